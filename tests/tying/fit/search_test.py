"""The initialisation from data: exact at full rank, best by its measure, never
worse than the paper's on what it kept apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.files import paths
from recursive_tx.tying import fit, kernels
from recursive_tx.tying.fit import (
  align,
  distance,
  layers,
  matrices,
  moments,
  refit,
)
from recursive_tx.tying.fit import search as search_lib
from recursive_tx.tying.relax import initialised, parts, target

LLAMA = tiny.FAMILIES['llama']
N, T = 16, 12


def _read(values):
  return lambda path, layer: paths.get(values['params'], path)[
      () if layer is None else layer]


def _fit(cfg, values, **how):
  return rtx.relax(cfg, values, init='fit',
                   calibration=tiny.tokens(cfg, N, T), **how)


def _kl(cfg, values, other, token_QT):
  """KL(values || other) of a model and a relaxed one, nats a token."""
  one, two = (jax.nn.log_softmax(tiny.decoder(c)(v, token_QT))
              for c, v in ((cfg, values), other))
  return float(jnp.sum(jnp.exp(one) * (one - two), axis=-1).mean())


# Law 6: at full rank a relaxed model is the original.


@pytest.mark.parametrize('name', [
    'llama', *(pytest.param(name, marks=pytest.mark.slow)
               for name in ('gpt_neox', 'mistral', 'gemma'))])
def test_full_rank_is_exact(name):
  cfg = tiny.FAMILIES[name]
  values = tiny.variables(cfg)
  rcfg, rvars = _fit(cfg, values, loops=2, rank='full', prelude=1, coda=1)
  token_BT = tiny.tokens(cfg)
  assert abs(tiny.decoder(rcfg)(rvars, token_BT)
             - tiny.decoder(cfg)(values, token_BT)).max() < 1e-4
  vcfg, vvars = rtx.merge(rcfg, rvars)
  assert vcfg == cfg
  for path, value in paths.items(vvars['params']):
    expected = paths.get(values['params'], path)
    assert np.abs(value - expected).max() < 1e-5, path


# What is chosen.


@pytest.mark.parametrize('rank, loop_norms', [
    (4, True), *(pytest.param(*case, marks=pytest.mark.slow)
                 for case in ((0, True), (0, False), (4, False)))])
def test_no_start_of_the_paper_is_nearer_on_what_was_kept_apart(
    rank, loop_norms):
  values = tiny.variables(LLAMA)
  kept = tiny.tokens(LLAMA, N, T)[-N // 8:]
  how = dict(loops=2, rank=rank, loop_norms=loop_norms)
  ours = _kl(LLAMA, values, _fit(LLAMA, values, **how), kept)
  for init in ('stepwise', 'average', 'lower'):
    theirs = _kl(LLAMA, values, rtx.relax(
        LLAMA, values, init=init, **how), kept)
    assert ours < theirs + 1e-5, init


@pytest.mark.slow
def test_the_papers_start_is_taken_where_it_is_nearer():
  """The layers above the first add nothing, unless they are the first."""
  values = tiny.variables(LLAMA)
  block = values['params']['block']
  # Twice the same layers: 'lower' and 'average' are the original itself.
  for path, value in paths.items(block):
    paths.put(block, path, np.concatenate([value[:3], value[:3]]))
  rcfg, rvars = _fit(LLAMA, values, loops=2)
  token_BT = tiny.tokens(LLAMA)
  assert tiny.distance(tiny.decoder(rcfg)(rvars, token_BT),
                       tiny.decoder(LLAMA)(values, token_BT)) < 1e-4


@pytest.mark.slow
def test_a_fit_is_far_nearer_where_inputs_lie_in_few_directions():
  """Weights that no input meets are nobody's loss; plain SVD keeps them."""
  cfg = dataclasses.replace(LLAMA, attention_bias=False, mlp_bias=False)
  values = tiny.variables(cfg)
  # The stream and all norms hold a quarter of D alone.
  for path, value in paths.items(values['params']):
    if path.endswith(('embedding', 'scale')):
      value[..., 4:] = 0
  token_QT = tiny.tokens(cfg, 4, T, seed=1)
  how = dict(loops=2, rank=4)
  ours = _kl(cfg, values, _fit(cfg, values, **how), token_QT)
  theirs = _kl(cfg, values, rtx.relax(
      cfg, values, init='average', **how), token_QT)
  assert ours < theirs / 4


