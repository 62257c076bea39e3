"""What adapters hold: factors of every linear, norms and biases per loop."""

import dataclasses

from flax.linen import meta
import jax
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import model
from recursive_tx.files import paths
from recursive_tx.model import adapters

LORA = dataclasses.replace(
    tiny.MIXED, rank='q2+k20+o3+mlp5', loop_norms=False)


def _adapter_shapes(cfg):
  return {path.removeprefix('adapters/'): shape
          for path, shape in model.flat_shapes(cfg).items()
          if path.startswith('adapters/')}


def test_factors_have_the_kernels_letters_and_their_own_rank():
  # MIXED: D=16, F=24, N=4, K=2, H=6, two loops of two layers.
  assert _adapter_shapes(LORA) == {
      'q/a': (2, 2, 16, 2), 'q/b': (2, 2, 2, 4, 6),
      # Capped at K * H; v has none.
      'k/a': (2, 2, 16, 12), 'k/b': (2, 2, 12, 2, 6),
      'o/a': (2, 2, 4, 6, 3), 'o/b': (2, 2, 3, 16),
      'gate/a': (2, 2, 16, 5), 'gate/b': (2, 2, 5, 24),
      'up/a': (2, 2, 16, 5), 'up/b': (2, 2, 5, 24),
      'down/a': (2, 2, 24, 5), 'down/b': (2, 2, 5, 16)}


def test_norms_and_biases_live_in_the_loops_or_in_the_block():
  vectors = {'attn_norm/scale': (16,), 'mlp_norm/scale': (16,),
             'q/bias': (4, 6), 'k/bias': (2, 6), 'v/bias': (2, 6),
             'o/bias': (16,)}
  for loops, loop_norms, there in (
      (2, True, 'adapters/'), (2, False, 'block/vectors/'),
      (1, True, 'block/vectors/'), (1, False, 'block/vectors/')):
    cfg = dataclasses.replace(
        tiny.MIXED, rank='0', loops=loops, loop_norms=loop_norms)
    shapes = model.flat_shapes(cfg)
    stack = (loops, 2) if there == 'adapters/' else (2,)
    for path, shape in vectors.items():
      assert shapes[there + path] == (*stack, *shape)
      # The prelude and the coda run once and keep their own.
      for part in ('prelude', 'coda'):
        assert shapes[f'{part}/vectors/{path}'] == (1, *shape)
    held = {path for path in shapes if path.startswith(
        ('adapters/', 'block/vectors/'))}
    assert held == {there + path for path in vectors}


def test_a_layer_norm_has_a_bias_and_linears_have_theirs():
  table = adapters.vector_table(tiny.FAMILIES['gpt_neox'])
  assert {name: set(leaves) for name, leaves in table.items()} == {
      'attn_norm': {'scale', 'bias'}, 'mlp_norm': {'scale', 'bias'},
      **dict.fromkeys(('q', 'k', 'v', 'o', 'up', 'down'), {'bias'})}


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_a_norm_starts_neutral(name):
  cfg = tiny.FAMILIES[name]
  start = {leaf: np.asarray(init(None, (3,))) for leaf, (_, _, init)
           in adapters.norm_leaves(cfg).items()}
  # Gemma's scale is stored minus one.
  assert (start.pop('scale') == (cfg.norm != 'rms+1')).all()
  assert all((value == 0).all() for value in start.values())


