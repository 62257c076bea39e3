"""Laws of sharing: one loop is vanilla, tying, merge, Eckart-Young."""

import dataclasses
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import tying
from recursive_tx.files import paths

B, T = 2, 12
ROUNDING = 1e-5


# Which layers are shared.


# Counted from 1, as the paper's figure 2 and the first author's later code
# have them.
@pytest.mark.parametrize('layers, places', [
    (4, [1, 4]), (6, [1, 3, 6]), (6, [1, 6]), (8, [1, 3, 6, 8]),
    (12, [1, 3, 5, 8, 10, 12]), (12, [1, 5, 8, 12]),
    (16, [1, 3, 5, 7, 10, 12, 14, 16]),
    (18, [1, 3, 5, 7, 9, 12, 14, 16, 18]), (18, [1, 4, 8, 11, 15, 18]),
    (22, [1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22]),
    (24, [1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22, 24]),
])
def test_stepwise_takes_the_papers_layers(layers, places):
  K = len(places)
  found = tying.sources('stepwise', loops=layers // K, layers_per_loop=K)
  assert found == [[place - 1] for place in places]
  assert all(type(place) is int for places in found for place in places)


def test_average_takes_all_and_lower_the_first():
  assert tying.sources('average', loops=2, layers_per_loop=3) == [
      [0, 3], [1, 4], [2, 5]]
  assert tying.sources('average', loops=3, layers_per_loop=2) == [
      [0, 2, 4], [1, 3, 5]]
  assert tying.sources('lower', loops=2, layers_per_loop=3) == [
      [0], [1], [2]]


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_fold_is_the_mean(dtype):
  rng = np.random.default_rng(0)
  layers = [rng.normal(size=(5, 7)).astype(ml_dtypes.bfloat16 if
            dtype == 'bfloat16' else dtype) for _ in range(3)]
  mean = sum(layer.astype(np.float64) for layer in layers) / 3
  folded = tying.fold(layers)
  assert folded.dtype == np.float32
  assert np.array_equal(folded, mean.astype(np.float32))
  assert np.array_equal(tying.fold(layers[:1]), layers[0].astype(np.float32))


# Law 7: Eckart-Young.


SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]


def _factor(residual, rank, scale=1.0):
  rng = np.random.default_rng(1)
  a, b, energy = tying.factor(residual, rank, scale=scale, rng=rng)
  assert a.shape == (residual.shape[0], rank)
  assert b.shape == (rank, residual.shape[1])
  assert a.dtype == b.dtype == np.float32
  return a.astype(np.float64), b.astype(np.float64), energy


@pytest.mark.parametrize('shape', SHAPES)
def test_error_is_that_of_the_cut_singular_values(shape):
  residual = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  s = np.linalg.svd(residual.astype(np.float64), compute_uv=False)
  errors = []
  for rank in range(1, min(shape) + 1):
    a, b, energy = _factor(residual, rank)
    error = np.linalg.norm(residual - a @ b)
    assert error == pytest.approx((s[rank:] ** 2).sum() ** 0.5, abs=1e-5)
    assert energy == pytest.approx((s[:rank] ** 2).sum(), rel=1e-6)
    # Equation 5: one factor is orthonormal, the other has the values.
    assert np.allclose(a.T @ a, np.eye(rank), atol=1e-5)
    assert np.allclose(np.linalg.norm(b, axis=1), s[:rank], atol=1e-5)
    errors.append(error)
  assert errors == sorted(errors, reverse=True)
  assert errors[-1] < 1e-5


@pytest.mark.parametrize('shape', [(6, 9), (9, 6), (40, 30)])
def test_factors_are_the_truncated_svd(shape):
  residual = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  u, s, vt = np.linalg.svd(residual.astype(np.float64), full_matrices=False)
  rank = 4
  a, b, _ = _factor(residual, rank)
  assert np.allclose(a @ b, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-5)
  # Largest first, up to the sign that a singular vector does not have.
  assert np.allclose(abs((a * u[:, :rank]).sum(axis=0)), 1, atol=1e-5)


@pytest.mark.parametrize('shape', [(6, 9), (9, 6)])
def test_a_rank_deficient_residual_is_restored_whole(shape):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))
  residual = (left @ right).astype(np.float32)
  a, b, energy = _factor(residual, 5)
  assert np.allclose(a @ b, residual, atol=1e-5)
  assert energy == pytest.approx(np.linalg.norm(residual) ** 2, rel=1e-5)
  # Directions without residual start as usual: Gaussian and zero.
  assert (np.linalg.norm(b, axis=1) > 0).tolist() == [True] * 2 + [False] * 3
  assert (np.linalg.norm(a, axis=0) > 0.1).all()


@pytest.mark.parametrize('shape', [(400, 30), (30, 400)])
@pytest.mark.parametrize('noise', [0.0, 1e-9])
def test_no_residual_starts_as_usual(shape, noise):
  # A layer equal to the shared one, up to the rounding of their mean.
  residual = noise * np.random.default_rng(0).normal(size=shape)
  a, b, energy = _factor(residual.astype(np.float32), 8, scale=100.0)
  assert not b.any()
  assert energy == 0
  assert a.std() == pytest.approx(shape[0] ** -0.5, rel=0.2)
  assert abs(a.mean()) < 0.1 * a.std() + 3 * a.std() / a.size ** 0.5