@pytest.mark.slow
def test_it_is_a_function_of_its_arguments_in_whatever_batches():
  values, token_QT = tiny.variables(LLAMA), tiny.tokens(LLAMA, N, T)
  one, other, third = (
      rtx.relax(LLAMA, values, loops=2, rank=3, init='fit', seed=seed,
                calibration=calibration)
      for seed, calibration in (
          (0, token_QT), (0, iter([token_QT[:5], token_QT[5:]])),
          (1, token_QT)))
  assert one[0] == other[0]
  tiny.assert_same_tree(one[1], other[1])
  kernels_of = [rvars['params']['block']['layers']['attn']['q']['kernel']
                for _, rvars in (one, third)]
  assert not np.array_equal(*kernels_of)
  # One rank for all is a budget.
  rcfg, rvars = one
  size = sum(leaf.size for path, leaf in paths.items(rvars['params'])
             if path.endswith(('/a', '/b')))
  assert len(set(rcfg.ranks.values())) > 1
  most = 6 * 3 * sum(sum(LLAMA.in_out(name)) for name in LLAMA.kernels)
  assert 0 <= most - size < 6 * 40


@pytest.mark.slow
def test_without_calibration_the_tokens_are_sampled_from_the_model():
  values = tiny.variables(LLAMA)
  token_QT = fit.sample(LLAMA, values, seed=3)
  assert token_QT.shape == (96, 128) and token_QT.max() < LLAMA.V
  # Likely ones: better by far than tokens drawn at random.
  scores = jax.nn.log_softmax(tiny.decoder(LLAMA)(values, token_QT))[:, :-1]
  likely = np.take_along_axis(scores, token_QT[:, 1:, None], -1).mean()
  assert likely > scores.mean() + 0.1
  tiny.assert_same_tree(*(
      rtx.relax(LLAMA, values, loops=2, rank=1, init='fit', seed=3,
                calibration=calibration)[1]
      for calibration in (None, token_QT)))


@pytest.mark.slow
def test_energy_is_of_the_residual_that_is_left():
  values, energy = tiny.variables(LLAMA), {}
  rcfg = target(LLAMA, loops=2, rank='attn3+mlp3', init='fit', lora='svd',
                prelude=0, coda=0, loop_norms=True)
  with initialised(LLAMA, rcfg, _read(values), init='fit', energy=energy,
             token_QT=tiny.tokens(LLAMA, N, T)) as (kept, init, found):
    held = {(path, at): array for path, at, array in found}
  assert (kept, init) == (rcfg, 'fit')
  q = 'block/layers/attn/q/kernel'
  kept = total = 0.0
  for layer in range(3):
    residual = _read(values)(q, 3 + layer) - held[q, (layer,)]
    product = np.tensordot(held['adapters/q/a', (1, layer)],
                           held['adapters/q/b', (1, layer)], 1)
    total += (residual ** 2).sum()
    kept += (residual ** 2).sum() - ((residual - product) ** 2).sum()
  assert energy['q', 1] == pytest.approx([kept, total], rel=1e-4)


def test_factors_are_for_the_inputs_that_they_get(tmp_path):
  """Fitted one after the other, they bring the stream back."""
  values, token_QT = tiny.variables(LLAMA), tiny.tokens(LLAMA, N, T)
  rcfg = dataclasses.replace(LLAMA, loops=2, layers_per_loop=3, rank='6')
  read = _read(values)
  store = kernels.Store(tmp_path / 'store', 2)
  for name in rcfg.kernels:
    for place in range(3):
      store.put(name, place, read(kernels.path(name), place), [
          kernels.kept(rcfg, name, np.zeros(rcfg.in_out(name), np.float32),
                       *(np.zeros((rows, 6), np.float32).reshape(shape)
                         for rows, shape in zip(
                             rcfg.in_out(name), ((-1, 6), (6, -1)),
                             strict=True)))
          for _ in range(2)])
  converted = kernels.unrolled(rcfg, read, 'average', store)
  kept = fit.Moments(tmp_path)
  streams = layers.stream(LLAMA, read, layers.ends(LLAMA, read), token_QT)
  for layer, x_QTD in zip(range(6), streams, strict=False):
    kept.put_stream(layer, x_QTD)
    for name in rcfg.kernels:
      kept.put(name, layer, 'output', np.eye(rcfg.in_out(name)[1]))

  def gap():
    ours, theirs = (distance.final(LLAMA, r, token_QT)
                    for r in (converted, read))
    return float(np.square(ours - theirs).mean())

  before = gap()
  refit.refit(
      LLAMA, rcfg, align.Aligned(read, kept, {}), converted, store)
  assert gap() < before / 4


