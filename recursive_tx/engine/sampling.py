"""From logits to a token: greedy, temperature, top-k, top-p."""

from collections.abc import Sequence
import dataclasses
import numbers
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.errors import in_range
from recursive_tx.model import cpu


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits, [0, inf). 0 takes the likeliest token,
      the first of several, and the smallest values do as well.
    top_k: keeps this many of the likeliest tokens, [0, 2^31); 0 keeps all.
    top_p: keeps the fewest likeliest tokens whose probability reaches this,
      (0, 1]. The smallest values keep the likeliest alone.
    seed: of the draws, any integer, modulo 2^32. The same seed and text give
      the same next token, whatever else is in the batch.

  Raises:
    UserError: a value outside its interval.
  """
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for name, span, kind in (
        ('temperature', '[0, inf)', numbers.Real),
        ('top_k', f'[0, {2**31})', numbers.Integral),
        ('top_p', '(0, 1]', numbers.Real),
        ('seed', '(-inf, inf)', numbers.Integral)):
      in_range(name, getattr(self, name), span, kind)


class Samplers(NamedTuple):
  """The fields of several, [B]."""
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  seed: jax.Array


def stack(samplers: Sequence[Sampler]) -> Samplers:
  """Float32 and (the seeds modulo 2^32) unsigned int32 arrays.

  Temperatures by which devices do not divide are their limit: 0 below
  float32's smallest normal number, and 1e30, at which all tokens are equally
  likely, above that.
  """
  def column(field, dtype):
    return np.array([getattr(s, field) for s in samplers], dtype)
  temperature = np.minimum(column('temperature', np.float64), 1e30)
  temperature[temperature < np.finfo(np.float32).tiny] = 0
  return Samplers(
      temperature.astype(np.float32), column('top_k', np.int32),
      column('top_p', np.float32),
      np.array([s.seed % 2**32 for s in samplers], np.uint32))


def sample(
    run: config_lib.Run, samplers: Samplers, logits_BV: jax.Array,
    position_B: jax.Array
) -> jax.Array:
  """Draws token_B, int32, from fp32 logits.

  Args:
    run: how the model is executed.
    samplers: of each row.
    logits_BV: fp32; minus infinity is never drawn.
    position_B: place of each row's token, so that no two draw alike.
  """
  likeliest_B = cpu.argmax(run, logits_BV)
  hot_B = samplers.temperature > 0

  def draw():
    # The largest is 0, and stays so at any temperature.
    scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)
                 ) / jnp.where(hot_B, samplers.temperature, 1)[:, None]
    cut = hot_B & ((samplers.top_k > 0) | (samplers.top_p < 1))
    kept_BV = lax.cond(
        cut.any(), lambda: _cut(samplers, scaled_BV), lambda: scaled_BV)
    drawn_B = jax.vmap(_draw)(samplers.seed, position_B, kept_BV)
    return jnp.where(hot_B, drawn_B, likeliest_B)

  return lax.cond(hot_B.any(), draw, lambda: likeliest_B)


def _cut(samplers, logits_BV):
  """Minus infinity for what top_k and then top_p leave out."""
  V = logits_BV.shape[-1]
  falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  k_B1 = jnp.where(samplers.top_k > 0, samplers.top_k, V)[:, None]
  falling_BV = jnp.where(jnp.arange(V) < k_B1, falling_BV, -jnp.inf)
  share_BV = jax.nn.softmax(falling_BV, axis=-1)
  # A token stays while those likelier than it do not reach top_p; the
  # likeliest always, though a device may take the smallest top_p for 0.
  before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
  stays_BV = (before_BV < samplers.top_p[:, None]) & (falling_BV > -jnp.inf)
  stays_BV |= jnp.arange(V) == 0
  least_B1 = jnp.min(
      jnp.where(stays_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _draw(seed, position, logits_V):
  key = jax.random.fold_in(jax.random.key(seed), position)
  return jax.random.categorical(key, logits_V).astype(jnp.int32)
