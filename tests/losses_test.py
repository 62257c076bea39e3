"""The loss against a loop over tokens, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_tx import losses

L, B, T, D, V = 3, 2, 6, 5, 7
TERMS = ('next_token', 'distill')


@pytest.fixture
def arrays():
  """Hidden states, a batch with some weights 0, heads of both models."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  weight_BT = np.ones((B, T), np.float32)
  weight_BT[0, 4:] = 0
  weight_BT[1, 0] = 0.5
  return {
      'h': normal(L, B, T, D),
      'head': normal(D, V),
      'teacher_h': normal(B, T, D + 1),
      'teacher_head': normal(D + 1, V),
      'batch': {
          'target_BT': rng.integers(0, V, (B, T)),
          'weight_BT': weight_BT,
      },
  }


def total(config, arrays):
  return losses.total(
      config,
      arrays['h'],
      arrays['batch'],
      lambda h: h @ arrays['head'],
      norm=arrays['batch']['weight_BT'].sum(),
      teacher=(arrays['teacher_h'], lambda h: h @ arrays['teacher_head']),
  )


def gradients(config, arrays):
  """Of the loss, with respect to all four float arrays."""
  names = ('h', 'head', 'teacher_h', 'teacher_head')
  return jax.grad(
      lambda x: total(config, {**arrays, **x})[0]
  )({name: arrays[name] for name in names})


def by_hand(arrays):
  """{term: [mean nats of each loop]}, one token at a time, in float64."""
  def log_softmax(x):
    return x - np.log(np.exp(x).sum())

  def as64(name):
    return arrays[name].astype(np.float64)

  sums = {term: np.zeros(L) for term in TERMS}
  target, weight = (arrays['batch'][k] for k in ('target_BT', 'weight_BT'))
  for loop, b, t in np.ndindex(L, B, T):
    q = log_softmax(as64('h')[loop, b, t] @ as64('head'))
    p = log_softmax(as64('teacher_h')[b, t] @ as64('teacher_head'))
    sums['next_token'][loop] += weight[b, t] * -q[target[b, t]]
    sums['distill'][loop] += weight[b, t] * (np.exp(p) * (p - q)).sum()
  return {term: value / weight.sum() for term, value in sums.items()}


@pytest.mark.parametrize('chunk', [0, 2])
def test_equals_a_loop_over_tokens(arrays, chunk):
  config = losses.LossConfig((0.5, 0.0, 2.0), (0.3, 1.0), chunk)
  loss, metrics = total(config, arrays)
  expected = by_hand(arrays)
  keys = {'next_token/loop1': 0, 'next_token/loop3': 2,
          'distill/loop2': 1, 'distill/loop3': 2}
  assert metrics.keys() == keys.keys()
  for key, loop in keys.items():
    mean = expected[key.split('/')[0]][loop]
    np.testing.assert_allclose(metrics[key], mean, rtol=1e-5)
  parts = expected['next_token'] @ [0.5, 0, 2] + expected['distill'] @ [
      0, 0.3, 1]
  np.testing.assert_allclose(loss, parts, rtol=1e-5)
  assert loss.dtype == jnp.float32


def test_chunks_change_neither_loss_nor_gradients(arrays):
  whole = losses.LossConfig((0.1, 0.1, 1.0), (0.2, 0.5))
  expected = gradients(whole, arrays)
  for chunk in (1, 3, 6):
    config = losses.LossConfig(whole.next_token, whole.distill, chunk)
    np.testing.assert_allclose(
        total(config, arrays)[0], total(whole, arrays)[0], rtol=1e-6
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        gradients(config, arrays), expected,
    )


def test_chunks_hold_no_logits_of_the_whole_batch(arrays):
  config = losses.LossConfig(chunk=2)
  text = str(jax.make_jaxpr(lambda x: gradients(config, {**arrays, **x}))(
      {'h': arrays['h']}
  ))
  assert f'{B},2,{V}]' in text
  assert f'{B},{T},{V}]' not in text
  # Nor are those of the chunks kept for the backward pass.
  assert f'{T // 2},{B},2,{V}]' not in text