@pytest.mark.parametrize('name', [
    'llama', *(pytest.param(name, marks=pytest.mark.slow)
               for name in ('gemma', 'gpt_neox'))])
def test_norms_do_what_kernels_without_factors_cannot(name, tmp_path):
  """Loops that differ by the scale of what kernels read become the same."""
  cfg, rng = tiny.FAMILIES[name], np.random.default_rng(0)
  values, token_QT = tiny.variables(cfg), tiny.tokens(cfg, N, T)
  by = rng.uniform(0.5, 2, (3, cfg.D))
  for path, value in paths.items(values['params']['block']):
    again = value[:3].copy()
    if path.split('/')[-2] in ('q', 'k', 'v', 'gate', 'up') and (
        path.endswith('kernel')):
      again *= by.reshape(3, cfg.D, *[1] * (value.ndim - 2))
    paths.put(values['params']['block'], path,
             np.concatenate([value[:3], again]))
  rcfg = dataclasses.replace(cfg, loops=2, layers_per_loop=3)
  read, vectors = _read(values), {}
  store = kernels.Store(tmp_path / 'store', 2)
  kept = fit.measure(cfg, read, token_QT, tmp_path, seed=0)
  for kernel in rcfg.kernels:
    for place in range(3):
      store.put(kernel, place, read(kernels.path(kernel), place), [])
  converted = kernels.unrolled(
      rcfg, lambda *at: vectors[at] if at in vectors else read(*at), 'average',
      store)

  def gap():
    ours, theirs = (distance.final(cfg, r, token_QT) for r in (converted, read))
    return float(np.square(ours - theirs).mean())

  before = gap()
  vectors.update(refit.refit(
      cfg, rcfg, align.Aligned(read, kept, {}), converted, store))
  assert gap() < before / 4
  assert set(vectors) == {(path, layer) for path in layers.leaves(cfg) if (
      path.startswith('block/vectors/')) for layer in range(6)}


@pytest.mark.parametrize('rank', ['0', '3', 'q3+mlp2'])
def test_a_loops_biases_keep_the_means(rank, tmp_path):
  """Whatever is lost, on average the stream is the original's everywhere."""
  cfg = tiny.FAMILIES['gpt_neox']
  values, token_QT = tiny.variables(cfg), tiny.tokens(cfg, N, T)
  rcfg = dataclasses.replace(cfg, loops=2, layers_per_loop=3, rank=rank)
  measured = fit.measure(cfg, _read(values), token_QT, tmp_path, seed=0)
  store = kernels.Store(tmp_path / 'store', 2)
  start = search_lib._fitted(
      cfg, rcfg, align.Aligned(_read(values), measured, {}), store, 1.0,
      lambda share: None)
  converted = kernels.unrolled(start.rcfg, start.read, start.rule, store)
  ours, theirs = (
      [x_QTD.mean((0, 1)) for x_QTD in layers.stream(
          cfg, read, layers.ends(cfg, read), token_QT)]
      for read in (converted, _read(values)))
  for layer in range(7):
    assert tiny.distance(ours[layer], theirs[layer]) < 1e-5, layer


def test_wide_kernels_biases_keep_the_means_too(tmp_path, monkeypatch):
  monkeypatch.setattr(moments, '_WIDEST', 16)  # D; the MLP is wider.
  test_a_loops_biases_keep_the_means('2', tmp_path)


