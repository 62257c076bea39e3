"""What SeqIO's tasks read: documents, their tokens in a cache, or TFDS.

Imports TensorFlow and SeqIO at its head because it derives classes from
theirs; others import it inside functions.
"""

from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from recursive_tx.data import ragged
from recursive_tx.data.config import Task
from recursive_tx.data.documents import Block, Documents, shuffled
from recursive_tx.data.units import Units
from recursive_tx.errors import UserError


class _UnitSource(seqio.DataSource):
  """Units as a SeqIO source; every split and shard of it.

  Shuffled, it never ends and shard i of n takes every n-th unit of the
  endless order, so that no shard is empty, all read every document equally
  often, and together they partition each epoch. Unshuffled, it is one pass in
  an order that is fixed, but not the files', so that its beginning is a fair
  sample.
  """

  def __init__(self, splits: dict[str, Documents | Units], seed: int):
    super().__init__(splits=splits)
    self._units = splits
    self._seed = seed

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return self._units[split].paths

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    """Of each block of a unit the documents in order, then its faults.

    `seed` is ignored for the source's own: shards with different orders
    would not partition an epoch.
    """
    del seed
    units = self._units[split]
    index, num = (0, 1)
    if shard_info:
      index, num = shard_info.index, shard_info.num_shards

    own, reader = self._seed if shuffle else 0, units.reader()

    def read(count: np.ndarray, block: np.ndarray) -> list | None:
      number = shuffled(int(count), own, units.num_units)
      try:
        found = reader(number, int(block))
        return None if found is None else self._rows(found)
      except (OSError, ValueError, tf.errors.OpError) as error:
        # TensorFlow would log a traceback and wrap the error. A fault takes
        # the place of the block, so that something comes out and the reader,
        # who looks for errors first, has occasion to.
        units.errors.append(error)
        return [self._left_out(1)]

    def is_there(count: np.ndarray, block: np.ndarray) -> np.bool_:
      return np.bool_(read(count, block) is not None)

    @tf.autograph.experimental.do_not_convert
    def unit(count: tf.Tensor) -> tf.data.Dataset:
      if not units.has_streams:  # Of one block each.
        return self._examples(read, [count, tf.constant(0)])
      return tf.data.Dataset.counter().take_while(
          lambda block: tf.numpy_function(
              is_there, [count, block], tf.bool, stateful=False)
      ).flat_map(lambda block: self._examples(read, [count, block]))

    counts = tf.data.Dataset.counter(index, num)
    if not shuffle:
      counts = tf.data.Dataset.range(index, units.num_units, num)
    # The position inside a flat_map is the count and the block, not the texts.
    return counts.flat_map(unit)


class DocumentSource(_UnitSource):
  """`Documents` as a source of 'text' and 'fault', the code or 0."""

  def _rows(self, block: Block) -> list[tuple[bytes, int]]:
    rows = [(text, 0) for text in block.texts]
    return rows + [self._left_out(code) for code in block.codes]

  def _left_out(self, code: int) -> tuple[bytes, int]:
    return b'', code

  def _examples(
      self, read: Callable, place: list[tf.Tensor]
  ) -> tf.data.Dataset:
    def arrays(*place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      rows = read(*place)
      texts = np.array([text for text, _ in rows], object)
      return texts, np.array([code for _, code in rows], np.int32)

    text, fault = tf.numpy_function(
        arrays, place, (tf.string, tf.int32), stateful=False)
    text.set_shape([None])
    fault.set_shape([None])
    examples = {'text': text, 'fault': fault}
    return tf.data.Dataset.from_tensor_slices(examples)


class CachedSource(_UnitSource):
  """A cache's `Units` as a source of what `pipeline.tokenize` gives."""

  def _rows(self, block: tuple[list[ragged.Row], list[int]]
            ) -> list[ragged.Row]:
    rows, faults = block
    return rows + [self._left_out(code) for code in faults]

  def _left_out(self, code: int) -> ragged.Row:
    return ragged.left_out(code)

  def _examples(
      self, read: Callable, place: list[tf.Tensor]
  ) -> tf.data.Dataset:
    return ragged.call(read, place)


def tfds_source(task: Task) -> seqio.TfdsDataSource:
  """A prepared dataset. Raises UserError as `tfds_builder`."""
  tfds_builder(task)
  splits = {'train': task.train[0], 'heldout': task.heldout[0]}
  return seqio.TfdsDataSource(task.dataset, splits=splits, read_only=True)


def tfds_builder(task: Task) -> tfds.core.DatasetBuilder:
  """The prepared dataset that a task reads.

  Raises:
    UserError: there is none, or it has no such splits or key.
  """
  try:
    builder = tfds.builder(task.dataset)
  except Exception as error:  # TFDS has several kinds, all worth one line.
    reason = str(error).strip().split('\n')[0]
    raise UserError(
        f'data task {task.name!r}: TFDS has no dataset {task.dataset!r} '
        f'({reason}); see `tfds list`, or set TFDS_DATA_DIR'
    ) from None
  if not builder.is_prepared():
    raise UserError(
        f'data task {task.name!r}: {task.dataset!r} is not in '
        f'{builder.data_dir}; run `tfds build {task.dataset}` once, or set '
        'TFDS_DATA_DIR')
  splits = {'train': task.train[0], 'heldout': task.heldout[0]}
  train, held = (
      _tfds_ranges(task, builder, split) for split in splits.values())
  if any(
      a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
      for a in train
      for b in held):
    raise UserError(
        f'data task {task.name!r}: the splits {task.train[0]!r} and '
        f'{task.heldout[0]!r} overlap; train on a slice such as '
        "'train[1%:]'")
  if task.key not in builder.info.features:
    raise UserError(
        f'data task {task.name!r}: {task.dataset!r} has no feature '
        f'{task.key!r}, only {", ".join(builder.info.features)}; set key')
  return builder


def _tfds_ranges(task: Task, builder, split: str) -> list[tuple]:
  """Which examples of which files a split is: (file, first, end)."""
  try:
    parts = builder.info.splits[split].file_instructions
  except (KeyError, ValueError, AssertionError):
    raise UserError(
        f'data task {task.name!r}: {task.dataset!r} has no split {split!r}, '
        f'only {", ".join(builder.info.splits)} and slices of them'
    ) from None
  return [
      (part.filename, part.skip, part.skip + part.take) for part in parts]
