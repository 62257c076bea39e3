"""Causal attention over grouped heads, within segments and a window.

Knows how scores are computed; nothing of layers, caches or meshes. Two ways
that differ by rounding only: `plain` holds all scores, `blocks` those of one
block of queries against the keys it may see, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp

_NEVER = -1e30  # Not -inf: a row without any key must not become NaN.
_BLOCK = 64  # Queries at once; a block's scores stay in a CPU's cache.
_MAX_BLOCKS = 16  # Blocks are unrolled, so their number costs compile time.


def visible(
    query_BT: jax.Array, key_BS: jax.Array, *, window: int,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
  """Which keys each query may see.

  Args:
    query_BT, key_BS: places of queries and keys in their sequence, int32
      (leading dimension may be 1).
    window: keys a query sees, itself included; 0 is all before it.
    segment_BT: document of each place where queries and keys are the same
      places; None is one document.

  Returns:
    mask_BTS, bool.
  """
  distance = query_BT[:, :, None] - key_BS[:, None, :]
  mask = distance >= 0
  if window:
    mask = mask & (distance < window)
  if segment_BT is not None:
    mask = mask & (segment_BT[:, :, None] == segment_BT[:, None, :])
  return mask


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
    mask_BTS: jax.Array, *, window: int, implementation: str,
) -> jax.Array:
  """Softmax attention; scores and softmax in fp32.

  Args:
    q_BTNH, k_BSKH, v_BSKH: heads; N is a multiple of K.
    mask_BTS: what may be seen, bool (leading dimension may be 1).
    window: as for the mask; bounds the keys that 'blocks' looks at.
    implementation: Run.attention. 'blocks' is for queries and keys of the
      same places, so 'auto' takes it where T equals S and is long enough.

  Returns:
    Mixed values, BTNH, in q's dtype.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BSKH.shape[2], k_BSKH.shape[1]
  if implementation == 'auto':
    implementation = 'blocks' if T == S > _BLOCK else 'plain'
  # One batch dimension P = B * K and contiguous rows are what XLA's CPU
  # backend multiplies fast.
  q_PGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(
      0, 2, 3, 1, 4).reshape(B * K, N // K, T, H)
  k_PSH, v_PSH = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H)
                  for x in (k_BSKH, v_BSKH))
  mask_PTS = mask_BTS if len(mask_BTS) == 1 else jnp.repeat(mask_BTS, K, 0)
  if implementation == 'blocks' and T == S:
    out_PGTH = _blocks(q_PGTH, k_PSH, v_PSH, mask_PTS, window)
  else:
    out_PGTH, _ = _mix(q_PGTH, k_PSH, v_PSH, mask_PTS)
  out_BKGTH = out_PGTH.reshape(B, K, N // K, T, H)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _mix(q_PGTH, k_PSH, v_PSH, mask_PTS):
  """Mixed values, and the log of each row's softmax denominator."""
  score = _scores(q_PGTH, k_PSH, mask_PTS)
  top = jnp.max(score, axis=-1, keepdims=True)
  weight = jnp.exp(score - top)
  total = weight.sum(-1, keepdims=True)
  out = jnp.einsum('PGTS,PSH->PGTH', weight.astype(v_PSH.dtype), v_PSH,
                   preferred_element_type=jnp.float32) / total
  return out.astype(q_PGTH.dtype), top + jnp.log(total)


def _scores(q_PGTH, k_PSH, mask_PTS):
  score = jnp.einsum('PGTH,PSH->PGTS', q_PGTH, k_PSH,
                     preferred_element_type=jnp.float32)
  return jnp.where(mask_PTS[:, None], score, _NEVER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q_PGTH, k_PSH, v_PSH, mask_PTS, window):
  return _blocks_forward(q_PGTH, k_PSH, v_PSH, mask_PTS, window)[0]


def _blocks_forward(q, k, v, mask, window):
  out, log_total = zip(*(
      _mix(q[:, :, rows], k[:, keys], v[:, keys], mask[:, rows, keys])
      for rows, keys in _spans(q.shape[2], window)), strict=True)
  out = jnp.concatenate(out, axis=2)
  log_total = jnp.concatenate(log_total, axis=2)
  return out, (q, k, v, mask, out, log_total)


def _blocks_backward(window, saved, d_out):
  """Scores again, block by block: only their row sums were kept."""
  q, k, v, mask, out, log_total = saved
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dot = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
  d_q, d_k, d_v = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
  for rows, keys in _spans(q.shape[2], window):
    q_rows, d_rows = q[:, :, rows], d_out[:, :, rows]
    score = _scores(q_rows, k[:, keys], mask[:, rows, keys])
    weight = jnp.exp(score - log_total[:, :, rows])
    d_weight = einsum('PGTH,PSH->PGTS', d_rows, v[:, keys])
    d_score = (weight * (d_weight - dot[:, :, rows])).astype(q.dtype)
    d_q.append(einsum('PGTS,PSH->PGTH', d_score, k[:, keys]))
    d_k = d_k.at[:, keys].add(einsum('PGTS,PGTH->PSH', d_score, q_rows))
    d_v = d_v.at[:, keys].add(
        einsum('PGTS,PGTH->PSH', weight.astype(q.dtype), d_rows))
  d_q = jnp.concatenate(d_q, axis=2)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _spans(length: int, window: int) -> list[tuple[slice, slice]]:
  """Each block of queries, and the keys that some query of it may see."""
  size = max(_BLOCK, -(-length // _MAX_BLOCKS))
  spans = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    first = max(0, start - window + 1) if window else 0
    spans.append((slice(start, stop), slice(first, stop)))
  return spans
