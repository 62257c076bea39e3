"""Tensors on disk, in safetensors files.

Read by the `safetensors` library, tensor by tensor or one layer of a tensor.
The writer is ours: the library writes a file at once, from tensors that are
all in memory, while `convert` makes the layers of a model larger than memory
in an order that is not the file's.
"""

import json
import os
from typing import Any

from absl import logging
from etils import epath
import ml_dtypes  # Before a tensor is read: the library finds bfloat16 by it.
import numpy as np
import safetensors

from recursive_tx.errors import UserError
from recursive_tx.files.json import read_json

_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': ml_dtypes.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_INDEX = 'model.safetensors.index.json'


class Reader:
  """Tensors of one file or of all files of an index, read one at a time.

  Attributes:
    shapes: {name: shape}.
    dtypes: {name: numpy dtype}.
  """

  def __init__(self, directory: str | os.PathLike):
    """Reads headers only.

    Raises:
      UserError: no safetensors there, or a file that is not whole.
    """
    self._files = {}
    self.shapes, self.dtypes = {}, {}
    for path in _files(epath.Path(directory)):
      file = _opened(path)
      for name in file.keys():
        if name in self._files:
          raise UserError(
              f'tensor {name!r} is in {self._files[name][0]} and in '
              f'{path.name}; remove one of them')
        entry = file.get_slice(name)
        if entry.get_dtype() not in _DTYPES:
          raise UserError(
              f'{path.name}: tensor {name!r} has dtype {entry.get_dtype()!r};'
              f' expected one of {", ".join(_DTYPES)}')
        self._files[name] = path.name, file
        self.shapes[name] = tuple(entry.get_shape())
        self.dtypes[name] = np.dtype(_DTYPES[entry.get_dtype()])

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    """A tensor, or its part at a first index; UserError for NaN, infinity."""
    path, file = self._files[name]
    array = (file.get_tensor(name) if layer is None else
             file.get_slice(name)[layer])
    if not finite(array):
      raise UserError(f'{path}: tensor {name!r} holds NaN or infinity')
    return array


class Ranges:
  """A file in a bucket, of which only the bytes of a tensor are read.

  As far as `Reader` needs it, it is what `safetensors.safe_open` gives, which
  reads from disks alone.
  """

  def __init__(self, path: epath.Path):
    """Reads the header. Raises UserError where the file is not whole."""
    self._path = path
    size = int.from_bytes(self._read(0, 8), 'little')
    there = path.stat().length
    try:
      if size > there:
        raise ValueError(f'a header of {size} bytes')
      self._entries = json.loads(self._read(8, size))
      self._entries.pop('__metadata__', None)
      end = max([0, *(x['data_offsets'][1] for x in self._entries.values())])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
          f'{path.name} is not a safetensors file ({error}); copy it anew'
      ) from None
    self._start = 8 + size
    if self._start + end != there:
      raise UserError(
          f'{path.name} is truncated: {there} bytes, expected '
          f'{self._start + end}; copy it anew')

  def keys(self) -> list[str]:
    """The tensors' names."""
    return list(self._entries)

  def get_slice(self, name: str) -> '_Range':
    """A tensor that is not read yet."""
    return _Range(self, self._entries[name])

  def get_tensor(self, name: str) -> np.ndarray:
    """A tensor, read whole."""
    return self.get_slice(name)[()]

  def bytes_at(self, start: int, size: int) -> bytes:
    """Bytes behind the header."""
    return self._read(self._start + start, size)

  def _read(self, start: int, size: int) -> bytes:
    with self._path.open('rb') as file:
      file.seek(start)
      return file.read(size)


class _Range:
  """A tensor of `Ranges`, or its part at a first index."""

  def __init__(self, file: Ranges, entry: dict[str, Any]):
    self._file, self._entry = file, entry

  def get_dtype(self) -> str:
    return self._entry['dtype']

  def get_shape(self) -> list[int]:
    return self._entry['shape']

  def __getitem__(self, index: int | tuple[()]) -> np.ndarray:
    shape, dtype = self._entry['shape'], np.dtype(_DTYPES[self.get_dtype()])
    start, _ = self._entry['data_offsets']
    if index != ():
      shape = shape[1:]
    size = int(np.prod(shape)) * dtype.itemsize
    start += size * index if index != () else 0
    return np.frombuffer(
        self._file.bytes_at(start, size), dtype).reshape(shape)