def test_a_loop_of_weight_0_is_not_even_looked_at(arrays):
  # Whatever a loop without weight holds, NaN included, must not be felt; a
  # multiplication by 0 would be.
  config = losses.LossConfig((0.0, 1.0), (1.0,))
  expected = gradients(config, arrays)
  h = arrays['h'].copy()
  h[0] = np.nan
  found = gradients(config, {**arrays, 'h': h})
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_array_equal(found['h'][0], 0)


def test_loops_without_weight_do_not_meet_the_head(arrays):
  seen = []

  def head(h):
    seen.append(h)
    return h @ arrays['head']

  losses.total(
      losses.LossConfig((1.0, 0.0, 1.0)), arrays['h'], arrays['batch'], head,
      norm=1.0)
  assert len(seen) == 2


def test_a_term_of_weight_0_changes_no_gradient(arrays):
  expected = gradients(losses.LossConfig((1.0,), ()), arrays)
  found = gradients(losses.LossConfig((0.0, 0.0, 1.0), (0.0,)), arrays)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tokens_of_weight_0_change_nothing(arrays):
  config = losses.LossConfig((1.0, 1.0, 1.0), (1.0,))
  expected = gradients(config, arrays)
  batch = dict(arrays['batch'])
  unused = batch['weight_BT'] == 0
  batch['target_BT'] = np.where(unused, 0, batch['target_BT'])
  found = gradients(config, {**arrays, 'batch': batch})
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_array_equal(found['h'][:, unused], 0)


def test_distillation_teaches_the_student_only(arrays):
  config = losses.LossConfig((), (1.0,))
  found = gradients(config, arrays)
  np.testing.assert_array_equal(found['teacher_h'], 0)
  np.testing.assert_array_equal(found['teacher_head'], 0)
  assert np.abs(found['h'][-1]).max() > 1e-3


def test_a_student_like_its_teacher_has_nothing_to_learn(arrays):
  same = {**arrays, 'teacher_h': arrays['h'][-1],
          'teacher_head': arrays['head']}
  config = losses.LossConfig((), (1.0,))
  np.testing.assert_allclose(total(config, same)[0], 0, atol=1e-6)
  np.testing.assert_allclose(gradients(config, same)['h'], 0, atol=1e-6)
  assert total(config, arrays)[0] > 0.1


def test_losses_of_parts_add_up(arrays):
  config = losses.LossConfig((1.0, 1.0, 1.0), (1.0,))
  norm = arrays['batch']['weight_BT'].sum()
  parts = [
      losses.total(
          config, arrays['h'][:, rows],
          {k: v[rows] for k, v in arrays['batch'].items()},
          lambda h: h @ arrays['head'], norm=norm,
          teacher=(arrays['teacher_h'][rows],
                   lambda h: h @ arrays['teacher_head']),
      )[0]
      for rows in (slice(0, 1), slice(1, 2))
  ]
  np.testing.assert_allclose(
      sum(parts), total(config, arrays)[0], rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.full((1, 1, 4096), 3.0, jnp.bfloat16)
  nats = losses.next_token_nats(logits, jnp.zeros((1, 1), jnp.int32))
  np.testing.assert_allclose(nats, np.log(4096), rtol=1e-6)


@pytest.mark.parametrize(
    ('config', 'said'),
    [
        (dict(next_token=(1.0,) * 4), 'has 3 loops'),
        (dict(next_token=()), 'Every weight in losses is 0'),
        (dict(next_token=(0.0, 0.0)), 'Every weight in losses is 0'),
        (dict(next_token=(-1.0,)), '0 or more'),
        (dict(chunk=4), 'does not divide the 6 positions'),
        (dict(chunk=-1), '0 or more'),
    ],
)
def test_bad_weights_are_refused(arrays, config, said):
  with pytest.raises(ValueError, match=said):
    total(losses.LossConfig(**config), arrays)


def test_a_missing_teacher_is_refused(arrays):
  with pytest.raises(ValueError, match='no teacher'):
    losses.total(
        losses.LossConfig(distill=(1.0,)), arrays['h'], arrays['batch'],
        lambda h: h @ arrays['head'], norm=1.0,
    )
