"""Laws of the decoder: causality, cache, exits, how is not what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import config as config_lib
from recursive_tx import model, tying
from recursive_tx.files import paths

B, T = 2, 12
# Distances are shares of max(1, max |logit|).
ROUNDING = 1e-5


# Law 8: causality and segments.


@functools.cache
def _embedding_gradient(cfg, T):
  """Gradient of the logits at t with respect to each token's embedding."""
  module = rtx.Decoder(cfg)

  def logit(table_VD, values, t, segment_1T):
    embed = {**values['params']['embed'], 'embedding': table_VD}
    params = {**values['params'], 'embed': embed}
    token_1T = jnp.arange(T)[None]  # All distinct, so a row is a place.
    logits_1TV = module.apply({'params': params}, token_1T, segment_1T)
    return (logits_1TV[0, t] * jnp.arange(1, cfg.V + 1)).sum()

  grad = tiny.jit(jax.grad(logit))
  values = tiny.variables(cfg)

  def reach(t, segment_T=None):
    """Places whose token has any influence on the logits at t."""
    segment = np.ones((1, T), np.int32) if segment_T is None else segment_T
    table = values['params']['embed']['embedding']
    by_place = grad(table, values, t, np.asarray(segment).reshape(1, T))[:T]
    return np.flatnonzero(np.abs(by_place).max(axis=-1)).tolist()

  return reach


CAUSAL = dataclasses.replace(
    tiny.MIXED, layers_per_loop=1, prelude=0, window=3)


@pytest.mark.parametrize('t', [0, 4, 11])
def test_gradients_from_later_tokens_are_exactly_zero(t):
  reach = _embedding_gradient(CAUSAL, T)(t)
  # Each of three layers sees two tokens further back.
  assert reach == list(range(max(0, t - 3 * 2), t + 1))


