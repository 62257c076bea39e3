"""A kernel, what a loop adds to it, and the product with tokens."""

import functools
import itertools

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from recursive_tx import config as config_lib


class Linear(nn.Module):
  """One kernel of the alphabet, plus its adapter's `a`, `b` and `bias`."""
  cfg: config_lib.ModelConfig
  kernel: str

  @nn.compact
  def __call__(
      self, x: jax.Array, adapter: dict, base_BTY: jax.Array | None = None
  ) -> jax.Array:
    """x times the kernel, which `base_BTY` may have, and what is added."""
    inner, outer = config_lib.split(self.cfg.kernels[self.kernel])
    if base_BTY is None:
      init = initializers.variance_scaling(
          1.0, 'fan_in', 'normal', in_axis=tuple(range(len(inner))),
          out_axis=tuple(range(len(inner), len(inner + outer))))
      kernel = self.param(
          'kernel', nn.with_logical_partitioning(init, tuple(inner + outer)),
          self.cfg.shape(inner + outer)).astype(x.dtype)
    # As matrices, X to Y: given two letters to sum over, XLA's CPU backend may
    # take them in the other order, and transposes the kernel for it.
    rows, columns = self.cfg.in_out(self.kernel)
    x_BTX = x.reshape(*x.shape[:2], rows)
    y_BTY = None
    if 'a' in adapter:
      a, b = adapter['a'].astype(x.dtype), adapter['b'].astype(x.dtype)
      # Adding the product to the kernel costs rows * columns a rank, two thin
      # matmuls (rows + columns) * tokens; rows of several loops have no one
      # product.
      mask_B1R = adapter.get('mask')
      if mask_B1R is None and base_BTY is None and (
          rows * columns < (rows + columns) * x.shape[0] * x.shape[1]):
        kernel += jnp.einsum(f'{inner}R,R{outer}->{inner}{outer}', a, b)
        # Each device adds its part, before the parts are gathered; so does
        # the gradient go: scattered, then to the factors.
        kernel = nn.with_logical_constraint(kernel, tuple(inner + outer))
      else:
        thin_BTR = jnp.einsum(
            'BTX,XR->BTR', x_BTX, a.reshape(rows, a.shape[-1]))
        if mask_B1R is not None:
          thin_BTR *= mask_B1R.astype(x.dtype)
        y_BTY = jnp.einsum(
            'BTR,RY->BTY', thin_BTR, b.reshape(b.shape[0], columns))
    if base_BTY is None:
      base_BTY = project(
          'BTX,XY->BTY', x_BTX, kernel.reshape(rows, columns), x.dtype)
    y_BTY = base_BTY if y_BTY is None else base_BTY + y_BTY
    y = y_BTY.reshape(*x.shape[:2], *self.cfg.shape(outer))
    return y + adapter['bias'].astype(x.dtype) if 'bias' in adapter else y


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
    adapter: dict
) -> list[jax.Array]:
  """Each linear's product with x_BTD.

  Args:
    linears: one, or several that read the same.
    fused: None, or the kernels that `fuse` made; those of `linears` are the
      last.
    x_BTD: what they read.
    adapter: what is added, by kernel.
  """
  base = [None] * len(linears)
  if fused is not None:
    widths = [linear.cfg.in_out(linear.kernel)[1] for linear in linears]
    # All columns: to multiply with a part of them, XLA copies it every time.
    y_BTY = project('BTX,XY->BTY', x_BTD, fused, x_BTD.dtype)
    base = jnp.split(y_BTY[..., -sum(widths):],
                     list(itertools.accumulate(widths[:-1])), axis=-1)
  return [linear(x_BTD, adapter.get(linear.kernel, {}), base_BTY)
          for linear, base_BTY in zip(linears, base, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(spec: str, x: jax.Array, kernel: jax.Array, dtype) -> jax.Array:
  """einsum(spec, x, kernel) in `dtype`, with gradients ordered for the CPU.

  To multiply, XLA's CPU backend transposes one operand. JAX's own rule has it
  transpose the incoming gradient, fused with whatever made it, which took a
  third of a training step; here it is the smaller of the two.
  """
  return jnp.einsum(spec, x, kernel, preferred_element_type=dtype)


def _project_forward(spec, x, kernel, dtype):
  return project(spec, x, kernel, dtype), (x, kernel)


def _project_backward(spec, dtype, saved, d_y):
  x, kernel = saved
  d_y = d_y.astype(x.dtype)
  letters, y_letters = spec.split('->')
  x_letters, kernel_letters = letters.split(',')
  d_x = jnp.einsum(f'{y_letters},{kernel_letters}->{x_letters}', d_y, kernel)
  pairs = sorted([(x.size, 0, x_letters, x), (d_y.size, 1, y_letters, d_y)])
  (_, _, small_letters, small), (_, _, large_letters, large) = pairs
  d_kernel = jnp.einsum(
      f'{small_letters},{large_letters}->{kernel_letters}', small, large)
  return d_x, d_kernel


project.defvjp(_project_forward, _project_backward)
