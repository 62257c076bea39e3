"""What is computed in another form where XLA's CPU backend is faster with it.

Each habit is a function of the plain form's arguments; `Run.layout` chooses,
and with 'auto' the platform: on TPU and GPU the plain form is compiled. What
each gains: docs/results.md, by tests/benchmarks/cpu_forms.py.

  product   a training step: kernels are matrices, and a gradient transposes
            the smaller operand
  argmax    sampling: two reductions that are vectorised
  the engine's transposed head (engine/weights.py): few rows times [D, V]
"""

import functools

import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib


def platform() -> str:
  """'cpu', 'tpu' or 'gpu': of the mesh that is compiled for, else of JAX."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(device.platform, device.platform)


def chosen(run: config_lib.Run) -> bool:
  """Whether these forms are used."""
  if run.layout == 'auto':
    return platform() == 'cpu'
  return run.layout == 'cpu'


def product(
    run: config_lib.Run, spec: str, x: jax.Array, kernel: jax.Array, dtype
) -> jax.Array:
  """einsum(spec, x, kernel) in `dtype`, for a kernel's spec or 'TD,VD->TV'."""
  if not chosen(run):
    return jnp.einsum(spec, x, kernel, preferred_element_type=dtype)
  if kernel.ndim == 2:
    return _project(spec, x, kernel, dtype)
  # As matrices, X to Y: given two letters to sum over, XLA may take them in
  # the other order, and transposes the kernel for it.
  inner, outer = (len(letters) for letters in config_lib.split(spec))
  leading, columns = x.shape[:x.ndim - inner], kernel.shape[inner:]
  flat = x.reshape(*leading, -1)
  kernel_XY = kernel.reshape(flat.shape[-1], -1)
  return _project('...X,XY->...Y', flat, kernel_XY, dtype).reshape(
      *leading, *columns)


def argmax(run: config_lib.Run, x: jax.Array) -> jax.Array:
  """The first largest along the last dimension, int32."""
  if not chosen(run):
    return jnp.argmax(x, axis=-1).astype(jnp.int32)
  size = x.shape[-1]
  is_top = x == x.max(axis=-1, keepdims=True)
  index = jnp.where(is_top, jnp.arange(size, dtype=jnp.int32), size - 1)
  return index.min(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project(spec: str, x: jax.Array, kernel: jax.Array, dtype) -> jax.Array:
  """A product with a matrix, whose gradient transposes what is smaller.

  To multiply, the backend transposes one operand. JAX's own rule has it
  transpose the incoming gradient, fused with whatever made it.
  """
  return jnp.einsum(spec, x, kernel, preferred_element_type=dtype)


def _project_forward(spec, x, kernel, dtype):
  return _project(spec, x, kernel, dtype), (x, kernel)


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


_project.defvjp(_project_forward, _project_backward)
