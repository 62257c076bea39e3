"""Attention in plain JAX: all scores at once, or a block of queries at a time.

Shapes are q [..., G, T, H], k and v [..., S, H], mask [..., T, S]; what leads
is batch and key heads, or their product.
"""

import functools

import jax
import jax.numpy as jnp

_NEVER = -1e30  # Not -inf: a row without any key must not become NaN.
BLOCK = 64  # Queries at once; a block's scores stay in a CPU's cache.
_MAX_BLOCKS = 16  # Blocks are unrolled, so their number costs compile time.


def mix(q, k, v, mask):
  """Mixed values."""
  return _mix(q, k, v, mask)[0]


def _mix(q, k, v, mask):
  """Mixed values, and the log of each row's softmax denominator."""
  score = _scores(q, k, mask)
  top = jnp.max(score, axis=-1, keepdims=True)
  weight = jnp.exp(score - top)
  total = weight.sum(-1, keepdims=True)
  out = jnp.einsum('...GTS,...SH->...GTH', weight.astype(v.dtype), v,
                   preferred_element_type=jnp.float32) / total
  return out.astype(q.dtype), top + jnp.log(total)


def _scores(q, k, mask):
  score = jnp.einsum('...GTH,...SH->...GTS', q, k,
                     preferred_element_type=jnp.float32)
  return jnp.where(mask[..., None, :, :], score, _NEVER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix_blocks(q, k, v, mask, window):
  return _blocks_forward(q, k, v, mask, window)[0]


def _blocks_forward(q, k, v, mask, window):
  out, log_total = zip(*(
      _mix(q[..., rows, :], k[..., keys, :], v[..., keys, :],
           mask[..., rows, keys])
      for rows, keys in _spans(q.shape[-2], window)), strict=True)
  out = jnp.concatenate(out, axis=-2)
  log_total = jnp.concatenate(log_total, axis=-2)
  return out, (q, k, v, mask, out, log_total)


def _blocks_backward(window, saved, d_out):
  """Scores again, block by block: only their row sums were kept."""
  q, k, v, mask, out, log_total = saved
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dot = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
  d_q, d_k, d_v = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
  for rows, keys in _spans(q.shape[-2], window):
    q_rows, d_rows = q[..., rows, :], d_out[..., rows, :]
    score = _scores(q_rows, k[..., keys, :], mask[..., rows, keys])
    weight = jnp.exp(score - log_total[..., rows, :])
    d_weight = einsum('...GTH,...SH->...GTS', d_rows, v[..., keys, :])
    d_score = (weight * (d_weight - dot[..., rows, :])).astype(q.dtype)
    d_q.append(einsum('...GTS,...SH->...GTH', d_score, k[..., keys, :]))
    d_k = d_k.at[..., keys, :].add(
        einsum('...GTS,...GTH->...SH', d_score, q_rows))
    d_v = d_v.at[..., keys, :].add(
        einsum('...GTS,...GTH->...SH', weight.astype(q.dtype), d_rows))
  d_q = jnp.concatenate(d_q, axis=-2)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


mix_blocks.defvjp(_blocks_forward, _blocks_backward)


def _spans(length: int, window: int) -> list[tuple[slice, slice]]:
  """Each block of queries, and the keys that some query of it may see."""
  size = max(BLOCK, -(-length // _MAX_BLOCKS))
  spans = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    first = max(0, start - window + 1) if window else 0
    spans.append((slice(start, stop), slice(first, stop)))
  return spans
