"""Exits are trained by weights: with distillation, or after all else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import history, losses, sharding, train
from recursive_tx.losses import LossConfig
from recursive_tx.optim import OptimConfig

CFG = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=4, layers_per_loop=1, loops=3, rank='q2')
B, T = 4, 6


pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def batch():
  return random_batch()


def random_batch():
  """Rows of one document, the first of them short."""
  token_BT = tiny.tokens(CFG, B, T + 1)
  weight_BT = np.ones((B, T), np.float32)
  weight_BT[0, 3:] = 0
  return {'token_BT': token_BT[:, :-1], 'target_BT': token_BT[:, 1:],
          'segment_BT': np.ones((B, T), np.int32),
          'position_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
          'weight_BT': weight_BT}


def run(cfg, loss, table=(('.*', 1.0, 0.0),), mesh=None):
  """A train.Config of no data but the shape of its batches."""
  base = processes.config('nowhere', data=dict(seq_len=T, batch=B))
  return dataclasses.replace(
      base, model=cfg, losses=loss, mesh=mesh or base.mesh,
      optim=OptimConfig(steps=9, lr=0.02, schedule='constant', table=table))


def stepped(config, variables, batch, steps, teacher=(None, None)):
  """The parameters after some steps on one batch, and every step's metrics."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    state = train.TrainState(
        jnp.int32(0), variables['params'], tx.init(variables['params']))
    state = sharding.place(
        jax.tree.map(np.asarray, state),
        jax.tree.map(lambda x: x.sharding, abstract))
    step = train.jit_step(config, mesh, tx, abstract, teacher[0])
    rows, found = sharding.place_rows(batch, mesh), []
    for _ in range(steps):
      state, metrics = step(state, rows, teacher[1])
      found.append(jax.tree.map(np.asarray, metrics))
  return jax.tree.map(np.asarray, state.params), found


@functools.cache
def logits_of(cfg, loop):
  """(variables, tokens) -> a loop's logits."""
  decoder = rtx.Decoder(cfg)

  def of(variables, token_BT):
    h_LBTD = decoder.apply(variables, token_BT, method='hidden')
    return decoder.apply(variables, h_LBTD[loop], loop, method='logits')

  return jax.jit(of)


# The paper's recipes, as weights.


WEIGHTED = (1 / 6, 2 / 6, 3 / 6)
AGGRESSIVE = (0.1, 0.1, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize('weights', [WEIGHTED, AGGRESSIVE])
def test_co_training_adds_exits_to_distillation(batch, weights):
  teacher = dataclasses.replace(CFG, loops=1, rank='0')
  loss = LossConfig(weights, (0.3, 0.5, 1.0), (0.7, 0.2, 0.0))
  values = tiny.variables(CFG)
  _, (found,) = stepped(run(CFG, loss), values, batch, 1,
                        (teacher, tiny.variables(teacher, 1)))
  expected = sum(
      weight * found[f'{term}/loop{loop + 1}']
      for term in losses.TERMS
      for loop, weight in enumerate(getattr(loss, term)) if weight)
  assert found['loss'] == pytest.approx(float(expected), rel=1e-5)
  assert len([name for name in found if '/loop' in name]) == 8
  # Against the model itself: its exits, and its final loop as a teacher.
  final = np.asarray(logits_of(CFG, 2)(values, batch['token_BT']))
  for loop in range(2):
    logits = logits_of(CFG, loop)(values, batch['token_BT'])
    for term, nats in (
        ('next_token', losses.next_token_nats(logits, batch['target_BT'])),
        ('self_distill', losses.divergence('forward_kl', logits, final))):
      mean = (nats * batch['weight_BT']).sum() / batch['weight_BT'].sum()
      assert found[f'{term}/loop{loop + 1}'] == pytest.approx(
          float(mean), rel=1e-4)


@pytest.mark.slow
def test_post_training_goes_on_from_another_run(tmp_path):
  processes.write_files(tmp_path)
  first = processes.config(
      tmp_path, optim=dict(steps=2), losses=dict(next_token=(1.0,)))
  before = train.train(first, str(tmp_path / 'first')).params
  after = dataclasses.replace(
      first, init_from=str(tmp_path / 'first'), tokenizer='',
      losses=LossConfig((0.1, 1.0), (), (0.1, 0.0)),
      optim=OptimConfig(steps=1, lr=1e-9))
  found = train.train(after, str(tmp_path / 'second')).params
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7),
               found, before)
  (row,) = [row for row in history.read_metrics(tmp_path / 'second')
            if 'train/loss' in row]
  assert row['train/loss'] == pytest.approx(
      0.1 * row['train/next_token/loop1'] + row['train/next_token/loop2']
      + 0.1 * row['train/self_distill/loop1'], rel=1e-5)