@pytest.mark.parametrize('sizes, loops, expected', [
    # Gemma 2B, TinyLlama 1.1B and Pythia 1B; the paper's section 3 as counted
    # by min(rank, in, out) * (in + out), in millions.
    (dict(F=16384, N=8, K=1, H=256, layers_per_loop=9), 2,
     {64: 78.4, 128: 156.9, 256: 313.8, 512: 606.3}),
    (dict(F=16384, N=8, K=1, H=256, layers_per_loop=6), 3,
     {64: 78.4, 128: 156.9, 256: 313.8, 512: 606.3}),
    (dict(F=5632, N=32, K=4, H=64, layers_per_loop=11), 2,
     {64: 50.5, 128: 100.9, 256: 201.9, 512: 377.7}),
    (dict(F=8192, N=8, K=8, H=256, layers_per_loop=8, gated=False), 2,
     {64: 37.7, 128: 75.5, 256: 151.0, 512: 302.0}),
])
def test_parameter_counts_are_the_papers(sizes, loops, expected):
  for rank, millions in expected.items():
    cfg = rtx.ModelConfig(
        V=8, D=2048, loops=loops, loop_norms=False, rank=rank, **sizes)
    count = sum(
        np.prod([R if letter == 'R' else getattr(cfg, letter)
                 for letter in letters], dtype=np.int64)
        for leaves in adapters.adapter_table(cfg).values()
        for letters, R, _ in leaves.values())
    count *= cfg.loops * cfg.layers_per_loop
    assert round(count / 1e6, 1) == millions


def test_fresh_adapters_change_nothing_and_differ_by_loop_and_layer():
  cfg = dataclasses.replace(tiny.MIXED, D=64, rank='q8+down5')
  stacked = adapters.stacked((('loops', 2), ('layers', 3)))(
      cfg, adapters.adapter_table(cfg))
  made = meta.unbox(tiny.jit(stacked.init)(jax.random.key(0)))['params']
  for path, value in paths.items(made):
    name, leaf = path.split('/')
    value = np.asarray(value)
    assert value.shape[:2] == (2, 3), path
    if leaf == 'a':
      rows = np.prod(value.shape[2:-1])
      assert abs(value.std() * rows ** 0.5 - 1) < 0.15, path
      drawn = value.reshape(6, -1)
      assert len({row.tobytes() for row in drawn}) == 6, path
    else:
      assert (value == (leaf == 'scale')).all(), path


def test_overlay_joins_leaves_of_one_name():
  assert adapters.overlay(
      {'q': {'bias': 1}, 'norm': {'scale': 2}}, {'q': {'a': 3, 'b': 4}},
      {'k': {'a': 5}}) == {
          'q': {'bias': 1, 'a': 3, 'b': 4}, 'norm': {'scale': 2},
          'k': {'a': 5}}


# With few tokens the two thin matmuls are cheaper than adding their product
# to the kernel, with many they are not: both must be the same function.
@pytest.mark.parametrize('T', [2, 40])
def test_a_pair_of_factors_equals_its_product_in_the_kernel(T):
  cfg = dataclasses.replace(
      tiny.MIXED, loops=1, prelude=0, coda=0, rank='q2+k3+v4+o5+mlp6')
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, 1, T)
  params = dict(values['params'])
  factors = params.pop('adapters')
  plain = dataclasses.replace(cfg, rank='0')
  layers = {group: dict(kernels) for group, kernels in
            params['block']['layers'].items()}
  for name, leaves in factors.items():
    rows, columns = cfg.in_out(name)
    a = leaves['a'].reshape(2, rows, -1).astype(np.float64)
    b = leaves['b'].reshape(2, -1, columns).astype(np.float64)
    group = 'mlp' if name in ('gate', 'up', 'down') else 'attn'
    kernel = layers[group][name]['kernel']
    # LoRA's scale is 1: no alpha.
    merged = kernel + np.stack([a[i] @ b[i] for i in range(2)]).reshape(
        kernel.shape)
    layers[group][name] = {'kernel': merged.astype(np.float32)}
  params['block'] = {**params['block'], 'layers': layers}
  one = tiny.decoder(cfg)(values, token_BT)
  other = tiny.decoder(plain)({'params': params}, token_BT)
  assert tiny.distance(one, other) < 1e-5
  base = tiny.decoder(plain)({'params': {
      **values['params'], 'block': values['params']['block']}}, token_BT)
  assert tiny.distance(one, base) > 1e-2