def test_a_norms_factor_is_of_least_squares(monkeypatch):
  monkeypatch.setattr(refit, '_NORM_DAMPING', 1e-12)
  rng, found, design, wanted = np.random.default_rng(0), [], [], []
  z = rng.normal(size=(50, 4))
  moment = z.T @ z / 50
  for columns in (3, 6):
    root = rng.normal(size=(columns, columns))
    pull, kernel = (rng.normal(size=(4, columns)) for _ in range(2))
    found.append((pull, kernel, root @ root.T))
    design.append(np.einsum('nd,dc->ncd', z, kernel @ root).reshape(-1, 4))
    wanted.append((z @ refit._solved(moment, pull) @ root).ravel())
  change, *_ = np.linalg.lstsq(
      np.concatenate(design), np.concatenate(wanted), rcond=None)
  assert np.allclose(refit._factor(moment, found), 1 + change, atol=1e-5)


def test_where_only_the_first_loop_counts_the_fit_is_lower(tmp_path):
  values = tiny.variables(LLAMA)
  rcfg = dataclasses.replace(LLAMA, loops=2, layers_per_loop=3)
  measured = fit.measure(
      LLAMA, _read(values), tiny.tokens(LLAMA, N, T), tmp_path, seed=0)
  store = kernels.Store(tmp_path / 'store', 2)
  aligned = align.Aligned(_read(values), measured, align.orders(
      rcfg, _read(values), measured))
  search_lib._fitted(LLAMA, rcfg, aligned, store, 1e9, lambda share: None)
  for name in rcfg.kernels:
    for place in range(3):
      assert tiny.distance(
          store.shared(name, place),
          _read(values)(kernels.path(name), place)) < 1e-4, name


# Layers one at a time.


@pytest.mark.parametrize('name', [
    'llama', pytest.param('gpt_neox', marks=pytest.mark.slow)])
def test_what_the_last_kernel_lacks_is_all_the_layer_lacks(name):
  cfg = tiny.FAMILIES[name]
  values, ours = (layers.read_layer(cfg, _read(tiny.variables(cfg, seed)), 0)
                  for seed in (0, 1))
  x_QTD, y_QTD = np.random.default_rng(0).normal(
      size=(2, 2, T, cfg.D)).astype(np.float32)
  _, z, _ = layers.both_inputs(cfg, values, ours, x_QTD, y_QTD, 'down')
  lacks = (layers.forward(cfg, values, x_QTD)
           - layers.forward(cfg, ours, y_QTD)).reshape(2 * T, cfg.D)

  def pull(values, ours, x_QTD, y_QTD):
    return refit._pull(cfg, 'down', values, ours, refit._sums(
        cfg, values, ours, x_QTD, y_QTD, 'down'))

  assert tiny.distance(
      pull(values, ours, x_QTD, y_QTD), z.T @ lacks / (2 * T)) < 1e-5
  # Nothing lacks where nothing differs.
  assert not pull(values, values, x_QTD, x_QTD).any()


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_layer_by_layer_is_the_decoder(name):
  cfg = tiny.FAMILIES[name]
  values, other = tiny.variables(cfg), tiny.variables(cfg, seed=1)
  for part in ('embed', 'norm', 'head'):
    if part in other['params']:
      other['params'][part] = values['params'][part]
  token_QT = tiny.tokens(cfg, 3, T)
  one, two = (distance.final(cfg, _read(v), token_QT) for v in (values, other))
  assert distance.divergence(cfg, _read(values), one, one) == 0
  assert distance.divergence(cfg, _read(values), one, two) == pytest.approx(
      _kl(cfg, values, (cfg, other), token_QT), rel=1e-4)


def test_inputs_and_gradients_make_the_kernels_gradients():
  cfg = tiny.FAMILIES['gpt_neox']
  values = layers.read_layer(cfg, _read(tiny.variables(cfg)), 2)
  rng = np.random.default_rng(0)
  x_BTD, d_BTD = rng.normal(size=(2, 2, T, cfg.D)).astype(np.float32)
  d_x, inputs, outputs = layers.backward(cfg, values, x_BTD, d_BTD)
  wanted, wanted_x = jax.grad(
      lambda v, x: jnp.vdot(layers.forward(cfg, v, x), d_BTD), (0, 1))(
          values, x_BTD)
  assert tiny.distance(d_x, wanted_x) < 1e-5
  for name in cfg.kernels:
    product = inputs[layers.INPUT[name]].T @ outputs[name]
    group = 'attn' if name in 'qkvo' else 'mlp'
    kernel = wanted['layers'][group][name]['kernel']
    assert tiny.distance(product, kernel.reshape(product.shape)) < 1e-5, name


