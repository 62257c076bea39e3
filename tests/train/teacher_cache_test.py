"""Saved top-k logits: they teach as their teacher does, are whole, and fit or
are refused.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import chex
from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files, losses, machine, train
from recursive_tx.data import Stream
from recursive_tx.text import tokenizer
from recursive_tx.train import log as log_lib
from recursive_tx.train import state, step, teacher_cache
from recursive_tx.train.optim import OptimConfig

B, V = 8, 32


pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> train.Config:
  """A run that learns from a random model, at both of its loops."""
  folder = tmp_path_factory.mktemp('files')
  processes.write_files(folder)
  base = processes.config(folder)
  cfg = dataclasses.replace(base.model, loops=1, rank='0')
  params = rtx.Decoder(cfg).init(
      jax.random.key(3), jnp.zeros((1, 4), jnp.int32))['params']
  params = jax.tree.map(np.asarray, meta.unbox(params))
  rtx.save(folder / 'teacher', cfg, {'params': params})
  return dataclasses.replace(
      base, teacher=str(folder / 'teacher'),
      losses=losses.LossConfig((), (0.5, 1.0)),
      optim=OptimConfig(steps=3, lr=0.01, accumulate=2))


@pytest.fixture(scope='module')
def ids(config):
  return tokenizer.load(config.tokenizer)


def facts(config, ids, best=4, **changes):
  return teacher_cache.facts(config.data, ids, **{
      'V': V, 'best': best, 'teacher': 'there', **changes})


def top_k(batch):
  """Of a teacher who knows nothing but the token: its next four ids."""
  id_BTJ = (batch['token_BT'][..., None] + jnp.arange(4)) % V
  return id_BTJ, jnp.log(jnp.broadcast_to(
      jnp.array([0.4, 0.3, 0.2, 0.05]), id_BTJ.shape))


class Counted(Stream):
  """A stream that counts the batches drawn from it."""
  drawn = 0

  def __next__(self):
    self.drawn += 1
    return super().__next__()


def save(directory, config, ids, steps=4, top_k=top_k, rows=range(B)):
  stream = Counted(config.data, ids, rows=rows)
  teacher_cache.save(directory, facts(config, ids), stream, top_k,
               rows=list(rows), steps=range(1, steps + 1))
  return stream.drawn


def reader(directory, config, ids, steps=4, rows=range(B), V=V):
  return teacher_cache.reader(directory, config.data, ids, V=V, rows=list(rows),
                        steps=range(1, steps + 1))


@pytest.fixture(scope='module')
def saved(config, ids, tmp_path_factory) -> pathlib.Path:
  """The top-k logits of four steps."""
  directory = tmp_path_factory.mktemp('saved')
  assert save(directory, config, ids) == 4
  return directory


def tensors(directory):
  """{path: {name: array}} of all parts but for positions, which are zips."""
  found = {}
  for path in sorted(directory.glob('steps/*/[0-9]*')):
    part = files.Reader(path)
    found[str(path.relative_to(directory))] = {
        name: part.read(name) for name in part.shapes if name != 'position'}
  return found


def assert_same(one, other):
  chex.assert_trees_all_equal(one, other)


# What is saved teaches as the teacher does.


def test_a_step_is_as_with_the_teacher_itself(config, ids):
  mesh = machine.make_mesh(config.mesh)
  batch = next(Stream(config.data, ids))
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    first = train.first_state(config, tx, abstract)
    cfg, variables = state.load_teacher(config, mesh, ids)
    best = jax.jit(step.make_top_k(config, cfg, mesh, V))(variables, batch)
    _, expected = jax.jit(train.make_step(config, mesh, tx, cfg))(
        first, batch, variables)
    _, found = jax.jit(train.make_step(config, mesh, tx))(
        first, {**batch, **dict(zip(losses.SAVED, best, strict=True))}, None)
  for name in ('loss', 'distill/loop1', 'distill/loop2', 'grad_norm'):
    assert found[name] == pytest.approx(float(expected[name]), rel=1e-4)


@pytest.mark.slow
def test_all_ids_saved_train_as_the_teacher_itself(config, ids, tmp_path):
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    cfg, variables = state.load_teacher(config, mesh, ids)
    best = jax.jit(step.make_top_k(config, cfg, mesh, V),
                   out_shardings=machine.rows(mesh))
    teacher_cache.save(
        tmp_path / 'top_k', facts(config, ids, best=V),
        Stream(config.data, ids),
        lambda batch: best(variables, machine.place_rows(batch, mesh)),
        rows=list(range(B)), steps=range(1, 4))
    assert state.load_teacher(dataclasses.replace(
        config, teacher=str(tmp_path / 'top_k')), mesh, ids) == (None, None)
  found = {}
  for name in ('top_k', 'teacher'):
    run = config if name == 'teacher' else dataclasses.replace(
        config, teacher=str(tmp_path / name))
    last = train.train(run, str(tmp_path / f'run-{name}'))
    rows = log_lib.read_metrics(tmp_path / f'run-{name}')
    found[name] = last.params, [row[f'train/distill/loop{loop}'] for row in
                                rows if 'train/loss' in row for loop in (1, 2)]
  np.testing.assert_allclose(found['top_k'][1], found['teacher'][1], 1e-4)
  # What little AdamW makes of gradients that are rounding is in the bound.
  chex.assert_trees_all_close(
      found['top_k'][0], found['teacher'][0], rtol=1e-7, atol=1e-3)


def test_guesses_are_the_best_and_their_log_probabilities(config):
  mesh = machine.make_mesh(config.mesh)
  cfg, variables, *_ = rtx.open(config.teacher)
  token_BT = tiny.tokens(cfg, B, config.data.seq_len)
  batch = {'token_BT': token_BT, 'segment_BT': np.ones_like(token_BT),
           'position_BT': np.tile(np.arange(token_BT.shape[1]), (B, 1))}
  with jax.set_mesh(mesh):
    id_BTJ, log_p_BTJ = jax.jit(
        step.make_top_k(config, cfg, mesh, 5))(variables, batch)
  expected = jax.nn.log_softmax(tiny.decoder(cfg)(variables, token_BT))
  np.testing.assert_allclose(
      log_p_BTJ, -np.sort(-np.asarray(expected))[..., :5], atol=1e-5)
  np.testing.assert_allclose(
      np.take_along_axis(np.asarray(expected), np.asarray(id_BTJ), -1),
      log_p_BTJ, atol=1e-5)


# It is whole, in whatever parts.


def test_what_is_read_is_what_was_said(config, ids, saved):
  add, stream = reader(saved, config, ids), Stream(config.data, ids)
  for at in range(1, 5):
    batch = next(stream)
    found = add(at, batch)
    assert set(found) == {*batch, *losses.SAVED}
    for name, expected in zip(losses.SAVED, top_k(batch), strict=True):
      np.testing.assert_array_equal(found[name], expected)


def test_rows_may_be_cut_in_another_way(config, ids, saved, tmp_path):
  for rows in ([0, 1, 2, 6], [3, 4, 5, 7]):
    save(tmp_path, config, ids, steps=1, rows=rows)
  assert len(tensors(tmp_path)) == 4
  rows = [6, 7, 2, 3]
  batch = next(Stream(config.data, ids, rows=rows))
  found = reader(tmp_path, config, ids, 1, rows)(1, batch)
  for name, expected in zip(losses.SAVED, top_k(batch), strict=True):
    np.testing.assert_array_equal(found[name], expected)
  # Some rows of larger parts.
  assert_same(found, reader(saved, config, ids, 1, rows)(1, batch))


@pytest.mark.parametrize('every, drawn', [
    pytest.param(50, 4, marks=pytest.mark.slow), (2, 2)])
def test_interrupted_it_goes_on_where_it_was(
    config, ids, saved, tmp_path, monkeypatch, every, drawn):
  monkeypatch.setattr(teacher_cache, '_POSITION_EVERY', every)
  calls = []

  def dies(batch):
    calls.append(batch)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return top_k(batch)

  with pytest.raises(KeyboardInterrupt):
    save(tmp_path, config, ids, steps=6, top_k=dies)
  there = tensors(tmp_path)
  assert sorted(there) == [f'steps/{at:08}/00000-00008' for at in (1, 2, 3)]
  # As a process leaves it that is killed while it writes the next.
  half = tmp_path / 'steps' / '00000004' / '.00000-00008.x' / 'new'
  half.mkdir(parents=True)
  (half / 'model.safetensors').write_bytes(b'half')
  with tiny.refused('lacks top-k logits for step 4', '--last=4'):
    reader(tmp_path, config, ids)
  assert save(tmp_path, config, ids) == drawn
  assert_same(tensors(tmp_path), tensors(saved))
  assert save(tmp_path, config, ids) == 0
  # And further, from the position after the last.
  assert save(tmp_path, config, ids, steps=5) == 1


# It fits, or is refused.


def _other(config, ids, change):
  """The config and the tokenizer with one thing changed."""
  if change == 'tokenizer':
    return config, dataclasses.replace(ids, digest='another')
  data = dataclasses.replace(config.data, **change)
  return dataclasses.replace(config, data=data), ids


@pytest.mark.parametrize('change, said', [
    (dict(seed=1), 'data.seed=0, not 1'),
    (dict(seq_len=12), 'data.seq_len=24, not 12'),
    (dict(batch=4), 'data.batch=8, not 4'),
    ('tokenizer', 'for another tokenizer'),
])
def test_guesses_of_another_run_are_refused(config, ids, saved, change, said):
  other = _other(config, ids, change)
  with tiny.refused(said, saved):
    reader(saved, *other)
  with tiny.refused(said, saved):
    teacher_cache.save(saved, facts(*other), None, top_k, rows=list(range(B)),
                 steps=range(1, 5))


def test_another_vocabulary_number_or_teacher_is_refused(config, ids, saved):
  with tiny.refused('V=32, not 33'):
    reader(saved, config, ids, V=33)
  for change, said in (
      (dict(best=5), 'best=4, not 5'), (dict(V=33), 'V=32, not 33'),
      (dict(teacher='here'), "teacher='there', not 'here'")):
    with tiny.refused(said):
      teacher_cache.save(saved, facts(config, ids, **change), None, top_k,
                   rows=list(range(B)), steps=range(1, 5))
  for best in (0, V + 1):
    with tiny.refused(f'best={best}', '1 to the vocabulary of 32'):
      facts(config, ids, best)


def test_steps_that_were_not_saved_are_refused(config, ids, saved, tmp_path):
  with tiny.refused(
      'lacks top-k logits for step 5', 'steps 1 to 6', '--last=6'):
    reader(saved, config, ids, 6)
  longer = dataclasses.replace(
      config, teacher=str(saved), optim=OptimConfig(steps=6, lr=0.01))
  with tiny.refused('lacks top-k logits for step 5'):
    train.train(longer, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_other_text_is_refused(config, ids, saved):
  batch = next(Stream(config.data, ids))
  batch['token_BT'][3, 0] += 1
  with tiny.refused('row 3 of step 1', 'other text'):
    reader(saved, config, ids)(1, batch)


def test_a_cache_of_the_same_text_is_the_same(config, ids, saved):
  data = dataclasses.replace(config.data, cache='somewhere')
  reader(saved, dataclasses.replace(config, data=data), ids)


def test_what_is_no_directory_of_guesses(config, ids, tmp_path):
  batch = next(Stream(config.data, ids))
  for directory in ('', config.teacher):
    assert reader(directory, config, ids)(1, batch) is batch
  (tmp_path / 'mine').write_text('kept')
  with tiny.refused('exists', tmp_path):
    save(tmp_path, config, ids)
  assert [path.name for path in tmp_path.iterdir()] == ['mine']


@pytest.mark.slow
def test_the_verbs(tmp_path):
  processes.write_files(tmp_path)
  def run(verb, *words):
    return subprocess.run(
        [sys.executable, '-m', 'recursive_tx', verb,
         f'--config=configs/quickstart.py:text={tmp_path}',
         '--config.data.seq_len=32', '--config.optim.steps=3',
         '--config.optim.warmup=1', *words],
        cwd=tiny.ROOT, capture_output=True,
        text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})

  output = f'--output={tmp_path}/top_k'
  done = run('teach', output, '--best=8', '--last=2')
  assert done.returncode == 0, done.stderr
  top_k = f'--config.teacher={tmp_path}/top_k'
  assert f'train with {top_k}' in done.stdout
  done = run('train', top_k, f'--workdir={tmp_path}/run')
  assert done.returncode == 1
  assert 'lacks top-k logits for step 3' in done.stderr.splitlines()[-1]
  done = run('teach', top_k, f'--output={tmp_path}/other')
  assert done.returncode == 1
  assert 'holds top-k logits; expected a model' in done.stderr.splitlines()[-1]
  assert run('teach', output, '--best=8').returncode == 0
  done = run('train', top_k, f'--workdir={tmp_path}/run')
  assert done.returncode == 0, done.stderr
  rows = log_lib.read_metrics(tmp_path / 'run')
  assert all(0 < row['train/distill/loop2'] < 20 for row in rows
             if 'train/loss' in row)
