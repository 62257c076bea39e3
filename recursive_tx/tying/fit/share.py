"""One kernel for several layers, and a layer's factors, by weighted error.

The error of a kernel M in place of W is ||C^(1/2) (M - W) S^(1/2)||^2, where C
is the second moment of the kernel's input x and S that of the gradient of the
model's loss in the kernel's output: the two Kronecker factors of the Fisher
matrix (Martens and Grosse, 2015), by which it estimates twice the KL divergence
a token. Arrays in, arrays out.

Second moments are ill-conditioned, so that they are factored in fp64 by NumPy.
Everything of a kernel's size is fp32 on JAX's default device.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from recursive_tx.tying import lapack
from recursive_tx.tying.fit import matrices

# Added to a second moment, as a share of its mean diagonal: directions that
# few tokens have, and noise, weigh no less than this. A gradient is noisier
# than an input, since every token gives one draw of it.
_INPUT_DAMPING = 1e-4
_OUTPUT_DAMPING = 1e-2

# The alternation ends with a round that lowers the error by less than this
# share, or after this many.
_LEAST_GAIN, _MOST_ROUNDS = 1e-3, 15
# Where the loops could do the same thing each, the shared kernel might as
# well; so little keeps the factors from growing against it, and is more than
# fp32 rounds to.
_RIDGE = 1e-5

# Subspace iteration: directions beyond those wanted, and rounds.
_EXTRA, _ITERATIONS = 16, 4


def share(
    kernels: Sequence[np.ndarray], inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray], rank: int,
) -> np.ndarray:
  """The shared kernel that, with every layer's best factors, errs least.

  Args:
    kernels: [rows, columns] of each layer, any float dtype.
    inputs: second moment of each layer's input, [rows, rows], or its
      diagonal, [rows].
    outputs: likewise of the gradient in its output, [columns, columns] or
      [columns].
    rank: of the factors, at most min(rows, columns); 0 is none.

  Returns:
    [rows, columns], fp32.
  """
  metric = _metric(inputs, outputs)
  apart = _apart(kernels, metric)
  change = _mean(apart, metric.roots)
  if 0 < rank < min(change.shape):
    change -= _absorbed(
        apart, metric.roots, rank, _MOST_ROUNDS, _LEAST_GAIN)
  return (kernels[0] + matrices.columns_back(
      matrices.unapply(metric.whole.T, np.asarray(change, np.float64)),
      metric.right)).astype(np.float32)


def spectra(
    kernels: Sequence[np.ndarray], inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
) -> np.ndarray:
  """What the next rank of all layers would take off the weighted error.

  Args:
    kernels, inputs, outputs: as for `share`.

  Returns:
    [min(rows, columns)], falling: squared singular values of the residuals
    that the best shared kernel without factors leaves, the layers' summed up.
  """
  metric = _metric(inputs, outputs)
  # SciPy finds eigenvalues alone, JAX's vectors take five times as long.
  return sum(
      np.maximum(lapack.eigenvalues(np.asarray(gram, np.float64))[::-1], 0)
      for gram in _grams(_apart(kernels, metric), metric.roots))


def factors(
    kernel: np.ndarray, shared: np.ndarray, input_moment: np.ndarray,
    output_moment: np.ndarray, rank: int,
) -> tuple[np.ndarray, np.ndarray]:
  """One layer's factors beside a shared kernel, of least weighted error.

  Args:
    kernel, shared: [rows, columns].
    input_moment, output_moment: second moments of the input, [rows, rows],
      and of the gradient in the output, [columns, columns], or their
      diagonals.
    rank: at least 1.

  Returns:
    a [rows, rank] with orthonormal columns and b [rank, columns], fp32.
  """
  residual = np.asarray(kernel, np.float32) - shared
  rows, columns = residual.shape
  if rank == min(rows, columns):  # Nothing is lost, whatever it weighs.
    if rows <= columns:
      return np.eye(rows, dtype=np.float32), residual
    a, b = lapack.qr(residual.astype(np.float64))
    return a.astype(np.float32), b.astype(np.float32)
  root = matrices.root(matrices.damped(
      input_moment.astype(np.float64), _INPUT_DAMPING))
  right = matrices.root(matrices.damped(
      output_moment.astype(np.float64), _OUTPUT_DAMPING))
  u, inner = _projected(*(x.astype(np.float32) for x in (
      residual, root, right)), rank)
  # Z^T a = u r^-1, so that the best b, which S does not change, is r u^T Z^T
  # times the residual.
  a, r = lapack.qr(matrices.unapply(root.T, np.asarray(u, np.float64)))
  return a.astype(np.float32), (r @ np.asarray(inner)).astype(np.float32)


class _Metric(NamedTuple):
  """Roots of the moments.

  A root Z is lower triangular, or the diagonal, of Z Z^T. With one S for all,
  nothing of the kernel's size has to be solved for again and again. Each
  layer's number, its gradient's size, goes to its C; against an S for every
  layer that costs little, against no S at all it gains much.

  Attributes:
    whole: Y, the root of the sum of all layers' C, fp64.
    roots: G_i = Y^-1 Z_i, fp32, with Z_i the root of layer i's C: the sum of
      all G_i G_i^T is 1.
    right: the root of an S that all layers have up to a number, fp64.
  """
  whole: np.ndarray
  roots: list[np.ndarray]
  right: np.ndarray


def _metric(inputs, outputs) -> _Metric:
  sizes = [matrices.trace(moment) or 1.0 for moment in outputs]
  common = sum(moment.astype(np.float64) / size
               for moment, size in zip(outputs, sizes, strict=True)
               ) / len(outputs)
  damped = [size * matrices.damped(moment.astype(np.float64), _INPUT_DAMPING)
            for moment, size in zip(inputs, sizes, strict=True)]
  whole = matrices.root(sum(damped))
  return _Metric(
      whole, [matrices.solved(whole, matrices.root(moment)).astype(np.float32)
              for moment in damped],
      matrices.root(matrices.damped(common, _OUTPUT_DAMPING)))


def _apart(kernels, metric):
  """Y^T (W_i - W_0) times S's root, fp32: what there is to share."""
  first = kernels[0].astype(np.float32)
  left, right = (x.astype(np.float32) for x in (metric.whole.T, metric.right))
  return [_weighted(kernel.astype(np.float32) - first, left, right)
          for kernel in kernels]


