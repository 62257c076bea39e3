"""Relaxing: full rank is exact, what each init shares, what is refused."""

import dataclasses
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import config as config_lib
from recursive_tx import model, tying
from recursive_tx.files import paths
from recursive_tx.tying.relax import parts as relaxed_parts
from recursive_tx.tying.relax import target

B, T = 2, 12
LLAMA = tiny.FAMILIES['llama']
Q = 'layers/attn/q/kernel'


def _logits(cfg, values, run=None):
  return np.asarray(
      tiny.decoder(cfg, run)(values, tiny.tokens(cfg, B, T)))


def _product(rcfg, rvars, name):
  """a @ b of one kernel: [loops, layers, rows, columns], fp64."""
  leaves = rvars['params']['adapters'][name]
  stack = (rcfg.loops, rcfg.layers_per_loop)
  rows, columns = rcfg.in_out(name)
  return (leaves['a'].reshape(*stack, rows, -1).astype(np.float64)
          @ leaves['b'].reshape(*stack, -1, columns).astype(np.float64))


# Law 6: at full rank a relaxed model is the original.


def _assert_exact(name, **how):
  cfg = tiny.FAMILIES[name]
  values = tiny.variables(cfg)
  original = _logits(cfg, values)
  for init in tying.INITS:
    rcfg, rvars = rtx.relax(cfg, values, rank='full', init=init, **how)
    assert abs(_logits(rcfg, rvars) - original).max() < 1e-4, init
    # Law 5 for every init: the same unrolled.
    vcfg, vvars = rtx.merge(rcfg, rvars)
    assert dataclasses.replace(cfg, loop_norms=vcfg.loop_norms) == vcfg
    for path, value in paths.items(vvars['params']):
      expected = paths.get(values['params'], path)
      assert np.abs(value - expected).max() < 1e-5, (init, path)


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_full_rank_is_exact(name):
  _assert_exact(name, loops=2)


@pytest.mark.parametrize('how', [
    dict(loops=2, prelude=1, coda=1),
    *(pytest.param(how, marks=pytest.mark.slow) for how in (
        dict(loops=3), dict(loops=6), dict(loops=5, prelude=1),
        dict(loops=1, coda=2)))])
@pytest.mark.parametrize('name', [
    'gpt_neox', *(pytest.param(name, marks=pytest.mark.slow)
                  for name in tiny.FAMILIES if name != 'gpt_neox')])
def test_full_rank_is_exact_however_it_loops(name, how):
  _assert_exact(name, **how)


def test_every_family_has_a_tiny_model():
  assert set(tiny.FAMILIES) == set(rtx.FAMILIES)


@pytest.mark.parametrize('name', [
    'llama', *(pytest.param(name, marks=pytest.mark.slow)
               for name in ('mistral', 'gemma', 'gpt_neox'))])
def test_full_rank_in_bf16_is_about_as_good_as_the_original(name):
  cfg, run = tiny.FAMILIES[name], rtx.Run(dtype='bfloat16')
  values = tiny.variables(cfg)
  exact = _logits(cfg, values)
  own = abs(_logits(cfg, values, run) - exact).max()
  for init in tying.INITS:
    rcfg, rvars = rtx.relax(cfg, values, loops=2, rank='full', init=init)
    assert abs(_logits(rcfg, rvars, run) - exact).max() < 2 * own, init


@pytest.mark.parametrize('name', [
    'llama', *(pytest.param(name, marks=pytest.mark.slow)
               for name in ('mistral', 'gemma', 'gpt_neox'))])
def test_full_rank_is_not_exact_with_the_papers_shared_norms(name):
  cfg = tiny.FAMILIES[name]
  values = tiny.variables(cfg)
  rcfg, rvars = rtx.relax(cfg, values, loops=2, rank='full',
                          init='average', loop_norms=False)
  assert abs(_logits(rcfg, rvars) - _logits(cfg, values)).max() > 1e-2


# What is shared.


@pytest.mark.parametrize('init, sources', [
    ('stepwise', [[0], [2], [5]]), ('average', [[0, 3], [1, 4], [2, 5]]),
    ('lower', [[0], [1], [2]])])
@pytest.mark.parametrize('loop_norms', [True, False])
def test_the_block_comes_from_the_inits_layers(init, sources, loop_norms):
  values = tiny.variables(LLAMA)
  rcfg, rvars = rtx.relax(LLAMA, values, loops=2, init=init,
                          loop_norms=loop_norms)
  assert (rcfg.loops, rcfg.layers_per_loop, rcfg.rank) == (2, 3, '0')
  for path, value in paths.items(rvars['params']):
    if path.startswith('adapters/'):
      # Each loop's own norms and biases are the original's.
      original = paths.get(values['params']['block']['vectors'],
                          path.removeprefix('adapters/'))
      expected = original.reshape(value.shape)
    elif path.startswith('block/'):
      original = paths.get(values['params'], path).astype(np.float64)
      expected = np.stack([original[taken].mean(axis=0) for taken in sources])
    else:
      expected = paths.get(values['params'], path)
    assert value.dtype == np.float32
    assert np.abs(value - expected).max() < 1e-6, path
  assert ('adapters' in rvars['params']) == loop_norms


