"""Tasks tokenised once, in the files of SeqIO's offline caches.

`DIR/TASK/` holds, for each split, TFRecords of documents ('targets' with BOS
and EOS, 'num_bytes') and the info and stats that SeqIO's own
`Task.get_dataset(use_cached=True)` asks for. Beside them are an index of
units, by which a stream reads the documents in the order in which it would
read the texts, and a description of what all was made of. Documents are whole:
a cache serves every `seq_len`.

TensorFlow is imported only where records are written or read.
"""

import dataclasses
import io
import json
from typing import Any
import zlib

from etils import epath
import numpy as np

from recursive_tx.data import files
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.documents import FAULTS, Documents
from recursive_tx.tokenizer import Tokenizer

SPLITS = ('train', 'heldout')
VERSION = 1
DESCRIPTION = 'recursive_tx.json'


class Units:
  """The documents of one split of a cached task, unit by unit.

  Attributes:
    paths: the TFRecords.
    num_units: how many reads make an epoch.
    digest: of the sources, on which the order depends.
    errors: what stopped a pipeline and its reader has yet to raise.
  """

  def __init__(self, folder: epath.Path, split: str, description: dict):
    """Opens a split. Raises ValueError where a file is not whole."""
    self.digest = description['splits'][split]['files']
    self.errors: list[Exception] = []
    sizes = description['splits'][split]['bytes']
    self.paths = [
        str(folder / part_name(split, i, len(sizes)))
        for i in range(len(sizes))
    ]
    for path, size in zip(self.paths, sizes, strict=True):
      found = files.size(path) if epath.Path(path).exists() else 'none'
      if found != size:
        raise ValueError(
            f'{path} should have {size} bytes and has {found}: copy the cache '
            'again, or make it again'
        )
    with np.load(io.BytesIO((folder / f'units.{split}.npz').read_bytes())) as f:
      self._index = dict(f)
    self.num_units = len(self._index['size'])

  def unit(self, number: int) -> tuple[list, list[int]]:
    """Rows of `ragged`, a document each, and the codes of what is left out.

    Raises:
      ValueError: the bytes are not those that were written.
    """
    import tensorflow as tf

    part, offset, size, checksum = (
        int(self._index[name][number])
        for name in ('part', 'offset', 'size', 'checksum')
    )
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
      raise ValueError(f'{path} is damaged at byte {offset}; make it again')
    rows = []
    for record in records:
      feature = tf.train.Example.FromString(record).features.feature
      ids = np.array(feature['targets'].int64_list.value, np.int32)
      rows.append((ids, feature['num_bytes'].int64_list.value[0], 0))
    counts = self._index['faults'][number]
    return rows, np.repeat(np.arange(1, 1 + len(FAULTS)), counts).tolist()


def open_units(
    config: DataConfig, tokenizer: Tokenizer, task: Task, split: str
) -> Units:
  """A split of a task in `config.cache`.

  Where the task's files are no longer there, the cache stands for them.

  Raises:
    ValueError: there is no cache of the task, it is not whole, or it was made
      of something else.
  """
  folder = epath.Path(config.cache) / task.name
  again = (
      'make it again: python -m recursive_tx cache --config=... '
      f'--output={config.cache}'
  )
  if not (folder / 'COMPLETED').exists():
    raise ValueError(
        f'data.cache={config.cache!r} holds no cache of task {task.name!r}; '
        + again
    )
  stored = json.loads((folder / DESCRIPTION).read_text())
  if stored['version'] != VERSION:
    raise ValueError(
        f'{folder} has format {stored["version"]}, this program reads '
        f'{VERSION}; {again}'
    )
  for name, now in describe(config, tokenizer, task).items():
    if stored[name] != now:
      raise ValueError(
          f'{folder} was made with {name}={stored[name]!r}, now it is '
          f'{now!r}; {again}'
      )
  digest = digest_files(config, task, split)
  if digest not in (None, stored['splits'][split]['files']):
    raise ValueError(
        f'{folder} was made of other files: since then names or sizes in '
        f'{getattr(task, split) or task.train} have changed; {again}'
    )
  return Units(folder, split, stored)


def describe(
    config: DataConfig, tokenizer: Tokenizer, task: Task
) -> dict[str, Any]:
  """What a task's cache is made of, but its files, as JSON has it."""
  fields = dataclasses.asdict(task)
  del fields['weight']
  described = {
      'tokenizer': [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id],
      'task': fields,
      'heldout_fraction': None if task.heldout else config.heldout_fraction,
      'faults': FAULTS,
  }
  return json.loads(json.dumps(described))


def digest_files(config: DataConfig, task: Task, split: str) -> str | None:
  """Names and sizes of what a split reads, digested; None if it is gone."""
  if task.kind == 'tfds':
    from recursive_tx.data import sources

    try:
      info = sources.tfds_builder(task).info
    except ValueError:
      return None
    count = info.splits[getattr(task, split)[0]].num_examples
    return f'{info.full_name}, {count} examples'
  if not files.exist(task):
    return None
  return Documents(task, split, fraction=config.heldout_fraction).digest


def part_name(split: str, part: int, parts: int) -> str:
  """The name of a TFRecord, as SeqIO has it."""
  return f'{split}.tfrecord-{part:05}-of-{parts:05}'
