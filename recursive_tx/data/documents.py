"""Files cut into documents, without an index and without reading them first.

A unit is what is read at once: a whole file where the file is the document,
else a block, to which every document belongs that starts in it. Any process
finds the n-th unit of the endless, per-epoch shuffled order by arithmetic, so
a position in it is one integer. It knows nothing of tokens or SeqIO, and
TensorFlow is imported only to reach paths such as gs://.
"""

from collections.abc import Iterator
import concurrent.futures
import functools
import glob
import hashlib
import json
import os
import re

import numpy as np

from recursive_tx.data.config import Task

# Large enough to be read well from a bucket; small corpora are cut finer, for
# the sake of shuffling, into about this many blocks.
_MOST_BLOCK_BYTES = 1 << 20
_LEAST_BLOCK_BYTES = 1 << 14
_BLOCKS = 1 << 10

# Faults in this much of a task are found before anything starts (half a
# second); later ones are found when they are reached.
_CHECKED_BYTES = 1 << 26


class Documents:
  """The documents of one split of a task of files.

  Attributes:
    paths: the files, sorted.
    num_units: how many reads make an epoch.
    digest: of the files' names and sizes, on which the order depends.
    faults: errors that a pipeline met and its reader has yet to raise.
  """

  def __init__(self, task: Task, split: str, *, fraction: float):
    """Lists the files.

    Args:
      task: of kind 'text' or 'jsonl'.
      split: 'train' or 'heldout'.
      fraction: share of the documents held out if the task names no files.

    Raises:
      ValueError: a pattern matches nothing, or a file is empty.
    """
    self._task = task
    self._split = split
    self._fraction = 0.0 if task.heldout else fraction
    self.paths = _paths(task, split)
    self.faults: list[Exception] = []
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      self._sizes = list(pool.map(_size, self.paths))
    for path, size in zip(self.paths, self._sizes, strict=True):
      if not size:
        raise ValueError(self._empty(path))
    block = max(self._sizes)
    if task.document != 'file':
      block = sum(self._sizes) // _BLOCKS
      block = min(max(block, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)
    self._block = block
    # The number of the first unit of each file, and of the end.
    blocks = [-(-size // block) for size in self._sizes]
    self._first = np.cumsum([0, *blocks])
    self.num_units = int(self._first[-1])
    files = json.dumps([self.paths, self._sizes]).encode()
    self.digest = hashlib.blake2b(files, digest_size=16).hexdigest()

  def unit(self, number: int) -> list[bytes]:
    """The documents of one unit, in order, as UTF-8.

    Raises:
      ValueError: bytes that are not UTF-8, or a record without its text; the
        file is named, and the line of a record.
    """
    return [
        text
        for text in self._read(number)
        if text and self._holds(text)
    ]

  def shuffled(self, count: int, seed: int) -> int:
    """The unit that comes count-th (from 0) when epochs follow each other."""
    epoch, step = divmod(count, self.num_units)
    return int(_permutation(seed, epoch, self.num_units)[step])

  def check(self) -> None:
    """Reads the first of it, to fail early.

    Raises:
      ValueError: as `unit`, or there is no document at all in a corpus small
        enough to be read through.
    """
    num_bytes, num_documents = 0, 0
    for number in range(self.num_units):
      if num_bytes > _CHECKED_BYTES:
        return
      _, start, stop, size = self._where(number)
      num_bytes += min(stop, size) - start
      num_documents += len(self.unit(number))
    if num_documents:
      return
    how = 'the files are blank; name others'
    if self._fraction:
      how = (
          f'data.heldout_fraction={self._fraction} leaves none, or the files '
          'are blank; name held-out files or change the fraction'
      )
    raise ValueError(
        f'data task {self._task.name!r} has no {self._split} document: {how}'
    )

  def _holds(self, text: bytes) -> bool:
    if not self._fraction:
      return True
    return (_hash(text) < self._fraction) == (self._split == 'heldout')

  def _where(self, number: int) -> tuple[str, int, int, int]:
    """A unit's file, its first byte, its end (or later), the file's size."""
    file = int(np.searchsorted(self._first, number, side='right')) - 1
    start = (number - int(self._first[file])) * self._block
    return self.paths[file], start, start + self._block, self._sizes[file]

  def _read(self, number: int) -> Iterator[bytes]:
    path, start, stop, size = self._where(number)
    if self._task.kind == 'jsonl':
      yield from _records(path, start, stop, self._task.key)
      return
    if self._task.document == 'file':
      texts = [_bytes(path, 0, None)]
      if not texts[0].strip():
        raise ValueError(self._empty(path))
    else:
      separator = self._task.document.encode()
      texts = _separated(path, start, stop, size, separator)
    for text in texts:
      _decode(text, path)
      yield text

  def _empty(self, path: str) -> str:
    return (
        f'data task {self._task.name!r}: {path} is empty, expected UTF-8 '
        'text; remove it or leave it out of the pattern'
    )


def _paths(task: Task, split: str) -> list[str]:
  """The split's files, sorted; held-out files are taken off train."""
  held = _expand(task, task.heldout)
  if split == 'heldout' and held:
    return held
  paths = [path for path in _expand(task, task.train) if path not in set(held)]
  if not paths:
    raise ValueError(
        f'data task {task.name!r}: every file of train={task.train} is held '
        f'out by heldout={task.heldout}; hold out fewer'
    )
  return paths


def _expand(task: Task, patterns: tuple[str, ...]) -> list[str]:
  paths = set()
  for pattern in patterns:
    if '://' in pattern:
      import tensorflow as tf

      found = tf.io.gfile.glob(pattern)
    else:
      found = glob.glob(pattern, recursive=True)
      found = [path for path in found if os.path.isfile(path)]
    if not found:
      raise ValueError(
          f'data task {task.name!r}: no file matches {pattern!r}'
          f'{_nearest(pattern)}'
      )
    paths.update(found)
  return sorted(paths)


def _nearest(pattern: str) -> str:
  """Where on disk a pattern stops being true, for an error."""
  if '://' in pattern:
    return '; check the bucket and the pattern'
  if os.path.isdir(pattern):
    return f', a directory; write {os.path.join(pattern, "*")!r}'
  path = os.path.abspath(pattern)
  while not os.path.exists(path):
    path = os.path.dirname(path)
  return f'; {path!r} exists, nothing below it matches the rest'


def _records(path: str, start: int, stop: int, key: str) -> Iterator[bytes]:
  """The texts of the JSON lines that start in [start, stop)."""
  offset, lines = _lines(path, start, stop)
  for line in lines.split(b'\n'):
    if line.strip():
      try:
        yield _record(line, key)
      except ValueError as error:
        number = _bytes(path, 0, offset).count(b'\n') + 1
        raise ValueError(f'{path}:{number}: {error}') from None
    offset += len(line) + 1


def _record(line: bytes, key: str) -> bytes:
  try:
    record = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError as error:
    raise ValueError(
        f'not UTF-8 ({error.reason} at byte {error.start} of the line); '
        'convert the file to UTF-8'
    ) from None
  except ValueError as error:
    raise ValueError(
        f'not a JSON record ({error}); expected one object a line'
    ) from None
  if not isinstance(record, dict) or not isinstance(record.get(key), str):
    has = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(
        f'no text under key {key!r}, the record has {has}; set the key of '
        'the data task'
    )
  try:
    return record[key].encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(
        f'the text under key {key!r} has half a surrogate pair, which UTF-8 '
        'cannot hold; repair the record'
    ) from None


def _separated(
    path: str, start: int, stop: int, size: int, line: bytes
) -> list[bytes]:
  """What stands between separator lines, from those in [start, stop) on.

  The line ends next to a separator belong to it, and so does one at the end
  of the file; blank documents are left out.
  """
  separator = re.compile(rb'^' + re.escape(line) + rb'\r?(?:\n|\Z)', re.M)
  text = _lines(path, start, stop)[1]
  if start:
    # What comes before the first separator started in an earlier block.
    first = separator.search(text)
    if not first:
      return []
    text = text[first.end() :]
  tail, step = [], stop - start
  while stop < size:
    more = _lines(path, stop, stop + step)[1]
    end = separator.search(more)
    if end:
      tail.append(more[: end.start()])
      break
    tail.append(more)
    stop, step = stop + step, 2 * step
  parts = separator.split(b''.join([text, *tail]))
  parts = [re.sub(rb'\r?\n\Z', b'', part) for part in parts]
  return [part for part in parts if part.strip()]


def _lines(path: str, start: int, stop: int) -> tuple[int, bytes]:
  """The lines that start in [start, stop), whole, and the first's offset."""
  begin = max(start - 1, 0)
  data = _bytes(path, begin, stop - begin)
  if start:
    # The line that holds the byte before `start` belongs to those before.
    cut = data.find(b'\n') + 1
    if not cut:
      return stop, b''
    begin, data = begin + cut, data[cut:]
  if begin == stop:
    return stop, b''
  end, step = [data], 1 << 12
  while not end[-1].endswith(b'\n'):
    more = _bytes(path, stop, step)
    cut = more.find(b'\n') + 1
    end.append(more[:cut] if cut else more)
    if cut or len(more) < step:
      break
    stop, step = stop + step, 2 * step
  return begin, b''.join(end)


def _bytes(path: str, start: int, size: int | None) -> bytes:
  with _open(path) as file:
    file.seek(start)
    return file.read() if size is None else file.read(size)


def _open(path: str):
  if '://' not in path:
    return open(path, 'rb')
  import tensorflow as tf

  return tf.io.gfile.GFile(path, 'rb')


def _size(path: str) -> int:
  if '://' not in path:
    return os.path.getsize(path)
  import tensorflow as tf

  return tf.io.gfile.stat(path).length


def _decode(text: bytes, path: str) -> None:
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
        f'{path} is not UTF-8 text ({error.reason}: byte '
        f'0x{text[error.start]:02x}); convert it to UTF-8'
    ) from None


def _hash(text: bytes) -> float:
  """A number in [0, 1) that depends on nothing but the text."""
  digest = hashlib.blake2b(text, digest_size=8).digest()
  return int.from_bytes(digest, 'big') / 2**64


@functools.lru_cache(32)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  # NumPy promises the bits of a bit generator for ever, but not what
  # Generator.permutation makes of them.
  key = np.array([seed, epoch], np.uint64)
  return np.argsort(np.random.Philox(key=key).random_raw(n), kind='stable')