def test_gradients_do_not_cross_documents():
  reach = _embedding_gradient(CAUSAL, T)
  segment_T = [1] * 5 + [2] * 4 + [0] * 3
  assert reach(4, segment_T) == [0, 1, 2, 3, 4]
  assert reach(5, segment_T) == [5]
  assert reach(8, segment_T) == [5, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
@pytest.mark.parametrize('loops', [1, 3])
def test_causality_of_every_family(name, loops):
  base = tiny.FAMILIES[name]
  cfg = dataclasses.replace(
      base, layers_per_loop=1, loops=loops, prelude=1, rank=2, window=0,
      pattern=base.pattern.replace('w', 'g'), tied=False)
  reach = _embedding_gradient(cfg, T)
  for t in range(T):
    assert reach(t) == list(range(t + 1))
  assert reach(8, [1] * 5 + [2] * 7) == [5, 6, 7, 8]


@pytest.mark.parametrize('window', [
    4, pytest.param(0, marks=pytest.mark.slow)])
def test_packed_documents_equal_separate_ones(window):
  cfg = dataclasses.replace(tiny.MIXED, window=window)
  values, run = tiny.variables(cfg), tiny.decoder(cfg)
  token_BT = tiny.tokens(cfg, B, T)
  alone_BTV = run(values, token_BT)
  # Row 0 packs the first 5 tokens of one document and 6 of the other, row 1
  # the other way round; one place of padding is left.
  packed_BT = np.zeros((B, T), np.int32)
  segment_BT, position_BT = np.zeros_like(packed_BT), np.zeros_like(packed_BT)
  places = [(0, 0, 0, 5), (0, 1, 5, 6), (1, 1, 0, 6), (1, 0, 6, 5)]
  for row, document, start, length in places:
    at = (row, slice(start, start + length))
    packed_BT[at] = token_BT[document, :length]
    segment_BT[at] = 1 + document
    position_BT[at] = np.arange(length)
  packed_BTV = run(values, packed_BT, segment_BT, position_BT)
  for row, document, start, length in places:
    assert tiny.distance(packed_BTV[row, start:start + length],
                         alone_BTV[document, :length]) < ROUNDING
  assert np.isfinite(packed_BTV).all()


@pytest.mark.parametrize('name', [
    'gpt_neox', pytest.param('llama', marks=pytest.mark.slow)])
def test_only_relative_positions_matter(name):
  cfg = tiny.FAMILIES[name]
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  position_BT = np.broadcast_to(np.arange(T), (B, T))
  run = tiny.decoder(cfg)
  out_BTV = run(values, token_BT, None, position_BT)
  shifted_BTV = run(values, token_BT, None, position_BT + 1000)
  # fp32 angles near 1000 have an error of about 6e-5.
  assert tiny.distance(shifted_BTV, out_BTV) < 1e-3
  stretched_BTV = run(values, token_BT, None, position_BT * 3)
  assert tiny.distance(stretched_BTV, out_BTV) > 1e-2


# Exits: `hidden` is each loop's output as an exit after it would have it.


EXITS = [
    tiny.MIXED,
    *(pytest.param(dataclasses.replace(tiny.MIXED, **change),
                   marks=pytest.mark.slow) for change in (
        dict(loops=3, loop_norms=False), dict(prelude=0), dict(coda=0),
        dict(loops=1), dict(rank='0', embed_scale=True)))]


@pytest.mark.parametrize('cfg', EXITS)
def test_hidden_is_what_an_exit_after_each_loop_computes(cfg):
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  h_LBTD = tiny.decoder(cfg, method='hidden')(values, token_BT)
  assert h_LBTD.shape == (cfg.loops, B, T, cfg.D)
  logits_LBTV = tiny.decoder(cfg, method='logits')(values, h_LBTD)
  last_BTV = tiny.decoder(cfg)(values, token_BT)
  assert tiny.distance(logits_LBTV[-1], last_BTV) < ROUNDING
  # By hand: the prelude, the loops so far and the coda, of the merged model.
  vanilla, merged = tying.merge(cfg, values)
  for loops in range(1, cfg.loops + 1):
    head = cfg.prelude + loops * cfg.layers_per_loop
    kept = [*range(head), *range(vanilla.num_layers - cfg.coda,
                                 vanilla.num_layers)]
    params = {**merged['params'], 'block': jax.tree.map(
        lambda v, kept=kept: v[np.array(kept)], merged['params']['block'])}
    exit_cfg = dataclasses.replace(vanilla, layers_per_loop=len(kept))
    exit_BTV = tiny.decoder(exit_cfg)({'params': params}, token_BT)
    assert tiny.distance(logits_LBTV[loops - 1], exit_BTV) < ROUNDING


def test_the_head_takes_any_leading_dimensions():
  cfg = tiny.MIXED
  values = tiny.variables(cfg)
  h_LBTD = np.random.default_rng(0).normal(
      size=(2, 3, 4, cfg.D)).astype(np.float32)
  run = tiny.decoder(cfg, method='logits')
  expected = h_LBTD @ values['params']['head']['kernel'].T
  for h in (h_LBTD, h_LBTD[0], h_LBTD[0, 0], h_LBTD[0, 0, 0]):
    assert run(values, h).shape == (*h.shape[:-1], cfg.V)
  assert tiny.distance(run(values, h_LBTD), expected) < ROUNDING


def test_logits_are_fp32_and_hidden_is_in_the_compute_dtype():
  cfg, run = tiny.MIXED, rtx.Run(dtype='bfloat16')
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, T)
  hidden = jax.eval_shape(
      tiny.decoder(cfg, run, method='hidden'), values, token_BT)
  assert hidden.dtype == jnp.bfloat16
  logits = jax.eval_shape(
      tiny.decoder(cfg, run, method='logits'), values, hidden)
  assert logits.dtype == jnp.float32


# Laws 11 and 12: how is not what, and every field matters.

RUNS = {
    'dtype': [rtx.Run(dtype='bfloat16')],
    'remat': [rtx.Run(remat='full'), rtx.Run(remat='dots')],
    'unroll': [rtx.Run(unroll=True), rtx.Run(unroll=True, remat='full')],
    'attention': [rtx.Run(attention='plain'), rtx.Run(attention='blocks')],
    'layout': [rtx.Run(layout='plain'),
               rtx.Run(layout='plain', attention='blocks')],
    'logits_mib': (rtx.Run(logits_mib=1),),
}
# One of each kind is enough in the fast set; compiling gradients is slow.
_SLOW_RUNS = (rtx.Run(remat='full'), rtx.Run(remat='dots'),
              rtx.Run(unroll=True), rtx.Run(attention='blocks'),
              rtx.Run(layout='plain', attention='blocks'))
