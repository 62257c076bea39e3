"""The documents of a cached task, read unit by unit.

Frames of TFRecords are read here, because TensorFlow's reader begins at the
start of a file, and a stream wants the n-th unit of a shuffled order.
TensorFlow is imported only where records are parsed.
"""

from collections.abc import Callable
import io
import zlib

from etils import epath
import numpy as np

from recursive_tx.data import files
from recursive_tx.data.documents import keep_last, parts
from recursive_tx.data.records import FAULTS
from recursive_tx.errors import UserError


class Units:
  """The documents of one split of a cached task, unit by unit.

  Attributes:
    paths: the TFRecords.
    num_units: how many an epoch has, as many as `Documents` would have.
    has_streams: whether any unit may have several blocks.
    num_readers: 1, since no file is read more often.
    digest: of the sources, on which the order depends.
    errors: what stopped a pipeline and its reader has yet to raise.
  """

  num_readers = 1

  def __init__(
      self, folder: epath.Path, split: str, description: dict, *,
      shards: int = 1):
    """Opens a split. Raises UserError where a file is not whole.

    Args:
      folder: of the task.
      split: its name.
      description: of the cache, as read.
      shards: as of `Documents`.
    """
    self.digest = description['splits'][split]['files']
    self.errors: list[Exception] = []
    sizes = description['splits'][split]['bytes']
    self.paths = [
        str(folder / part_name(split, i, len(sizes)))
        for i in range(len(sizes))]
    for path, size in zip(self.paths, sizes, strict=True):
      found = files.size(path) if epath.Path(path).exists() else 'none'
      if found != size:
        raise UserError(
            f'{path} should have {size} bytes and has {found}: copy the cache '
            'again, or make it again')
    with np.load(io.BytesIO((folder / f'units.{split}.npz').read_bytes())) as f:
      self._index = dict(f)
    # The first block of each file or the like, and the end.
    self._start = np.append(
        np.flatnonzero(self._index['opens']), len(self._index['size']))
    opening = self._start[:-1]
    is_stream = self._index['is_stream'][opening]
    self.has_streams = bool(is_stream.any())
    several = parts(len(opening), shards)
    self._parts = np.where(is_stream, several, 1)
    self._first = np.cumsum([0, *self._parts])
    self.num_units = int(self._first[-1])

  def reader(self) -> Callable[[int, int], tuple[list, list[int]] | None]:
    """(unit, number of a block) -> the block, None beyond the last.

    A block is rows of `ragged`, a document each, and the codes of what is left
    out. It raises UserError where the bytes are not those that were written.
    """

    def read(number: int, block: int) -> tuple[list, list[int]] | None:
      file = int(np.searchsorted(self._first, number, side='right')) - 1
      part = number - int(self._first[file])
      place = int(self._start[file]) + part + block * int(self._parts[file])
      return self._block(place) if place < self._start[file + 1] else None

    return keep_last(read)

  def _block(self, place: int) -> tuple[list, list[int]]:
    import tensorflow as tf

    part, offset, size, checksum = (
        int(self._index[name][place])
        for name in ('part', 'offset', 'size', 'checksum'))
    path = self.paths[part]
    records, found = [], 0
    data = memoryview(files.read_bytes(path, offset, size))
    while data:
      # Length, its checksum, the record, its checksum.
      end = 12 + int.from_bytes(data[:8], 'little')
      found = zlib.crc32(data[12:end], found)
      records.append(bytes(data[12:end]))
      data = data[end + 4 :]
    if found != checksum:
      raise UserError(f'{path} is damaged at byte {offset}; make it again')
    rows = []
    for record in records:
      feature = tf.train.Example.FromString(record).features.feature
      ids = np.array(feature['targets'].int64_list.value, np.int32)
      rows.append((ids, feature['num_bytes'].int64_list.value[0], 0))
    counts = self._index['faults'][place]
    return rows, np.repeat(np.arange(1, 1 + len(FAULTS)), counts).tolist()


def part_name(split: str, part: int, parts: int) -> str:
  """The name of a TFRecord, as SeqIO has it."""
  return f'{split}.tfrecord-{part:05}-of-{parts:05}'
