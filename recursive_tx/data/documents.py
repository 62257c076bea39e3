"""Files cut into documents, without an index and without reading them first.

A unit is what is read at once: a whole file where the file is the document,
else a block, to which every document belongs that starts in it. Any process
finds the n-th unit of the endless, per-epoch shuffled order by arithmetic, so
a position in it is one integer. It knows nothing of tokens or SeqIO.

Lines end at \\n alone: U+2028, U+0085 and the form feed are text. A byte order
mark at the start of a file is no text.
"""

import codecs
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re

from absl import logging
import numpy as np

from recursive_tx.data import files
from recursive_tx.data.config import Task
from recursive_tx.errors import UserError

# Large enough to be read well from a bucket; small corpora are cut finer, for
# the sake of shuffling, into about this many blocks.
_MOST_BLOCK_BYTES = 1 << 20
_LEAST_BLOCK_BYTES = 1 << 14
_BLOCKS = 1 << 10

# A task without one usable document in so many bytes and reads, taken here
# and there, is refused at the start; it would hold up a run for ever.
_CHECKED_BYTES = 1 << 26
_CHECKED_UNITS = 32

# What can be wrong with a document. One that is longer than the context is
# cut into pieces and loses nothing; the others are left out.
FAULTS = ('not_utf8', 'not_json', 'no_text', 'empty', 'long')


# The first bytes of files that are often named like text.
_FORMATS = {
    b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'\xfd7zXZ': 'xz',
    b'BZh': 'bzip2', b'PK\x03\x04': 'zip', b'PAR1': 'Parquet'}


@dataclasses.dataclass(frozen=True)
class Fault:
  """A document, or a whole file, that cannot be used.

  Attributes:
    kind: one of FAULTS.
    path: the file.
    reason: what was found, what was expected, the way out.
    offset: of a record, the first byte of its line.
  """

  kind: str
  path: str
  reason: str
  offset: int | None = None

  @property
  def code(self) -> int:
    """The number of the kind, from 1."""
    return 1 + FAULTS.index(self.kind)

  def __str__(self) -> str:
    """One line. Counts lines from the file's start, so it is not for all."""
    if self.offset is None:
      return f'{self.path} {self.reason}'
    if self.offset > _CHECKED_BYTES:
      return f'{self.path}, byte {self.offset}: {self.reason}'
    line = files.read_bytes(self.path, 0, self.offset).count(b'\n') + 1
    return f'{self.path}:{line}: {self.reason}'


