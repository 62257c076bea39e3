"""Training with tokens that leave early: those that go on read their keys."""

import dataclasses

import exit_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import losses, machine
from recursive_tx.errors import UserError
from recursive_tx.exits import forward
from recursive_tx.losses.terms import LossConfig
from recursive_tx.train import step as step_lib

CFG = exit_training.CFG

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def batch():
  return exit_training.random_batch()


@pytest.fixture(scope='module')
def variables():
  return tiny.variables(CFG)


def hidden(variables, batch, depth_BT, unroll=False):
  decoder = rtx.Decoder(CFG, rtx.Run(unroll=unroll))
  return jax.jit(lambda variables, batch, depth_BT: decoder.apply(
      variables, batch['token_BT'], batch['segment_BT'], batch['position_BT'],
      depth_BT, method='hidden'))(variables, batch, depth_BT)


def test_tokens_leave_as_an_engine_has_them_leave(variables, batch):
  pass_at, exits = forward.forward(CFG, rtx.Run(), 'top'), CFG.loops - 1
  score_EBT = pass_at(variables, batch, np.full(exits, np.inf)).score_EBT
  passed = pass_at(variables, batch, np.full(exits, np.median(score_EBT)))
  assert len(np.unique(passed.depth_BT)) == CFG.loops
  h_BTD = hidden(variables, batch, passed.depth_BT)[-1]
  logits_BTV = rtx.Decoder(CFG).apply(variables, h_BTD, method='logits')
  np.testing.assert_array_equal(logits_BTV.argmax(-1), passed.best_BT)
  full_BTD = hidden(variables, batch, None)[-1]
  # Those that go on see the keys of those that left.
  stays_BT = np.array(passed.depth_BT) == CFG.loops
  assert np.abs(np.array(h_BTD - full_BTD))[stays_BT].max() > 1e-3


@pytest.mark.parametrize('unroll', [False, True])
def test_what_left_stays_as_it_was(variables, batch, unroll):
  depth_BT = np.random.default_rng(0).integers(
      1, CFG.loops + 1, batch['token_BT'].shape)
  h_LBTD = np.array(hidden(variables, batch, depth_BT, unroll))
  for loop in range(1, CFG.loops):
    left_BT = depth_BT <= loop
    np.testing.assert_array_equal(
        h_LBTD[loop][left_BT], h_LBTD[loop - 1][left_BT])
    assert (h_LBTD[loop][~left_BT] != h_LBTD[loop - 1][~left_BT]).any()
  np.testing.assert_array_equal(
      hidden(variables, batch, np.full_like(depth_BT, CFG.loops), unroll),
      hidden(variables, batch, None, unroll))


def test_a_token_that_left_has_no_final_output_to_compare_with(batch):
  rng = np.random.default_rng(1)
  h_LBTD = rng.normal(size=(CFG.loops, *batch['token_BT'].shape, CFG.D)).astype(
      np.float32)
  gate_EBT = rng.normal(size=h_LBTD.shape[:-1])[:-1].astype(np.float32)
  depth_BT = rng.integers(1, CFG.loops + 1, batch['token_BT'].shape)
  head = losses.Head(
      rng.normal(size=(CFG.D, CFG.V)).astype(np.float32), lambda p, h: h @ p)
  def terms(config, **changes):
    return losses.total(config, h_LBTD, {**batch, **changes}, head, norm=9.0,
                        gate_EBT=gate_EBT)[1]
  some = LossConfig(next_token=(), self_distill=(1., 1., 0.), gate=(1., 1., 0.))
  whole_BT = batch['weight_BT'] * (depth_BT == CFG.loops)
  assert 0 < whole_BT.sum() < batch['weight_BT'].sum()
  assert terms(some, depth_BT=depth_BT) == terms(some, weight_BT=whole_BT)
  every = LossConfig(next_token=(1., 1., 1.))
  assert terms(every, depth_BT=depth_BT) == terms(every)


def test_a_share_of_the_sequences_leaves(batch):
  config = exit_training.run(CFG, LossConfig(early=0.25))
  rows = {'weight_BT': np.ones((400, 30), np.float32)}
  depth_BT = np.array(step_lib._depths(config, jnp.int32(3), rows))
  leaves_B = (depth_BT < CFG.loops).any(axis=1)
  assert 60 < leaves_B.sum() < 140
  counts = np.bincount(depth_BT[leaves_B].ravel(), minlength=CFG.loops + 1)
  np.testing.assert_allclose(
      counts / counts.sum(), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.05)
  np.testing.assert_array_equal(
      depth_BT, step_lib._depths(config, jnp.int32(3), rows))
  assert (depth_BT != step_lib._depths(config, jnp.int32(4), rows)).any()


@pytest.mark.slow
def test_a_step_learns_from_what_left(variables, batch):
  metrics = []
  for share in (0.0, 1.0):
    config = exit_training.run(CFG, LossConfig(
        next_token=(0.0, 0.0, 1.0), early=share))
    _, first = exit_training.stepped(config, variables, batch, 1)
    metrics.append(first[0])
  mesh = machine.make_mesh(config.mesh)
  depth_BT = step_lib._depths(config, jnp.int32(0), batch)
  with jax.set_mesh(mesh):
    h_LBTD, _, head = step_lib.forward(config, CFG, mesh, early=True)(
        variables, {**batch, 'depth_BT': depth_BT})
    loss, _ = losses.total(
        config.losses, h_LBTD, batch, head, norm=batch['weight_BT'].sum())
  np.testing.assert_allclose(metrics[1]['loss'], loss, rtol=1e-6)
  assert abs(metrics[0]['loss'] - metrics[1]['loss']) > 1e-4


def test_a_share_is_from_0_to_1():
  for share in (-0.1, 1.5):
    with pytest.raises(UserError, match='losses.early'):
      dataclasses.replace(LossConfig(), early=share)
