"""The SeqIO part: documents -> tokens -> pieces, one pipeline a shard.

The only module here that imports TensorFlow and SeqIO, and does it at its
head because it derives classes from theirs; others import it inside
functions. A pipeline's `tf.data` position is exact and small: a counter, the
documents being tokenised, and the shuffle buffer.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from recursive_tx.data import packing
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.documents import Documents
from recursive_tx.tokenizer import Tokenizer

# TensorFlow only feeds: it must not take the accelerator's memory. A program
# that has already set TensorFlow up keeps what it chose.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')

# Documents given to the tokenizer at once, and pieces given to Python at
# once: enough that the crossing between TensorFlow and Python costs nothing.
_DOCUMENTS = 16
_PIECES = 64


class TokenizerVocabulary(seqio.Vocabulary):
  """A `Tokenizer` as SeqIO's vocabulary. `pad_id` means nothing here."""

  def __init__(self, tokenizer: Tokenizer):
    super().__init__()
    self.tokenizer = tokenizer

  @property
  def bos_id(self) -> int | None:
    return self.tokenizer.bos_id

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def unk_id(self) -> None:
    return None

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def _encode(self, s: str) -> list[int]:
    return self.tokenizer.encode(s)

  def _decode(self, ids) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    """The ids of a text, or those of a vector of texts as a ragged tensor."""
    if s.shape.rank == 0:
      return self._encode_tf(s[None])[0]

    def encode(texts: np.ndarray) -> tuple[np.ndarray, ...]:
      ids = self.tokenizer.encode_batch([text.decode() for text in texts])
      return _ragged([np.array(row, np.int32) for row in ids])

    return _call_ragged(encode, [s])[0]

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(ids: np.ndarray) -> bytes:
      return self.tokenizer.decode(ids).encode()

    return tf.numpy_function(decode, [ids], tf.string, stateful=False)


class DocumentSource(seqio.DataSource):
  """`Documents` as a SeqIO source; every split and shard of it.

  Shuffled, it never ends and shard i of n takes every n-th unit of the
  endless order, so that no shard is empty, all read every document equally
  often, and together they partition each epoch. Unshuffled, it is one pass in
  an order that is fixed, but not the files', so that its beginning is a fair
  sample.
  """

  def __init__(self, splits: dict[str, Documents], seed: int):
    super().__init__(splits=splits)
    self._documents = splits
    self._seed = seed

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return self._documents[split].paths

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    """Examples of one feature, 'text'.

    `seed` is ignored for the source's own: shards with different orders
    would not partition an epoch.
    """
    del seed
    documents = self._documents[split]
    index, num = (0, 1)
    if shard_info:
      index, num = shard_info.index, shard_info.num_shards

    def read(count: np.ndarray) -> np.ndarray:
      own = self._seed if shuffle else 0
      try:
        texts = documents.unit(documents.shuffled(int(count), own))
      except (OSError, ValueError) as fault:
        # TensorFlow would log a traceback and wrap the error. A stand-in
        # takes the place of the unit, so that something comes out and the
        # reader, who looks for faults first, has occasion to.
        documents.faults.append(fault)
        texts = [b'fault']
      return np.array(texts, object)

    @tf.autograph.experimental.do_not_convert
    def unit(count: tf.Tensor) -> tf.data.Dataset:
      text = tf.numpy_function(read, [count], tf.string, stateful=False)
      text.set_shape([None])
      return tf.data.Dataset.from_tensor_slices({'text': text})

    counts = tf.data.Dataset.counter(index, num)
    if not shuffle:
      counts = tf.data.Dataset.range(index, documents.num_units, num)
    # The position inside a flat_map is the count, not the texts.
    return counts.flat_map(unit)


