"""Sums over chunks of time, for what is too large to be there at once.

Knows a function of arrays; nothing of losses.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# (params, outputs, fixed, constants) -> a scalar, and a tree of others.
# `outputs` are arrays [L, B, T, ...], `fixed` are [B, T, ...].
Function = Callable[..., tuple[jax.Array, Any]]


def total(function: Function, chunk: int) -> Function:
  """function(params, outputs, fixed, constants), summed over chunks of T.

  Where a gradient is wanted, each chunk's is computed along with its value,
  so that its logits are made once and not kept. It is that of the function's
  first result, a scalar; the others get none.
  """

  @jax.custom_vjp
  def total(params, outputs, fixed, constants):
    def value(start):
      return function(params, *_cut(outputs, fixed, start, chunk), constants)

    def add(sums, start):
      return jax.tree.map(jnp.add, sums, value(start)), None

    return lax.scan(add, _zeros(value), _starts(outputs, chunk))[0]

  def forward(params, outputs, fixed, constants):
    def value_and_grad(start):
      found, (d_params, d_chunk) = jax.value_and_grad(
          function, argnums=(0, 1), has_aux=True
      )(params, *_cut(outputs, fixed, start, chunk), constants)
      return (found, d_params), d_chunk

    def add(carry, start):
      sums, d_outputs = carry
      found, d_chunk = value_and_grad(start)
      # Written in place: stacked chunks would have to be transposed.
      d_outputs = jax.tree.map(
          lambda whole, part: lax.dynamic_update_slice_in_dim(
              whole, part, start, axis=2), d_outputs, d_chunk)
      return (jax.tree.map(jnp.add, sums, found), d_outputs), None

    zeros = _zeros(value_and_grad)[0], jax.tree.map(jnp.zeros_like, outputs)
    (found, d_params), d_outputs = lax.scan(
        add, zeros, _starts(outputs, chunk))[0]
    return found, (d_params, d_outputs)

  def backward(gradients, cotangent):
    scaled = jax.tree.map(
        lambda g: (g * cotangent[0]).astype(g.dtype), gradients)
    return *scaled, None, None

  total.defvjp(forward, backward)
  return total


def _starts(outputs: Mapping[str, jax.Array], chunk: int) -> jax.Array:
  return jnp.arange(0, jax.tree.leaves(outputs)[0].shape[2], chunk)


def _zeros(function: Callable[[jax.Array], Any]) -> Any:
  """Zeros like the result for a chunk."""
  return jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(function, jnp.int32(0)))


def _cut(outputs, fixed, start, chunk):
  """A chunk of every array. The batch stays whole, since it is sharded."""
  def cut(x, axis):
    return lax.dynamic_slice_in_dim(x, start, chunk, axis)

  return ({key: cut(x, 2) for key, x in outputs.items()},
          {key: cut(x, 1) for key, x in fixed.items()})
