"""The SeqIO part: documents -> tokens -> pieces, one pipeline a shard.

Imports TensorFlow and SeqIO at its head because it derives classes from
theirs; others import it inside functions. A pipeline's `tf.data` position is
exact and small: a counter, the documents being tokenised, and the shuffle
buffer.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools

from absl import logging
import numpy as np
import seqio
import tensorflow as tf

from recursive_tx.data import cache, packing, ragged, sources
from recursive_tx.data.chats import Chats
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.documents import Documents
from recursive_tx.data.records import FAULTS
from recursive_tx.data.registered import RegisteredSource
from recursive_tx.data.units import Units
from recursive_tx.errors import UserError
from recursive_tx.text.tokenizer import Tokenizer

# TensorFlow only feeds: it must not take the accelerator's memory. A program
# that has already set TensorFlow up keeps what it chose.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')

# Documents given to the tokenizer at once, and pieces given to Python at
# once: enough that the crossing between TensorFlow and Python costs nothing.
_DOCUMENTS = 16
_PIECES = 64


def build_tasks(
    config: DataConfig, tokenizer: Tokenizer, split: str
) -> tuple[list[seqio.Task], list[Units | Documents | RegisteredSource]]:
  """The SeqIO tasks of one split, and what has their digests and errors.

  They are not entered in SeqIO's registry, where two streams in one process
  could collide.

  Raises:
    UserError: as `Documents`, `Units` or `RegisteredSource`; a dataset that is
      not prepared or has no such split or key; fewer files than shards where
      the file is the document.
  """
  # SeqIO mixes only tasks of one vocabulary. It never encodes: `tokenize` does.
  vocabulary = seqio.PassThroughVocabulary(
      tokenizer.vocab_size, tokenizer.eos_id)
  tasks, found = [], []
  for number, task in enumerate(config.tasks):
    source, units = _source(config, tokenizer, task, split)
    if units:
      found.append(units)
    cut = functools.partial(split_long, first=number * len(FAULTS))
    steps = [functools.partial(tokenize, encode=encoder(tokenizer, task)),
             seqio.CacheDatasetPlaceholder()]
    if config.cache or task.kind == 'seqio':
      steps = []  # What comes is tokens.
    elif units:
      steps.insert(0, _rekey(targets='text', fault='fault'))
    else:
      steps.insert(0, _rekey(targets=task.key))
    tasks.append(
        seqio.Task(
            task.name, source=source, preprocessors=[*steps, cut],
            output_features={'targets': seqio.Feature(vocabulary)},
            shuffle_buffer_size=config.shuffle))
  return tasks, found


def fault_names(config: DataConfig) -> list[str]:
  """What the codes of the mixture's faults, from 1, mean: 'task/kind'."""
  return [f'{task.name}/{kind}' for task in config.tasks for kind in FAULTS]


def encoder(
    tokenizer: Tokenizer, task: Task
) -> Callable[[Sequence[bytes], Sequence[int]], list[ragged.Row]]:
  """What makes rows of a task's texts, see `encode` and `encode_chats`.

  Raises:
    UserError: as `Chats`.
  """
  if task.is_chat:
    return functools.partial(encode_chats, Chats(tokenizer))
  return functools.partial(encode, tokenizer)


def encode(
    tokenizer: Tokenizer, texts: Sequence[bytes], codes: Sequence[int]
) -> list[ragged.Row]:
  """Texts to documents: BOS where the family adds one, ids, EOS.

  Args:
    tokenizer: makes the ids.
    texts: UTF-8; where it is not, or is empty, the row has a fault.
    codes: of faults that are known already, 0 elsewhere.
  """
  codes, strings = [int(code) for code in codes], []
  for i, text in enumerate(texts):
    try:
      strings.append(text.decode())
    except UnicodeDecodeError:
      strings.append('')
      codes[i] = codes[i] or 1 + FAULTS.index('not_utf8')
    if not text:
      codes[i] = codes[i] or 1 + FAULTS.index('empty')
  return [
      ragged.left_out(code)
      if code
      else (
          np.array([*tokenizer.opening, *ids, tokenizer.eos_id], np.int32),
          len(text),
          0)
      for ids, text, code in zip(
          tokenizer.encode_batch(strings), texts, codes, strict=True)]


def encode_chats(
    chats: Chats, texts: Sequence[bytes], codes: Sequence[int]
) -> list[ragged.Row]:
  """As `encode`, for what `Chats.render` gave."""
  return [
      ragged.left_out(int(code)) if code else (*chats.encode(text), 0)
      for text, code in zip(texts, codes, strict=True)]


def tokenize(dataset: tf.data.Dataset, encode: Callable) -> tf.data.Dataset:
  """Texts to rows of `ragged`, a document each."""
  @tf.autograph.experimental.do_not_convert
  def documents(example) -> tf.data.Dataset:
    texts = example['targets']
    codes = example.get('fault', tf.zeros_like(texts, tf.int32))
    return ragged.call(encode, [texts, codes])

  return dataset.batch(_DOCUMENTS).flat_map(documents)


