"""The last stage of the fit: distillation of all looped layers at once."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.files import paths
from recursive_tx.tying import kernels
from recursive_tx.tying.fit import distance, search
from recursive_tx.tying.fit import polish as polish_lib

LLAMA = tiny.FAMILIES['llama']


def _read(values):
  return lambda path, layer: paths.get(values['params'], path)[
      () if layer is None else layer]


@pytest.mark.slow
def test_it_comes_nearer_and_leaves_the_ends_alone():
  values, token_QT = tiny.variables(LLAMA), tiny.tokens(LLAMA, 16, 12)
  rcfg, rvars = rtx.relax(LLAMA, values, loops=2, rank=2, init='average')
  final_QTD = distance.final(LLAMA, _read(values), token_QT)
  shares = []
  params = polish_lib.polish(
      rcfg, rvars['params'], token_QT, final_QTD, seed=0,
      report=shares.append)

  def nats(params):
    one, two = (jax.nn.log_softmax(tiny.decoder(c)(v, token_QT)) for c, v in (
        (LLAMA, values), (rcfg, {'params': params})))
    return float((np.exp(one) * (one - two)).sum(-1).mean())

  # Of 24 small steps.
  assert nats(params) < 0.99 * nats(rvars['params'])
  assert sum(shares) == pytest.approx(1)
  for path, value in paths.items(params):
    was = paths.get(rvars['params'], path)
    assert value.dtype == np.float32 and value.shape == was.shape
    kept = path.split('/')[0] in ('embed', 'norm', 'head')
    assert np.array_equal(value, was) == kept, path


def test_its_gradient_is_that_of_the_mean_divergence(monkeypatch):
  """Two steps of plain descent, by the whole model's own gradient."""
  monkeypatch.setattr(polish_lib.optax, 'adam', lambda *_, **how: (
      polish_lib.optax.sgd(0.1)))
  monkeypatch.setattr(polish_lib, '_LEAST_STEPS', 2)
  polish_lib._training.cache_clear()
  values, token_QT = tiny.variables(LLAMA), tiny.tokens(LLAMA, 4, 12)
  rcfg, rvars = rtx.relax(LLAMA, values, loops=2, rank=2, init='average')
  teacher = jax.nn.log_softmax(tiny.decoder(LLAMA)(values, token_QT))

  def nats(params):
    ours = jax.nn.log_softmax(
        rtx.Decoder(rcfg).apply({'params': params}, token_QT))
    return (jax.numpy.exp(teacher) * (teacher - ours)).sum(-1).mean()

  wanted = rvars['params']
  for _ in range(2):
    stepped = jax.tree.map(
        lambda x, d: x - 0.1 * d, wanted, jax.grad(nats)(wanted))
    wanted = {key: wanted[key] if key in ('embed', 'norm', 'head') else new
              for key, new in stepped.items()}
  params = polish_lib.polish(
      rcfg, rvars['params'], token_QT,
      distance.final(LLAMA, _read(values), token_QT), seed=0)
  polish_lib._training.cache_clear()
  for path, value in paths.items(params):
    if path.split('/')[0] not in ('embed', 'norm', 'head'):
      assert np.abs(value - paths.get(wanted, path)).max() < 1e-6, path


@pytest.mark.parametrize('name, how', [
    ('llama', dict(prelude=1, coda=1)),
    ('gpt_neox', dict(loop_norms=False)),
    ('gemma', dict(rank='0'))])
def test_a_polished_candidate_has_the_parameters_it_got(name, how, tmp_path):
  cfg = tiny.FAMILIES[name]
  how = dict(dict(loops=2, rank='3'), **how)
  values = tiny.variables(cfg)
  rcfg, rvars = rtx.relax(cfg, values, init='average', **how)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: x + 0.01 * rng.normal(size=x.shape).astype(np.float32),
      rvars['params'])
  for part in ('embed', 'norm', 'head'):
    if part in params:
      params[part] = rvars['params'][part]
  made = search.Initialisation('fit', rcfg, _read(values), 'average', None)
  store = kernels.Store(tmp_path / 'store', 2)
  new = search._polished(cfg, made, params, store)
  token_QT = tiny.tokens(cfg, 3, 12)
  ours = distance.final(
      cfg, kernels.unrolled(new.rcfg, new.read, new.rule, store), token_QT)
  vcfg, vvars = rtx.merge(rcfg, {'params': params})
  theirs = distance.final(vcfg, _read(vvars), token_QT)
  assert tiny.distance(ours, theirs) < 1e-5


@pytest.mark.slow
def test_what_it_made_worse_is_not_kept(monkeypatch):
  monkeypatch.setattr(search, 'polish', lambda rcfg, params, *_, **how: (
      jax.tree.map(lambda x: x + 0.1, params)))
  how = dict(loops=2, rank='2', init='fit',
             calibration=tiny.tokens(LLAMA, 16, 12))
  one = rtx.relax(LLAMA, tiny.variables(LLAMA), **how)
  monkeypatch.setattr(search, 'polishes', lambda rcfg: False)
  other = rtx.relax(LLAMA, tiny.variables(LLAMA), **how)
  tiny.assert_same_tree(one[1], other[1])


def test_only_models_that_fit_in_memory():
  assert polish_lib.polishes(LLAMA)
  large = dataclasses.replace(LLAMA, V=1 << 27, D=16)
  assert not polish_lib.polishes(large)
