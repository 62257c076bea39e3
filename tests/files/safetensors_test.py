"""Files are safetensors, whole; directories appear whole or not at all."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tiny

from recursive_tx import files


def _arrays():
  rng = np.random.default_rng(0)
  arrays = {
      str(np.dtype(dtype)): rng.normal(size=(3, 4, 5)).astype(dtype)
      for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
  for dtype in (np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_):
    arrays[str(np.dtype(dtype))] = rng.integers(0, 2, (7,)).astype(dtype)
  arrays['scalar'] = np.array(3.5, np.float32)
  arrays['empty'] = np.zeros((0, 3), np.float32)
  return arrays


def _write(directory, arrays):
  directory.mkdir(exist_ok=True)
  tiny.write_tensors(directory / 'model.safetensors', arrays)
  return directory / 'model.safetensors'


def test_what_is_written_is_read(tmp_path):
  _write(tmp_path, _arrays())
  reader = files.Reader(tmp_path)
  assert set(reader.shapes) == set(_arrays())
  for name, expected in _arrays().items():
    value = reader.read(name)
    assert value.dtype == expected.dtype == reader.dtypes[name]
    assert value.shape == expected.shape == reader.shapes[name]
    assert value.tobytes() == expected.tobytes()


def test_one_layer_of_a_tensor_is_read(tmp_path):
  arrays = {k: v for k, v in _arrays().items() if v.ndim > 1 and v.size}
  arrays['bad'] = np.array([[1, 2], [np.inf, 3]], np.float32)
  _write(tmp_path, arrays)
  reader = files.Reader(tmp_path)
  for name, expected in arrays.items():
    layers = [0] if name == 'bad' else range(len(expected))
    for layer in layers:
      value = reader.read(name, layer)
      assert value.dtype == expected.dtype
      assert value.shape == expected.shape[1:]
      assert value.tobytes() == expected[layer].tobytes()
  with tiny.refused("'bad'", 'infinity'):
    reader.read('bad', 1)


_FRESH = """
import sys
from recursive_tx import files
value = files.Reader(sys.argv[1]).read('a')
assert str(value.dtype) == 'bfloat16' and value.tolist() == [[1, 2], [3, 4]]
assert 'torch' not in sys.modules
"""
# What the import of ml_dtypes in our module is for.
_WITHOUT = """
import sys
import safetensors
file = safetensors.safe_open(sys.argv[1] + '/model.safetensors', 'numpy')
try:
  file.get_tensor('a')
except TypeError as error:
  assert 'bfloat16' in str(error)
else:
  raise AssertionError('the library knows bfloat16 by itself')
