"""Tasks of lm-evaluation-harness: as its own `hf` backend scores them."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import exits
from recursive_tx.evaluate import harness
from recursive_tx.evaluate.answers import Answers
from recursive_tx.evaluate.loglikelihood import Scorer
from recursive_tx.files import paths
from recursive_tx.store import export

pytest.importorskip(
    'lm_eval', reason='runs tasks of lm-evaluation-harness, the extra [eval]')

CHOICE = '''
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{query}}}}Answer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
'''
TEXT = '''
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{query}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity,
      higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity,
      higher_is_better: false}}
metadata: {{version: 1.0}}
'''
DOCUMENTS = [
    {'query': f'Question: what follows the number {i}?\n', 'gold': i % 3,
     'choices': ['nothing at all', f'{i + 1}', f'the word after "{i}"']}
    for i in range(24)]


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A directory with two tasks over local JSON lines."""
  directory = tmp_path_factory.mktemp('tasks')
  import datasets
  datasets.config.HF_DATASETS_CACHE = directory / 'datasets'
  path = directory / 'documents.jsonl'
  path.write_text('\n'.join(map(json.dumps, DOCUMENTS)))
  for name, text in (('follows', CHOICE), ('read', TEXT)):
    (directory / f'{name}.yaml').write_text(text.format(name=name, path=path))
  return directory


@pytest.fixture(scope='module')
def relaxed():
  """Two loops, far from the model that ships, with its tokenizer."""
  model = rtx.open('recursive_tx/demo')
  cfg, variables = rtx.relax(
      model.config, model.variables, loops=2, rank=4)
  return model._replace(config=cfg, variables=variables)


def run(model, tasks, names=('follows',), progress=None, cache=None,
        **settings):
  return harness.evaluate(
      harness.Tasks(names, include_path=str(tasks), **settings),
      model.config, model.variables, model.tokenizer, max_length=128,
      cache=cache, progress=progress or (lambda items, what: items))


def of_hf(directory, **settings):
  pytest.importorskip('torch', reason=tiny.TORCH)
  pytest.importorskip('transformers', reason=tiny.TORCH)
  pytest.importorskip('accelerate', reason='the hf backend wants it')
  from lm_eval.models.huggingface import HFLM
  # With its cache, of two requests of the same tokens that are split elsewhere
  # one gets the scores of the other's positions (0.4.13).
  return HFLM(pretrained=str(directory), dtype='float32', device='cpu',
              batch_size=4, logits_cache=False, **settings)


def ours(model, **settings):
  from recursive_tx.evaluate.harness_model import HarnessModel
  settings = {'max_length': 2048, 'exits': False, 'answers': Answers(),
              **settings}
  return HarnessModel(model.config, model.variables, model.tokenizer,
                      run=rtx.Run(), progress=iter, **settings)


def instances(kind, several):
  from lm_eval.api.instance import Instance
  return [Instance(kind, {}, arguments, i)
          for i, arguments in enumerate(several)]


# Where backends have differed: an empty context, white space that ends one,
# BOS in the text, contexts that are too long, one-token continuations.
PAIRS = [
    ('', 'Once upon a time'), ('', 'the'), ('Once upon ', 'a time'),
    ('Once upon  \n', 'a time'), ('Once upon', ' a time'),
    ('<s>Once upon', ' a time'), ('Once</s>upon', ' a time'),
    *[('Question: who? Answer:', f' {name}')
      for name in ('Tom', 'Lily', 'a', 'Tom and Lily', 'é', '\u4e2d')],
    *[('She went to the park with her mother and saw a dog. ' * 9, choice)
      for choice in (' They', ' They went home, and were happy.')],
]
TEXTS = ['Once upon a time', 'a', 'Tom saw a cat.\n\nIt ran.  ',
         'One day she went to the park. ' * 20]


@pytest.mark.parametrize(
    'name', [None, *(pytest.param(name, marks=pytest.mark.slow)
                     for name in ('stories260K', 'stories3M'))])
