"""SeqIO Tasks and Mixtures of a user's own, as sources of documents.

Their sources, preprocessors and rates are kept as they are. Only what comes out
is taken on: 'targets', after 'inputs' if there are any, is a document, packed
and given positions as all others. As for a decoder in T5X, the inputs are read
and the targets learnt.

Imports TensorFlow and SeqIO at its head because it derives a class from
theirs; others import it inside functions.
"""

import hashlib
import importlib
import tempfile

import numpy as np
import seqio
import tensorflow as tf

from recursive_tx.data import ragged
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.records import FAULTS
from recursive_tx.errors import UserError, nearest
from recursive_tx.text.tokenizer import Tokenizer

_FEATURES = ('inputs', 'targets')

# Examples given to Python at once.
_EXAMPLES = 16
# What a vocabulary must encode as the tokenizer does.
_PROBES = ('The quick brown fox', 'é 漢字 x=1', 'two\nlines,  two spaces')


class RegisteredSource(seqio.DataSource):
  """A registered Task or Mixture as a source of rows of `ragged`.

  Attributes:
    digest: of its names and its number of examples.
    errors: what stopped a pipeline and its reader has yet to raise.
  """

  def __init__(self, config: DataConfig, tokenizer: Tokenizer, task: Task):
    """Imports the modules and finds the name.

    Raises:
      UserError: a module that cannot be imported; a name that is not
        registered; no such split; features, or a vocabulary, of another kind.
    """
    super().__init__(splits={'train': 0, 'heldout': 0})
    self._splits = {'train': task.train[0], 'heldout': task.heldout[0]}
    self._where = f'data task {task.name!r}: SeqIO {task.dataset!r}'
    self._seed, self._tokenizer = config.seed, tokenizer
    self._provider = _find(config, task, self._where)
    self.errors: list[UserError] = []
    self._check_features()
    for split in self._splits.values():
      if split not in self._provider.splits:
        raise UserError(
            f'{self._where} has no split {split!r}, only '
            f'{", ".join(sorted(self._provider.splits))}')
    # Its preprocessors may cut to this length; a row holds it and BOS.
    length = config.seq_len + 1 - len(tokenizer.opening)
    self._lengths = dict.fromkeys(self._provider.output_features, length)
    self.digest = self._digest()

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [self._splits[split]]

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    """Rows of documents; without end and as the rates are if shuffled.

    Unshuffled it is one pass over every task. `seed` is ignored for the
    config's.
    """
    del seed
    try:
      dataset = self._examples(self._splits[split], shuffle, shard_info)
    except Exception as error:  # Of anything that the user's module does.
      raise UserError(
          f'{self._where} cannot be read: {_line(error)}') from error
    return dataset.ragged_batch(_EXAMPLES).flat_map(self._rows)

  def check(self, options: tf.data.Options) -> None:
    """Raises UserError unless it continues exactly where it was saved."""
    def pipeline():
      return iter(self.get_dataset().with_options(options))

    def some(iterator):
      return [next(iterator)['targets'].numpy().tolist() for _ in range(9)]

    try:
      one, two = pipeline(), pipeline()
      some(one)
      with tempfile.TemporaryDirectory() as folder:
        tf.train.Checkpoint(iterator=one).write(f'{folder}/position')
        want = some(one)
        tf.train.Checkpoint(iterator=two).read(f'{folder}/position')
        is_same = some(two) == want
    except tf.errors.UnimplementedError:
      is_same = False
    except (tf.errors.OpError, StopIteration) as error:
      raise UserError(
          f'{self._where} cannot be read: {_line(error)}') from error
    if self.errors:
      raise self.errors[0]
    if not is_same:
      raise UserError(
          f'{self._where} has no position that can be saved, as nothing has '
          'that a Python generator makes; read files with tf.data, or by TFDS')

  def _examples(
      self, split: str, shuffle: bool, shard_info: seqio.ShardInfo | None
  ) -> tf.data.Dataset:
    how = dict(
        sequence_length=self._lengths, split=split, shuffle=shuffle,
        seed=self._seed, shard_info=shard_info, trim_output_features=False,
        try_in_mem_cache=False)
    if shuffle or not isinstance(self._provider, seqio.Mixture):
      dataset = self._provider.get_dataset(
          num_epochs=None if shuffle else 1, **how)
      return dataset.map(self._features)
    # A Mixture's pass would end with the first of its tasks that does.
    tasks = [task for task in self._provider.tasks if split in task.splits]
    return tf.data.Dataset.sample_from_datasets(
        [task.get_dataset(num_epochs=1, **how).map(self._features)
         for task in tasks],
        [float(self._provider.get_rate(task)) for task in tasks],
        seed=0, stop_on_empty_dataset=False)

  def _features(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    targets = example['targets']
    inputs = example['inputs'] if 'inputs' in self._lengths else targets[:0]
    return {'inputs': tf.cast(inputs, tf.int32),
            'targets': tf.cast(targets, tf.int32)}

  def _rows(self, batch: dict[str, tf.RaggedTensor]) -> tf.data.Dataset:
    return ragged.call(self._documents, [
        part for name in _FEATURES
        for part in (batch[name].values, batch[name].row_lengths())])

  def _documents(
      self, inputs: np.ndarray, input_lengths: np.ndarray,
      targets: np.ndarray, target_lengths: np.ndarray,
  ) -> list[ragged.Row]:
    return [
        self._document(*pair) for pair in zip(
            ragged.split(inputs, input_lengths),
            ragged.split(targets, target_lengths), strict=True)]

  def _document(self, inputs: np.ndarray, targets: np.ndarray) -> ragged.Row:
    ids = np.concatenate([inputs, targets])
    if len(ids) and not 0 <= ids.min() <= ids.max() < (
        size := self._tokenizer.vocab_size):
      self.errors.append(UserError(
          f'{self._where} gives ids from {ids.min()} to {ids.max()}, and the '
          f'tokenizer has {size}; use the vocabulary of the tokenizer'))
    if not len(targets):
      return ragged.left_out(1 + FAULTS.index('empty'))
    opening = self._tokenizer.opening
    if ids[: len(opening)].tolist() == opening:
      opening = []
    ids = np.concatenate([
        ~np.array([*opening, *inputs], np.int32), targets])
    text = self._tokenizer.decode(targets[targets != self._tokenizer.eos_id])
    return ids.astype(np.int32), max(1, len(text.encode())), 0

  def _check_features(self) -> None:
    features = self._provider.output_features
    for name, feature in features.items():
      is_ids = (
          isinstance(feature, seqio.Feature) and feature.rank == 1
          and not isinstance(feature, seqio.ContinuousFeature)
          and feature.dtype.is_integer)
      if name not in _FEATURES or not is_ids or 'targets' not in features:
        raise UserError(
            f'{self._where} has the features {", ".join(features)}, of which '
            f'{name!r} is not known here; expected ids [n] under targets, or '
            'under inputs and targets')
      self._check_vocabulary(name, feature.vocabulary)

  def _check_vocabulary(self, name: str, vocabulary: seqio.Vocabulary) -> None:
    """Raises UserError unless it encodes as the tokenizer does."""
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
      return  # It encodes nothing; the ids are checked as they come.
    tokenizer = self._tokenizer
    if vocabulary.eos_id != tokenizer.eos_id:
      raise UserError(
          f'{self._where}: the vocabulary of {name!r} ends with id '
          f'{vocabulary.eos_id}, the tokenizer with {tokenizer.eos_id}; use '
          'the vocabulary of the tokenizer')
    for text in _PROBES:
      found, want = list(vocabulary.encode(text)), tokenizer.encode(text)
      if found != want:
        raise UserError(
            f'{self._where}: the vocabulary of {name!r} encodes {text!r} as '
            f'{found}, the tokenizer as {want}; use the vocabulary of the '
            'tokenizer')

  def _digest(self) -> str:
    tasks = getattr(self._provider, 'tasks', [self._provider])
    names = [
        (task.name, split, task.num_input_examples(split))
        for task in tasks for split in self._splits.values()
        if split in task.splits]
    listed = repr(names).encode()
    return hashlib.blake2b(listed, digest_size=16).hexdigest()


def _find(
    config: DataConfig, task: Task, where: str
) -> seqio.Task | seqio.Mixture:
  for module in config.modules:
    try:
      importlib.import_module(module)
    except Exception as error:  # Of anything that the module does.
      raise UserError(
          f'data.modules names {module!r}, which cannot be imported '
          f'({_line(error)}); put its folder on PYTHONPATH') from error
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if task.dataset not in known:
    raise UserError(
        f'{where} is not registered{nearest(task.dataset, known)}; name the '
        f'module that registers it, --config.data.modules=MODULE (now '
        f'{config.modules})')
  return seqio.get_mixture_or_task(task.dataset)


def _line(error: Exception) -> str:
  """An error in one line."""
  return ' '.join(str(error).split())[:300] or type(error).__name__
