"""Attention by the Pallas kernels that come with JAX.

'splash' is for TPUs, 'pallas' (the Triton one) for GPUs; both are compiled for
one device, so on a mesh they run inside `shard_map`, on whole sequences and
their share of the batch and of the heads.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_BLOCKS = (512, 256, 128)  # Queries and keys at once, the largest that divides.


def covers(kernel: str, *, T: int, S: int, window: int) -> bool:
  """Whether a kernel computes this case."""
  return T == S and T % 128 == 0 and (kernel == 'splash' or not window)


def attend(
    kernel: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
    segment_BT: jax.Array | None, window: int, *, interpret: bool,
) -> jax.Array:
  """Causal attention of queries that are scaled already.

  Args:
    kernel: 'splash' or 'pallas'.
    q_BTNH, k_BSKH, v_BSKH: heads; N is a multiple of K.
    segment_BT: document of each place; None is one document a row.
    window: keys a query sees, itself included; 0 is all before it.
    interpret: emulate the kernel, to run it on a CPU.

  Returns:
    Mixed values, BTNH, in q's dtype.
  """
  if segment_BT is None:
    segment_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
  query, key, segment = map(_spec, ('BTNH', 'BSKH', 'BT'))
  if query[2] != key[2] and k_BSKH.shape[2] > 1:
    # Heads are cut where key heads cannot be: give each head its own.
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSKH, v_BSKH = (jnp.repeat(x, groups, 2) for x in (k_BSKH, v_BSKH))
    key = query
  local = functools.partial(
      _splash if kernel == 'splash' else _pallas, window=window,
      interpret=interpret)
  if not jax.sharding.get_abstract_mesh().empty:
    # A kernel does not say how its result varies over the mesh.
    local = jax.shard_map(
        local, in_specs=(query, key, key, segment), out_specs=query,
        check_vma=False)
  return local(q_BTNH, k_BSKH, v_BSKH, segment_BT)


def _spec(letters: str) -> PartitionSpec:
  """Where the letters of an array go by the rules in force."""
  return nn.logical_to_mesh_axes(tuple(letters)) or PartitionSpec(
      *[None] * len(letters))


def _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, window, interpret):
  # Imported here, since it takes a while and only accelerators need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_mask as masks,
  )
  _, T, N, _ = q_BTNH.shape
  size = next(size for size in _BLOCKS if T % size == 0)
  mask = masks.CausalMask((T, T))
  if window:
    mask = masks.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
  kernel = splash.make_splash_mha(
      masks.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1,
      interpret=interpret, block_sizes=splash.BlockSizes(
          block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size,
          block_q_dq=size, block_kv_dq=size))

  def row(q_TNH, k_SKH, v_SKH, segment_T):
    q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q_TNH, k_SKH, v_SKH))
    return kernel(q_NTH, k_KSH, v_KSH, splash.SegmentIds(
        segment_T, segment_T)).swapaxes(0, 1)

  return jax.vmap(row)(q_BTNH, k_BSKH, v_BSKH, segment_BT)


def _pallas(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, window, interpret):
  from jax.experimental.pallas.ops.gpu import attention as pallas
  assert not window
  groups = q_BTNH.shape[2] // k_BSKH.shape[2]
  k_BSNH, v_BSNH = (jnp.repeat(x, groups, 2) for x in (k_BSKH, v_BSKH))
  return pallas.mha(q_BTNH, k_BSNH, v_BSNH, segment_BT, causal=True,
                    interpret=interpret)