_EACH_RUN = [
    pytest.param(run, marks=pytest.mark.slow) if run in _SLOW_RUNS else run
    for runs in RUNS.values() for run in runs]
# A window, so that blocks of keys can be skipped, and segments are passed.
RUN_CFG = dataclasses.replace(
    tiny.MIXED, window=30, prelude=0, coda=0, rank='q2+down3',
    gated=False)
LONG = 100  # Long enough for attention in blocks; a multiple of no size.


@functools.cache
def _loss_and_gradient(run, cfg=RUN_CFG):
  """Loss, logits and gradients on two packed rows."""
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, B, LONG)
  segment_BT = 1 + (np.arange(LONG)[None] >= np.array([[70], [37]]))
  module = rtx.Decoder(cfg, run=run)

  def loss(values):
    logits_BTV = module.apply(values, token_BT, segment_BT)
    nats_BTV = jax.nn.log_softmax(logits_BTV)
    at = np.roll(token_BT, -1, axis=1)[..., None]
    return -jnp.take_along_axis(nats_BTV, at, -1).mean(), logits_BTV

  return tiny.jit(jax.value_and_grad(loss, has_aux=True))(values)


def test_every_way_to_run_has_a_row():
  assert set(RUNS) == {field.name for field in dataclasses.fields(rtx.Run)}
  for name, runs in RUNS.items():
    assert all(getattr(run, name) != getattr(rtx.Run(), name)
               for run in runs)
  assert {run.remat for run in RUNS['remat']} | {'none'} == set(
      config_lib.REMATS)


# Layers that differ in what they attend to, capped scores, all norms.
KINDS_CFG = dataclasses.replace(
    tiny.FAMILIES['gemma3_text'], layers_per_loop=2, loops=3, rank='2',
    window=30, attention_cap=2.0)


@pytest.mark.parametrize('cfg, run', [
    *(pytest.param(RUN_CFG, *run.values, marks=run.marks)
      if hasattr(run, 'marks') else (RUN_CFG, run) for run in _EACH_RUN),
    (KINDS_CFG, rtx.Run(unroll=True, attention='blocks')),
    *(pytest.param(KINDS_CFG, run, marks=pytest.mark.slow) for run in (
        rtx.Run(attention='plain'), rtx.Run(remat='full')))])
def test_how_is_not_what(cfg, run):
  (loss, logits_BTV), grads = _loss_and_gradient(run, cfg)
  (loss_0, logits_0_BTV), grads_0 = _loss_and_gradient(rtx.Run(), cfg)
  # bf16 has 8 bits, and its errors add up over layers.
  atol = ROUNDING if run.dtype == 'float32' else 5e-2
  assert abs(float(loss) - float(loss_0)) < atol
  assert tiny.distance(logits_BTV, logits_0_BTV) < atol
  for path, grad in paths.items(grads):
    expected = paths.get(grads_0, path)
    scale = max(1e-3, float(abs(expected).max()))
    assert grad.dtype == jnp.float32
    assert float(abs(grad - expected).max()) < 4 * atol * scale, path


# Base and change, for each field. Where only logits can tell, the same
# variables serve both.
LOOPED = dataclasses.replace(
    tiny.FAMILIES['mistral'], layers_per_loop=2, loops=2, loop_norms=False)