def test_agrees_with_the_hf_backend(name, relaxed, tmp_path):
  """Of the exported directory: to 1e-5, every choice and greedy flag."""
  if name is None:
    model, saved = relaxed, tmp_path / 'saved'
    rtx.save(saved, model.config, model.variables,
             companions=model.companions)
  else:
    saved = tiny.REAL / name
    if not saved.is_dir():
      pytest.skip(f'{saved} is not there')
    model = rtx.open(saved)
  # The model that ships is in bfloat16, to which what is merged is rounded.
  export.export(saved, tmp_path / 'hf', dtype='float32')
  theirs = of_hf(tmp_path / 'hf', max_length=64)
  mine = ours(model, max_length=64)
  assert mine.prefix_token_id == theirs.prefix_token_id
  assert mine.eot_token_id == theirs.eot_token_id
  asked = instances('loglikelihood', PAIRS)
  expected = theirs.loglikelihood(asked, disable_tqdm=True)
  found = mine.loglikelihood(asked)
  np.testing.assert_allclose(*zip(*(
      (a[0], b[0]) for a, b in zip(found, expected, strict=True)),
                                  strict=True), rtol=1e-5, atol=1e-5)
  assert [flag for _, flag in found] == [flag for _, flag in expected]
  texts = instances('loglikelihood_rolling', [(text,) for text in TEXTS])
  np.testing.assert_allclose(
      mine.loglikelihood_rolling(texts),
      theirs.loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-5)
  prompts = instances('generate_until', [
      (text, settings) for text in ('Once upon a time', '', TEXTS[-1])
      for settings in ({'until': ['.', 'x'], 'max_gen_toks': 24},
                       {'until': [], 'max_gen_toks': 9, 'do_sample': False})])
  assert mine.generate_until(prompts) == theirs.generate_until(
      prompts, disable_tqdm=True)


def test_scores_are_those_of_the_log_likelihoods(relaxed, tasks):
  """acc and acc_norm from the requests themselves; perplexities by words."""
  result = run(relaxed, tasks, ('follows', 'read'), control=0)
  model = ours(relaxed, max_length=128)
  scores = model.loglikelihood(instances('loglikelihood', [
      (document['query'] + 'Answer:', f' {choice}')
      for document in DOCUMENTS for choice in document['choices']]))
  log_p_NC = np.array([log_p for log_p, _ in scores]).reshape(-1, 3)
  gold_N = np.array([document['gold'] for document in DOCUMENTS])
  length_NC = np.array([[len(choice) for choice in document['choices']]
                        for document in DOCUMENTS])
  found = result['results']['follows']
  assert found['acc,none'] == (log_p_NC.argmax(1) == gold_N).mean()
  assert found['acc_norm,none'] == (
      (log_p_NC / length_NC).argmax(1) == gold_N).mean()
  texts = [document['query'] for document in DOCUMENTS]
  nats = -sum(model.loglikelihood_rolling(
      instances('loglikelihood_rolling', [(text,) for text in texts])))
  # The harness counts the empty word after the last line.
  words = sum(len(text.split()) + 1 for text in texts)
  assert result['results']['read']['word_perplexity,none'] == pytest.approx(
      math.exp(nats / words))
  assert result['n-samples']['follows']['effective'] == len(DOCUMENTS)
  json.dumps(result)


def test_every_loop_has_a_column(relaxed, tasks):
  result = run(relaxed, tasks, ('follows', 'read'), exits=True, control=0)
  model = ours(relaxed, exits=True)
  asked = instances('loglikelihood', PAIRS[:5])
  by_loop = []
  for loop in (1, 2):
    model.loop = loop
    by_loop.append([log_p for log_p, _ in model.loglikelihood(asked)])
  requests = [model._encode_pair(*pair) if pair[0] else (
      [model.prefix_token_id], model.tok_encode(
          pair[1], add_special_tokens=False)) for pair in PAIRS[:5]]
  scores = Scorer(relaxed.config, relaxed.variables, exits=True)(requests)
  np.testing.assert_allclose(by_loop, scores.log_p_LQ, rtol=1e-6)
  loops = result['recursive_tx']['loops']
  assert len(loops) == 2 and loops[1] == result['results']
  assert loops[0]['read'] != loops[1]['read']


@pytest.mark.slow
def test_generation_exits_after_the_loop(relaxed):
  model = ours(relaxed, exits=True)
  asked = instances('generate_until', [
      ('def f(', {'until': ['\n\n\n'], 'max_gen_toks': 12})])
  texts = []
  for loop in (1, 2):
    model.loop = loop
    texts += model.generate_until(asked)
    prompt = model.tok_encode('def f(')
    exit = exits.static(1, 2) if loop == 1 else rtx.Exit()
    ids, = rtx.generate(
        relaxed.config, relaxed.variables, [prompt], max_new_tokens=12,
        exit=exit, eos_id=relaxed.tokenizer.end_ids)
    assert relaxed.tokenizer.decode(ids).split('\n\n\n')[0] == texts[-1]
  assert texts[0] != texts[1]


class _Killed(BaseException):
  pass


