"""Laws of attention: both ways equal brute force, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from recursive_tx.model import attention

SCALE = 0.3
CAP = 0.7


def _brute_force(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap=0):
  """One query, one head at a time, in fp64."""
  B, T, N, H = q_BTNH.shape
  out = np.zeros(q_BTNH.shape)
  for b in range(B):
    for t in range(T):
      for n in range(N):
        key = n // (N // k_BSKH.shape[2])
        seen = np.flatnonzero(mask_BTS[b % len(mask_BTS), t])
        score = k_BSKH[b, seen, key].astype(float) @ q_BTNH[b, t, n] * SCALE
        if cap:
          score = cap * np.tanh(score / cap)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ v_BSKH[b, seen, key]
  return out


def _case(T, window, segments):
  rng = np.random.default_rng(0)
  q_BTNH, k_BSKH, v_BSKH = (
      rng.normal(size=(2, T, heads, 4)).astype(np.float32)
      for heads in (4, 2, 2))
  place_1T = np.arange(T)[None]
  segment_BT = None
  if segments:
    segment_BT = np.sort(rng.integers(1, 4, (2, T)), axis=1)
  mask_BTS = attention.visible(
      place_1T, place_1T, window=window, segment_BT=segment_BT)
  return q_BTNH, k_BSKH, v_BSKH, np.asarray(mask_BTS), segment_BT


@pytest.mark.parametrize('implementation', ['plain', 'blocks'])
@pytest.mark.parametrize(
    'T, window, segments',
    [(7, 0, False), (64, 0, True), (150, 20, True), (150, 0, False)])
def test_equals_brute_force(T, window, segments, implementation):
  q, k, v, mask, segment = _case(T, window, segments)
  for cap in (0, CAP):
    out = attention.attend(
        q, k, v, mask_BTS=mask, segment_BT=segment, window=window,
        scale=SCALE, cap=cap, implementation=implementation)
    assert tiny.distance(out, _brute_force(q, k, v, mask, cap)) < 1e-5


@pytest.mark.parametrize('implementation, window', [
    ('splash', 0), ('splash', 20), ('pallas', 0)])
def test_emulated_kernels_equal_brute_force(implementation, window):
  if implementation == 'splash' and jax.default_backend() == 'gpu':
    pytest.skip('JAX emulates kernels for TPUs on CPUs only')
  q, k, v, mask, segment = _case(128, window, True)
  assert attention.choose(
      implementation, T=128, S=128, window=window) == implementation
  out = attention.attend(
      q, k, v, mask_BTS=mask, segment_BT=segment, window=window,
      scale=SCALE, implementation=implementation)
  assert tiny.distance(out, _brute_force(q, k, v, mask)) < 1e-5


def test_kernels_are_chosen_where_they_cover_the_case():
  def choose(platform, T, window=0, S=None, implementation='auto', cap=0):
    return attention.choose(implementation, T=T, S=S or T, window=window,
                            cap=cap, platform=platform)

  assert choose('tpu', 256) == choose('tpu', 256, window=9) == 'splash'
  assert choose('gpu', 256) == 'pallas'
  assert choose('gpu', 256, window=9) == choose('cpu', 256) == 'blocks'
  assert choose('tpu', 200) == 'blocks'
  assert choose('tpu', 1, S=256) == choose('cpu', 64) == 'plain'
  assert choose('cpu', 1, S=256, implementation='splash') == 'plain'
  # No kernel has a cap.
  assert choose('tpu', 256, cap=CAP) == choose(
      'tpu', 256, implementation='splash', cap=CAP) == 'blocks'


@pytest.mark.parametrize('implementation, T, window, cap', [
    ('blocks', 150, 20, 0), ('blocks', 65, 0, CAP), ('splash', 128, 20, 0),
    ('pallas', 128, 0, 0)])
def test_gradients_equal_those_of_plain(implementation, T, window, cap):
  q, k, v, mask, segment = _case(T, window, True)
  pull = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

  def gradients(implementation):
    return tiny.jit(jax.grad(
        lambda *qkv: jnp.sum(pull * attention.attend(
            *qkv, mask_BTS=mask, segment_BT=segment, window=window,
            scale=SCALE, cap=cap, implementation=implementation)),
        argnums=(0, 1, 2)))(q, k, v)

  for ours, plain in zip(
      gradients(implementation), gradients('plain'), strict=True):
    assert tiny.distance(ours, plain) < 1e-5


def test_blocks_never_hold_all_scores():
  q, k, v, mask, _ = _case(512, 0, False)
  step = jax.grad(lambda q: attention.attend(
      q, k, v, mask_BTS=mask, window=0, scale=SCALE,
      implementation='blocks').sum())
  largest = max(
      np.prod(shape.aval.shape) for equation in _equations(
          jax.make_jaxpr(step)(q).jaxpr) for shape in equation.outvars)
  assert largest < 2 * 4 * 512 * 512 / 4


def test_a_query_that_sees_nothing_is_not_nan():
  q, k, v, mask, _ = _case(5, 0, False)
  out = attention.attend(
      q, k, v, mask_BTS=np.zeros_like(mask), window=0, scale=SCALE,
      implementation='plain')
  assert np.isfinite(out).all()


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from _equations(inner)
