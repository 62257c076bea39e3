"""One layer: norms, rotary attention, MLP. What varies by loop comes in."""

import functools
import math
from typing import NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import attention, kv_cache
from recursive_tx.model.adapters import LayerValues
from recursive_tx.model.linear import Linear, products

_ACTS = {
    'silu': jax.nn.silu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'relu': jax.nn.relu,
}


class Context(NamedTuple):
  """What the layers of one pass share.

  Attributes:
    position_BT: places of the tokens in their documents.
    rope: of `rope_tables` for these; None where layers differ in it.
    mask_BTS, segment_BT: of `attention.attend`; None with a cache.
    window_BTS: the mask of layers with a window, where not all have one.
    first: whether this is the first loop, a bool, traced in a scan; read where
      loops share keys.
    exited_BT: tokens that exited before this loop, bool; None is none.
  """
  position_BT: jax.Array
  rope: tuple[jax.Array, jax.Array] | None = None
  mask_BTS: jax.Array | None = None
  window_BTS: jax.Array | None = None
  segment_BT: jax.Array | None = None
  first: bool | jax.Array = True
  exited_BT: jax.Array | None = None

  def at(self, loop, depth_BT: jax.Array | None) -> 'Context':
    """In a loop, from 0, where tokens exit after depth_BT of them."""
    return self._replace(
        first=loop == 0,
        exited_BT=None if depth_BT is None else depth_BT <= loop)


def whole(
    cfg: config_lib.ModelConfig, shape: tuple[int, int],
    segment_BT: jax.Array | None = None, position_BT: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
) -> Context:
  """Of a pass over whole sequences, [B, T]; see `Decoder` for the arrays."""
  given = [x for x in (segment_BT, position_BT) if x is not None]
  chex.assert_shape(given, shape)
  place_1T = jnp.arange(shape[1])[None]
  if position_BT is None:
    position_BT = jnp.broadcast_to(place_1T, shape)
  if mask_BTS is None:
    mask_BTS = attention.visible(
        place_1T, place_1T, window=0 if cfg.mixed_kinds else cfg.window,
        segment_BT=segment_BT)
  if not cfg.mixed_kinds:
    return Context(position_BT, rope_tables(cfg, position_BT), mask_BTS,
                   segment_BT=segment_BT)
  window_BTS = mask_BTS
  if cfg.window:
    window_BTS &= attention.visible(
        position_BT, position_BT, window=cfg.window)
  return Context(position_BT, None, mask_BTS, window_BTS, segment_BT)


def normalize(
    cfg: config_lib.ModelConfig, x: jax.Array, leaves: dict
) -> jax.Array:
  """Norm over the last dimension, in fp32; `leaves` holds scale (and bias)."""
  if cfg.norm != 'layer':
    return _rms(cfg, x, leaves['scale'], -1).astype(x.dtype)
  y = x.astype(jnp.float32)
  y -= jnp.mean(y, axis=-1, keepdims=True)
  y = _rms(cfg, y, leaves['scale'], -1) + leaves['bias'].astype(jnp.float32)
  return y.astype(x.dtype)


def _rms(cfg, x, scale, axes):
  """x over its root mean square, times the scale, fp32."""
  y, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + cfg.norm_eps)
  return y * (1 + scale if cfg.norm == 'rms+1' else scale)