def test_an_interrupted_run_continues(relaxed, tasks, tmp_path, monkeypatch):
  """Only what is missing is scored, and the results are the same."""
  from recursive_tx.evaluate import loglikelihood
  monkeypatch.setitem(loglikelihood._TOKENS, 'cpu', 256)
  whole = run(relaxed, tasks, control=0, exits=True)

  def killed(items, what):
    for number, item in enumerate(items):
      if number == 2:
        raise _Killed
      yield item

  with pytest.raises(_Killed):
    run(relaxed, tasks, progress=killed, cache=tmp_path, exits=True, control=0)
  file, = tmp_path.iterdir()
  before = len(file.read_text().split('\n'))
  assert before > 1
  scored = []

  def counted(items, what):
    scored.append(sum(len(tree.numbers) for batch in items
                      for row in batch.rows for tree in row))
    return items

  again = run(relaxed, tasks, progress=counted, cache=tmp_path, exits=True,
              control=0)
  assert again['results'] == whole['results']
  assert again['recursive_tx'] == whole['recursive_tx']
  assert 0 < scored[0] == 3 * len(DOCUMENTS) - (before - 1)
  run(relaxed, tasks, progress=counted, cache=tmp_path, exits=True, control=0)
  assert len(scored) == 1


def test_another_model_reads_no_answers_of_this_one(relaxed, tasks, tmp_path):
  """The harness's own cache would give it these."""
  first = run(relaxed, tasks, cache=tmp_path, control=0)
  halved = {**relaxed.variables['params'], 'embed': {
      'embedding': relaxed.variables['params']['embed']['embedding'] / 2}}
  other = relaxed._replace(variables={'params': halved})
  second = run(other, tasks, cache=tmp_path, control=0)
  assert second['results'] == run(other, tasks, control=0)['results']
  assert len(list(tmp_path.iterdir())) == 2
  assert first['results'] == run(
      relaxed, tasks, cache=tmp_path, control=0)['results']


@pytest.mark.slow
def test_limits_shots_and_the_control(relaxed, tasks):
  asked = []
  result = run(relaxed, tasks, limit=8, num_fewshot=2, control=5,
               progress=lambda items, what: asked.append(what) or items)
  control = result['recursive_tx']['control']
  assert asked == ['evaluate', 'random weights']
  assert result['n-samples']['follows']['effective'] == 8
  assert control['n-samples']['follows']['effective'] == 5
  assert result['n-shot']['follows'] == 2
  # Every token is about equally likely.
  random = harness.random_variables(relaxed.config)
  tiny.assert_same_tree(random['params'], harness.random_variables(
      relaxed.config)['params'])
  shapes, expected = (
      {path: leaf.shape for path, leaf in paths.items(each['params'])}
      for each in (random, relaxed.variables))
  assert shapes == expected
  log_p, _ = ours(relaxed._replace(variables=random)).loglikelihood(
      instances('loglikelihood', [('def f(', 'x')]))[0]
  assert abs(log_p + math.log(relaxed.config.V)) < 3


@pytest.mark.slow  # The harness reads its own thousands of files.
def test_an_unknown_task_is_refused(relaxed, tasks):
  with tiny.refused("'folows'", "did you mean 'follows'", '--include_path'):
    run(relaxed, tasks, ('folows',))


def test_what_cannot_be_run_is_refused(relaxed, tasks, tmp_path):
  with tiny.refused(f'{tmp_path}/none', 'no directory'):
    run(relaxed, tmp_path / 'none')
  (tmp_path / 'gone.yaml').write_text(
      CHOICE.format(name='gone', path=tmp_path / 'gone.jsonl'))
  with tiny.refused('gone', 'gone.jsonl', 'docs/evaluate.md'):
    run(relaxed, tmp_path, ('gone',))
  model = ours(relaxed, max_length=16)
  with tiny.refused('16', 'max_length'):
    model.generate_until(instances(
        'generate_until', [('a', {'max_gen_toks': 16})]))
  with tiny.refused('num_beams=3'):
    model.generate_until(instances(
        'generate_until', [('a', {'num_beams': 3, 'max_gen_toks': 4})]))


def test_without_the_hub_a_task_says_so_in_a_line(tmp_path):
  import lm_eval
  piqa = pathlib.Path(lm_eval.__file__).parent / 'tasks' / 'piqa'
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', 'evaluate',
       '--checkpoint=recursive_tx/demo', '--tasks=piqa',
       f'--include_path={piqa}', f'--cache={tmp_path}'],
      cwd=tiny.ROOT, capture_output=True, text=True, check=False,
      env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
  assert done.returncode == 1 and not done.stdout
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith('evaluate: the data of piqa cannot be read')
  assert 'Hugging Face hub' in line and 'docs/evaluate.md' in line
