"""Token ids to vectors, from a table that may be cut along its vocabulary.

Then no device gathers the table: each looks up, for the tokens of all that
share it, the rows that it holds, and the sum, in which all terms but one are
zero, returns each vector to the device of its token.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_BYTES = 1 << 26  # Of vectors looked up at once, whatever the batch.


def lookup(table_VD: jax.Array, token_BT: jax.Array, dtype) -> jax.Array:
  """The tokens' rows of the table, x_BTD in `dtype`; equals indexing."""
  mesh = jax.sharding.get_abstract_mesh()
  spec = nn.logical_to_mesh_axes(('V', 'D'))
  axes = spec[0] if spec and not mesh.empty else None
  batch = nn.logical_to_mesh_axes(('B',))
  if axes is None or 'fsdp' not in axes or token_BT.ndim != 2:
    # NumPy, which `load_hf` gives, takes no index that is traced.
    return jnp.asarray(table_VD)[token_BT].astype(dtype)
  rows = PartitionSpec(batch[0] if batch else None)
  return jax.shard_map(
      functools.partial(_lookup, axes=axes, dtype=dtype),
      in_specs=(PartitionSpec(axes), rows), out_specs=rows,
  )(table_VD, token_BT)


def _lookup(table_VD, token_BT, *, axes, dtype):
  """On one device: its rows of the table, its rows of the batch."""
  token_BT = lax.all_gather(token_BT, 'fsdp', tiled=True)
  B, T = token_BT.shape
  V, D = table_VD.shape
  token_BT = token_BT - lax.axis_index(axes) * V
  size = B * D * jnp.dtype(dtype).itemsize
  chunk = max(n for n in range(1, T + 1)
              if T % n == 0 and n <= max(1, _BYTES // size))

  @jax.checkpoint  # Keeps the ids, not where they were found.
  def part(token_BC):
    here = (token_BC >= 0) & (token_BC < V)
    rows = table_VD[jnp.where(here, token_BC, 0)].astype(dtype)
    rows = jnp.where(here[..., None], rows, 0)
    rows = lax.psum_scatter(rows, 'fsdp', tiled=True)
    others = tuple(axis for axis in axes if axis != 'fsdp')
    return lax.psum(rows, others) if others else rows

  token_CBC = jnp.moveaxis(token_BT.reshape(B, -1, chunk), 1, 0)
  x_CBCD = lax.map(part, token_CBC)
  return jnp.moveaxis(x_CBCD, 0, 1).reshape(-1, T, D)