def build_tasks(
    config: DataConfig, tokenizer: Tokenizer, split: str
) -> tuple[list[seqio.Task], list[Documents]]:
  """The SeqIO tasks of one split, and the documents of those with files.

  They are not entered in SeqIO's registry, where two streams in one process
  could collide.

  Raises:
    ValueError: as `Documents`; a dataset that is not prepared or has no such
      split or key; fewer files than shards where the file is the document.
  """
  # SeqIO mixes only tasks of one vocabulary.
  vocabulary = TokenizerVocabulary(tokenizer)
  tasks, found = [], []
  for task in config.tasks:
    if task.kind == 'tfds':
      source = _tfds_source(task)
      key = task.key
    else:
      documents = Documents(task, split, fraction=config.heldout_fraction)
      if split == 'train' and task.document == 'file':
        _check_shards(task, documents, config)
      documents.check()
      found.append(documents)
      source = DocumentSource({split: documents}, config.seed)
      key = 'text'
    select = functools.partial(
        seqio.preprocessors.rekey, key_map={'targets': key}
    )
    tasks.append(
        seqio.Task(
            task.name,
            source=source,
            preprocessors=[select, tokenize, split_long],
            output_features={'targets': seqio.Feature(vocabulary)},
            shuffle_buffer_size=config.shuffle,
        )
    )
  return tasks, found