def _opened(path: epath.Path) -> Any:
  """A file of the library. Raises UserError where it is not whole."""
  if '://' in str(path):
    return Ranges(path)
  with open(path, 'rb') as file:
    if file.read(8) == b'version ':
      raise UserError(
          f'{path} is a pointer of Git LFS; fetch the file with git lfs pull')
  try:
    # Of a mapped file every page that was read stays in memory.
    return safetensors.safe_open(path, 'numpy', backend='pread')
  except safetensors.SafetensorError as error:
    raise UserError(
        f'{path.name} is truncated or not a safetensors file ({error}); copy'
        ' it anew') from None


class Writer:
  """One safetensors file whose tensors are written in any order, or in parts.

  Use as a context manager; leaving it checks that every byte was written.
  """

  def __init__(
      self, path: str | os.PathLike,
      tensors: dict[str, tuple[tuple[int, ...], Any]]):
    """Lays the file out. `tensors`: {name: (shape, dtype)}."""
    header, self._places, end = {'__metadata__': {'format': 'pt'}}, {}, 0
    for name, (shape, dtype) in sorted(tensors.items()):
      dtype = np.dtype(dtype)
      begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
      header[name] = {'dtype': _NAMES[dtype], 'shape': list(shape),
                      'data_offsets': [begin, end]}
      self._places[name] = (begin, tuple(shape), dtype)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    self._start, self._left = 8 + len(text), end
    self._file = open(path, 'wb')
    self._file.write(len(text).to_bytes(8, 'little') + text)

  def write(self, name: str, array: np.ndarray, at: tuple[int, ...] = ()):
    """Writes a tensor, or the part of it at leading indices `at`, once."""
    begin, shape, dtype = self._places[name]
    part = shape[len(at):]
    assert array.shape == part, (name, array.shape, part)
    index = int(np.ravel_multi_index(at, shape[:len(at)])) if at else 0
    data = np.ascontiguousarray(array, dtype)
    self._file.seek(self._start + begin + index * data.nbytes)
    self._file.write(data.reshape(-1).view(np.uint8))
    self._left -= data.nbytes

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    self._file.close()
    assert kind or not self._left, f'{self._left} bytes were not written'


def finite(array: np.ndarray) -> bool:
  """Whether an array of any dtype holds neither NaN nor infinity."""
  if array.dtype == ml_dtypes.bfloat16:
    # All exponent bits set is NaN or infinity; much faster than a cast.
    return not ((array.view(np.uint16) & 0x7f80) == 0x7f80).any()
  return array.dtype.kind in 'iub' or bool(np.isfinite(array).all())


def _files(directory: epath.Path) -> list[epath.Path]:
  """The files to read: the whole one before shards, as transformers does."""
  whole = directory / 'model.safetensors'
  if whole.exists():
    if (directory / _INDEX).exists():
      logging.warning('%s holds %s and %s; the first is read, as transformers'
                      ' does.', directory, whole.name, _INDEX)
    return [whole]
  if (directory / _INDEX).exists():
    names = read_json(directory / _INDEX).get('weight_map')
    if not isinstance(names, dict) or not all(
        isinstance(name, str) for name in names.values()):
      raise UserError(
          f"{directory}/{_INDEX} has no object 'weight_map' of files' names")
    files = [directory / name for name in sorted(set(names.values()))]
    missing = [f.name for f in files if not f.exists()]
    if missing:
      raise UserError(f'{directory} lacks {missing}, which {_INDEX} names')
    return files
  pickles = sorted(p.name for p in directory.glob('*.bin'))
  if pickles:
    raise UserError(
        f'{directory} holds pickles ({pickles[0]}), which can run code and '
        f'are not read; convert the model to safetensors first')
  raise UserError(f'{directory} holds no model.safetensors nor {_INDEX}')
