"""Tasks tokenised once, in the files of SeqIO's offline caches.

`DIR/TASK/` holds, for each split, TFRecords of documents ('targets' with BOS
and EOS, 'num_bytes'; ids as `packing` has them) and the info and stats that
SeqIO's own `Task.get_dataset(use_cached=True)` needs. Beside them are an index
of blocks, by which a stream reads the documents in the order in which it would
read the texts, and a description of what all was made of. Documents are whole:
a cache serves every `seq_len`.

TensorFlow is imported only where records are written or read.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from recursive_tx.data import files
from recursive_tx.data.chats import Chats
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.documents import Documents
from recursive_tx.data.records import FAULTS
from recursive_tx.data.units import Units
from recursive_tx.errors import UserError
from recursive_tx.text.tokenizer import Tokenizer

SPLITS = ('train', 'heldout')
VERSION = 2
DESCRIPTION = 'recursive_tx.json'


def open_units(
    config: DataConfig, tokenizer: Tokenizer, task: Task, split: str
) -> Units:
  """A split of a task in `config.cache`.

  Where the task's files are no longer there, the cache stands for them.

  Raises:
    UserError: there is no cache of the task, it is not whole, or it was made
      of something else.
  """
  folder = epath.Path(config.cache) / task.name
  again = (
      'make it again: python -m recursive_tx cache --config=... '
      f'--output={config.cache}')
  if not (folder / 'COMPLETED').exists():
    raise UserError(
        f'data.cache={config.cache!r} holds no cache of task {task.name!r}; '
        + again)
  stored = json.loads((folder / DESCRIPTION).read_text())
  if stored['version'] != VERSION:
    raise UserError(
        f'{folder} has format {stored["version"]}, this program reads '
        f'{VERSION}; {again}')
  for name, now in describe(config, tokenizer, task).items():
    if stored[name] != now:
      raise UserError(
          f'{folder} was made with {name}={stored[name]!r}, now it is '
          f'{now!r}; {again}')
  digest = digest_files(config, task, split)
  if digest not in (None, stored['splits'][split]['files']):
    raise UserError(
        f'{folder} was made of other files: since then names or sizes in '
        f'{getattr(task, split) or task.train} have changed; {again}')
  return Units(
      folder, split, stored, shards=config.shards if split == 'train' else 1)


def describe(
    config: DataConfig, tokenizer: Tokenizer, task: Task
) -> dict[str, Any]:
  """What a task's cache is made of, but its files, as JSON has it."""
  fields = dataclasses.asdict(task)
  del fields['weight']
  template = Chats(tokenizer).digest if task.is_chat else None
  described = {
      'tokenizer': [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id],
      'task': fields,
      'template': template,
      'heldout_fraction': None if task.heldout else config.heldout_fraction,
      'faults': FAULTS}
  return json.loads(json.dumps(described))


def digest_files(config: DataConfig, task: Task, split: str) -> str | None:
  """Names and sizes of what a split reads, digested; None if it is gone."""
  if task.kind == 'tfds':
    from recursive_tx.data import sources

    try:
      info = sources.tfds_builder(task).info
    except UserError:
      return None
    count = info.splits[getattr(task, split)[0]].num_examples
    return f'{info.full_name}, {count} examples'
  if not files.exist(task):
    return None
  return Documents(task, split, fraction=config.heldout_fraction).digest