class Documents:
  """The documents of one split of a task of files.

  Attributes:
    paths: the files, sorted.
    num_units: how many reads make an epoch.
    num_bytes: of all files.
    digest: of the files' names and sizes, on which the order depends.
    errors: what stopped a pipeline and its reader has yet to raise.
  """

  def __init__(self, task: Task, split: str, *, fraction: float):
    """Lists the files.

    Args:
      task: of kind 'text' or 'jsonl'.
      split: 'train' or 'heldout'.
      fraction: share of the documents held out if the task names no files.

    Raises:
      UserError: a pattern matches nothing.
    """
    self._task = task
    self._split = split
    self._fraction = 0.0 if task.heldout else fraction
    self.paths = files.find(task, split)
    self.errors: list[Exception] = []
    self._warned: set[str] = set()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      self._sizes = list(pool.map(files.size, self.paths))
    self.num_bytes = sum(self._sizes)
    block = max(1, *self._sizes)
    if task.document != 'file':
      block = self.num_bytes // _BLOCKS
      block = min(max(block, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)
    self._block = block
    # The number of the first unit of each file, and of the end. An empty file
    # has one too, to be counted.
    blocks = [max(1, -(-size // block)) for size in self._sizes]
    self._first = np.cumsum([0, *blocks])
    self.num_units = int(self._first[-1])
    listed = json.dumps([self.paths, self._sizes]).encode()
    self.digest = hashlib.blake2b(listed, digest_size=16).hexdigest()

  def unit(self, number: int) -> tuple[list[bytes], list[Fault]]:
    """The documents of one unit, in order, as UTF-8, and what is left out.

    Where documents are held out by a hash of their text, faults count as
    train's, since they have no text.
    """
    texts, faults = [], []
    for found in self._read(number):
      if isinstance(found, Fault):
        self._warn(found)
        faults.append(found)
      elif self._holds(found):
        texts.append(found)
    if self._fraction and self._split == 'heldout':
      faults = []
    return texts, faults

  def check(self) -> None:
    """Reads until there is a document.

    Raises:
      UserError: there is none at all, or none that can be read in so much
        that there will hardly be one. The first fault is named.
    """
    first, num_bytes, is_readable = None, 0, False
    for step in range(self.num_units):
      number = shuffled(step, 0, self.num_units)
      for found in self._read(number):
        if isinstance(found, Fault):
          first = first or found
        elif self._holds(found):
          return
        else:
          is_readable = True
      _, start, stop, size = self._where(number)
      num_bytes += min(stop, size) - start
      if num_bytes > _CHECKED_BYTES and step >= _CHECKED_UNITS:
        if is_readable or not first:
          return
        break
    where = f'data task {self._task.name!r} has no {self._split} document'
    if first and not is_readable:
      raise UserError(f'{where} that can be read: {first}')
    how = 'the files are blank; name others'
    if self._fraction:
      how = (
          f'data.heldout_fraction={self._fraction} leaves none, or the files '
          'are blank; name held-out files or change the fraction')
    raise UserError(f'{where}: {how}')

  def _warn(self, fault: Fault) -> None:
    """Logs the first of each kind; the others are only counted."""
    if fault.kind not in self._warned:
      self._warned.add(fault.kind)
      logging.warning(
          'Data task %r: %s. It is left out, and others like it.',
          self._task.name, fault)

  def _holds(self, text: bytes) -> bool:
    if not self._fraction:
      return True
    return (_hash(text) < self._fraction) == (self._split == 'heldout')

  def _where(self, number: int) -> tuple[str, int, int, int]:
    """A unit's file, its first byte, its end (or later), the file's size."""
    file = int(np.searchsorted(self._first, number, side='right')) - 1
    start = (number - int(self._first[file])) * self._block
    return self.paths[file], start, start + self._block, self._sizes[file]

  def _read(self, number: int) -> Iterator[bytes | Fault]:
    path, start, stop, size = self._where(number)
    if self._task.document == 'file':
      texts = [_unmarked(files.read_bytes(path, 0, None))]
    elif not size:
      texts = [b'']
    elif self._task.kind == 'jsonl':
      yield from _records(path, start, stop, self._task.key)
      return
    else:
      separator = self._task.document.encode()
      texts = _separated(path, start, stop, size, separator)
    for text in texts:
      yield _checked(text, path)


def shuffled(count: int, seed: int, n: int) -> int:
  """The unit of n that comes count-th (from 0) when epochs follow another."""
  epoch, step = divmod(count, n)
  return int(_permutation(seed, epoch, n)[step])


def _records(
    path: str, start: int, stop: int, key: str
) -> Iterator[bytes | Fault]:
  """The texts of the JSON lines that start in [start, stop)."""
  offset, lines = _lines(path, start, stop)
  for line in lines.split(b'\n'):
    if not offset:
      line, offset = _unmarked(line), len(line) - len(_unmarked(line))
    if line.strip():
      found = _record(line, key)
      if isinstance(found, tuple):
        kind, reason = found
        found = Fault(kind, path, reason, offset)
      yield found
    offset += len(line) + 1


def _record(line: bytes, key: str) -> bytes | tuple[str, str]:
  """A record's text, or the kind of its fault and the reason."""
  try:
    # As floats, since Python refuses integers of more than 4300 digits.
    record = json.loads(line.decode('utf-8'), parse_int=float)
  except UnicodeDecodeError as error:
    return 'not_utf8', (
        f'not UTF-8 ({error.reason} at byte {error.start} of the line); '
        f'{_conversion(line)}')
  except (ValueError, RecursionError) as error:
    return 'not_json', (
        f'not a JSON record ({error}); expected one object a line')
  if not isinstance(record, dict) or not isinstance(record.get(key), str):
    has = sorted(record) if isinstance(record, dict) else type(record).__name__
    return 'no_text', (
        f'no text under key {key!r}, the record has {has}; set the key of '
        'the data task')
  if not record[key]:
    return 'empty', f'the text under key {key!r} is empty; remove the record'
  try:
    return record[key].encode('utf-8')
  except UnicodeEncodeError:
    return 'not_utf8', (
        f'the text under key {key!r} has half a surrogate pair, which UTF-8 '
        'cannot hold; repair the record')


def _separated(
    path: str, start: int, stop: int, size: int, line: bytes
) -> list[bytes]:
  """What stands between separator lines, from those in [start, stop) on.

  The line ends next to a separator belong to it, and so does one at the end
  of the file; blank documents are left out.
  """
  separator = re.compile(rb'^' + re.escape(line) + rb'\r?(?:\n|\Z)', re.M)
  text = _lines(path, start, stop)[1]
  if not start:
    text = _unmarked(text)
  else:
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
  data = files.read_bytes(path, begin, stop - begin)
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
    more = files.read_bytes(path, stop, step)
    cut = more.find(b'\n') + 1
    end.append(more[:cut] if cut else more)
    if cut or len(more) < step:
      break
    stop, step = stop + step, 2 * step
  return begin, b''.join(end)


def _unmarked(text: bytes) -> bytes:
  """The start of a file without a byte order mark."""
  return text.removeprefix(codecs.BOM_UTF8)


def _checked(text: bytes, path: str) -> bytes | Fault:
  """A text of a file, or why it is none."""
  if not text.strip():
    return Fault('empty', path, (
        'is empty, expected UTF-8 text; remove it or leave it out of the '
        'pattern'))
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return Fault('not_utf8', path, (
        f'is not UTF-8 text ({error.reason}: byte 0x{text[error.start]:02x}); '
        f'{_conversion(text)}'))
  return text


def _conversion(text: bytes) -> str:
  """The way out for bytes that are not UTF-8."""
  for first, name in _FORMATS.items():
    if text.startswith(first):
      return f'it begins as {name} does; unpack the file first'
  return 'convert the file to UTF-8'


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