@jax.jit
def _weighted(kernel, left, right):
  return matrices.columns(matrices.apply(left, kernel), right)


@jax.jit
def _mean(apart, roots):
  """The layers' weighted mean: best as long as there are no factors."""
  # All shares sum up to 1, and the first layer is the origin.
  return sum(matrices.apply(root, matrices.apply(root.T, kernel))
             for root, kernel in zip(roots, apart, strict=True))


def _residuals(apart, roots):
  """F_i = Z_i^T (W_i - mean)."""
  mean = _mean(apart, roots)
  return [matrices.apply(root.T, kernel - mean)
          for root, kernel in zip(roots, apart, strict=True)]


@jax.jit
def _grams(apart, roots):
  return [_gram(left) for left in _residuals(apart, roots)]


@functools.partial(jax.jit, static_argnames='rank')
def _projected(residual, root, right, rank):
  """Leading directions u of a weighted residual, and u^T Z^T residual."""
  left = matrices.apply(root.T, residual)
  u = directions(matrices.columns(left, right), rank)
  return u, u.T @ left


@functools.partial(jax.jit, static_argnames='rank')
def _absorbed(apart, roots, rank, most, gain):
  """What the factors, and not the shared kernel, represent, [rows, columns].

  Let P_i = u_i b_i be the factors of layer i in its root's coordinates, and
  F_i its residual without any. The best shared kernel for them leaves to
  layer i R_i = F_i + sum_j H_ij P_j, H_ij = G_i^T G_j. A round updates each
  u_i by a step of subspace iteration on R_i, and then solves for all b at
  once. Its products are all thin: R is never made.
  """
  # fp32 does: H is a projection, and the factors are made anew afterwards.
  residuals = _residuals(apart, roots)
  total = sum(jnp.vdot(left, left) for left in residuals)
  bases = _initial(residuals, roots, rank)

  def step(state):
    bases, b, error, _, rounds = state
    old = bases, b, error
    applied = [
        matrices.apply(root, u) for root, u in zip(roots, bases, strict=True)]
    bases = [_orthonormal(left @ mine.T + matrices.apply(root.T, sum(
        a @ (other @ mine.T) for a, other in zip(applied, b, strict=True))))
         for left, root, mine in zip(residuals, roots, b, strict=True)]
    b, taken = _solve(residuals, roots, bases)
    better = total - taken < error  # Not so for nan.
    return *jax.tree.map(
        lambda new, was: jnp.where(better, new, was),
        (bases, b, total - taken), old), error, rounds + 1

  def unfinished(state):
    _, _, error, before, rounds = state
    return (rounds < most) & (before - error > gain * error)

  b, taken = _solve(residuals, roots, bases)
  bases, b, *_ = lax.while_loop(
      unfinished, step, (bases, b, total - taken, jnp.inf, 0))
  return sum(matrices.apply(root, u) @ mine
             for root, u, mine in zip(roots, bases, b, strict=True))


