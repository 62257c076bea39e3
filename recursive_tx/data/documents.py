"""Files cut into documents, without an index and without reading them first.

A unit is what a pipeline takes at a time: a whole file where the file is the
document; a block of bytes of a file of lines; or, since they are read from the
front, a whole compressed file or row group of Parquet. Any process finds the
n-th unit of the endless, per-epoch shuffled order by arithmetic, so a position
in it is one integer. What a unit holds comes in blocks, which are the second
integer of a position. It knows nothing of tokens or SeqIO.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from typing import Any

from absl import logging
import numpy as np

from recursive_tx.data import chats, compressed, files, parquet, records
from recursive_tx.data.config import Task
from recursive_tx.data.records import Fault
from recursive_tx.errors import UserError

# Large enough to be read well from a bucket; small corpora are cut finer, for
# the sake of shuffling, into about this many blocks.
_MOST_BLOCK_BYTES = 1 << 20
_LEAST_BLOCK_BYTES = 1 << 14
_BLOCKS = 1 << 10
# Of what a compressed file holds, whose size is not known.
_STREAM_BLOCK_BYTES = 1 << 18

# A task without one usable document in so many bytes and blocks, taken here
# and there, is refused at the start; it would hold up a run for ever.
_CHECKED_BYTES = 1 << 26
_CHECKED_BLOCKS = 32


@dataclasses.dataclass(frozen=True)
class Block:
  """Part of a unit.

  Attributes:
    texts: its documents in order, UTF-8; chats as of `Chats.render`.
    faults: what is left out.
  """

  texts: list[bytes]
  faults: list[Fault]

  @property
  def codes(self) -> list[int]:
    """Those of `faults`."""
    return [fault.code for fault in self.faults]


class Documents:
  """The documents of one split of a task of files.

  Attributes:
    paths: the files, sorted.
    num_units: how many an epoch has.
    num_bytes: of all files.
    has_streams: whether any unit may have several blocks.
    num_readers: how often an epoch reads the files that are read from the
      front, and decompresses them.
    digest: of the files' names and sizes, on which the order depends.
    errors: what stopped a pipeline and its reader has yet to raise.
  """

  def __init__(
      self, task: Task, split: str, *, fraction: float, shards: int = 1,
      render: records.Render | None = None):
    """Lists the files.

    Args:
      task: of kind 'text' or 'jsonl'.
      split: 'train' or 'heldout'.
      fraction: share of the documents held out if the task names no files.
      shards: that share the units of an epoch. Files that are read from the
        front become several units each where there are fewer of them; every
        n-th block of a file is one of its n units.
      render: of chats, see `records.field`.

    Raises:
      UserError: a pattern matches nothing, or the files are of a format that
        the kind has not or that cannot be read here.
    """
    self._task = task
    self._split = split
    self._fraction = 0.0 if task.heldout else fraction
    self._render = render
    self.paths = files.find(task, split)
    self.errors: list[Exception] = []
    self._warned: set[str] = set()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      self._sizes = list(pool.map(files.size, self.paths))
      # Units of each file that is read from the front, 0 for others.
      streams = list(pool.map(functools.partial(_streams, task), self.paths))
    self._streams = streams
    self.num_bytes = sum(self._sizes)
    plain = [
        size for size, n in zip(self._sizes, streams, strict=True) if not n]
    block = max([1, *plain])
    if task.document != 'file':
      block = sum(plain) // _BLOCKS
      block = min(max(block, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)
    self._block = block
    # An empty file has a unit too, to be counted.
    units = np.array([
        n or max(1, -(-size // block))
        for size, n in zip(self._sizes, streams, strict=True)])
    several = 1 if task.document == 'file' else parts(int(units.sum()), shards)
    self._parts = np.where(streams, several, 1)
    # The number of the first unit of each file, and of the end.
    self._first = np.cumsum([0, *(units * self._parts)])
    self.num_units = int(self._first[-1])
    self.num_readers = int(self._parts.max())
    self.has_streams = task.document != 'file' and any(streams)
    listed = json.dumps([self.paths, self._sizes]).encode()
    self.digest = hashlib.blake2b(listed, digest_size=16).hexdigest()

  def reader(self) -> Callable[[int, int], Block | None]:
    """(unit, number of a block) -> the block, None beyond the last.

    A reader keeps open the file that it reads, so that the next block is at
    hand. What it gives depends on its arguments alone.

    Where documents are held out by a hash of their text, faults count as
    train's, since they have no text.
    """
    held = _Held()

    def read(number: int, block: int) -> Block | None:
      found = self._read(number, block, held)
      return None if found is None else self._split_off(found)

    return keep_last(read)

  def blocks(self, number: int) -> Iterator[Block]:
    """All blocks of a unit."""
    return _until_none(functools.partial(self.reader(), number))

  def is_stream(self, number: int) -> bool:
    """Whether a unit is read from the front, in any number of blocks."""
    file, _ = self._where(number)
    return self._task.document != 'file' and bool(self._streams[file])

  def check(self) -> None:
    """Reads until there is a document.

    Raises:
      UserError: there is none at all, or none that can be read in so much
        that there will hardly be one. The first fault is named.
    """
    first, num_bytes, is_readable = None, 0, False
    for step, (items, size) in enumerate(self._all_items()):
      for found in items:
        if isinstance(found, Fault):
          first = first or found
        elif self._holds(found):
          return
        else:
          is_readable = True
      num_bytes += size
      if num_bytes > _CHECKED_BYTES and step >= _CHECKED_BLOCKS:
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

  def _split_off(self, items: Iterable[bytes | Fault]) -> Block:
    """What belongs to this split."""
    texts, faults = [], []
    for found in items:
      if isinstance(found, Fault):
        self._warn(found)
        faults.append(found)
      elif self._holds(found):
        texts.append(found)
    if self._fraction and self._split == 'heldout':
      faults = []
    return Block(texts, faults)

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
    if self._render:
      text = chats.messages_of(text)
    return (_hash(text) < self._fraction) == (self._split == 'heldout')

  def _all_items(self) -> Iterator[tuple[Iterable[bytes | Fault], int]]:
    """What each block of an epoch holds, and about how many bytes."""
    held = _Held()
    for step in range(self.num_units):
      number = shuffled(step, 0, self.num_units)
      file, place = self._where(number)
      size = _STREAM_BLOCK_BYTES
      if not self._streams[file]:
        size = min(self._block, self._sizes[file] - place * self._block)
      for items in _until_none(
          lambda block, number=number: self._read(number, block, held)):
        yield items, size

  def _where(self, number: int) -> tuple[int, int]:
    """A unit's file, and its number in that file."""
    file = int(np.searchsorted(self._first, number, side='right')) - 1
    return file, number - int(self._first[file])

  def _read(
      self, number: int, block: int, held: '_Held'
  ) -> Iterable[bytes | Fault] | None:
    """The documents and faults of a block, None beyond the last."""
    file, number = self._where(number)
    path, task = self.paths[file], self._task
    if not self._streams[file]:
      size = self._sizes[file]
      if block:
        return None
      if not size:
        return [records.checked(b'', path)]
      return self._parse(
          records.Plain(path, size), path, number * self._block, self._block)
    parts = int(self._parts[file])
    group, part = divmod(number, parts)
    block = part + block * parts
    if parquet.is_parquet(path):
      return held.get(
          (path, group), lambda: parquet.RowGroup(
              path, group, task.key, self._render)).block(block)
    source = held.get((path, 0), lambda: compressed.Reader(path))
    start = block * _STREAM_BLOCK_BYTES
    if task.document == 'file' and block:
      return None
    if not source.holds(start):
      # The first block has the fault of a file that holds nothing else.
      if block:
        return None
      if not source.broken:
        return [records.checked(b'', path)]
    return self._parse(source, path, start, _STREAM_BLOCK_BYTES)

  def _parse(
      self, source: records.Plain | compressed.Reader, path: str, start: int,
      size: int
  ) -> Iterator[bytes | Fault]:
    task = self._task
    if task.document == 'file':
      return records.whole(source, path)
    if task.kind == 'jsonl':
      return records.records(
          source, path, start, start + size, task.key, self._render)
    return records.separated(
        source, path, start, start + size, task.document.encode())


