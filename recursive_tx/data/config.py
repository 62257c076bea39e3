"""What a data stream is made of, checked where it is written down.

Frozen and hashable. It knows no tokenizer and opens no file.
"""

from collections.abc import Sequence
import dataclasses
import re

from recursive_tx.errors import UserError, check_ranges, in_range

KINDS = ('text', 'jsonl', 'tfds', 'seqio')


@dataclasses.dataclass(frozen=True)
class Task:
  """One source of documents.

  Attributes:
    name: letters, digits, `_`, `.`; unique among a config's tasks.
    kind: 'text'; 'jsonl', records in lines of JSON or in Parquet, by the
      suffix .parquet; 'tfds', a dataset that is prepared; 'seqio', a Task or
      Mixture that is registered. Files of the first two may be compressed, by
      their suffix: .gz, .zst.
    train: globs (`**` included) of the files to train on; a path that exists
      is that path, also with '[' in its name; '@FILE' stands for the lines of
      a file. For 'tfds' and 'seqio' one split, 'train[1%:]'.
    heldout: likewise, held out and taken off `train` where both match a
      file, under whatever path. Empty holds out `DataConfig.heldout_fraction`
      of the documents, by a hash of their text, so that a repeated document
      stays on one side. 'tfds' and 'seqio' must name a split.
    document: what a document is. 'file'; 'record'; 'chat', a record of
      'jsonl' with messages, of which the assistant's are learnt; or for
      'text' the line that separates documents, such as '<|endoftext|>'.
      Empty: a file of 'text', a record of the others.
    key: the field that holds a record's text, or a chat's messages. Empty is
      'text', or 'messages' for chats.
    dataset: for 'tfds' the dataset's name, 'c4/en:3.1.0'; for 'seqio' that of
      the Task or Mixture.
    weight: relative rate in the mixture, in (0, inf). As everywhere in SeqIO
      the rate is of examples: documents, or pieces of `seq_len` tokens of
      longer ones.
  """

  name: str
  kind: str
  train: tuple[str, ...]
  heldout: tuple[str, ...] = ()
  document: str = ''
  key: str = ''
  dataset: str = ''
  weight: float = 1.0

  RANGES = dict(weight='(0, inf)')

  def __post_init__(self):
    where = f'data task {self.name!r}'
    if not isinstance(self.name, str) or not re.fullmatch(
        r'[\w.]+', self.name):
      raise UserError(
          f'{where}: a name is letters, digits, _ and . only; rename it')
    if self.kind not in KINDS:
      raise UserError(
          f'{where}: unknown kind {self.kind!r}, expected one of '
          f'{", ".join(KINDS)}')
    for field in ('train', 'heldout'):
      value = _strings(getattr(self, field), f'{where}: {field}')
      object.__setattr__(self, field, value)
    for field in ('document', 'key', 'dataset'):
      if not isinstance(getattr(self, field), str):
        raise UserError(
            f'{where}: {field} is {getattr(self, field)!r}, expected a string')
    if not self.document:
      unit = 'file' if self.kind == 'text' else 'record'
      object.__setattr__(self, 'document', unit)
    if not self.key:
      key = 'messages' if self.is_chat else 'text'
      object.__setattr__(self, 'key', key)
    in_range(f'{where}: weight', self.weight, self.RANGES['weight'])
    self._check_kind(where)

  @property
  def is_chat(self) -> bool:
    """Whether documents are chats."""
    return self.document == 'chat'

  @property
  def is_dataset(self) -> bool:
    """Whether it is read by the name of a dataset, not of files."""
    return self.kind in ('tfds', 'seqio')

  def _check_kind(self, where: str) -> None:
    if not self.train:
      raise UserError(f'{where}: train is empty; name files or a split')
    records = ('record', 'chat') if self.kind == 'jsonl' else ('record',)
    if (self.kind == 'text') == (self.document in ('record', 'chat')) or (
        self.kind != 'text' and self.document not in records):
      raise UserError(
          f"{where}: kind 'text' takes document='file' or a separator line, "
          f"the others document='record', 'jsonl' also 'chat'; got "
          f'{self.document!r} with {self.kind!r}')
    if '\n' in self.document or '\r' in self.document:
      raise UserError(
          f'{where}: document={self.document!r} is more than one line; a '
          'separator is one whole line, without its end')
    if self.is_dataset != bool(self.dataset):
      raise UserError(
          f"{where}: dataset={self.dataset!r} with kind {self.kind!r}; kinds "
          "'tfds' and 'seqio' need the dataset's name and no other takes one")
    if self.is_dataset and not len(self.train) == len(self.heldout) == 1:
      raise UserError(
          f'{where}: kind {self.kind!r} takes one split to train on and one '
          f"held out, such as train='train[1%:]', heldout='train[:1%]'; got "
          f'{self.train} and {self.heldout}')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """A mixture of tasks and the shape of its batches.

  Attributes:
    tasks: the mixture.
    seq_len: T, tokens in a row, in [1, inf).
    batch: B, rows in the global batch, of all processes together, in
      [1, inf); a multiple of `shards`.
    shards: independent pipelines, in [1, inf); row i comes from shard
      i % shards. Part of what the stream is: another number is another
      stream. A process runs every shard it has a row of, so with many
      processes shards = batch makes no row twice.
    seed: of all shuffling and mixing of the training stream, in
      [0, 4294967296).
    shuffle: pieces in each shard's shuffle buffer, in [1, inf), saved with
      every position; what comes first is shuffled already, in blocks of
      documents.
    heldout_fraction: of the documents, in (0, 0.5], for tasks that name no
      held-out files.
    cache: directory that the verb `cache` made of these tasks with this
      tokenizer, to read tokens from; '' tokenises on the fly. Tasks of files
      give the same batches either way. The order of 'tfds' is another: TFDS
      shuffles its files, a cache blocks of its documents.
    modules: Python modules to import first, which register what tasks of kind
      'seqio' name.
  """

  tasks: tuple[Task, ...]
  seq_len: int
  batch: int
  shards: int = 8
  seed: int = 0
  shuffle: int = 256
  heldout_fraction: float = 0.01
  cache: str = ''
  modules: tuple[str, ...] = ()

  RANGES = dict(
      seq_len='[1, inf)', batch='[1, inf)', shards='[1, inf)',
      seed='[0, 4294967296)', shuffle='[1, inf)',
      heldout_fraction='(0, 0.5]')

  def __post_init__(self):
    if not isinstance(self.tasks, Sequence) or not all(
        isinstance(task, Task) for task in self.tasks):
      raise UserError(
          f'data.tasks is {self.tasks!r}, expected a sequence of data.Task')
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    names = [task.name for task in self.tasks]
    if not names or len(set(names)) < len(names):
      raise UserError(
          f'data.tasks are named {names}: there must be one at least, and no '
          'name twice')
    check_ranges('data', self)
    if not isinstance(self.cache, str):
      raise UserError(f'data.cache is {self.cache!r}, expected a directory')
    modules = _strings(self.modules, 'data.modules')
    object.__setattr__(self, 'modules', modules)
    if self.cache and any(task.kind == 'seqio' for task in self.tasks):
      raise UserError(
          f"data.cache={self.cache!r} with a task of kind 'seqio', which SeqIO "
          'caches itself; leave out the cache or the task')
    if self.batch % self.shards:
      most = min(self.batch, 4096)
      fits = [n for n in range(1, most + 1) if not self.batch % n]
      raise UserError(
          f'data.batch {self.batch} is not a multiple of data.shards '
          f'{self.shards}; choose shards among {fits}, or another batch')


def _strings(value: object, where: str) -> tuple[str, ...]:
  """A string or a sequence of strings as a tuple; '' is none."""
  if isinstance(value, str):
    value = (value,) if value else ()
  if not isinstance(value, Sequence) or not all(
      isinstance(part, str) and part for part in value):
    raise UserError(f'{where} is {value!r}, expected strings')
  return tuple(value)