assert 'torch' not in sys.modules
"""


@pytest.mark.parametrize('program', [_FRESH, _WITHOUT])
def test_bfloat16_is_read_without_torch_by_ml_dtypes(program, tmp_path):
  _write(tmp_path, {'a': np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)})
  subprocess.run([sys.executable, '-c', program, tmp_path], check=True)


def test_parts_are_written_in_any_order(tmp_path):
  whole = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
  other = np.arange(6, dtype=np.int32)
  path = tmp_path / 'model.safetensors'
  with files.Writer(path, {'w': (whole.shape, np.float32),
                          'other': ((6,), np.int32)}) as writer:
    for at in ((2, 1), (0, 0), (1, 0), (2, 0)):
      writer.write('w', whole[at], at)
    writer.write('other', other)
    # A transposed view and another dtype are laid out as the file says.
    writer.write('w', np.asfortranarray(whole[0, 1]).astype(np.float64),
                 (0, 1))
    writer.write('w', whole[1, 1], (1, 1))
  reader = files.Reader(tmp_path)
  assert np.array_equal(reader.read('w'), whole)
  assert np.array_equal(reader.read('other'), other)


def test_a_file_that_is_not_written_whole_is_noticed(tmp_path):
  with pytest.raises(AssertionError, match='16 bytes'):
    with files.Writer(tmp_path / 'f', {'a': ((2, 4), np.float32)}) as writer:
      writer.write('a', np.zeros(4, np.float32), (1,))


def test_an_error_inside_a_writer_is_not_hidden(tmp_path):
  with pytest.raises(RuntimeError, match='mine'):
    with files.Writer(tmp_path / 'f', {'a': ((2, 4), np.float32)}):
      raise RuntimeError('mine')


# Bad files.


@pytest.mark.parametrize('length', [0, 1, 7, 8, 9, 60, -1])
def test_a_file_cut_anywhere_is_refused(length, tmp_path):
  path = _write(tmp_path, {'a': np.ones((3, 4), np.float32),
                           'b': np.ones(2, np.int8)})
  whole = path.read_bytes()
  path.write_bytes(whole[:length])
  with tiny.refused('model.safetensors', 'truncated', 'copy it anew'):
    files.Reader(tmp_path)


def _with_header(tmp_path, header, data=b'\0' * 64):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  (tmp_path / 'model.safetensors').write_bytes(
      len(text).to_bytes(8, 'little') + text + data)


@pytest.mark.parametrize('header', [
    b'not json', b'\xff\xfe\x00', [], 'text', {'a': []}, {'a': {}},
    {'a': {'dtype': 'F32', 'shape': [2]}},
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0]}},
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}},
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [60, 68]}},
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [-8, 0]}},
])
def test_a_header_that_makes_no_sense_is_refused(header, tmp_path):
  _with_header(tmp_path, header)
  with tiny.refused('model.safetensors'):
    files.Reader(tmp_path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(b'\xff' * 64)
  with tiny.refused('model.safetensors', 'truncated'):
    files.Reader(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
  _with_header(tmp_path, {
      'a': {'dtype': 'F8_E4M3', 'shape': [8], 'data_offsets': [0, 8]}},
               b'\0' * 8)
  with tiny.refused("'a'", 'F8_E4M3', 'BF16', 'F32'):
    files.Reader(tmp_path)


@pytest.mark.parametrize('text', [
    '{}', '{"weight_map": 3}', '{"weight_map": {"a": null}}', '[]', 'x'])
def test_an_index_that_makes_no_sense_is_refused(text, tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with tiny.refused('model.safetensors.index.json'):
    files.Reader(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
  for i in (1, 2):
    tiny.write_tensors(tmp_path / f'{i}.safetensors',
                       {'a': np.full(2, i, np.float32),
                        f'b{i}': np.ones(1, np.float32)})
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({
      'weight_map': {'a': '1.safetensors', 'b1': '1.safetensors',
                     'b2': '2.safetensors'}}))
  # Or the index decides; never the order in which files are read.
  try:
    value = files.Reader(tmp_path).read('a')
  except ValueError as error:
    assert "'a'" in str(error)
  else:
    assert value[0] == 1


# Not finite.


@pytest.mark.parametrize('dtype', [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_sees_one_bad_value(dtype):
  top = float(ml_dtypes.finfo(dtype).max)
  tiny_value = float(ml_dtypes.finfo(dtype).smallest_subnormal)
  good = np.array([[0, -0.0, 1, -1], [top, -top, tiny_value, -tiny_value]],
                  dtype)
  assert files.finite(good)
  assert files.finite(good[:0])
  for bad in (np.nan, -np.nan, np.inf, -np.inf):
    for at in np.ndindex(good.shape):
      array = good.copy()
      array[at] = bad
      assert not files.finite(array)
  assert files.finite(np.array([-1, 3], np.int8))
  assert files.finite(np.array([True]))


# Directories.


def _children(path):
  return sorted(p.name for p in path.iterdir())


def test_a_directory_appears_whole(tmp_path):
  target = tmp_path / 'deep' / 'out'
  with files.new_directory(target) as new:
    assert not target.exists()
    assert new.parent.parent == target.parent  # A rename, not a copy.
    (new / 'a').write_text('1')
    (new / 'b').mkdir()
  assert _children(target) == ['a', 'b']
  assert _children(tmp_path / 'deep') == ['out']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('old', [False, True])
def test_or_not_at_all(error, old, tmp_path):
  target = tmp_path / 'out'
  if old:
    target.mkdir()
    (target / 'kept').write_text('old')
  with pytest.raises(error):
    with files.new_directory(target, overwrite=old) as new:
      (new / 'half').write_text('1')
      raise error
  assert _children(tmp_path) == ['out'] * old
  if old:
    assert (target / 'kept').read_text() == 'old'
    assert _children(target) == ['kept']


def test_what_exists_is_replaced_only_if_asked(tmp_path):
  target = tmp_path / 'out'
  target.mkdir()
  with files.new_directory(target) as new:  # An empty one is no obstacle.
    (new / 'first').write_text('1')
  with tiny.refused(target, 'exists'):
    with files.new_directory(target):
      raise AssertionError('not reached')
  assert _children(target) == ['first']
  with files.new_directory(target, overwrite=True) as new:
    (new / 'second').write_text('2')
  assert _children(target) == ['second']
  assert _children(tmp_path) == ['out']


def test_a_file_in_the_way_is_not_replaced(tmp_path):
  target = tmp_path / 'out'
  target.write_text('mine')
  with tiny.refused(target, 'exists'):
    with files.new_directory(target):
      raise AssertionError('not reached')
  assert target.read_text() == 'mine'


def test_a_pointer_of_git_lfs_is_named(tmp_path):
  (tmp_path / 'model.safetensors').write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
  with tiny.refused('model.safetensors', 'git lfs pull'):
    files.Reader(tmp_path)


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
  (tmp_path / 'a.json').write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
  assert files.read_json(tmp_path / 'a.json') == {'a': 'é'}