def test_small_residuals_are_not_taken_for_none():
  residual = 1e-3 * np.random.default_rng(0).normal(size=(20, 30))
  a, b, _ = _factor(residual.astype(np.float32), 20, scale=20.0)
  assert np.allclose(a @ b, residual, atol=1e-8)


def test_wide_spectra_keep_their_small_end():
  # Singular values from 1 down to 1e-4 in fp32.
  rng = np.random.default_rng(0)
  u, _ = np.linalg.qr(rng.normal(size=(12, 12)))
  v, _ = np.linalg.qr(rng.normal(size=(15, 15)))
  s = np.logspace(0, -4, 12)
  residual = ((u * s) @ v[:12]).astype(np.float32)
  a, b, _ = _factor(residual, 12)
  assert np.abs(a @ b - residual).max() < 1e-6
  assert np.allclose(np.linalg.norm(b, axis=1), s, rtol=2e-3)


# Laws 3 to 5.


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_one_loop_is_vanilla(name):
  cfg = tiny.FAMILIES[name]
  values = tiny.variables(cfg)
  for init in ('stepwise', 'average', 'lower'):
    rcfg, rvars = rtx.relax(cfg, values, loops=1, init=init)
    assert rcfg == cfg
    tiny.assert_same_tree(rvars, values)
  vcfg, vvars = rtx.merge(cfg, values)
  assert vcfg == cfg
  tiny.assert_same_tree(vvars, values)


TIED = dataclasses.replace(tiny.MIXED, rank='0', loop_norms=False)


@pytest.mark.parametrize('cfg', [
    TIED,
    *(pytest.param(dataclasses.replace(TIED, **change),
                   marks=pytest.mark.slow) for change in (
        dict(loops=3), dict(prelude=0, coda=0), dict(loops=5, prelude=2),
        dict(layers_per_loop=1, loops=4)))])
def test_tying_equals_tiled_weights(cfg):
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  params = dict(values['params'])
  parts = [params.pop('prelude', None), *[params['block']] * cfg.loops,
           params.pop('coda', None)]
  params['block'] = jax.tree.map(
      lambda *stacks: np.concatenate(stacks), *filter(None, parts))
  vanilla = dataclasses.replace(
      cfg, loops=1, layers_per_loop=cfg.num_layers, prelude=0, coda=0)
  one = tiny.decoder(cfg)(values, token_BT)
  other = tiny.decoder(vanilla)({'params': params}, token_BT)
  assert tiny.distance(one, other) < ROUNDING


def _assert_merge(cfg, seed=0):
  values, token_BT = tiny.variables(cfg, seed), tiny.tokens(cfg, B, T)
  vcfg, vvars = rtx.merge(cfg, values)
  assert (vcfg.loops, vcfg.prelude, vcfg.coda) == (1, 0, 0)
  assert not any(vcfg.ranks.values())
  assert vcfg.num_layers == cfg.num_layers
  one = tiny.decoder(cfg)(values, token_BT)
  other = tiny.decoder(vcfg)(vvars, token_BT)
  assert tiny.distance(one, other) < ROUNDING


def _like(name, **change):
  return dataclasses.replace(tiny.FAMILIES[name], layers_per_loop=2, **change)


@pytest.mark.parametrize('cfg', [
    tiny.MIXED,
    _like('gpt_neox', loops=3, rank='full', prelude=1),
    _like('gemma', loops=2, rank='k2+v2+mlp3', loop_norms=False, coda=2),
    _like('mistral', loops=1, rank='3'),
])
def test_merge_computes_the_same(cfg):
  _assert_merge(cfg)


GRID = list(itertools.product(
    tiny.FAMILIES, (1, 2, 3), ('0', '3', 'full', 'q2+down5'), (True, False),
    ((0, 0), (2, 1))))


@pytest.mark.slow
@pytest.mark.parametrize('name, loops, rank, loop_norms, ends', GRID[::3])
def test_merge_of_the_grid(name, loops, rank, loop_norms, ends):
  _assert_merge(_like(name, loops=loops, rank=rank, loop_norms=loop_norms,
                      prelude=ends[0], coda=ends[1]))


def test_merge_keeps_dtypes_where_nothing_is_added():
  cfg = dataclasses.replace(tiny.MIXED, rank='q2')
  values = jax.tree.map(
      lambda v: v.astype(ml_dtypes.bfloat16), tiny.variables(cfg))
  merged = rtx.merge(cfg, values)[1]
  for path, value in paths.items(merged['params']):
    wanted = np.float32 if '/q/kernel' in path else ml_dtypes.bfloat16
    assert value.dtype == wanted, path
  # The prelude's and the coda's are what they were; so is the rest.
  up = merged['params']['block']['layers']['mlp']['up']['kernel']
  for at, part, layer in ((0, 'prelude', 0), (1, 'block', 0),
                          (4, 'block', 1), (5, 'coda', 0)):
    original = values['params'][part]['layers']['mlp']['up']['kernel'][layer]
    assert np.array_equal(up[at], original)


def test_merge_leaves_its_input_alone():
  values = tiny.variables(tiny.MIXED)
  before = jax.tree.map(np.copy, values)
  rtx.merge(tiny.MIXED, values)
  tiny.assert_same_tree(values, before)