def tokenize(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
  """Texts to documents: BOS where the family adds one, ids, EOS.

  'num_bytes' comes along, the length of the text as UTF-8.
  """
  vocabulary = output_features['targets'].vocabulary
  head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
  tail = [vocabulary.eos_id]

  def close(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    return _ragged([
        np.concatenate([head, row, tail])
        for row in np.split(ids, np.cumsum(lengths)[:-1])
    ])

  @tf.autograph.experimental.do_not_convert
  def encode(example) -> tf.data.Dataset:
    ids = vocabulary.encode_tf(example['targets'])
    ids = _call_ragged(close, [ids.values, ids.row_lengths()])[0]
    return _unbatch(ids, tf.strings.length(example['targets']))

  return dataset.batch(_DOCUMENTS).flat_map(encode)


def split_long(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Documents to pieces; 'num_bytes' is 0 on all but the first of each."""
  T = sequence_length['targets'] - 1

  def pieces(
      ids: np.ndarray, lengths: np.ndarray, num_bytes: np.ndarray
  ) -> tuple[np.ndarray, ...]:
    rows, counts = [], []
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    for document, count in zip(documents, num_bytes, strict=True):
      cut = packing.split(document, T)
      rows += cut
      counts += [count, *[0] * (len(cut) - 1)][: len(cut)]
    return *_ragged(rows), np.array(counts, np.int32)

  @tf.autograph.experimental.do_not_convert
  def cut(example) -> tf.data.Dataset:
    ids = example['targets']
    arguments = [ids.values, ids.row_lengths(), example['num_bytes']]
    rows, num_bytes = _call_ragged(pieces, arguments, tf.int32)
    return _unbatch(rows, num_bytes)

  return dataset.ragged_batch(_DOCUMENTS).flat_map(cut)


def shard_dataset(
    tasks: list[seqio.Task], config: DataConfig, shard: int
) -> tf.data.Dataset:
  """One shard's endless mixture: ragged batches of pieces, int32."""

  def sample(datasets, weights, seed):
    # All shards share the tasks' seed, and so the order that they partition;
    # which task comes next is each shard's own draw.
    del seed
    return tf.data.Dataset.sample_from_datasets(
        datasets, weights, seed=config.seed * config.shards + shard
    )

  mixture = seqio.Mixture(
      'mixture',
      [
          (task, own.weight)
          for task, own in zip(tasks, config.tasks, strict=True)
      ],
      sample_fn=sample,
  )
  dataset = mixture.get_dataset(
      sequence_length={'targets': config.seq_len + 1},
      split='train',
      seed=config.seed,
      shard_info=seqio.ShardInfo(shard, config.shards),
      num_epochs=None,
      trim_output_features=False,
      try_in_mem_cache=False,
  )
  dataset = dataset.map(lambda example: example['targets'])
  return dataset.ragged_batch(_PIECES).prefetch(2).with_options(_options())


def heldout_documents(
    task: seqio.Task, T: int
) -> Iterator[tuple[list[np.ndarray], int]]:
  """One pass over a task's held-out documents: pieces, bytes of UTF-8."""
  dataset = task.get_dataset(
      sequence_length={'targets': T + 1},
      split='heldout',
      shuffle=False,
      trim_output_features=False,
      try_in_mem_cache=False,
  )
  pieces, num_bytes = [], 0
  dataset = dataset.with_options(_options())
  for example in dataset.as_numpy_iterator():
    if example['num_bytes'] and pieces:
      yield pieces, num_bytes
      pieces, num_bytes = [], 0
    pieces.append(example['targets'])
    num_bytes += int(example['num_bytes'])
  if pieces:
    yield pieces, num_bytes


def _options() -> tf.data.Options:
  options = tf.data.Options()
  # tf.data calls any Python function stateful and refuses to save; ours are
  # functions of their arguments alone.
  options.experimental_external_state_policy = (
      tf.data.experimental.ExternalStatePolicy.IGNORE
  )
  options.deterministic = True
  options.autotune.enabled = False
  return options


def _check_shards(
    task: Task, documents: Documents, config: DataConfig
) -> None:
  if documents.num_units < config.shards:
    raise ValueError(
        f'data task {task.name!r} has {documents.num_units} documents (a file '
        f'each) for data.shards={config.shards}, so that shards would give '
        'the same rows; lower data.shards, or set document to a separator '
        'line'
    )


def _tfds_source(task: Task) -> seqio.TfdsDataSource:
  try:
    builder = tfds.builder(task.dataset)
  except Exception as error:  # TFDS has several kinds, all worth one line.
    reason = str(error).strip().split('\n')[0]
    raise ValueError(
        f'data task {task.name!r}: TFDS has no dataset {task.dataset!r} '
        f'({reason}); see `tfds list`, or set TFDS_DATA_DIR'
    ) from None
  if not builder.is_prepared():
    raise ValueError(
        f'data task {task.name!r}: {task.dataset!r} is not in '
        f'{builder.data_dir}; run `tfds build {task.dataset}` once, or set '
        'TFDS_DATA_DIR'
    )
  splits = {'train': task.train[0], 'heldout': task.heldout[0]}
  train, held = (
      _tfds_ranges(task, builder, split) for split in splits.values()
  )
  if any(
      a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
      for a in train
      for b in held
  ):
    raise ValueError(
        f'data task {task.name!r}: the splits {task.train[0]!r} and '
        f'{task.heldout[0]!r} overlap; train on a slice such as '
        "'train[1%:]'"
    )
  if task.key not in builder.info.features:
    raise ValueError(
        f'data task {task.name!r}: {task.dataset!r} has no feature '
        f'{task.key!r}, only {", ".join(builder.info.features)}; set key'
    )
  return seqio.TfdsDataSource(
      task.dataset, splits=splits, read_only=True, caching_permitted=False
  )


def _tfds_ranges(task: Task, builder, split: str) -> list[tuple]:
  """Which examples of which files a split is: (file, first, end)."""
  try:
    parts = builder.info.splits[split].file_instructions
  except (KeyError, ValueError, AssertionError):
    raise ValueError(
        f'data task {task.name!r}: {task.dataset!r} has no split {split!r}, '
        f'only {", ".join(builder.info.splits)} and slices of them'
    ) from None
  return [
      (part.filename, part.skip, part.skip + part.take) for part in parts
  ]


def _ragged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """The rows' values one after the other, and their lengths."""
  values = np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32)
  return values, np.array([len(row) for row in rows], np.int64)


def _call_ragged(
    function: Callable, arguments: list[tf.Tensor], *more: tf.DType
) -> tuple:
  """Calls Python for rows (int32 values, lengths) and more vectors."""
  values, lengths, *rest = tf.numpy_function(
      function, arguments, [tf.int32, tf.int64, *more], stateful=False
  )
  for tensor in (values, lengths, *rest):
    tensor.set_shape([None])
  rows = tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)
  return rows, *rest


def _unbatch(rows: tf.RaggedTensor, num_bytes: tf.Tensor) -> tf.data.Dataset:
  """An example a row. Slicing a ragged tensor itself makes TensorFlow warn
  of types that it cannot tell."""
  starts = rows.row_splits

  @tf.autograph.experimental.do_not_convert
  def row(i: tf.Tensor) -> dict[str, tf.Tensor]:
    ids = rows.values[starts[i] : starts[i + 1]]
    return {'targets': ids, 'num_bytes': num_bytes[i]}

  return tf.data.Dataset.range(rows.nrows()).map(row)
