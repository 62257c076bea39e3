"""SeqIO Tasks and Mixtures of a user's own: kept as they are, packed here."""

import collections
import dataclasses
import json
import sys

import numpy as np
import pytest
from tiny_data import pieces_of
import tiny_tokenizers

from recursive_tx import data
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

T = 32

# What a T5X user has in a file of their own.
MODULE = '''
import functools
import seqio
import tensorflow as tf

FOLDER = {folder!r}
VOCABULARY = seqio.SentencePieceVocabulary(FOLDER + '/tokenizer.model')
FEATURES = {{
    'inputs': seqio.Feature(VOCABULARY, add_eos=False),
    'targets': seqio.Feature(VOCABULARY, add_eos=True)}}
FILES = {{'train': FOLDER + '/train.tsv', 'validation': FOLDER + '/held.tsv'}}


def parse(dataset, shout):
  def pair(line):
    question, answer = tf.unstack(tf.strings.split(line, '\\t'), 2)
    return {{'inputs': question, 'targets': shout + answer}}
  return dataset.map(pair)


def add(name, shout, features=FEATURES, **how):
  seqio.TaskRegistry.add(
      name, source=seqio.TextLineDataSource(FILES),
      preprocessors=[
          functools.partial(parse, shout=shout),
          seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features=features, **how)


add('{prefix}_a', 'the cat ')
add('{prefix}_b', 'the dog ')
seqio.MixtureRegistry.add(
    '{prefix}_mix', [('{prefix}_a', 3), ('{prefix}_b', 1)])
add('{prefix}_lm', 'sat on ', {{'targets': FEATURES['targets']}})
add('{prefix}_odd', '', {{**FEATURES, 'suffix': FEATURES['targets']}})
add('{prefix}_floats', '', {{
    'targets': seqio.ContinuousFeature(dtype=tf.float32)}})
add('{prefix}_bytes', '', {{
    'targets': seqio.Feature(seqio.ByteVocabulary())}})


def numbers(dataset):
  return dataset.map(lambda line: {{
      'targets': tf.range(tf.strings.length(line) * 100)}})


seqio.TaskRegistry.add(
    '{prefix}_ids', source=seqio.TextLineDataSource(FILES),
    preprocessors=[numbers], output_features={{
        'targets': seqio.Feature(seqio.PassThroughVocabulary(9))}})


def generator(split, shuffle_files, seed=None):
  return tf.data.Dataset.from_generator(
      lambda: ({{'targets': [i % 200 + 3, 4]}} for i in range(5000)),
      output_signature={{'targets': tf.TensorSpec([None], tf.int32)}})


seqio.TaskRegistry.add(
    '{prefix}_generator',
    source=seqio.FunctionDataSource(generator, ['train', 'validation']),
    preprocessors=[], output_features={{
        'targets': seqio.Feature(seqio.PassThroughVocabulary(290))}})
'''
PREFIX = 'rtx_registered'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tiny_tokenizers.train(
      tmp_path_factory.mktemp('seqio'), bos_id=1, eos_id=2, unk_id=0)
  for name, count in (('train', 120), ('held', 30)):
    (folder / f'{name}.tsv').write_text(''.join(
        f'q{name}{i}\ta{i}{"t" * (i % 50)}\n' for i in range(count)))
  (folder / f'{PREFIX}.py').write_text(
      MODULE.format(folder=str(folder), prefix=PREFIX))
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


@pytest.fixture(scope='module')
def tok(folder) -> tokenizer.Tokenizer:
  return tokenizer.load(folder)


def config_of(*names, weights=(1.0, 1.0, 1.0), **changes) -> data.DataConfig:
  tasks = [
      data.Task(name, 'seqio', 'train', 'validation', weight=weight,
                dataset=f'{PREFIX}_{name}')
      for name, weight in zip(names, weights, strict=False)]
  config = data.DataConfig(
      tasks, seq_len=T, batch=8, shards=4, shuffle=16, modules=(PREFIX,))
  return dataclasses.replace(config, **changes)


def take(stream, steps):
  return [next(stream) for _ in range(steps)]


