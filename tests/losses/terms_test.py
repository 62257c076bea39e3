"""The loss against a loop over tokens, and what must not change it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_tx import losses
from recursive_tx.errors import UserError

L, B, T, D, V = 3, 2, 6, 5, 7
TERMS = ('next_token', 'distill', 'self_distill', 'gate')


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
      'gate': normal(L - 1, B, T),
      'batch': {
          'target_BT': rng.integers(0, V, (B, T)),
          'weight_BT': weight_BT,
      },
  }


def head_of(table):
  return losses.Head(table, lambda table, h: h @ table)


def total(config, arrays, chunk=0):
  return losses.total(
      config,
      arrays['h'],
      arrays['batch'],
      head_of(arrays['head']),
      norm=arrays['batch']['weight_BT'].sum(),
      teacher=(arrays['teacher_h'], head_of(arrays['teacher_head'])),
      gate_EBT=arrays['gate'],
      chunk=chunk,
  )


def gradients(config, arrays, chunk=0):
  """Of thrice the loss, with respect to all five float arrays."""
  names = ('h', 'head', 'teacher_h', 'teacher_head', 'gate')
  return jax.grad(
      lambda x: 3 * total(config, {**arrays, **x}, chunk)[0]
  )({name: arrays[name] for name in names})


def by_hand(arrays, divergence='forward_kl'):
  """{term: [mean nats of each loop]}, one token at a time, in float64."""
  def diverge(p, q):
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    return {
        'forward_kl': (np.exp(p) * (p - q)).sum(),
        'reverse_kl': (np.exp(q) * (q - p)).sum(),
        'jsd': ((np.exp(p) * (p - m)).sum()
                + (np.exp(q) * (q - m)).sum()) / 2,
        'tvd': np.abs(np.exp(p) - np.exp(q)).sum() / 2,
    }[divergence]

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
    sums['distill'][loop] += weight[b, t] * diverge(p, q)
    final = log_softmax(as64('h')[-1, b, t] @ as64('head'))
    sums['self_distill'][loop] += weight[b, t] * diverge(final, q)
    if loop < L - 1:
      p_gate = 1 / (1 + np.exp(-as64('gate')[loop, b, t]))
      leaves = final.argmax() == q.argmax()
      sums['gate'][loop] -= weight[b, t] * np.log(
          p_gate if leaves else 1 - p_gate)
  return {term: value / weight.sum() for term, value in sums.items()}


@pytest.mark.parametrize('divergence', losses.DIVERGENCES)
@pytest.mark.parametrize('chunk', [0, 2])
def test_equals_a_loop_over_tokens(arrays, chunk, divergence):
  config = losses.LossConfig(
      (0.5, 0.0, 2.0), (0.3, 1.0), (0.7, 0.0), divergence, (0.6, 0.2, 0.0))
  loss, metrics = total(config, arrays, chunk)
  expected = by_hand(arrays, divergence)
  keys = {'next_token/loop1': 0, 'next_token/loop3': 2, 'distill/loop2': 1,
          'distill/loop3': 2, 'self_distill/loop2': 1, 'gate/loop1': 0,
          'gate/loop2': 1}
  assert metrics.keys() == keys.keys()
  for key, loop in keys.items():
    mean = expected[key.split('/')[0]][loop]
    np.testing.assert_allclose(metrics[key], mean, rtol=1e-5)
  parts = (expected['next_token'] @ [0.5, 0, 2] + expected['distill'] @ [
      0, 0.3, 1] + expected['self_distill'] @ [0, 0.7, 0]
           + expected['gate'] @ [0.6, 0.2, 0])
  np.testing.assert_allclose(loss, parts, rtol=1e-5)
  assert loss.dtype == jnp.float32


def plain(config, arrays):
  """The loss as one would write it down, all logits at once."""
  weight_BT = arrays['batch']['weight_BT']
  logits = [h @ arrays['head'] for h in arrays['h']]
  teacher = arrays['teacher_h'] @ arrays['teacher_head']
  loss = 0.0
  best_LBT = [jnp.argmax(logits_BTV, axis=-1) for logits_BTV in logits]
  for term, weights in config.weights(L).items():
    for loop, (weight, logits_BTV) in enumerate(
        zip(weights, logits, strict=True)):
      if term == 'gate':
        sign_BT = jnp.where(best_LBT[loop] == best_LBT[-1], 1, -1)
        nats = jnp.logaddexp(0, -sign_BT * arrays['gate'][min(loop, L - 2)])
      elif term == 'next_token':
        nats = losses.next_token_nats(logits_BTV, arrays['batch']['target_BT'])
      else:
        target = teacher if term == 'distill' else logits[-1]
        nats = losses.divergence(config.divergence, logits_BTV, target)
      loss += weight * (nats * weight_BT).sum() / weight_BT.sum()
  return loss


@pytest.mark.parametrize('divergence', [
    'forward_kl', *(pytest.param(name, marks=pytest.mark.slow)
                    for name in losses.DIVERGENCES if name != 'forward_kl')])
def test_chunks_change_neither_loss_nor_gradients(arrays, divergence):
  config = losses.LossConfig(
      (0.1, 0.1, 1.0), (0.2, 0.5), (0.3, 0.4, 0.0), divergence,
      (0.2, 0.6, 0.0))
  names = ('h', 'head', 'teacher_h', 'teacher_head', 'gate')
  value, expected = jax.value_and_grad(
      lambda x: 3 * plain(config, {**arrays, **x})
  )({name: arrays[name] for name in names})
  for chunk in (0, 1, 3, 6):
    np.testing.assert_allclose(
        3 * total(config, arrays, chunk)[0], value, rtol=1e-6
    )
    chex.assert_trees_all_close(
        gradients(config, arrays, chunk), expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize('config', [
    losses.LossConfig(), losses.LossConfig((), gate=(1.0, 1.0, 0.0))])
def test_chunks_hold_no_logits_of_the_whole_batch(arrays, config):
  text = str(jax.make_jaxpr(
      lambda x: gradients(config, {**arrays, **x}, 2)
  )({'h': arrays['h'], 'gate': arrays['gate']}))
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
  chex.assert_trees_all_equal(found, expected)
  np.testing.assert_array_equal(found['h'][0], 0)


def test_loops_without_weight_do_not_meet_the_head(arrays):
  seen = []

  def logits(table, h):
    seen.append(h)
    return h @ table

  jax.make_jaxpr(lambda h: losses.total(
      losses.LossConfig((1.0, 0.0, 1.0)), h, arrays['batch'],
      losses.Head(arrays['head'], logits), norm=1.0)[0])(arrays['h'])
  once = len(seen)
  losses.total(
      losses.LossConfig((1.0, 1.0, 1.0)), arrays['h'], arrays['batch'],
      losses.Head(arrays['head'], logits), norm=1.0)
  assert 2 * (len(seen) - once) == 3 * once


def test_a_term_of_weight_0_changes_no_gradient(arrays):
  expected = gradients(losses.LossConfig((1.0,), ()), arrays)
  found = gradients(losses.LossConfig((0.0, 0.0, 1.0), (0.0,)), arrays)
  chex.assert_trees_all_equal(found, expected)


def test_tokens_of_weight_0_change_nothing(arrays):
  config = losses.LossConfig((1.0, 1.0, 1.0), (1.0,))
  expected = gradients(config, arrays)
  batch = dict(arrays['batch'])
  unused = batch['weight_BT'] == 0
  batch['target_BT'] = np.where(unused, 0, batch['target_BT'])
  found = gradients(config, {**arrays, 'batch': batch})
  chex.assert_trees_all_equal(found, expected)
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
          head_of(arrays['head']), norm=norm,
          teacher=(arrays['teacher_h'][rows],
                   head_of(arrays['teacher_head'])),
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
        (dict(next_token=(-1.0,)), 'is -1.0, .* at least 0'),
        (dict(divergence='forward_kll'), "mean 'forward_kl'"),
        (dict(self_distill=(0.1, 1.0)), 'make it 0'),
        (dict(gate=(1.0,)), 'which has no gate: make it 0'),
    ],
)
def test_bad_weights_are_refused(arrays, config, said):
  with pytest.raises(UserError, match=said):
    total(losses.LossConfig(**config), arrays)


def test_a_chunk_that_does_not_divide_is_refused(arrays):
  with pytest.raises(UserError, match='does not divide the 6 positions'):
    total(losses.LossConfig(), arrays, 4)


def test_the_final_loop_learns_nothing_from_the_earlier(arrays):
  config = losses.LossConfig((), (), (1.0, 0.0))
  found = gradients(config, arrays)
  np.testing.assert_array_equal(found['h'][-1], 0)
  assert np.abs(found['h'][-2]).max() > 1e-3


def test_the_gate_learns_from_the_loops_and_they_nothing_from_it(arrays):
  found = gradients(losses.LossConfig((), gate=(1.0, 0.5, 0.0)), arrays)
  for name in ('h', 'head', 'teacher_h', 'teacher_head'):
    np.testing.assert_array_equal(found[name], 0)
  used = arrays['batch']['weight_BT'] > 0
  assert (found['gate'][:, used] != 0).all()
  assert (found['gate'][:, ~used] == 0).all()


def test_logits_are_made_once_for_all_terms_of_a_loop(arrays):
  def made(**terms):
    seen = []

    def logits(table, h):
      seen.append(h)
      return h @ table

    losses.total(
        losses.LossConfig(**terms), arrays['h'], arrays['batch'],
        losses.Head(arrays['head'], logits), norm=1.0,
        gate_EBT=arrays['gate'])
    return len(seen)

  taught = made(next_token=(1.0,), self_distill=(1.0, 1.0, 0.0))
  assert made(next_token=(1.0,), self_distill=(1.0, 1.0, 0.0),
              gate=(1.0, 1.0, 0.0)) == taught
  assert made(next_token=(), gate=(1.0, 1.0, 0.0)) == taught


def test_a_missing_gate_is_refused(arrays):
  with pytest.raises(UserError, match='there is no gate'):
    losses.total(
        losses.LossConfig(gate=(1.0, 0.0)), arrays['h'], arrays['batch'],
        head_of(arrays['head']), norm=1.0,
    )


def test_a_missing_teacher_is_refused(arrays):
  with pytest.raises(UserError, match='no teacher'):
    losses.total(
        losses.LossConfig(distill=(1.0,)), arrays['h'], arrays['batch'],
        head_of(arrays['head']), norm=1.0,
    )


# What was saved of a teacher: its best ids and their log-probabilities.


def saved(arrays, C):
  """The arrays with the teacher's C best in the batch, and no teacher."""
  log_p_BTV = jax.nn.log_softmax(arrays['teacher_h'] @ arrays['teacher_head'])
  log_p_BTJ, id_BTJ = jax.lax.top_k(log_p_BTV, C)
  batch = {**arrays['batch'], 'teacher_id_BTJ': id_BTJ,
           'teacher_log_p_BTJ': log_p_BTJ}
  return {**arrays, 'batch': batch, 'teacher_h': arrays['teacher_h'] * np.nan}