def rope_tables(
    cfg: config_lib.ModelConfig, position_BT: jax.Array,
    kind: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of each rotated pair's angle, [B, T, 1, pairs], fp32.

  `kind` is that of `LayerValues`; None where all layers are alike.
  """
  if kind is None:
    frequency = _frequencies(cfg, cfg.kind(0))
  else:
    frequency = jnp.stack(
        [_frequencies(cfg, letter) for letter in config_lib.KINDS])[kind]
  angle = position_BT[..., None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
  scale = cfg.long_rope[1] if cfg.long_rope else 1.0
  return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def _frequencies(cfg, kind: str):
  """Radians a position of each rotated pair; 0 where nothing is rotated."""
  pairs = cfg.rotated // 2
  if kind == 'n':
    return jnp.zeros(pairs)
  exponent = -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
  if kind == 'w' and cfg.window_theta:
    return cfg.window_theta ** exponent
  frequency = cfg.rope_theta ** exponent
  if cfg.long_rope:
    long = cfg.context > cfg.long_rope[0]
    frequency /= jnp.asarray(cfg.rope_divisors(long))
  if len(cfg.rope_scaling) == 1:
    frequency /= cfg.rope_scaling[0]
  if len(cfg.rope_scaling) == 4:
    # Llama 3: long wavelengths are stretched by `factor`, short ones are
    # kept, those between are interpolated.
    factor, low, high, length = cfg.rope_scaling
    rotations = length * frequency / (2 * math.pi)
    keep = jnp.clip((rotations - low) / (high - low), 0, 1)
    frequency *= keep + (1 - keep) / factor
  return frequency


def normalize_heads(
    cfg: config_lib.ModelConfig, heads: jax.Array, leaves: dict
) -> jax.Array:
  """RMS norm of queries or keys [B, T, heads, H]: of each head, or of all."""
  scale = leaves['scale']
  if cfg.qk_norm == 'all':
    return _rms(cfg, heads, scale, (-2, -1)).astype(heads.dtype)
  return _rms(cfg, heads, scale[..., None, :], -1).astype(heads.dtype)


def rotate(heads: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates pairs (i, i + pairs) of the first 2 * pairs dimensions of H."""
  cos, sin = rope
  pairs = cos.shape[-1]
  x = heads.astype(jnp.float32)
  one, two, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
  rotated = [one * cos - two * sin, two * cos + one * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.q, self.k, self.v, self.o = (
        Linear(self.cfg, self.run, kernel)
        for kernel in config_lib.GROUPS['attn'])

  def __call__(self, x_BTD, values, context, keys=None):
    """y_BTD and the keys, `Shared` or `Cached`, with those of x_BTD."""
    if isinstance(keys, kv_cache.Cached):
      q_BTNH, *own = self._rotated(
          (self.q, self.k, self.v), x_BTD, values, context)
      keys = kv_cache.write(keys, *own)
      y_BTNH = kv_cache.attend(self.cfg, q_BTNH, keys, values.kind)
    else:
      q_BTNH, *own = self._heads(x_BTD, values, context, keys)
      y_BTNH = self._attend(q_BTNH, *own, values.kind, context)
      keys = None if keys is None else kv_cache.Shared(*own)
    return self.o(y_BTNH, values.linears['o']), keys

  def _attend(self, q_BTNH, k_BTKH, v_BTKH, kind, context):
    """Over whole sequences."""
    def attend(mask_BTS, window):
      return attention.attend(
          q_BTNH, k_BTKH, v_BTKH, mask_BTS=mask_BTS,
          segment_BT=context.segment_BT, window=window,
          scale=self.cfg.score_scale, cap=self.cfg.attention_cap,
          implementation=self.run.attention)
    if kind is None:
      return attend(context.mask_BTS, self.cfg.window)
    return jax.lax.cond(
        kind == config_lib.WINDOW,
        lambda: attend(context.window_BTS, self.cfg.window),
        lambda: attend(context.mask_BTS, 0))

  def _heads(self, x_BTD, values, context, shared):
    """Queries, BTNH, and keys and values, BTKH, own or shared."""
    if shared is not None and context.first is False:
      q_BTNH, = self._rotated((self.q,), x_BTD, values, context)
      return q_BTNH, *shared
    q_BTNH, *own = self._rotated(
        (self.q, self.k, self.v), x_BTD, values, context)
    if shared is not None and context.first is not True:
      # A scan over loops does not know which one it is in.
      own = [jnp.where(context.first, mine, theirs)
             for mine, theirs in zip(own, shared, strict=True)]
    return q_BTNH, *own

  def write(self, x_BTD, values, context, keys):
    """The cache with the keys and values of x_BTD."""
    return kv_cache.write(
        keys, *self._rotated((self.k, self.v), x_BTD, values, context))

  def _rotated(self, linears, x_BTD, values, context):
    """Products of some linears; queries and keys are normed and rotated."""
    rope, rotated = context.rope, []
    if rope is None:
      rope = rope_tables(self.cfg, context.position_BT, values.kind)
    for linear, heads in zip(linears, products(
        linears, self.get_variable('params', 'fused'), x_BTD, values.linears),
                             strict=True):
      if linear.kernel != 'v':
        norm = f'{linear.kernel}_norm'
        if norm in values.norms:
          heads = normalize_heads(self.cfg, heads, values.norms[norm])
        heads = rotate(heads, rope)
      rotated.append(heads)
    return rotated


class Mlp(nn.Module):
  """act(gate) * up, or act(up), then down."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  @nn.compact
  def __call__(self, x_BTD, linears):
    up, down, *gate = (
        Linear(self.cfg, self.run, name, name=name)
        for name in ('up', 'down', 'gate')[:2 + self.cfg.gated])
    first_BTF, *up_BTF = products(
        (*gate, up), self.get_variable('params', 'fused'), x_BTD, linears)
    h_BTF = _ACTS[self.cfg.act](first_BTF)
    if up_BTF:
      h_BTF *= up_BTF[0]
    h_BTF = nn.with_logical_constraint(h_BTF, ('B', 'T', 'F'))
    return down(h_BTF, linears['down'])


class Layer(nn.Module):
  """One layer; its norms, biases and factors come as `values`."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.attn = Attention(self.cfg, self.run)
    self.mlp = Mlp(self.cfg, self.run)

  def __call__(self, x_BTD, values: LayerValues, context: Context, keys=None):
    """Output, BTD, and `keys` with those of x_BTD; see `Stack.walk`."""
    cfg = self.cfg
    def norm(name, x_BTD):
      leaves = values.norms.get(name)
      return x_BTD if leaves is None else normalize(cfg, x_BTD, leaves)

    attn, keys = self.attn(norm('attn_norm', x_BTD), values, context, keys)
    attn = cfg.residual_scale * norm('attn_post_norm', attn)
    residual_BTD = x_BTD if cfg.parallel else x_BTD + attn
    mlp = self.mlp(norm('mlp_norm', residual_BTD), values.linears)
    mlp = cfg.residual_scale * norm('mlp_post_norm', mlp)
    y_BTD = residual_BTD + mlp + (attn if cfg.parallel else 0)
    if context.exited_BT is not None:  # Tokens that exited keep their state.
      y_BTD = jnp.where(context.exited_BT[..., None], x_BTD, y_BTD)
    return nn.with_logical_constraint(y_BTD, ('B', 'T', 'D')), keys

  def fill(self, x_BTD, values: LayerValues, context: Context, keys):
    """Writes keys and values into the cache; returns x_BTD as it is."""
    y_BTD = x_BTD
    if 'attn_norm' in values.norms:
      y_BTD = normalize(self.cfg, x_BTD, values.norms['attn_norm'])
    return x_BTD, self.attn.write(y_BTD, values, context, keys)
