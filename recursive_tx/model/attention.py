"""Causal attention over grouped heads, within segments and a window.

Knows how scores are computed; nothing of layers, caches or models. The ways
differ by rounding only: `plain` holds all [T, S] scores, the others those of
one block of queries at a time, forward and backward.
"""

import chex
import jax

from recursive_tx.model import attention_blocks, attention_kernels, cpu


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


def choose(
    implementation: str, *, T: int, S: int, window: int,
    platform: str | None = None,
) -> str:
  """What 'auto' stands for: a way that covers the case on the platform.

  Args:
    implementation: Run.attention.
    T, S: queries and keys.
    window: keys a query sees; 0 is all before it.
    platform: 'cpu', 'tpu' or 'gpu'; None is that of the mesh, else of JAX.
  """
  platform = platform or cpu.platform()
  if implementation in ('splash', 'pallas') and not attention_kernels.covers(
      implementation, T=T, S=S, window=window):
    implementation = 'auto'  # Decoding runs beside training under one Run.
  if implementation != 'auto':
    return implementation
  kernel = {'tpu': 'splash', 'gpu': 'pallas'}.get(platform)
  if kernel and attention_kernels.covers(kernel, T=T, S=S, window=window):
    return kernel
  return 'blocks' if T == S > attention_blocks.BLOCK else 'plain'


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *,
    mask_BTS: jax.Array, segment_BT: jax.Array | None = None, window: int,
    implementation: str,
) -> jax.Array:
  """Softmax attention; scores and softmax in fp32.

  Args:
    q_BTNH, k_BSKH, v_BSKH: heads; N is a multiple of K.
    mask_BTS: what may be seen, bool (leading dimension may be 1). The kernels
      do not read it: they cover causal attention within segments and windows.
    segment_BT: the documents that the mask keeps apart, for the kernels.
    window: as for the mask; bounds the keys that are looked at.
    implementation: Run.attention.

  Returns:
    Mixed values, BTNH, in q's dtype.
  """
  chex.assert_rank([q_BTNH, k_BSKH], 4)
  chex.assert_equal_shape([k_BSKH, v_BSKH])
  T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
  implementation = choose(implementation, T=T, S=S, window=window)
  if implementation in ('splash', 'pallas'):
    return attention_kernels.attend(
        implementation, q_BTNH * H**-0.5, k_BSKH, v_BSKH, segment_BT, window,
        interpret=cpu.platform() == 'cpu')
  k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
  if implementation == 'blocks' and T == S:
    def mix(q, k, v, mask):
      return attention_blocks.mix_blocks(q, k, v, mask, window)
  else:
    mix = attention_blocks.mix
  return attend_heads(q_BTNH, k_BKSH, v_BKSH, mask_BTS, mix)


def attend_heads(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array,
    mask_BTS: jax.Array, mix=attention_blocks.mix,
) -> jax.Array:
  """The same for keys and values ordered by head; plain, or as `mix` does."""
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(
      0, 2, 3, 1, 4)
  out_BKGTH = mix(q_BKGTH, k_BKSH, v_BKSH, mask_BTS)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
