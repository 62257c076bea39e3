"""Loops that attend to the keys and values of the first (loop_keys=False)."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.files import paths
from recursive_tx.model import kv_cache
from recursive_tx.store import opening

B, T = 2, 12
# Distances are shares of max(1, max |logit|).
ROUNDING = 1e-5
SHARED = dataclasses.replace(tiny.MIXED, loops=3, loop_keys=False)
PLAIN = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=6, layers_per_loop=2, loops=3,
    loop_norms=False)


def _norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(cfg, x_TNH):
  pairs = cfg.H // 2
  angle = np.arange(len(x_TNH))[:, None, None] * cfg.rope_theta ** -(
      np.arange(pairs) / pairs)
  one, two = x_TNH[..., :pairs], x_TNH[..., pairs:]
  return np.concatenate([one * np.cos(angle) - two * np.sin(angle),
                         two * np.cos(angle) + one * np.sin(angle)], -1)


def _by_hand(cfg, values, token_T):
  """Logits of PLAIN's kind of model, one token and head after the other."""
  params = values['params']
  x_TD = np.float64(params['embed']['embedding'])[token_T]
  kept = {}
  for virtual in range(cfg.loops * cfg.layers_per_loop):
    loop, layer = divmod(virtual, cfg.layers_per_loop)
    kernel = {name: np.float64(leaves['kernel'][layer])
              for group in params['block']['layers'].values()
              for name, leaves in group.items()}
    scale = {name: np.float64(leaves['scale'][layer])
             for name, leaves in params['block']['vectors'].items()}
    y_TD = _norm(x_TD, scale['attn_norm'], cfg.norm_eps)
    q_TNH = _rotate(cfg, np.einsum('td,dnh->tnh', y_TD, kernel['q']))
    if loop == 0 or cfg.loop_keys:
      kept[layer] = (_rotate(cfg, np.einsum('td,dkh->tkh', y_TD, kernel['k'])),
                     np.einsum('td,dkh->tkh', y_TD, kernel['v']))
    k_TKH, v_TKH = kept[layer]
    for t in range(len(x_TD)):
      for n in range(cfg.N):
        head = n // (cfg.N // cfg.K)
        score = k_TKH[:t + 1, head] @ q_TNH[t, n] / np.sqrt(cfg.H)
        share = np.exp(score - score.max())
        mixed = share @ v_TKH[:t + 1, head] / share.sum()
        x_TD[t] += mixed @ kernel['o'][n]
    y_TD = _norm(x_TD, scale['mlp_norm'], cfg.norm_eps)
    gate_TF = y_TD @ kernel['gate']
    x_TD += (gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ kernel['up'])
             ) @ kernel['down']
  x_TD = _norm(x_TD, np.float64(params['norm']['scale']), cfg.norm_eps)
  return x_TD @ np.float64(params['embed']['embedding']).T


@pytest.mark.parametrize('loop_keys', [False, True])
def test_logits_are_those_made_by_hand(loop_keys):
  cfg = dataclasses.replace(PLAIN, loop_keys=loop_keys)
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  logits_BTV = tiny.decoder(cfg)(values, token_BT)
  for logits_TV, token_T in zip(logits_BTV, token_BT, strict=True):
    assert tiny.distance(
        logits_TV, _by_hand(cfg, values, token_T)) < ROUNDING


def test_the_cache_has_keys_of_one_loop_only():
  layers = SHARED.prelude + SHARED.layers_per_loop + SHARED.coda
  cache = kv_cache.init(SHARED, B, 5)
  assert all(len(leaf) == layers for leaf in cache)


@pytest.mark.parametrize('run', [
    rtx.Run(unroll=True),
    pytest.param(rtx.Run(unroll=True, remat='full'), marks=pytest.mark.slow),
    pytest.param(rtx.Run(remat='dots'), marks=pytest.mark.slow)])
def test_how_it_runs_does_not_matter(run):
  values, token_BT = tiny.variables(SHARED), tiny.tokens(SHARED, B, T)

  def gradients(run):
    def loss(values):
      logits_BTV = rtx.Decoder(SHARED, run=run).apply(values, token_BT)
      return jax.nn.log_softmax(logits_BTV)[..., 0].mean()
    return tiny.jit(jax.grad(loss))(values)

  expected = gradients(rtx.Run())
  for path, grad in paths.items(gradients(run)):
    wanted = paths.get(expected, path)
    # The error is of sums over all tokens.
    assert abs(grad - wanted).max() < 1e-4 * max(1e-3, abs(wanted).max()), path


def test_a_recursive_model_may_begin_to_share_keys(tmp_path):
  before = dataclasses.replace(SHARED, loop_keys=True)
  rtx.save(tmp_path / 'model', before, tiny.variables(before))
  for wanted in (SHARED, before):
    origin = opening.source(str(tmp_path / 'model'))
    found = {(path, at): value for path, at, value in opening.parts_as(
        origin, wanted, init='average', lora='svd', seed=0)}
    for (path, at), value in found.items():
      leaf = paths.get(tiny.variables(before)['params'], path)
      np.testing.assert_array_equal(value, np.asarray(leaf)[at])


def test_a_vanilla_model_may_be_relaxed_into_one(tmp_path):
  vanilla = tiny.FAMILIES['llama']
  rtx.save(tmp_path / 'model', vanilla, tiny.variables(vanilla))
  rcfg, values = rtx.relax(vanilla, tiny.variables(vanilla), loops=2, rank=3)
  wanted = dataclasses.replace(rcfg, loop_keys=False)
  for path, at, value in opening.parts_as(
      opening.source(str(tmp_path / 'model')), wanted, init='average',
      lora='svd', seed=0):
    np.testing.assert_array_equal(value, paths.get(values['params'], path)[at])


def test_it_has_no_vanilla_counterpart():
  with tiny.refused('model.loop_keys=False', 'loop_keys=True'):
    rtx.merge(SHARED, tiny.variables(SHARED))