def merged(logits_BTV, id_BTJ):
  """Logits of which all that are no ids are summed into one more."""
  V = logits_BTV.shape[-1]
  is_id_BTV = (id_BTJ[..., None] == jnp.arange(V)).any(axis=-2)
  rest_BT = jax.nn.logsumexp(
      jnp.where(is_id_BTV, -jnp.inf, logits_BTV), axis=-1)
  top_BTJ = jnp.take_along_axis(logits_BTV, id_BTJ, axis=-1)
  return jnp.concatenate([top_BTJ, rest_BT[..., None]], axis=-1)


@pytest.mark.parametrize('divergence', losses.DIVERGENCES)
def test_all_ids_saved_equal_the_teacher(arrays, divergence):
  config = losses.LossConfig((0.2,), (0.4, 1.0), (), divergence)
  found, expected = (
      jax.jit(jax.value_and_grad(lambda h, given=given: total(
          config, {**given, 'h': h}, 2)[0]))(arrays['h'])
      for given in (saved(arrays, V), arrays))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize('C', [2, V - 2])
@pytest.mark.parametrize('divergence', losses.DIVERGENCES)
def test_ids_that_are_not_saved_are_one_outcome(arrays, divergence, C):
  given = saved(arrays, C)['batch']
  teacher_BTV = arrays['teacher_h'] @ arrays['teacher_head']

  def by_hand(logits_BTV):
    return losses.divergence(
        divergence, merged(logits_BTV, given['teacher_id_BTJ']),
        merged(teacher_BTV, given['teacher_id_BTJ']))

  def ours(logits_BTV):
    return losses.top_divergence(
        divergence, logits_BTV, *(given[key] for key in losses.SAVED))

  logits_BTV = arrays['h'][-1] @ arrays['head']
  np.testing.assert_allclose(
      ours(logits_BTV), by_hand(logits_BTV), rtol=1e-4, atol=1e-6)
  found, expected = (
      jax.jit(jax.grad(lambda x, of=of: of(x).sum()))(logits_BTV)
      for of in (ours, by_hand))
  # 1 - sum_c p_c is known to 1e-7, of which 'reverse_kl' takes the log.
  np.testing.assert_allclose(found, expected, atol=3e-5)
  # Knowing less, it never finds more.
  full_BT = losses.divergence(divergence, logits_BTV, teacher_BTV)
  assert (np.asarray(ours(logits_BTV)) <= np.asarray(full_BT) + 1e-6).all()


