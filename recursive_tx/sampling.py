"""From logits to a token: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps this many of the likeliest tokens; 0 keeps all.
    top_p: keeps the fewest likeliest tokens whose probability reaches this.
  """
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
          f'{self} is no sampler; temperature and top_k are at least 0, '
          f'top_p is above 0 and at most 1')


def sample(
    sampler: Sampler, logits_BV: jax.Array, key: jax.Array
) -> jax.Array:
  """Draws token_B, int32, from fp32 logits."""
  if sampler.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampler.temperature
  if sampler.top_k:
    k = min(sampler.top_k, logits_BV.shape[-1])
    least = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
  if sampler.top_p < 1:
    falling = jnp.sort(logits_BV, axis=-1, descending=True)
    share = jax.nn.softmax(falling, axis=-1)
    # A token stays while those likelier than it do not reach top_p.
    stays = jnp.cumsum(share, axis=-1) - share < sampler.top_p
    least = jnp.min(jnp.where(stays, falling, jnp.inf), -1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
