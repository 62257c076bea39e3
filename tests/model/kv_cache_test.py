"""Decoding with a cache equals the full forward, at any loop of any row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.engine import weights
from recursive_tx.model import kv_cache

B, T = 2, 12
ROWS = np.arange(B, dtype=np.int32)
# Distances are shares of max(1, max |logit|).
ROUNDING = 1e-5


@functools.cache
def _decode(cfg, run=None):
  module = rtx.Decoder(cfg, run=run or rtx.Run())
  return tiny.jit(functools.partial(module.apply, method='decode'))


CACHED = [
    tiny.MIXED, dataclasses.replace(tiny.MIXED, loop_keys=False),
    *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (
        dataclasses.replace(tiny.MIXED, window=0),
        dataclasses.replace(tiny.MIXED, prelude=0, loops=3),
        dataclasses.replace(tiny.MIXED, coda=0, loop_norms=False),
        *tiny.FAMILIES.values()))]


@pytest.mark.parametrize('cfg', CACHED)
def test_step_by_step_equals_the_full_forward(cfg):
  values, cache = tiny.variables(cfg), kv_cache.init(cfg, B, T)
  # The second round finds the first one's keys in the cache: a token's slot
  # is its position, whatever was there.
  for seed in range(2):
    token_BT = tiny.tokens(cfg, B, T, seed)
    full_BTV = tiny.decoder(cfg)(values, token_BT)
    for t in range(T):
      position_B1 = np.full((B, 1), t, np.int32)
      logits_B1V, cache = _decode(cfg)(
          values, token_BT[:, t:t + 1], position_B1, ROWS, cache)
      assert tiny.distance(logits_B1V[:, 0], full_BTV[:, t]) < ROUNDING


@pytest.mark.parametrize('cfg', CACHED)
def test_prefill_of_padded_rows_then_steps(cfg):
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  full_BTV = tiny.decoder(cfg)(values, token_BT)
  length_B, width = np.array([7, 4]), 7
  padded_BT = token_BT[:, :width].copy()
  padded_BT[1, 4:] = 5  # Tokens that are not there.
  position_BT = np.broadcast_to(np.arange(width, dtype=np.int32), (B, width))
  logits_BTV, cache = _decode(cfg)(
      values, padded_BT, position_BT, ROWS, kv_cache.init(cfg, B, T))
  for row, length in enumerate(length_B):
    assert tiny.distance(logits_BTV[row, :length],
                         full_BTV[row, :length]) < ROUNDING
  rows = np.arange(B)
  for t in range(5):
    at_B = length_B + t
    logits_B1V, cache = _decode(cfg)(
        values, token_BT[rows, at_B][:, None],
        at_B[:, None].astype(np.int32), ROWS, cache)
    assert tiny.distance(logits_B1V[:, 0], full_BTV[rows, at_B]) < ROUNDING


def test_prefill_as_long_as_the_cache():
  # Long enough for attention in blocks, which assumes that queries and keys
  # are the same places.
  cfg = dataclasses.replace(tiny.MIXED, prelude=0, coda=0, rank='0', window=30)
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, 100)
  full_BTV = tiny.decoder(cfg, rtx.Run(attention='plain'))(values, token_BT)
  position_BT = np.broadcast_to(np.arange(100, dtype=np.int32), (B, 100))
  logits_BTV, _ = _decode(cfg)(
      values, token_BT, position_BT, ROWS, kv_cache.init(cfg, B, 100))
  assert tiny.distance(logits_BTV, full_BTV) < ROUNDING


def test_every_virtual_layer_has_its_own_keys():
  cfg = tiny.MIXED
  cache = kv_cache.init(cfg, B, 5, 'bfloat16')
  for leaf in cache:
    assert leaf.shape == (cfg.num_layers, B, cfg.K, 5, cfg.H)
    assert leaf.dtype == jnp.bfloat16
  _, cache = _decode(cfg)(
      tiny.variables(cfg), tiny.tokens(cfg, B, 1), np.full((B, 1), 3, np.int32),
      ROWS[::-1], cache)
  for leaf in cache:
    written = np.abs(np.asarray(leaf, np.float32)).max(axis=(2, 4)) > 0
    assert (written == (np.arange(5) == 3)).all()
    assert len({np.asarray(x).tobytes() for x in leaf}) == cfg.num_layers


def test_a_row_that_is_nobodys_writes_nothing():
  cfg = tiny.MIXED
  cache = kv_cache.init(cfg, B, 5)
  _, cache = _decode(cfg)(
      tiny.variables(cfg), tiny.tokens(cfg, B, 1), np.zeros((B, 1), np.int32),
      np.array([1, B], np.int32), cache)
  for leaf in cache:
    assert not leaf[:, 0].any() and leaf[:, 1].any()


@pytest.mark.parametrize('cfg', [
    dataclasses.replace(tiny.MIXED, loops=3),
    dataclasses.replace(tiny.MIXED, loops=3, loop_keys=False),
    pytest.param(dataclasses.replace(tiny.MIXED, loops=3, loop_norms=False),
                 marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(tiny.FAMILIES['gpt_neox'], loops=3,
                                     layers_per_loop=1, rank='full'),
                 marks=pytest.mark.slow)])
def test_a_pass_over_rows_at_different_loops(cfg):
  """Each row gets what it would get in a batch of its own loop."""
  values = tiny.variables(cfg)
  rows, loop_B = np.arange(4, dtype=np.int32), np.array([2, 0, 1, 2], np.int32)
  rng = np.random.default_rng(0)
  x_BTD = rng.normal(size=(4, 2, cfg.D)).astype(np.float32)
  position_BT = np.broadcast_to(np.arange(2, dtype=np.int32), (4, 2))
  place = kv_cache.Place(
      rows[:, None], position_BT, np.zeros((4, 1), np.int32))

  def go(loop, x_BTD):
    return rtx.Decoder(cfg).apply(
        values, x_BTD, loop, None,
        kv_cache.Cached(kv_cache.init(cfg, 4, 3), place), method='loop')

  mixed_BTD, mixed = tiny.jit(functools.partial(go, loop_B[:, None]))(x_BTD)
  for row, loop in enumerate(loop_B.tolist()):
    alone_BTD, alone = tiny.jit(functools.partial(go, loop))(x_BTD)
    assert tiny.distance(mixed_BTD[row], alone_BTD[row]) < ROUNDING
    for one, other in zip(mixed.cache, alone.cache, strict=True):
      assert tiny.distance(one[:, row], other[:, row]) < ROUNDING


@pytest.mark.parametrize('cfg', [
    tiny.MIXED, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (
        dataclasses.replace(tiny.MIXED, loop_keys=False),
        dataclasses.replace(tiny.FAMILIES['gpt_neox'], loops=3,
                            layers_per_loop=1, rank='full'),
        tiny.FAMILIES['llama']))])
def test_kernels_side_by_side_compute_what_they_do_apart(cfg):
  """Prompts, rows at different loops, and the keys of loops left out."""
  apart, fused = (
      weights.prepare(cfg, rtx.Run(), meshed, tiny.variables(cfg))
      for meshed in (True, False))
  params = fused.variables['params']
  for stack in {'prelude', 'block', 'coda'} & set(params):
    for layer in params[stack]['layers']:
      assert set(layer['attn']) == {'fused', 'o'}
      assert set(layer['mlp']) == (
          {'fused', 'down'} if cfg.gated else {'up', 'down'})
  token_BT = tiny.tokens(cfg, B, T)
  position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  x_B1D = np.random.default_rng(0).normal(size=(B, 1, cfg.D))
  loop_B1 = np.array([[0], [cfg.loops - 1]], np.int32)
  place = kv_cache.Place(
      ROWS[:, None], np.full((B, 1), T, np.int32), np.zeros((B, 1), np.int32))

  @tiny.jit
  def go(w):
    apply = functools.partial(rtx.Decoder(cfg).apply, w.variables)
    read = apply(token_BT, position_BT, ROWS, kv_cache.init(cfg, B, T + 1),
                 w.mixed_M, w.head_DV, method='decode')
    keys = kv_cache.Cached(read[1], place)
    passed = [apply(x_B1D.astype(np.float32), loop_B1, None, keys, method,
                    w.mixed_M, method='loop')
              for method in ('__call__', 'fill')]
    return [read, *((x_B1D, keys.cache) for x_B1D, keys in passed)]

  for one, other in zip(
      jax.tree.leaves(go(fused)), jax.tree.leaves(go(apart)), strict=True):
    assert tiny.distance(one, other) < ROUNDING