def _initial(residuals, roots, rank):
  """Where the search begins: the leading directions of every layer alone.

  Of two layers the second has the leading directions of what the first leaves:
  alone both would have the same, and once is enough. Where both layers have
  the same weights, this is the optimum.
  """
  bases = []
  for left in residuals:
    if bases and len(residuals) == 2:
      b, _ = _solve(residuals[:1], roots[:1], bases)
      left = left + matrices.apply(
          roots[1].T, matrices.apply(roots[0], bases[0]) @ b[0])
    bases.append(directions(left, rank))
  return bases


def _solve(residuals, roots, bases):
  """The best b_i for given u_i, and the error that they take off.

  Since H is a projection, the error is that without factors, minus
  2 <F, P>, plus <P, (1 - H) P>: a system of size rank times layers.
  """
  applied = jnp.concatenate([
      matrices.apply(root, u) for root, u in zip(roots, bases, strict=True)], 1)
  wanted = jnp.concatenate([
      u.T @ left for u, left in zip(bases, residuals, strict=True)])
  system = (1 + _RIDGE) * jnp.eye(len(wanted)) - applied.T @ applied
  b = jax.scipy.linalg.solve(system, wanted, assume_a='pos')
  return jnp.split(b, len(residuals)), jnp.vdot(wanted, b)


def directions(matrix: jax.Array, rank: int) -> jax.Array:
  """Leading left singular vectors, or what spans the same, [rows, rank].

  Where few are wanted, by subspace iteration (Halko et al., 2011).
  """
  rows, columns = matrix.shape
  wide = rank + _EXTRA
  if 2 * wide >= min(rows, columns):
    vectors = jnp.linalg.eigh(_gram(matrix))[1][:, -rank:]
    return vectors if rows <= columns else _orthonormal(matrix @ vectors)
  x = matrix @ jax.random.normal(jax.random.key(0), (columns, wide))
  for _ in range(_ITERATIONS):
    x = matrix @ (matrix.T @ _orthonormal(x))
  x = _orthonormal(x)
  return x @ jnp.linalg.eigh(_gram(x.T @ matrix))[1][:, -rank:]


def _gram(matrix):
  """Inner products of the rows or of the columns, whichever are fewer."""
  rows, columns = matrix.shape
  return matrix @ matrix.T if rows <= columns else matrix.T @ matrix


def _orthonormal(x):
  return jnp.linalg.qr(x)[0]
