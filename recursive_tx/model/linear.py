"""A kernel, what a loop adds to it, and the product with tokens."""

import itertools

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model.adapters import LinearValues
from recursive_tx.model.cpu import product


class Linear(nn.Module):
  """One kernel of the alphabet, plus what is added to its product."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run
  kernel: str

  @nn.compact
  def __call__(
      self, x: jax.Array, values: LinearValues,
      base_BTY: jax.Array | None = None
  ) -> jax.Array:
    """x times the kernel, which `base_BTY` may have, and what is added."""
    spec = self.cfg.kernels[self.kernel]
    inner, outer = config_lib.split(spec)
    if base_BTY is None:
      init = initializers.variance_scaling(
          1.0, 'fan_in', 'normal', in_axis=tuple(range(len(inner))),
          out_axis=tuple(range(len(inner), len(inner + outer))))
      kernel = self.param(
          'kernel', nn.with_logical_partitioning(init, tuple(inner + outer)),
          self.cfg.shape(inner + outer)).astype(x.dtype)
    low_rank = None
    if values.a is not None:
      a, b = values.a.astype(x.dtype), values.b.astype(x.dtype)
      # Adding the product to the kernel costs rows * columns a rank, two thin
      # matmuls (rows + columns) * tokens; rows of several loops have no one
      # product.
      rows, columns = self.cfg.in_out(self.kernel)
      if values.mask_B1R is None and base_BTY is None and (
          rows * columns < (rows + columns) * x.shape[0] * x.shape[1]):
        kernel += jnp.einsum(f'{inner}R,R{outer}->{inner}{outer}', a, b)
        # Each device adds its part, before the parts are gathered; so does
        # the gradient go: scattered, then to the factors.
        kernel = nn.with_logical_constraint(kernel, tuple(inner + outer))
      else:
        thin_BTR = product(
            self.run, f'BT{inner},{inner}R->BTR', x, a, x.dtype)
        if values.mask_B1R is not None:
          thin_BTR *= values.mask_B1R.astype(x.dtype)
        low_rank = product(
            self.run, f'BTR,R{outer}->BT{outer}', thin_BTR, b, x.dtype)
    if base_BTY is None:
      y = product(self.run, spec, x, kernel, x.dtype)
    else:
      y = base_BTY.reshape(*x.shape[:2], *self.cfg.shape(outer))
    if low_rank is not None:
      y += low_rank
    return y if values.bias is None else y + values.bias.astype(x.dtype)


def fuse(tree: dict, names: tuple[str, ...]) -> dict:
  """Kernels [D, ...] of one input side by side, so that it is read once.

  Args:
    tree: of an attention or an MLP, {name: {'kernel': [D, ...]}}.
    names: whose kernels, in the order of their columns.

  Returns:
    The tree with 'fused', [D, columns], in their place; see `products`.
  """
  kernels = [tree[name]['kernel'] for name in names]
  rest = {name: leaves for name, leaves in tree.items() if name not in names}
  return {**rest, 'fused': jnp.concatenate(
      [kernel.reshape(len(kernel), -1) for kernel in kernels], axis=1)}


def products(
    linears: tuple[Linear, ...], fused: jax.Array | None, x_BTD: jax.Array,
    values: dict[str, LinearValues]
) -> list[jax.Array]:
  """Each linear's product with x_BTD.

  Args:
    linears: one, or several that read the same.
    fused: None, or the kernels that `fuse` made; those of `linears` are the
      last.
    x_BTD: what they read.
    values: what is added, by kernel.
  """
  base = [None] * len(linears)
  if fused is not None:
    widths = [linear.cfg.in_out(linear.kernel)[1] for linear in linears]
    # All columns: to multiply with a part of them, XLA copies it every time.
    y_BTY = product(
        linears[0].run, 'BTX,XY->BTY', x_BTD, fused, x_BTD.dtype)
    base = jnp.split(y_BTY[..., -sum(widths):],
                     list(itertools.accumulate(widths[:-1])), axis=-1)
  return [linear(x_BTD, values[linear.kernel], base_BTY)
          for linear, base_BTY in zip(linears, base, strict=True)]
