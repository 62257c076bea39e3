"""From logits to a token: greedy, temperature, top-k, top-p."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from recursive_tx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps this many of the likeliest tokens; 0 keeps all.
    top_p: keeps the fewest likeliest tokens whose probability reaches this.
    seed: of the draws. The same seed and text give the same next token,
      whatever else is in the batch.
  """
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(
          f'{self} is no sampler; temperature and top_k are at least 0, '
          f'top_p is above 0 and at most 1')


class Samplers(NamedTuple):
  """The fields of several, [B]."""
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  seed: jax.Array


def stack(samplers: Sequence[Sampler]) -> Samplers:
  """Float32 and (the seeds modulo 2^32) unsigned int32 arrays."""
  def column(field, dtype):
    return np.array([getattr(s, field) for s in samplers], dtype)
  return Samplers(
      column('temperature', np.float32), column('top_k', np.int32),
      column('top_p', np.float32),
      np.array([s.seed % 2**32 for s in samplers], np.uint32))


def sample(
    samplers: Samplers, logits_BV: jax.Array, position_B: jax.Array
) -> jax.Array:
  """Draws token_B, int32, from fp32 logits.

  Args:
    samplers: of each row.
    logits_BV: fp32.
    position_B: place of each row's token, so that no two draw alike.
  """
  likeliest_B = likeliest(logits_BV)
  hot_B = samplers.temperature > 0

  def draw():
    scaled_BV = logits_BV / jnp.where(hot_B, samplers.temperature, 1)[:, None]
    cut = hot_B & ((samplers.top_k > 0) | (samplers.top_p < 1))
    kept_BV = lax.cond(
        cut.any(), lambda: _cut(samplers, scaled_BV), lambda: scaled_BV)
    drawn_B = jax.vmap(_draw)(samplers.seed, position_B, kept_BV)
    return jnp.where(hot_B, drawn_B, likeliest_B)

  return lax.cond(hot_B.any(), draw, lambda: likeliest_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
  """The first largest, int32: argmax as two reductions that CPUs vectorise."""
  V = logits_BV.shape[-1]
  is_top_BV = logits_BV == logits_BV.max(axis=-1, keepdims=True)
  index_BV = jnp.where(is_top_BV, jnp.arange(V, dtype=jnp.int32), V - 1)
  return index_BV.min(axis=-1)


def _cut(samplers, logits_BV):
  """Minus infinity for what top_k and then top_p leave out."""
  V = logits_BV.shape[-1]
  falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  k_B1 = jnp.where(samplers.top_k > 0, samplers.top_k, V)[:, None]
  falling_BV = jnp.where(jnp.arange(V) < k_B1, falling_BV, -jnp.inf)
  share_BV = jax.nn.softmax(falling_BV, axis=-1)
  # A token stays while those likelier than it do not reach top_p.
  before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
  stays_BV = (before_BV < samplers.top_p[:, None]) & (falling_BV > -jnp.inf)
  least_B1 = jnp.min(
      jnp.where(stays_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _draw(seed, position, logits_V):
  key = jax.random.fold_in(jax.random.key(seed), position)
  return jax.random.categorical(key, logits_V).astype(jnp.int32)
