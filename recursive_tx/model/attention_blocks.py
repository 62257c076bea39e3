"""Attention in plain JAX: all scores at once, or by blocks of queries."""

import functools

import jax
import jax.numpy as jnp

_NEVER = -1e30  # Not -inf: a row without any key must not become NaN.
BLOCK = 64  # Queries at once; a block's scores stay in a CPU's cache.
_MAX_BLOCKS = 16  # Blocks are unrolled, so their number costs compile time.


def mix(q_BKGTH, k_BKSH, v_BKSH, mask_BTS):
  """Mixed values."""
  return _mix(q_BKGTH, k_BKSH, v_BKSH, mask_BTS)[0]


def _mix(q_BKGTH, k_BKSH, v_BKSH, mask_BTS):
  """Mixed values, and the log of each row's softmax denominator."""
  score = _scores(q_BKGTH, k_BKSH, mask_BTS)
  top = jnp.max(score, axis=-1, keepdims=True)
  weight = jnp.exp(score - top)
  total = weight.sum(-1, keepdims=True)
  out = jnp.einsum('BKGTS,BKSH->BKGTH', weight.astype(v_BKSH.dtype), v_BKSH,
                   preferred_element_type=jnp.float32) / total
  return out.astype(q_BKGTH.dtype), top + jnp.log(total)


def _scores(q_BKGTH, k_BKSH, mask_BTS):
  score = jnp.einsum('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH,
                     preferred_element_type=jnp.float32)
  return jnp.where(mask_BTS[:, None, None], score, _NEVER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix_blocks(q_BKGTH, k_BKSH, v_BKSH, mask_BTS, window):
  return _blocks_forward(q_BKGTH, k_BKSH, v_BKSH, mask_BTS, window)[0]


def _blocks_forward(q, k, v, mask, window):
  out, log_total = zip(*(
      _mix(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], mask[:, rows, keys])
      for rows, keys in _spans(q.shape[3], window)), strict=True)
  out = jnp.concatenate(out, axis=3)
  log_total = jnp.concatenate(log_total, axis=3)
  return out, (q, k, v, mask, out, log_total)


def _blocks_backward(window, saved, d_out):
  """Scores again, block by block: only their row sums were kept."""
  q, k, v, mask, out, log_total = saved
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dot = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
  d_q, d_k, d_v = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
  for rows, keys in _spans(q.shape[3], window):
    q_rows, d_rows = q[:, :, :, rows], d_out[:, :, :, rows]
    score = _scores(q_rows, k[:, :, keys], mask[:, rows, keys])
    weight = jnp.exp(score - log_total[:, :, :, rows])
    d_weight = einsum('BKGTH,BKSH->BKGTS', d_rows, v[:, :, keys])
    d_score = (weight * (d_weight - dot[:, :, :, rows])).astype(q.dtype)
    d_q.append(einsum('BKGTS,BKSH->BKGTH', d_score, k[:, :, keys]))
    d_k = d_k.at[:, :, keys].add(einsum('BKGTS,BKGTH->BKSH', d_score, q_rows))
    d_v = d_v.at[:, :, keys].add(
        einsum('BKGTS,BKGTH->BKSH', weight.astype(q.dtype), d_rows))
  d_q = jnp.concatenate(d_q, axis=3)
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
