"""AdamW by hand, the schedule's values, and a row for every parameter."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recursive_tx.errors import UserError
from recursive_tx.train import optim

TABLE = (('norm/.*', 1.0, 0.0), ('.*/slow', 0.5, 1.0), ('.*', 1.0, 1.0))


@pytest.fixture
def params():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
      'block': {'kernel': normal(2, 3), 'slow': normal(4)},
      'norm': {'scale': normal(3)},
  }


def grads_like(params, seed, size=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.normal(0, size, x.shape), jnp.float32), params
  )


def run(config, params, all_grads):
  tx = optim.make(config, params)
  state = tx.init(params)
  for grads in all_grads:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_warmup_then_cosine():
  config = optim.OptimConfig(steps=110, lr=1.0, warmup=10, min_ratio=0.2)

  def rate(step):
    return float(optim.learning_rate(config, step))

  assert rate(0) == pytest.approx(0.1)
  assert rate(4) == pytest.approx(0.5)
  assert rate(9) == pytest.approx(1.0)
  assert rate(59) == pytest.approx(0.6)  # Halfway: (1 + 0.2) / 2.
  assert rate(34) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
  assert rate(109) == pytest.approx(0.2)
  assert rate(500) == pytest.approx(0.2)


def test_warmup_then_constant():
  config = optim.OptimConfig(steps=20, lr=3.0, warmup=3, schedule='constant')
  rates = [float(optim.learning_rate(config, step)) for step in range(20)]
  np.testing.assert_allclose(rates, [1, 2] + [3] * 18)


def test_no_warmup_starts_at_the_peak():
  config = optim.OptimConfig(steps=10, lr=2.0, schedule='constant')
  assert float(optim.learning_rate(config, 0)) == 2.0


def test_equals_adamw_by_hand(params):
  config = optim.OptimConfig(
      steps=10, lr=0.1, warmup=2, clip=1.0, weight_decay=0.3, b1=0.8, b2=0.9,
      eps=1e-3, table=TABLE,
  )
  # The first gradient is clipped, the second is not.
  all_grads = [grads_like(params, 1), grads_like(params, 2, 0.05)]
  found, _ = run(config, params, all_grads)

  rows = {'kernel': (1, 1), 'slow': (0.5, 1), 'scale': (1, 0)}

  def flat(tree):
    return {
        path[-1].key: np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }

  expected = flat(params)
  m = {name: np.zeros(x.shape) for name, x in expected.items()}
  v = {name: np.zeros(x.shape) for name, x in expected.items()}
  for step, grads in enumerate(map(flat, all_grads), 1):
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    assert (norm > 1) == (step == 1)
    rate = float(optim.learning_rate(config, step - 1))
    for name, (lr, decay) in rows.items():
      g = grads[name] / max(norm, 1.0)
      m[name] = 0.8 * m[name] + 0.2 * g
      v[name] = 0.9 * v[name] + 0.1 * g * g
      update = (m[name] / (1 - 0.8**step)) / (
          np.sqrt(v[name] / (1 - 0.9**step)) + 1e-3
      )
      expected[name] = expected[name] - rate * lr * (
          update + 0.3 * decay * expected[name]
      )
  for name, value in flat(found).items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6)


def test_clip_0_does_not_clip(params):
  config = optim.OptimConfig(steps=9, lr=0.1, clip=0.0, table=TABLE)
  huge = optim.OptimConfig(steps=9, lr=0.1, clip=1e9, table=TABLE)
  grads = [grads_like(params, 1, 100.0)] * 2
  chex.assert_trees_all_equal(
      run(config, params, grads)[0], run(huge, params, grads)[0])


def test_frozen_parameters_do_not_move_weigh_or_cost(params):
  table = (('block/kernel', 0.0, 1.0), *TABLE)
  config = optim.OptimConfig(steps=9, lr=0.1, table=table)
  grads = grads_like(params, 1)
  found, state = run(config, params, [grads] * 3)
  np.testing.assert_array_equal(
      found['block']['kernel'], params['block']['kernel'])
  assert not np.array_equal(found['block']['slow'], params['block']['slow'])
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert shapes.count((2, 3)) == 0 and shapes.count((4,)) == 2

  # Neither the norm that is told nor the one that clips sees them.
  loud = {**grads, 'block': {**grads['block'], 'kernel': jnp.full((2, 3), 1e9)}}
  told = optim.gradient_norm(config, loud)
  rest = [grads['block']['slow'], grads['norm']['scale']]
  np.testing.assert_allclose(told, optax.tree.norm(rest), rtol=1e-6)
  chex.assert_trees_all_equal(run(config, params, [loud] * 3)[0], found)


def test_the_first_matching_row_wins(params):
  one = optim.OptimConfig(steps=9, lr=0.1, table=TABLE)
  other = optim.OptimConfig(steps=9, lr=0.1, table=TABLE[::-1])
  grads = [grads_like(params, 1)]
  block, other_block = (
      run(config, params, grads)[0]['block'] for config in (one, other))
  assert np.array_equal(block['kernel'], other_block['kernel'])
  assert not np.array_equal(block['slow'], other_block['slow'])


def test_a_parameter_without_a_row_is_named(params):
  # A pattern has to match the whole name, not a part of it.
  table = (('norm', 1.0, 1.0), ('block/(kernel|slow)', 1.0, 1.0))
  with pytest.raises(UserError, match="'norm/scale' matches no row"):
    optim.make(optim.OptimConfig(steps=1, lr=1.0, table=table), params)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        (dict(schedule='cosin'), "did you mean 'cosine'"),
        (dict(warmup=11), 'expected 0 to optim.steps, 10'),
        (dict(accumulate=0), 'of at least 1'),
        (dict(table=(('.*', 1.0),)), 'expected .pattern, lr, decay'),
        (dict(table=('.*',)), 'expected .pattern, lr, decay'),
        (dict(table=(('(', 1.0, 1.0),)), 'not a regular expression'),
        (dict(table=((1, 1.0, 1.0),)), 'not a regular expression'),
        (dict(table=(('.*', -1.0, 1.0),)), 'its lr is -1.0, .* at least 0'),
        (dict(table=(('.*', 1.0, math.nan),)), 'its decay is nan'),
        (dict(table=(('.*', 0.0, 1.0),)), 'freezes every parameter'),
    ],
)
def test_bad_settings_are_refused(params, changes, said):
  with pytest.raises(UserError, match=said):
    optim.make(optim.OptimConfig(**dict(steps=10, lr=1.0) | changes), params)