def test_moments_are_means_over_tokens(tmp_path, monkeypatch):
  values = tiny.variables(LLAMA)
  token_QT = tiny.tokens(LLAMA, 3, T)
  found = fit.measure(LLAMA, _read(values), token_QT, tmp_path, seed=0)
  first = layers.read_layer(LLAMA, _read(values), 0)['vectors']['attn_norm']
  x_QTD = values['params']['embed']['embedding'][token_QT]
  x = np.asarray(rtx.model.normalize(LLAMA, x_QTD, first)).reshape(-1, LLAMA.D)
  for name in 'qkv':
    assert np.allclose(found.input(name, 0), x.T @ x / len(x), atol=1e-5)
    assert np.allclose(
        matrices.centred(found.input(name, 0), found.mean(name, 0)),
        np.cov(x.T, bias=True), atol=1e-5)
  # Wide ones have the diagonal only.
  whole = found.input('down', 1), found.output('up', 1)
  monkeypatch.setattr(moments, '_WIDEST', 16)
  monkeypatch.setattr(layers, '_TOKENS', T)  # Nor do batches matter.
  found = fit.measure(LLAMA, _read(values), token_QT, tmp_path, seed=0)
  assert found.input('q', 1).shape == (16, 16)
  np.testing.assert_allclose(
      found.input('down', 1), whole[0].diagonal(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
      matrices.centred(found.input('down', 1), found.mean('down', 1)),
      matrices.centred(whole[0], found.mean('down', 1)).diagonal(),
      rtol=1e-4, atol=1e-6)
  assert found.output('up', 1).shape == whole[1].diagonal().shape


# Bad input.


@pytest.mark.parametrize('calibration, parts', [
    (np.zeros((4, 8)), ('float64', 'integer', 'tokenize')),
    (np.zeros(64, int), ('(64,)', '[sequences, tokens]')),
    (np.full((4, 8), 29), ('29', '0 to 28', 'tokenizer')),
    (np.full((4, 8), -1), ('-1', '0 to 28', 'tokenizer')),
    (np.zeros((1, 64), int), ('1 sequences', 'more text')),
    (np.zeros((3, 5), int), ('15 tokens', '16 tokens', 'more text')),
    ([], ('0 sequences', 'more text')),
    ([np.zeros((2, 8), int), np.zeros((2, 9), int)], ('(8,)', '(9,)')),
])
def test_tokens_that_tell_nothing_are_explained(calibration, parts):
  with tiny.refused('calibration', *parts):
    rtx.relax(LLAMA, tiny.variables(LLAMA), loops=2, init='fit',
              calibration=calibration)


def test_what_does_not_go_with_it_is_explained():
  values = tiny.variables(LLAMA)
  with tiny.refused("init='average'", 'calibration', "init='fit'"):
    rtx.relax(LLAMA, values, loops=2, calibration=tiny.tokens(LLAMA))
  with tiny.refused("lora='zero'", "lora='svd'"):
    rtx.relax(LLAMA, values, loops=2, init='fit', lora='zero')
  with tiny.refused("init='fit'", 'calibration', 'convert'):
    rcfg = dataclasses.replace(LLAMA, loops=2, layers_per_loop=3)
    list(parts(LLAMA, rcfg, _read(values), init='fit'))


def test_text_is_cut_into_rows(tmp_path):
  class Bytes:
    bos_id, eos_id = 1, 2

    def encode(self, text):
      return list(text.encode())

  path = tmp_path / 'text'
  path.write_text('a' * 300 + '\n<|end|>\n' + 'b' * 300)
  token_QT = fit.read(path, Bytes(), tokens=10_000, document='<|end|>')
  assert token_QT.shape == (2, 256) and token_QT.dtype == np.int32
  assert token_QT.ravel().tolist() == (
      [1, *[97] * 300, 2, 1, *[98] * 300, 2])[:512]
  assert len(fit.read(path, Bytes(), tokens=300, document='<|end|>')) == 1
  with tiny.refused('200 tokens', '256', 'more text'):
    fit.read(path, Bytes(), tokens=200)
  with tiny.refused('nowhere', 'UTF-8'):
    fit.read(tmp_path / 'nowhere', Bytes(), tokens=200)