def assert_equal(batches, others):
  for one, other in zip(batches, others, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def learnt_of(batches, tok) -> list[str]:
  """The text of what is learnt, a run of targets each."""
  runs = []
  for batch in batches:
    for target, weight, segment in zip(
        *(batch[f'{name}_BT'] for name in ('target', 'weight', 'segment')),
        strict=True):
      for number in range(1, segment.max() + 1):
        ids = target[(segment == number) & (weight > 0)]
        if len(ids):
          runs.append(tok.decode(ids))
  return runs


def test_targets_are_learnt_and_inputs_read(folder, tok):
  """Every example once in a pass, with its own end of text."""
  held = data.heldout(config_of('a', seq_len=128), tok)
  assert held.num_documents == 30
  texts = sorted(tok.decode(ids) for ids in held.documents)
  want = []
  for i in range(30):
    question, answer = f'qheld{i}', f'the cat a{i}{"t" * i}'
    ids = [1, *tok.encode(question), *tok.encode(answer), 2]
    want.append(tok.decode(ids))
  assert texts == sorted(want)
  answers = collections.Counter(learnt_of(held.batches, tok))
  assert all(text.startswith(('the cat', 't')) for text in answers)
  assert held.num_tokens == sum(
      len(tok.encode(f'the cat a{i}{"t" * i}')) + 1 for i in range(30))
  assert held.num_bytes == sum(len(f'the cat a{i}') + i for i in range(30))


def test_a_language_model_has_targets_alone(folder, tok):
  held = data.heldout(config_of('lm'), tok)
  assert held.num_tokens == sum(len(ids) - 1 for ids in held.documents)


def test_rates_are_those_of_the_mixture_and_of_ours(folder, tok):
  """3 to 1 inside the mixture, which has half of all."""
  config = config_of('mix', 'lm', weights=(1.0, 1.0))
  pieces = pieces_of(
      take(data.Stream(config, tok), 150), is_all_learnt=False)
  counts = collections.Counter(
      word for piece in pieces if piece[0] == 1
      for word in ('cat', 'dog', 'sat') if word in tok.decode(piece))
  total = counts.total()
  assert total > 300
  for word, share in (('cat', 3 / 8), ('dog', 1 / 8), ('sat', 1 / 2)):
    deviation = (share * (1 - share) / total) ** 0.5
    assert abs(counts[word] / total - share) < 4 * deviation, counts
  held = data.heldout(config_of('mix'), tok)
  assert held.num_documents == 60


def test_the_stream_is_the_same_for_all_hosts_and_resumes_exactly(folder, tok):
  """Also a stream that was read already, at its first position again."""
  config = config_of('mix', batch=4, shards=2)
  whole, positions, batches = data.Stream(config, tok), {}, []
  for step in range(20):
    if step in (0, 9):
      positions[step] = whole.save()
    batches += take(whole, 1)
  other = data.Stream(config, tok)
  for step in (9, 0):
    other.restore(positions[step])
    assert_equal(take(other, 11), batches[step : step + 11])
  for rows in ([2, 0], [1, 3]):
    part = data.Stream(config, tok, rows=rows)
    part.restore(positions[9])
    assert_equal(take(part, 11), [
        {k: v[rows] for k, v in batch.items()} for batch in batches[9:]])


@pytest.mark.parametrize(('name', 'changes', 'message'), [
    ('odd', {}, "of which 'suffix' is not known here; expected ids"),
    ('floats', {}, "of which 'targets' is not known here"),
    ('bytes', {}, "the vocabulary of 'targets' (ends with|encodes)"),
    ('generator', {}, 'has no position that can be saved'),
    ('ids', {}, 'gives ids from .* tokenizer has 290; use the vocabulary'),
    ('mixx', {}, "is not registered, did you mean 'rtx_registered_mix'"),
    ('a', {'modules': ('no_such_module',)}, "names 'no_such_module', which ca"),
])
def test_what_cannot_be_taken_is_refused(folder, tok, name, changes, message):
  with pytest.raises(UserError, match=message) as error:
    data.Stream(config_of(name, **changes), tok)
  assert '\n' not in str(error.value)


def test_a_split_that_is_not_there_is_refused(folder, tok):
  config = config_of('a')
  task = dataclasses.replace(config.tasks[0], train=('trian',))
  with pytest.raises(UserError, match="no split 'trian', only train, valid"):
    data.Stream(dataclasses.replace(config, tasks=(task,)), tok)


def test_it_has_no_cache_of_ours():
  with pytest.raises(UserError, match='which SeqIO caches itself'):
    config_of('a', cache='somewhere')


def test_config_files_name_it(folder, tok):
  """As a config file has it, after JSON too."""
  from recursive_tx.train import config as train_config

  config = config_of('a')
  as_json = json.loads(json.dumps(dataclasses.asdict(config)))
  assert train_config.from_json(data.DataConfig, as_json) == config