def test_prelude_and_coda_are_the_first_and_the_last_layers():
  values = tiny.variables(LLAMA)
  rcfg, rvars = rtx.relax(LLAMA, values, loops=2, init='average', prelude=1,
                          coda=3)
  assert (rcfg.prelude, rcfg.layers_per_loop, rcfg.coda) == (1, 1, 3)
  for path, original in paths.items(values['params']['block']):
    for part, layers in (('prelude', [0]), ('coda', [3, 4, 5])):
      assert np.array_equal(paths.get(rvars['params'][part], path),
                            original[layers]), path
  original = values['params']['block']['layers']['mlp']['up']['kernel']
  shared = rvars['params']['block']['layers']['mlp']['up']['kernel'][0]
  assert np.allclose(shared, original[[1, 2]].mean(axis=0), atol=1e-6)


def test_stepwise_counts_the_layers_between_prelude_and_coda():
  values = tiny.variables(dataclasses.replace(LLAMA, layers_per_loop=8))
  rvars = rtx.relax(
      dataclasses.replace(LLAMA, layers_per_loop=8), values, loops=2,
      init='stepwise', prelude=1, coda=1)[1]
  original = values['params']['block']['layers']['attn']['q']['kernel']
  assert np.array_equal(rvars['params']['block']['layers']['attn']['q'][
      'kernel'], original[[1, 3, 6]])


def test_random_is_drawn_from_the_seed_alone():
  values = tiny.variables(LLAMA)
  blocks = [rtx.relax(LLAMA, values, loops=2, init='random', seed=seed,
                      loop_norms=False)[1]['params']['block']
            for seed in (0, 0, 1)]
  tiny.assert_same_tree(blocks[0], blocks[1])
  for path, value in paths.items(blocks[0]):
    if path.endswith('kernel'):
      assert not np.array_equal(value, paths.get(blocks[2], path)), path
      rows = LLAMA.in_out(path.split('/')[-2])[0]
      assert abs(value.std() * rows ** 0.5 - 1) < 0.2, path
      assert not np.array_equal(value[0], value[1]), path
    else:
      assert (value == path.endswith('scale')).all(), path
  assert not np.array_equal(blocks[0]['layers']['mlp']['up']['kernel'],
                            blocks[0]['layers']['mlp']['gate']['kernel'])


def test_the_input_may_be_of_any_dtype_and_stays_as_it_is():
  values = jax.tree.map(
      lambda v: v.astype(ml_dtypes.bfloat16), tiny.variables(LLAMA))
  before = jax.tree.map(np.copy, values)
  wide = jax.tree.map(lambda v: v.astype(np.float32), values)
  # The residuals of bf16 kernels are formed and factored in fp32 or better.
  tiny.assert_same_tree(
      rtx.relax(LLAMA, values, loops=2, rank=3)[1],
      rtx.relax(LLAMA, wide, loops=2, rank=3)[1])
  tiny.assert_same_tree(values, before)


# What the adapters hold.


def test_residuals_of_an_average_of_two_are_opposite():
  values = tiny.variables(LLAMA)
  for rank in (2, 'full'):
    rcfg, rvars = rtx.relax(LLAMA, values, loops=2, rank=rank)
    for name in rcfg.kernels:
      product = _product(rcfg, rvars, name)
      assert np.abs(product[0] + product[1]).max() < 1e-5
      assert np.abs(product[0]).max() > 1e-2


def test_layers_equal_to_the_shared_one_start_as_usual():
  values = tiny.variables(LLAMA)
  for init, equal in (
      ('lower', [(0, 0), (0, 1), (0, 2)]), ('stepwise', [(0, 0), (1, 2)]),
      ('average', [])):
    rcfg, rvars = rtx.relax(LLAMA, values, loops=2, rank=3, init=init)
    for name in rcfg.kernels:
      product = _product(rcfg, rvars, name)
      for at in itertools.product(range(2), range(3)):
        assert (not product[at].any()) == (at in equal), (init, name, at)
      # Gaussian, so that b gets a gradient; orthonormal otherwise.
      rows = rcfg.in_out(name)[0]
      a = rvars['params']['adapters'][name]['a'].reshape(2, 3, rows, -1)
      for at in itertools.product(range(2), range(3)):
        gram = a[at].T @ a[at]
        assert (gram.diagonal() > 0.2).all()
        assert np.allclose(gram, np.eye(3), atol=1e-4) == (at not in equal)
      for one, other in itertools.combinations(equal, 2):
        assert not np.array_equal(a[one], a[other])


