"""Directories in buckets: only the bytes that are wanted are read.

There is no bucket here. `etils.epath` reads a path on disk as it reads one of
gs://, so that a path on disk stands for the bucket.
"""

import pathlib

from etils import epath
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from recursive_tx import files
from recursive_tx.errors import UserError
from recursive_tx.files import safetensors as module
from recursive_tx.store import bucket, opening

DEMO = tiny.ROOT / 'recursive_tx' / 'demo'


def test_tensors_are_those_that_the_library_reads(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
      f'{name}{i}': np.asarray(rng.normal(size=shape) * 9).astype(dtype)
      for i, shape in enumerate([(3, 4, 5), (7,), (0, 2), ()])
      for name, dtype in (
          ('bf16', ml_dtypes.bfloat16), ('f32', np.float32), ('i8', np.int8),
          ('f16', np.float16), ('bool', np.bool_))}
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  found = module.Ranges(epath.Path(path))
  assert set(found.keys()) == set(tensors)
  for name, want in tensors.items():
    got = found.get_tensor(name)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()
    entry = found.get_slice(name)
    assert list(entry.get_shape()) == list(want.shape)
    for i in range(want.shape[0] if want.ndim else 0):
      assert entry[i].tobytes() == want[i].tobytes()


@pytest.mark.parametrize('content', [b'', b'1234', bytes(8), b'\xff' * 99])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
  path = tmp_path / 'a.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match='copy it anew'):
    module.Ranges(epath.Path(path))


def test_a_truncated_file_is_refused(tmp_path):
  path = tmp_path / 'a.safetensors'
  path.write_bytes((DEMO / 'model.safetensors').read_bytes()[:-1])
  with pytest.raises(UserError, match='is truncated: '):
    module.Ranges(epath.Path(path))


@pytest.fixture
def there(tmp_path, monkeypatch) -> pathlib.Path:
  """The demo model where a bucket would be, and code and pickles beside it."""
  folder = tmp_path / 'bucket'
  folder.mkdir()
  for path in DEMO.iterdir():
    if path.is_file() and path.suffix != '.py':
      (folder / path.name).write_bytes(path.read_bytes())
  (folder / 'modeling.py').write_text('')
  (folder / 'pytorch_model.bin').write_text('')
  monkeypatch.setattr(
      bucket, 'is_bucket', lambda directory: directory == str(folder))
  monkeypatch.setattr(
      module, '_opened', lambda path: module.Ranges(path))
  return folder


def test_a_model_is_opened_and_its_weights_are_not_copied(there):
  found, want = opening.open(there), opening.open(DEMO)
  assert found.config == want.config
  assert found.tokenizer.digest == want.tokenizer.digest
  copied = {path.name for path in found.companions.iterdir()}
  assert copied == {path.name for path in DEMO.iterdir() if path.suffix in (
      '.json', '.model', '.md')}
  origin = opening.source(there)
  for (path, at, value), (_, _, theirs) in zip(
      opening.parts(origin), opening.parts(opening.source(DEMO)), strict=True):
    assert value.tobytes() == theirs.tobytes(), (path, at)


def test_a_layer_is_read_alone(there, monkeypatch):
  reads, read = [], module.Ranges._read

  def noted(self, start, size):
    reads.append(size)
    return read(self, start, size)

  monkeypatch.setattr(module.Ranges, '_read', noted)
  reader = files.Reader(there)
  reads.clear()
  name = max(reader.shapes, key=lambda name: np.prod(reader.shapes[name]))
  one = reader.read(name, 3)
  assert reads == [one.nbytes]
  np.testing.assert_array_equal(one, reader.read(name)[3])


def test_a_bucket_that_is_not_reached_is_refused_in_one_line(tmp_path):
  with pytest.raises(UserError, match='cannot be read .*copy it to a') as error:
    bucket.fetch(str(tmp_path / 'nothing'))
  assert '\n' not in str(error.value)