class _Held:
  """The one file that a reader keeps open."""

  def __init__(self):
    self._name: Any = None
    self._file: Any = None

  def get(self, name: Any, make: Callable[[], Any]) -> Any:
    """The file of this name, opened with `make` if it is another."""
    if name != self._name:
      self.close()
      self._name, self._file = name, make()
    return self._file

  def close(self) -> None:
    """Closes it."""
    if self._file is not None:
      self._file.close()
    self._name = self._file = None


def keep_last(
    read: Callable[[int, int], Any]
) -> Callable[[int, int], Any]:
  """A reader that is asked twice for a block reads it once.

  One thread at a time: TensorFlow may start to read from a restored position
  before it has stopped reading from another.
  """
  read, lock = functools.lru_cache(1)(read), threading.Lock()

  def one_at_a_time(number: int, block: int) -> Any:
    with lock:
      return read(number, block)

  return one_at_a_time


def parts(units: int, shards: int) -> int:
  """Into how many units a stream is divided, so that no shard has none."""
  return max(1, -(-shards // units))


def shuffled(count: int, seed: int, n: int) -> int:
  """The unit of n that comes count-th (from 0) when epochs follow another."""
  epoch, step = divmod(count, n)
  return int(_permutation(seed, epoch, n)[step])


def _streams(task: Task, path: str) -> int:
  """Units of a file that is read from the front; 0 for other files."""
  if parquet.is_parquet(path):
    if task.kind == 'text':
      raise UserError(
          f"data task {task.name!r}: {path} holds records, and kind 'text' has "
          "none; set kind='jsonl', which reads Parquet by its suffix")
    return parquet.num_groups(path)
  if compressed.is_compressed(path):
    compressed.Reader(path)  # Raises where zstd is not installed.
    return 1
  return 0


def _until_none(call: Callable[[int], Any]) -> Iterator[Any]:
  """call(0), call(1), ... before the first None."""
  for number in itertools.count():
    found = call(number)
    if found is None:
      return
    yield found


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