@pytest.mark.parametrize('init', ['stepwise', 'random'])
def test_zero_start_is_the_recursive_model(init):
  values = tiny.variables(LLAMA)
  plain = rtx.relax(LLAMA, values, loops=2, init=init)
  zero = rtx.relax(LLAMA, values, loops=2, init=init, rank=3, lora='zero')
  for name in zero[0].kernels:
    assert not _product(*zero, name).any()
    assert zero[1]['params']['adapters'][name]['a'].any()
  tiny.assert_same_tree(
      plain[1]['params']['block'], zero[1]['params']['block'])
  assert tiny.distance(_logits(*zero), _logits(*plain)) < 1e-5


def test_error_falls_with_rank_as_the_energy_says():
  cfg = tiny.FAMILIES['gemma']
  values = tiny.variables(cfg)

  def read(path, layer):
    value = paths.get(values['params'], path)
    return value if layer is None else value[layer]

  errors = []
  for rank in (1, 4, 8, 'full'):
    energy, total = {}, 0.0
    rcfg = target(
        cfg, loops=3, rank=rank, init='stepwise', loop_norms=True, prelude=0,
        coda=0, lora='svd')
    params = {}
    for path, shape in model.flat_shapes(rcfg).items():
      paths.put(params, path, np.full(shape, np.nan, np.float32))
    for path, at, array in relaxed_parts(
        cfg, rcfg, read, init='stepwise', energy=energy):
      paths.get(params, path)[at] = array
    # Every part of the tree is covered.
    assert all(np.isfinite(v).all() for _, v in paths.items(params))
    assert set(energy) == {
        (name, loop) for name in cfg.kernels for loop in range(3)}
    merged = rtx.merge(rcfg, {'params': params})[1]['params']['block']
    for name in cfg.kernels:
      group = 'attn' if name in config_lib.GROUPS['attn'] else 'mlp'
      path = f'layers/{group}/{name}/kernel'
      gap = paths.get(merged, path) - read(f'block/{path}', None)
      for loop in range(3):
        kept, there = energy[name, loop]
        error = float((gap[2 * loop:2 * loop + 2] ** 2).sum())
        assert error == pytest.approx(there - kept, rel=1e-3, abs=1e-6)
        total += error
    errors.append(total)
  assert errors[0] > errors[1] > errors[2] > 1
  assert errors[-1] < 1e-8


def test_rank_may_differ_by_kernel():
  values = tiny.variables(LLAMA)
  rcfg, rvars = rtx.relax(LLAMA, values, loops=2, rank='q2+mlp5')
  held = rvars['params']['adapters']
  assert {name: leaves['a'].shape[-1] for name, leaves in held.items()
          if 'a' in leaves} == dict(q=2, gate=5, up=5, down=5)
  # The same factors as at one rank for all.
  whole = rtx.relax(LLAMA, values, loops=2, rank=5)
  assert np.allclose(_product(rcfg, rvars, 'up'), _product(*whole, 'up'),
                     atol=1e-6)


# Bad input.


@pytest.mark.parametrize('how, parts', [
    (dict(loops=4), ('loops=4', '6 layers', '[1, 2, 3, 6]', 'prelude',
                     'coda')),
    (dict(loops=2, prelude=1), ('loops=2', '5 layers', '[1, 5]')),
    (dict(loops=0), ('loops=0', '[1, 2, 3, 6]')),
    (dict(loops=-1), ('loops=-1', '[1, 2, 3, 6]')),
    (dict(loops=1, prelude=3, coda=3), ('prelude=3', 'coda=3', '6 layers')),
    (dict(loops=1, prelude=-1), ('prelude=-1',)),
    (dict(loops=1, coda=-2), ('coda=-2',)),
    (dict(loops=2, rank='q'), ("'q'", "'full'")),
    (dict(loops=2, rank=-4), ("'-4'", "'full'")),
    (dict(loops=2, rank='kk3'), ("'kk'", 'down')),
    (dict(loops=2, init='avarage'), ("'avarage'", "'average'", 'stepwise')),
    (dict(loops=2, lora='svdd'), ("'svdd'", "'svd'", 'zero')),
])
def test_what_cannot_be_relaxed_is_explained(how, parts):
  with tiny.refused(*parts):
    rtx.relax(LLAMA, tiny.variables(LLAMA), **how)


@pytest.mark.parametrize('change', [
    dict(loops=2), dict(prelude=1), dict(coda=1), dict(rank='3')])
def test_a_relaxed_model_is_not_relaxed_again(change):
  cfg = dataclasses.replace(LLAMA, **change)
  with tiny.refused('already', f'loops={cfg.loops}', 'merge'):
    rtx.relax(cfg, tiny.variables(cfg), loops=2)
