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
    rope: of `rope_tables`, for the positions of the tokens.
    mask_BTS, segment_BT: of `attention.attend`; None with a cache.
    first: whether this is the first loop, a bool, traced in a scan; read where
      loops share keys.
    exited_BT: tokens that exited before this loop, bool; None is none.
  """
  rope: tuple[jax.Array, jax.Array]
  mask_BTS: jax.Array | None = None
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
        place_1T, place_1T, window=cfg.window, segment_BT=segment_BT)
  return Context(rope_tables(cfg, position_BT), mask_BTS, segment_BT)


def normalize(
    cfg: config_lib.ModelConfig, x: jax.Array, leaves: dict
) -> jax.Array:
  """Norm over the last dimension, in fp32; `leaves` holds scale (and bias)."""
  dtype = x.dtype
  x = x.astype(jnp.float32)
  scale = leaves['scale'].astype(jnp.float32)
  if cfg.norm == 'layer':
    x -= jnp.mean(x, axis=-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps)
  x *= 1 + scale if cfg.norm == 'rms+1' else scale
  if cfg.norm == 'layer':
    x += leaves['bias'].astype(jnp.float32)
  return x.astype(dtype)


def rope_tables(
    cfg: config_lib.ModelConfig, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of each rotated pair's angle, [B, T, 1, pairs], fp32."""
  pairs = int(cfg.H * cfg.rope_fraction) // 2
  frequency = cfg.rope_theta ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
  if len(cfg.rope_scaling) == 1:
    frequency /= cfg.rope_scaling[0]
  if len(cfg.rope_scaling) == 4:
    # Llama 3: long wavelengths are stretched by `factor`, short ones are
    # kept, those between are interpolated.
    factor, low, high, length = cfg.rope_scaling
    rotations = length * frequency / (2 * math.pi)
    keep = jnp.clip((rotations - low) / (high - low), 0, 1)
    frequency *= keep + (1 - keep) / factor
  angle = position_BT[..., None, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


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

  def __call__(self, x_BTD, linears, context, keys=None):
    """y_BTD and the keys, `Shared` or `Cached`, with those of x_BTD."""
    if isinstance(keys, kv_cache.Cached):
      q_BTNH, *own = self._rotated(
          (self.q, self.k, self.v), x_BTD, linears, context)
      keys = kv_cache.write(keys, *own)
      y_BTNH = kv_cache.attend(q_BTNH, keys, window=self.cfg.window)
    else:
      q_BTNH, *own = self._heads(x_BTD, linears, context, keys)
      y_BTNH = attention.attend(
          q_BTNH, *own, mask_BTS=context.mask_BTS,
          segment_BT=context.segment_BT, window=self.cfg.window,
          implementation=self.run.attention)
      keys = None if keys is None else kv_cache.Shared(*own)
    return self.o(y_BTNH, linears['o']), keys

  def _heads(self, x_BTD, linears, context, shared):
    """Queries, BTNH, and keys and values, BTKH, own or shared."""
    if shared is not None and context.first is False:
      return rotate(self.q(x_BTD, linears['q']), context.rope), *shared
    q_BTNH, *own = self._rotated(
        (self.q, self.k, self.v), x_BTD, linears, context)
    if shared is not None and context.first is not True:
      # A scan over loops does not know which one it is in.
      own = [jnp.where(context.first, mine, theirs)
             for mine, theirs in zip(own, shared, strict=True)]
    return q_BTNH, *own

  def write(self, x_BTD, linears, context, keys):
    """The cache with the keys and values of x_BTD."""
    return kv_cache.write(
        keys, *self._rotated((self.k, self.v), x_BTD, linears, context))

  def _rotated(self, of, x_BTD, linears, context):
    """Products of some linears; all but the last, the values, are rotated."""
    *rotary, v_BTKH = products(
        of, self.get_variable('params', 'fused'), x_BTD, linears)
    return *(rotate(heads, context.rope) for heads in rotary), v_BTKH


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
    cfg, linears = self.cfg, values.linears
    attn, keys = self.attn(
        normalize(cfg, x_BTD, values.attn_norm), linears, context, keys)
    residual_BTD = x_BTD if cfg.parallel else x_BTD + attn
    mlp = self.mlp(normalize(cfg, residual_BTD, values.mlp_norm), linears)
    y_BTD = residual_BTD + mlp + (attn if cfg.parallel else 0)
    if context.exited_BT is not None:  # Tokens that exited keep their state.
      y_BTD = jnp.where(context.exited_BT[..., None], x_BTD, y_BTD)
    return nn.with_logical_constraint(y_BTD, ('B', 'T', 'D')), keys

  def fill(self, x_BTD, values: LayerValues, context: Context, keys):
    """Writes keys and values into the cache; returns x_BTD as it is."""
    return x_BTD, self.attn.write(
        normalize(self.cfg, x_BTD, values.attn_norm), values.linears, context,
        keys)
