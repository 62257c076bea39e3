"""One layer: norms, rotary attention, MLP. What varies by loop comes in."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import attention, kv_cache
from recursive_tx.model.linear import Linear, products

_ACTS = {
    'silu': jax.nn.silu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'relu': jax.nn.relu,
}


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


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates pairs (i, i + pairs) of the first 2 * pairs dimensions of H."""
  cos, sin = rope
  pairs = cos.shape[-1]
  x = x_BTNH.astype(jnp.float32)
  one, two, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
  rotated = [one * cos - two * sin, two * cos + one * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions and an optional cache.

  Without a cache, and where loops share keys, it gives those in its place.
  """
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.q, self.k, self.v, self.o = (
        Linear(self.cfg, kernel) for kernel in config_lib.GROUPS['attn'])

  def __call__(self, x_BTD, adapter, context, cache=None, place=None):
    q_BTNH, k_BSKH, v_BSKH = self._heads(x_BTD, adapter, context)
    if cache is None:
      y_BTNH = attention.attend(
          q_BTNH, k_BSKH, v_BSKH, mask_BTS=context['mask_BTS'],
          segment_BT=context['segment_BT'], window=self.cfg.window,
          implementation=self.run.attention)
      cache = {'k': k_BSKH, 'v': v_BSKH} if 'keys' in adapter else None
    else:
      cache = kv_cache.write(cache, place, k_BSKH, v_BSKH)
      y_BTNH = kv_cache.attend(
          q_BTNH, cache, place, window=self.cfg.window)
    return self.o(y_BTNH, adapter.get('o', {})), cache

  def _heads(self, x_BTD, adapter, context):
    """Queries, BTNH, and keys and values, BTKH, own or shared."""
    shared = adapter.get('keys')
    if shared is not None and context['first'] is False:
      q_BTNH = self.q(x_BTD, adapter.get('q', {}))
      return rotate(q_BTNH, context['rope']), shared['k'], shared['v']
    q_BTNH, *own = self._rotated(
        (self.q, self.k, self.v), x_BTD, adapter, context)
    if shared is not None and context['first'] is not True:
      # A scan over loops does not know which one it is in.
      own = [jnp.where(context['first'], own, shared[leaf])
             for leaf, own in zip('kv', own, strict=True)]
    return q_BTNH, *own

  def keys(self, x_BTD, adapter, context):
    """Keys and values, BTKH."""
    return self._rotated((self.k, self.v), x_BTD, adapter, context)

  def _rotated(self, linears, x_BTD, adapter, context):
    """Products of some linears; all but the last, the values, are rotated."""
    *rotary, v_BTKH = products(
        linears, self.get_variable('params', 'fused'), x_BTD, adapter)
    return *(rotate(x_BTNH, context['rope']) for x_BTNH in rotary), v_BTKH


class Mlp(nn.Module):
  """act(gate) * up, or act(up), then down."""
  cfg: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x_BTD, adapter):
    up, down, *gate = (
        Linear(self.cfg, name, name=name)
        for name in ('up', 'down', 'gate')[:2 + self.cfg.gated])
    first_BTF, *up_BTF = products(
        (*gate, up), self.get_variable('params', 'fused'), x_BTD, adapter)
    h_BTF = _ACTS[self.cfg.act](first_BTF)
    if up_BTF:
      h_BTF *= up_BTF[0]
    h_BTF = nn.with_logical_constraint(h_BTF, ('B', 'T', 'F'))
    return down(h_BTF, adapter.get('down', {}))


class Layer(nn.Module):
  """One layer; its norms, biases, factors, shared keys come as `adapter`."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.attn = Attention(self.cfg, self.run)
    self.mlp = Mlp(self.cfg)

  def __call__(self, x_BTD, adapter, context, cache=None, place=None):
    cfg = self.cfg
    attn, cache = self.attn(
        normalize(cfg, x_BTD, adapter['attn_norm']), adapter, context, cache,
        place)
    residual_BTD = x_BTD if cfg.parallel else x_BTD + attn
    mlp = self.mlp(
        normalize(cfg, residual_BTD, adapter['mlp_norm']), adapter)
    y_BTD = residual_BTD + mlp + (attn if cfg.parallel else 0)
    if 'exited_BT' in context:  # Tokens that exited keep their state.
      y_BTD = jnp.where(context['exited_BT'][..., None], x_BTD, y_BTD)
    return nn.with_logical_constraint(y_BTD, ('B', 'T', 'D')), cache

  def fill(self, x_BTD, adapter, context, cache, place):
    """Writes keys and values into the cache; returns x_BTD as it is."""
    keys = self.attn.keys(
        normalize(self.cfg, x_BTD, adapter['attn_norm']), adapter, context)
    return x_BTD, kv_cache.write(cache, place, *keys)