_LONG = (32.0, 1.0, 1.0, 2.0, 1.0, 4.0)  # Of both pairs, short and long.
FIELDS = {
    'V': (LOOPED, dict(V=30)),
    'D': (LOOPED, dict(D=18)),
    'F': (LOOPED, dict(F=25)),
    'N': (LOOPED, dict(N=5)),
    'K': (LOOPED, dict(K=2)),
    'H': (LOOPED, dict(H=6)),
    'layers_per_loop': (LOOPED, dict(layers_per_loop=3)),
    'loops': (LOOPED, dict(loops=3)),
    'prelude': (LOOPED, dict(prelude=1)),
    'coda': (LOOPED, dict(coda=1)),
    'rank': (LOOPED, dict(rank='v1')),
    'loop_norms': (LOOPED, dict(loop_norms=True)),
    'loop_keys': (LOOPED, dict(loop_keys=False)),
    'norm': (LOOPED, dict(norm='rms+1')),
    'norm_eps': (LOOPED, dict(norm_eps=1e-2)),
    'norm_place': (LOOPED, dict(norm_place='both')),
    'qk_norm': (LOOPED, dict(qk_norm='head')),
    'act': (LOOPED, dict(act='gelu')),
    'gated': (LOOPED, dict(gated=False)),
    'parallel': (LOOPED, dict(parallel=True)),
    'attention_bias': (LOOPED, dict(attention_bias=True)),
    'mlp_bias': (LOOPED, dict(mlp_bias=True)),
    'qkv_bias': (LOOPED, dict(qkv_bias=True)),
    'query_scale': (LOOPED, dict(query_scale=0.1)),
    'attention_cap': (LOOPED, dict(attention_cap=0.5)),
    'logits_cap': (LOOPED, dict(logits_cap=0.5)),
    'residual_scale': (LOOPED, dict(residual_scale=0.5)),
    'logits_scale': (LOOPED, dict(logits_scale=0.5)),
    'rope_theta': (LOOPED, dict(rope_theta=100.0)),
    'rope_fraction': (LOOPED, dict(rope_fraction=0.5)),
    'rope_scaling': (LOOPED, dict(rope_scaling=(4.0,))),
    'long_rope': (LOOPED, dict(long_rope=_LONG)),
    'context': (dataclasses.replace(LOOPED, long_rope=_LONG),
                dict(context=33)),
    'window': (LOOPED, dict(window=6)),
    'pattern': (LOOPED, dict(pattern='wg')),
    'window_theta': (LOOPED, dict(window_theta=100.0)),
    'embed_scale': (LOOPED, dict(embed_scale=True)),
    'embed_factor': (LOOPED, dict(embed_factor=2.0)),
    'positions': (LOOPED, dict(positions=64)),
    'tied': (LOOPED, dict(tied=True)),
    'exit_gate': (LOOPED, dict(exit_gate=3)),
}
# One of its two wavelengths is kept, the other is between short and long.
_LLAMA_3 = dataclasses.replace(
    LOOPED, rope_theta=10.0, rope_scaling=(4.0, 1.0, 4.0, 32.0))
# More settings of the same fields.
SETTINGS = [
    (LOOPED, dict(norm='layer')), (LOOPED, dict(window=0)),
    (LOOPED, dict(act='relu')), (LOOPED, dict(act='gelu_tanh')),
    *((_LLAMA_3, dict(rope_scaling=other)) for other in (
        (), (4.0,), (8.0, 1.0, 4.0, 32.0), (4.0, 0.5, 4.0, 32.0),
        (4.0, 1.0, 8.0, 32.0), (4.0, 1.0, 4.0, 64.0))),
    (dataclasses.replace(LOOPED, act='gelu'), dict(act='gelu_tanh')),
    *((dataclasses.replace(LOOPED, long_rope=_LONG, context=context),
       dict(long_rope=other))
      for context, other in (
          (32, (32, 1.5, 1.0, 2.0, 1.0, 4.0)),
          (32, (32, 1.0, 1.0, 3.0, 1.0, 4.0)), (33, (33, *_LONG[1:])))),
    (LOOPED, dict(norm_place='post')), (LOOPED, dict(qk_norm='all')),
    (dataclasses.replace(LOOPED, pattern='wg'), dict(pattern='wn')),
    (dataclasses.replace(LOOPED, pattern='wg'), dict(window_theta=100.0)),
]


