"""The loop: it learns, it accumulates, it resumes bit for bit, it refuses."""

import dataclasses
import json
import shutil

import chex
from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

import recursive_tx as rtx
from recursive_tx import machine, train
from recursive_tx.data import DataConfig, Task
from recursive_tx.errors import UserError
from recursive_tx.losses.terms import LossConfig
from recursive_tx.store import checkpoint
from recursive_tx.train import log as log_lib
from recursive_tx.train.optim import OptimConfig

CFG = rtx.ModelConfig(
    V=32, D=16, F=32, N=4, K=2, H=4, layers_per_loop=1, loops=2, rank='2'
)
QUIET = log_lib.LogConfig(every=2, progress=False, tensorboard=False)
EVERY_STEP = checkpoint.CheckpointConfig(every=1, keep=0)
TABLE = (('.*kernel', 1.0, 1.0), ('.*', 1.0, 0.0))


pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('files')
  processes.write_files(folder, train=200)
  return folder


@pytest.fixture(scope='module')
def config(files) -> train.Config:
  task = Task('letters', 'jsonl', (f'{files}/train.jsonl',),
              heldout=(f'{files}/heldout.jsonl',))
  return train.Config(
      model=CFG,
      data=DataConfig((task,), seq_len=24, batch=8, shards=4, shuffle=16),
      optim=OptimConfig(steps=6, lr=0.02, warmup=2, table=TABLE),
      losses=LossConfig((0.3, 1.0)),
      tokenizer=str(files), checkpoint=EVERY_STEP, log=QUIET,
  )


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """A run that nothing interrupts: its workdir and last state."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train.train(config, str(workdir))


def changed(config, section, **values):
  part = dataclasses.replace(getattr(config, section), **values)
  return dataclasses.replace(config, **{section: part})


def assert_same(found, expected):
  chex.assert_trees_all_equal(found, expected)


def test_it_learns_and_says_so(whole, config):
  workdir, state = whole
  rows = log_lib.read_metrics(workdir)
  assert [row['step'] for row in rows] == [0, 2, 4, 6, 6]
  first, last = rows[0], rows[-1]
  for loop in (1, 2):
    # A fresh model knows nothing: at least ln 28 nats a token.
    assert first[f'eval/loop{loop}/loss'] > 3.2
    assert last[f'eval/loop{loop}/loss'] < first[f'eval/loop{loop}/loss']
  told = rows[2]
  assert told['train/loss'] == pytest.approx(
      0.3 * told['train/next_token/loop1'] + told['train/next_token/loop2'],
      rel=1e-5)
  assert int(state.step) == 6
  assert json.loads((workdir / 'config.json').read_text())['seed'] == 0


def test_it_leaves_a_model_and_its_tokenizer(whole):
  workdir, state = whole
  cfg, variables = rtx.restore(workdir / 'model')
  assert cfg == CFG
  assert_same(variables['params'], state.params)
  assert (workdir / 'model' / 'tokenizer.json').exists()


@pytest.mark.parametrize('stopped', [
    pytest.param(1, marks=pytest.mark.slow), 4])
def test_resumed_equals_never_interrupted(whole, config, tmp_path, stopped):
  workdir, expected = whole
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  for step in range(stopped + 1, 7):
    shutil.rmtree(tmp_path / 'checkpoints' / str(step))
  shutil.rmtree(tmp_path / 'model')
  state = train.train(config, str(tmp_path))
  assert_same(state, expected)
  assert_same(rtx.restore(tmp_path / 'model')[1],
              rtx.restore(workdir / 'model')[1])
  # The history is that of one run.
  rows, others = (log_lib.read_metrics(w) for w in (tmp_path, workdir))
  assert [row['step'] for row in rows] == [row['step'] for row in others]
  assert rows[-1] == others[-1]


def test_a_finished_run_has_nothing_left_to_do(whole, config, tmp_path):
  workdir, expected = whole
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  assert_same(train.train(config, str(tmp_path)), expected)
  assert log_lib.read_metrics(tmp_path) == log_lib.read_metrics(workdir)


def test_another_run_in_its_workdir_is_refused(whole, config):
  workdir, _ = whole
  before = sorted(workdir.rglob('*'))
  other = changed(config, 'optim', lr=0.01)
  with pytest.raises(UserError, match=r'optim.lr 0.02 -> 0.01.*init_from='):
    train.train(other, str(workdir))
  assert sorted(workdir.rglob('*')) == before


@pytest.mark.slow
def test_a_run_starts_from_another_ones_weights(whole, config, tmp_path):
  workdir, before = whole
  other = dataclasses.replace(
      config, init_from=str(workdir), tokenizer='', seed=9,
      optim=OptimConfig(steps=1, lr=1e-9, table=TABLE))
  state = train.train(other, str(tmp_path))
  chex.assert_trees_all_close(
      state.params, before.params, rtol=1e-7, atol=1e-7)
  assert (tmp_path / 'model' / 'tokenizer.json').exists()


def first_step(config, batch):
  """The fresh state, the state after a step on the batch, and its metrics."""
  config = changed(config, 'data', seq_len=batch['token_BT'].shape[1])
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    state = train.first_state(config, tx, abstract)
    step = jax.jit(train.make_step(config, mesh, tx))
    return state, *step(state, batch, None)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(1)
  token_BT = rng.integers(0, 28, (8, 13), np.int32)
  # Rows differ in how many targets count, so that means of parts would not
  # give the mean of the whole.
  weight_BT = (np.arange(12) < rng.integers(1, 12, (8, 1))).astype(np.float32)
  return {
      'token_BT': token_BT[:, :-1], 'target_BT': token_BT[:, 1:],
      'segment_BT': np.ones((8, 12), np.int32),
      'position_BT': np.tile(np.arange(12, dtype=np.int32), (8, 1)),
      'weight_BT': weight_BT,
  }


@pytest.fixture(scope='module')
def stepped(config, batch):
  return first_step(config, batch)


def test_the_loss_is_a_mean_over_tokens(config, batch, stepped):
  before, _, metrics = stepped
  apply = jax.jit(rtx.Decoder(CFG).apply)
  logits_BTV = np.asarray(
      apply({'params': before.params}, batch['token_BT']), np.float64)
  nats, tokens = 0.0, 0.0
  for b, t in np.argwhere(batch['weight_BT']):
    logits_V = logits_BTV[b, t]
    nats += np.log(np.exp(logits_V).sum()) - logits_V[batch['target_BT'][b, t]]
    tokens += 1
  assert metrics['next_token/loop2'] == pytest.approx(nats / tokens, rel=1e-5)
  assert metrics['lr'] == pytest.approx(0.01)
  assert metrics['grad_norm'] > 0


def test_parts_of_a_batch_equal_the_batch(config, batch, stepped):
  _, expected, metrics = stepped
  parts = changed(config, 'optim', accumulate=4)
  _, found, others = first_step(parts, batch)
  for key in metrics:
    np.testing.assert_allclose(others[key], metrics[key], rtol=1e-5)
  # After one step AdamW's moments are the gradient and its square; the
  # parameters would show only its sign.
  chex.assert_trees_all_close(
      found.opt_state, expected.opt_state, rtol=1e-4, atol=1e-7)


def test_frozen_parameters_stay_and_the_others_move(config, batch):
  table = (('adapters/.*/[ab]', 1.0, 0.0), ('.*', 0.0, 0.0))
  frozen = changed(config, 'optim', table=table)
  before, after, _ = first_step(frozen, batch)
  for path, x in jax.tree_util.tree_leaves_with_path(before.params):
    y = after.params
    for key in path:
      y = y[key.key]
    # At the start `b` is 0, and with it the gradient of `a`.
    moves = path[0].key == 'adapters' and path[-1].key == 'b'
    assert np.array_equal(x, y) != moves, path


@pytest.mark.slow
def test_full_rank_has_nothing_to_learn_from_its_source(config, tmp_path):
  source = dataclasses.replace(
      CFG, loops=1, layers_per_loop=2, rank='0')
  params = rtx.Decoder(source).init(
      jax.random.key(3), jnp.zeros((1, 4), jnp.int32))['params']
  params = jax.tree.map(np.asarray, meta.unbox(params))
  rtx.save(tmp_path / 'source', source, {'params': params},
           companions=None)
  found = {}
  for rank in ('full', '0'):
    run = dataclasses.replace(
        config, init_from=str(tmp_path / 'source'),
        teacher=str(tmp_path / 'source'),
        model=dataclasses.replace(CFG, rank=rank),
        losses=LossConfig((), (1.0,)),
        optim=OptimConfig(steps=1, lr=1e-9, table=TABLE))
    train.train(run, str(tmp_path / rank))
    row = log_lib.read_metrics(tmp_path / rank)[1]
    found[rank] = row['train/distill/loop2']
    assert row['train/loss'] == found[rank]
  assert abs(found['full']) < 1e-5
  assert found['0'] > 1e-2


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        (dict(losses=LossConfig((), (1.0,))), 'no teacher.*--config.teacher='),
        (dict(teacher='x'), 'give it a weight'),
        (dict(losses=LossConfig((1.0,) * 3)), 'has 2 loops'),
        (dict(tokenizer=''), '--config.tokenizer='),
        (dict(optim=OptimConfig(steps=1, lr=1.0, accumulate=3)),
         'does not divide data.batch, 8'),
        (dict(model=dataclasses.replace(CFG, V=16)), 'embeds only 16'),
        (dict(mesh=machine.MeshConfig(tensor=2)), 'does not multiply'),
        (dict(init_from='nowhere'), 'nowhere'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config, tmp_path, changes, said
):
  with pytest.raises(UserError, match=said) as error:
    train.train(dataclasses.replace(config, **changes), str(tmp_path / 'w'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'w').exists()


def test_init_from_another_model_is_refused(config, whole, tmp_path):
  workdir, _ = whole
  other = dataclasses.replace(
      config, init_from=str(workdir), losses=LossConfig(),
      model=dataclasses.replace(CFG, loops=1))
  with pytest.raises(UserError, match='loops=2'):
    train.train(other, str(tmp_path / 'w'))
