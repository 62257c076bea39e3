"""A directory of any kind opens, by one door, for whatever reads models."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import demo, exits
from recursive_tx.files import paths
from recursive_tx.store import checkpoint, native, opening

CFG = dataclasses.replace(
    tiny.FAMILIES['llama'], V=290, loops=2, layers_per_loop=3, rank='2')
SETTINGS = {'model': dataclasses.asdict(CFG), 'tokenizer': '', 'init_from': ''}


@pytest.fixture
def text(sentencepiece_dir, tmp_path):
  """A directory that holds a tokenizer and nothing else."""
  shutil.copytree(sentencepiece_dir, tmp_path / 'text')
  return tmp_path / 'text'


def save(workdir, values, *, tokenizer='', init_from='', step=3):
  """A run that has not ended: its latest checkpoint."""
  settings = {**SETTINGS, 'tokenizer': str(tokenizer),
              'init_from': str(init_from)}
  with checkpoint.Checkpoints(
      str(workdir), checkpoint.CheckpointConfig()) as checkpoints:
    checkpoints.save(
        step, state={'params': jax.tree.map(np.asarray, values['params'])},
        position=b'', settings=settings, score=None)
    checkpoints.wait()
  return workdir


def test_hugging_faces(text, tmp_path):
  cfg = dataclasses.replace(tiny.FAMILIES['llama'], V=290)
  values = tiny.make_ours(tmp_path / 'hf', cfg)
  found = rtx.open(tmp_path / 'hf')
  assert found.config == cfg and found.exit is None
  assert found.tokenizer is None
  assert found.companions == tmp_path / 'hf'
  tiny.assert_same_tree(found.variables, values)
  shutil.copy(text / 'tokenizer.model', tmp_path / 'hf')
  again = rtx.open(str(tmp_path / 'hf')).tokenizer
  assert again.encode('the cat') == rtx.load_tokenizer(text).encode('the cat')


def test_a_saved_one_with_its_exit(text, tmp_path):
  values = tiny.variables(CFG)
  rtx.save(tmp_path / 'saved', CFG, values, companions=text)
  exits.save(tmp_path / 'saved', rtx.Exit('top', (0.5,)), {})
  found = rtx.open(tmp_path / 'saved')
  assert found.config == CFG and found.tokenizer.vocab_size == 290
  assert found.exit == rtx.Exit('top', (0.5,))
  tiny.assert_same_tree(found.variables, values)


def test_a_run_is_its_model_once_it_has_ended(text, tmp_path):
  first, last = tiny.variables(CFG, 1), tiny.variables(CFG, 2)
  workdir = save(tmp_path / 'run', first, tokenizer=text)
  found = rtx.open(workdir)
  assert found.config == CFG
  tiny.assert_same_tree(found.variables, first)
  assert found.companions == text
  assert found.tokenizer.vocab_size == 290
  rtx.save(workdir / 'model', CFG, last, companions=text)
  found = rtx.open(workdir)
  tiny.assert_same_tree(found.variables, last)
  assert found.companions == workdir / 'model'


def test_a_run_that_has_not_ended_has_its_sources_companions(text, tmp_path):
  source = tmp_path / 'source'
  rtx.save(source, CFG, tiny.variables(CFG), companions=text)
  exits.save(source, rtx.Exit('top', (0.5,)), {})
  workdir = save(tmp_path / 'run', tiny.variables(CFG, 1), init_from=source)
  found = rtx.open(workdir)
  assert found.companions == source and found.tokenizer.vocab_size == 290
  # What was calibrated for other weights is not for these.
  assert found.exit is None


@pytest.mark.parametrize('kind', ['hf', 'saved', 'checkpoint', 'model'])
def test_read_leaf_by_leaf_it_is_the_same(kind, tmp_path):
  values, where = tiny.variables(CFG), tmp_path / kind
  if kind == 'hf':
    rtx.save_hf(where, CFG, values)
  elif kind == 'saved':
    rtx.save(where, CFG, values)
  else:
    save(where, values)
    if kind == 'model':
      rtx.save(where / 'model', CFG, tiny.variables(CFG, 5))
  whole, source = rtx.open(where), opening.source(where)
  assert source.cfg == whole.config == opening.config(where)
  assert source.companions == whole.companions
  params = {}
  for path, at, array in opening.parts(source):
    params.setdefault(path, {})[at] = array
  for path, leaf in paths.items(whole.variables['params']):
    for at, array in params.pop(path).items():
      np.testing.assert_array_equal(array, leaf[at])
  assert not params


def test_the_demo_is_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = rtx.open('recursive_tx/demo')
  assert found.companions == demo.DIRECTORY
  assert rtx.load_tokenizer(demo.NAME).vocab_size == found.config.V == 1024


@pytest.mark.parametrize('make', ['empty', 'missing', 'broken'])
def test_what_is_none_of_them_is_refused(make, tmp_path):
  where = tmp_path / 'x'
  if make != 'missing':
    where.mkdir()
  if make == 'broken':
    (where / 'checkpoints' / '7').mkdir(parents=True)
  for read in (rtx.open, opening.source, opening.config):
    with tiny.refused(where):
      read(where)


def test_every_verb_takes_a_workdir(text, tmp_path):
  """Export and convert of a run, which the same words as for a model do."""
  vanilla = dataclasses.replace(tiny.FAMILIES['llama'], V=290)
  values = tiny.variables(vanilla)
  rtx.save_hf(tmp_path / 'hf', vanilla, values, companions=text)
  rtx.save(tmp_path / 'source', vanilla, values, companions=tmp_path / 'hf')
  workdir = save(tmp_path / 'run', tiny.variables(CFG),
                 init_from=tmp_path / 'source')
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  for words in (
      ['export', f'--checkpoint={workdir}', f'--output={tmp_path}/exported'],
      ['convert', f'--source={tmp_path}/source', '--loops=3', '--rank=2',
       f'--output={tmp_path}/converted']):
    done = subprocess.run(
        [sys.executable, '-m', 'recursive_tx', *words], cwd=tiny.ROOT, env=env,
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
  token_BT = tiny.tokens(CFG)
  cfg, exported, *_ = rtx.open(tmp_path / 'exported')
  assert tiny.distance(
      tiny.decoder(cfg)(exported, token_BT),
      tiny.decoder(CFG)(tiny.variables(CFG), token_BT)) < 1e-5
  assert (tmp_path / 'exported' / 'tokenizer.model').is_file()
  assert rtx.open(tmp_path / 'converted').config.loops == 3
  stored = json.loads((tmp_path / 'converted' / 'source.json').read_text())
  assert stored['model_type'] == 'llama'
  assert native.is_saved(tmp_path / 'converted')