def split_long(
    dataset: tf.data.Dataset, sequence_length, first: int = 0
) -> tf.data.Dataset:
  """Documents to pieces; faults get their codes of the mixture.

  Args:
    dataset: of documents, in which codes are those of one task.
    sequence_length: of 'targets', T + 1.
    first: what the task's codes are raised by.
  """
  T = sequence_length['targets'] - 1
  empty, long = (1 + FAULTS.index(kind) for kind in ('empty', 'long'))

  def pieces(ids, lengths, num_bytes, codes) -> list[ragged.Row]:
    rows = []
    documents = ragged.split(ids, lengths)
    for ids, size, code in zip(documents, num_bytes, codes, strict=True):
      cut = packing.split(ids, T)
      if not cut:
        rows.append((ids[:0], 0, first + (code or empty)))
        continue
      code = first + long if len(cut) > 1 else 0
      rows += [(cut[0], size, code), *((piece, 0, 0) for piece in cut[1:])]
    return rows

  @tf.autograph.experimental.do_not_convert
  def cut(example) -> tf.data.Dataset:
    ids, num_bytes = example['targets'], example['num_bytes']
    # SeqIO's own reader of a cache gives documents only.
    codes = example.get('fault', tf.zeros_like(num_bytes))
    return ragged.call(
        pieces, [ids.values, ids.row_lengths(), num_bytes, codes])

  return dataset.ragged_batch(_DOCUMENTS).flat_map(cut)


def shard_dataset(
    tasks: list[seqio.Task], config: DataConfig, shard: int
) -> tf.data.Dataset:
  """One shard's endless mixture: batches of 'targets', ragged, and 'fault'.

  A row without ids stands for a document that is left out.
  """

  def sample(datasets, weights, seed):
    # All shards share the tasks' seed, and so the order that they partition;
    # which task comes next is each shard's own draw.
    del seed
    return tf.data.Dataset.sample_from_datasets(
        datasets, weights, seed=config.seed * config.shards + shard)

  mixture = seqio.Mixture(
      'mixture',
      [
          (task, own.weight)
          for task, own in zip(tasks, config.tasks, strict=True)],
      sample_fn=sample)
  dataset = mixture.get_dataset(
      sequence_length={'targets': config.seq_len + 1}, split='train',
      seed=config.seed, shard_info=seqio.ShardInfo(shard, config.shards),
      num_epochs=None, passthrough_features=['fault'],
      trim_output_features=False, try_in_mem_cache=False)
  return dataset.ragged_batch(_PIECES).prefetch(2).with_options(_options())


def one_pass(
    task: seqio.Task, T: int, split: str
) -> Iterator[tuple[list[np.ndarray], int, int]]:
  """One pass over the documents of a task's split.

  Yields:
    Pieces, bytes of UTF-8 and the code of a fault or 0; no pieces where the
    document is left out.
  """
  dataset = task.get_dataset(
      sequence_length={'targets': T + 1}, split=split, shuffle=False,
      trim_output_features=False, try_in_mem_cache=False)
  pieces, size, code = [], 0, 0
  dataset = dataset.with_options(_options())
  for example in dataset.as_numpy_iterator():
    is_first = example['num_bytes'] or not len(example['targets'])
    if is_first and (pieces or code):
      yield pieces, size, code
    if is_first:
      pieces, size, code = [], int(example['num_bytes']), example['fault']
    if len(example['targets']):
      pieces.append(example['targets'])
  if pieces or code:
    yield pieces, size, int(code)


def _options() -> tf.data.Options:
  options = tf.data.Options()
  # tf.data calls any Python function stateful and refuses to save; ours are
  # functions of their arguments alone.
  options.experimental_external_state_policy = (
      tf.data.experimental.ExternalStatePolicy.IGNORE)
  options.deterministic = True
  options.autotune.enabled = False
  return options


def _source(
    config: DataConfig, tokenizer: Tokenizer, task: Task, split: str
) -> tuple[seqio.DataSource, Documents | Units | RegisteredSource | None]:
  """What a task reads, and what has its digest and errors, if anything."""
  if config.cache:
    units = cache.open_units(config, tokenizer, task, split)
    _check_shards(config, task, split, units)
    return sources.CachedSource({split: units}, config.seed), units
  if task.kind == 'tfds':
    return sources.tfds_source(task), None
  if task.kind == 'seqio':
    source = RegisteredSource(config, tokenizer, task)
    if split == 'train':
      source.check(_options())
    return source, source
  documents = Documents(
      task, split, fraction=config.heldout_fraction,
      shards=config.shards if split == 'train' else 1,
      render=Chats(tokenizer).render if task.is_chat else None)
  documents.check()
  _check_shards(config, task, split, documents)
  return sources.DocumentSource({split: documents}, config.seed), documents


def _rekey(**key_map: str) -> functools.partial:
  return functools.partial(seqio.preprocessors.rekey, key_map=key_map)


def _check_shards(
    config: DataConfig, task: Task, split: str, units: Documents | Units
) -> None:
  if split != 'train':
    return
  if units.num_readers > 1:
    logging.warning(
        'data task %r has fewer files or row groups than data.shards=%d, so '
        'that each is read %d times in an epoch; lower data.shards, or divide '
        'the files.', task.name, config.shards, units.num_readers)
  if units.num_units >= config.shards:
    return
  what = f'data task {task.name!r} has {units.num_units}'
  if task.document == 'file':
    raise UserError(
        f'{what} documents (a file each) for data.shards={config.shards}, so'
        ' that shards would give the same rows; lower data.shards, or set'
        ' document to a separator line')
  logging.warning(
      '%s blocks of documents for data.shards=%d: several shards read the same'
      ' ones, so that batches repeat rows; lower data.shards.',
      what, config.shards)
