"""Exits are trained by weights: with distillation, or after all else."""

import dataclasses

from exit_training import CFG, logits_of, random_batch, run, stepped
import jax
import numpy as np
import processes
import pytest
import tiny

from recursive_tx import losses, train
from recursive_tx.losses.terms import LossConfig
from recursive_tx.train import log as log_lib
from recursive_tx.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def batch():
  return random_batch()


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
  (row,) = [row for row in log_lib.read_metrics(tmp_path / 'second')
            if 'train/loss' in row]
  assert row['train/loss'] == pytest.approx(
      0.1 * row['train/next_token/loop1'] + row['train/next_token/loop2']
      + 0.1 * row['train/self_distill/loop1'], rel=1e-5)