def test_a_student_too_sure_of_the_ids_learns_of_the_others():
  # Its rest has a probability of 1e-13: no difference from 1 in fp32.
  logits = jnp.array([[[30.0, 0.0, 0.0, 0.0]]])
  ids, log_p = jnp.array([[[0]]]), jnp.log(jnp.array([[[0.7]]]))
  nats, d_logits = jax.value_and_grad(lambda x: losses.top_divergence(
      'forward_kl', x, ids, log_p).sum())(logits)
  entropy = 0.7 * np.log(0.7) + 0.3 * np.log(0.3)
  assert nats == pytest.approx(0.3 * (30 - np.log(3)) + entropy, rel=1e-5)
  np.testing.assert_allclose(d_logits, [[[0.3, -0.1, -0.1, -0.1]]], rtol=1e-5)


def test_saved_guesses_in_chunks_hold_no_logits_of_the_whole_batch(arrays):
  config = losses.LossConfig((), (0.5, 1.0))
  small = saved(arrays, 3)
  text = str(jax.make_jaxpr(
      lambda x: gradients(config, {**small, **x}, 2))({'h': arrays['h']}))
  assert f'{B},2,{V}]' in text
  assert f'{B},{T},{V}]' not in text
  # Nor is what the rest is made of ever laid out for every id saved.
  assert f'{B},2,3,{V}]' not in text


def test_an_earlier_loop_has_its_own_head_and_the_final_one_none(arrays):
  config = losses.LossConfig((0.1, 0.2, 1.0), (), (0.5, 0.3, 0.0))
  tables = np.stack([arrays['head'] * scale for scale in (1.0, 0.5, -2.0)])

  def of(head):
    return jax.jit(jax.value_and_grad(lambda tables: losses.total(
        config, arrays['h'], arrays['batch'], head(tables), norm=3.0,
        chunk=2)[0]))(tables)

  # The same by hidden states that a head for all takes alike.
  scaled = arrays['h'] * np.array([1.0, 0.5, -2.0])[:, None, None, None]
  value, d_tables = of(lambda tables: losses.Head(
      tables, lambda tables, h: h @ tables[2],
      # Never asked for the final one.
      lambda tables, h, loop: h @ tables[(0, 1)[loop]]))
  expected = losses.total(
      config, scaled.astype(np.float32), arrays['batch'],
      head_of(arrays['head']), norm=3.0)[0]
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert all(np.abs(table).max() > 1e-3 for table in d_tables)