def _matters(base, change):
  changed = dataclasses.replace(base, **change)
  shapes = model.flat_shapes(base), model.flat_shapes(changed)
  if shapes[0] != shapes[1]:
    return True
  values, token_BT = tiny.variables(base), tiny.tokens(base, B, T)
  one, other = (tiny.decoder(cfg)(values, token_BT)
                for cfg in (base, changed))
  # The two forms of gelu differ by 5e-4 at most, other settings far more.
  return tiny.distance(other, one) > 1e-5 * 10


@pytest.mark.parametrize(
    'field', [f.name for f in dataclasses.fields(rtx.ModelConfig)])
def test_every_field_matters(field):
  assert field in FIELDS, 'a new field needs a row in FIELDS'
  base, change = FIELDS[field]
  assert list(change) == [field]
  assert _matters(base, change)


@pytest.mark.slow
@pytest.mark.parametrize('base, change', SETTINGS)
def test_every_setting_matters(base, change):
  assert _matters(base, change)


# Names of dimensions.


@pytest.mark.parametrize('cfg', [tiny.MIXED, tiny.FAMILIES['gpt_neox'],
                                 LOOPED])
def test_every_parameter_names_its_dimensions(cfg):
  boxed = jax.tree_util.tree_leaves_with_path(
      model.abstract_params(cfg), is_leaf=lambda x: hasattr(x, 'names'))
  assert len(boxed) == len(model.flat_shapes(cfg))
  for path, box in boxed:
    keys = [entry.key for entry in path if hasattr(entry, 'key')]
    part, name, leaf = keys[0], keys[-2], keys[-1]
    sizes = dict(
        loops=cfg.loops, R=cfg.ranks.get(name),
        layers=cfg.layers_per_loop if part in ('block', 'adapters')
        else getattr(cfg, part, None))
    shape = box.unbox().shape
    assert shape == tuple(
        sizes[n] if n in sizes else getattr(cfg, n) for n in box.names), keys
    expected = {'norm': (), 'embed': (), 'head': (),
                'adapters': ('loops', 'layers')}.get(part, ('layers',))
    assert box.names[:len(expected)] == expected
    letters = box.names[len(expected):]
    assert all(len(letter) == 1 and letter.isupper() for letter in letters)
    inner, outer = config_lib.split(cfg.kernels.get(name, 'BTD,D->BT'))
    if name in cfg.kernels:
      assert ''.join(letters) == {
          'kernel': inner + outer, 'a': inner + 'R', 'b': 'R' + outer,
          'bias': outer}[leaf]


def test_the_tree_has_the_contracts_top_level_names():
  top = {cfg: {path.split('/')[0] for path in model.flat_shapes(cfg)}
         for cfg in (tiny.MIXED, tiny.FAMILIES['gemma'])}
  assert top[tiny.MIXED] == {
      'embed', 'prelude', 'block', 'coda', 'norm', 'head', 'adapters'}
  assert top[tiny.FAMILIES['gemma']] == {'embed', 'block', 'norm'}


def test_init_makes_what_the_shapes_say():
  cfg = dataclasses.replace(
      tiny.MIXED, prelude=0, coda=0, rank='q2+down3')
  made = tiny.jit(rtx.Decoder(cfg).init)(
      jax.random.key(0), tiny.tokens(cfg, 1, 2))
  params = jax.tree.map(np.asarray, jax.tree.map(
      lambda box: box.unbox(), made['params'],
      is_leaf=lambda x: hasattr(x, 'unbox')))
  flat = dict(paths.items(params))
  assert {k: v.shape for k, v in flat.items()} == model.flat_shapes(cfg)
  assert all(v.dtype == np.float32 for v in flat.values())
  for path, value in flat.items():
    name, leaf = path.split('/')[-2:]
    if leaf in ('b', 'bias'):
      assert not value.any(), path
    elif leaf == 'scale':
      assert (value == 1).all(), path
    elif leaf in ('kernel', 'a') and name in cfg.kernels:
      # Every layer (and loop) is drawn anew, at one over the root of fan-in.
      std = cfg.in_out(name)[0] ** -0.5
      assert abs(value.std() / std - 1) < 0.25, path
      stack = value.reshape(-1, *value.shape[1 if leaf == 'kernel' else 2:])
      assert not np.array_equal(stack[0], stack[-1]), path
