"""One kernel for several layers, and a layer's factors, by weighted error.

The error of a kernel M in place of W is ||C^(1/2) (M - W) S^(1/2)||^2, where C
is the second moment of the kernel's input x and S that of the gradient of the
model's loss in the kernel's output: the two Kronecker factors of the Fisher
matrix (Martens and Grosse, 2015), by which it estimates twice the KL divergence
a token. Arrays in, arrays out.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from recursive_tx import tying
from recursive_tx.tying.fit import matrices

# Added to a second moment, as a share of its mean diagonal: directions that
# few tokens have, and noise, weigh no less than this. A gradient is noisier
# than an input, since every token gives one draw of it.
_INPUT_DAMPING = 1e-4
_OUTPUT_DAMPING = 1e-2

# The alternation ends when so many rounds lower the error by less than this
# share, or after this many.
_ROUNDS, _LEAST_GAIN, _MOST_ROUNDS = 10, 1e-3, 100
# Where the loops could do the same thing each, the shared kernel might as
# well; so little keeps the factors from growing against it.
_RIDGE = 1e-6
# Sine of a column's angle to those before it, below which Cholesky's method
# loses more than fp32 holds.
_NEAREST = 1e-4


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
  roots, right = _roots(inputs, outputs)
  wide, shared, inverse = _mean(kernels, roots, right)
  if 0 < rank < min(shared.shape):
    shared -= _absorbed(wide, shared, roots, inverse, rank)
  return matrices.columns_back(shared, right).astype(np.float32)


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
  roots, right = _roots(inputs, outputs)
  wide, mean, _ = _mean(kernels, roots, right)
  total = np.zeros(min(mean.shape))
  for kernel, root in zip(wide, roots, strict=True):
    left = _left(root, kernel - mean)
    total += np.maximum(scipy.linalg.eigvalsh(tying.gram(left))[::-1], 0)
  return total


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
  root = matrices.root(matrices.damped(
      input_moment.astype(np.float64), _INPUT_DAMPING))
  right = matrices.root(matrices.damped(
      output_moment.astype(np.float64), _OUTPUT_DAMPING))
  residual = kernel.astype(np.float32) - shared
  rows, columns = residual.shape
  if rank == min(rows, columns):  # Nothing is lost, whatever it weighs.
    a = np.eye(rows) if rows <= columns else _orthonormal(
        residual.astype(np.float64))
  else:
    a = _orthonormal(matrices.unapply(root.T, _directions(
        matrices.columns(_left(root, residual), right.astype(np.float32)),
        rank)))
  # The best b for this a; S does not change it.
  q, r = np.linalg.qr(matrices.apply(root.T, a))
  b = scipy.linalg.solve_triangular(r, matrices.apply(root, q).T @ residual)
  return a.astype(np.float32), b.astype(np.float32)


def _directions(matrix, rank):
  """Leading left singular vectors, or what spans the same, [rows, rank]."""
  _, vectors = tying.leading(matrix, rank)
  return vectors if len(vectors) == len(matrix) else _orthonormal(
      matrix @ vectors)


def _left(root, kernel):
  """Z^T kernel, fp32: a kernel's size times its rows is no work for fp64."""
  return matrices.apply(root.T.astype(np.float32), kernel)


def _mean(kernels, roots, right):
  """The kernels and their weighted mean, fp32, with S taken into the columns
  so that what is left to weigh is C; and the inverse of all C's sum, fp64."""
  moments = [matrices.square(root) for root in roots]
  inverse = matrices.inverse(sum(moments))
  wide = [matrices.columns(kernel.astype(np.float32), right.astype(np.float32))
          for kernel in kernels]
  # This is best as long as there are no factors. All shares sum up to 1.
  mean = wide[0].copy()
  for kernel, moment in zip(wide[1:], moments[1:], strict=True):
    mean += matrices.apply(
        matrices.product(inverse, moment).astype(np.float32), kernel - wide[0])
  return wide, mean, inverse


def _roots(inputs, outputs):
  """Roots of every C, and of an S that all layers have up to a number.

  A root Z is lower triangular, or the diagonal, of Z Z^T. With one S for all,
  nothing of the kernel's size has to be solved for again and again. Each
  layer's number, its gradient's size, goes to its C; against an S for every
  layer that costs little, against no S at all it gains much.
  """
  sizes = [matrices.trace(moment) or 1.0 for moment in outputs]
  common = sum(moment.astype(np.float64) / size
               for moment, size in zip(outputs, sizes, strict=True)
               ) / len(outputs)
  right = matrices.root(matrices.damped(common, _OUTPUT_DAMPING))
  damped = [matrices.damped(moment.astype(np.float64), _INPUT_DAMPING)
            for moment in inputs]
  return [matrices.root(size * moment)
          for moment, size in zip(damped, sizes, strict=True)], right


def _absorbed(wide, mean, roots, inverse, rank):
  """What the factors, and not the shared kernel, represent, [rows, columns].

  Let F_i = Z_i^T (W_i - mean), and P_i = U_i b_i the factors of layer i in
  its root's coordinates. The best shared kernel for them leaves to layer i
  R_i = F_i + sum_j H_ij P_j, H_ij = Z_i^T (sum_j Z_j Z_j^T)^-1 Z_j. A round
  updates each U_i by a step of subspace iteration on R_i, and then solves for
  all b at once. Its products are all thin: R is never made.
  """
  # fp32 does: H is a projection, and the factors are made anew afterwards.
  F = [_left(root, kernel - mean)
       for root, kernel in zip(roots, wide, strict=True)]
  halves = [matrices.product(root.T, inverse) for root in roots]
  H = [[matrices.product(half, other).astype(np.float32) for other in roots]
       for half in halves]
  places = range(len(F))
  U = _initial(F, H, rank)
  b, error = _solve(F, H, U)
  errors = [error]
  for _ in range(_MOST_ROUNDS):
    U = [_orthonormal(F[i] @ b[i].T + sum(
        matrices.apply(H[i][j], U[j]) @ (b[j] @ b[i].T) for j in places))
         for i in places]
    b, error = _solve(F, H, U)
    errors.append(error)
    if (len(errors) > _ROUNDS
        and errors[-1 - _ROUNDS] - error < _LEAST_GAIN * abs(error)):
      break
  return sum(
      matrices.apply(
          inverse, matrices.apply(roots[i], U[i].astype(np.float64))) @ b[i]
      for i in places)


def _initial(F, H, rank):
  """Where the search begins: the leading directions of every layer alone.

  Of two layers the second has the leading directions of what the first leaves:
  alone both would have the same, and once is enough. Where both layers have
  the same weights, this is the optimum.
  """
  U = []
  for left in F:
    if U and len(F) == 2:
      b, _ = _solve(F[:1], H[:1], U)
      left = left + matrices.apply(H[1][0], U[0]) @ b[0]
    U.append(_directions(left, rank).astype(np.float32))
  return U


def _solve(F, H, U):
  """The best b_i for given U_i, and the error that is left.

  Since H is a projection, the error is that without factors, minus
  2 <F, P>, plus <P, (1 - H) P>: a system of size rank times layers.
  """
  places, rank = range(len(F)), U[0].shape[1]
  system = np.eye(len(F) * rank) * (1 + _RIDGE)
  system -= np.block([
      [U[i].T @ matrices.apply(H[i][j], U[j]) for j in places] for i in places])
  wanted = np.concatenate([u.T @ f for u, f in zip(U, F, strict=True)])
  b = scipy.linalg.solve(
      system, wanted.astype(np.float64), assume_a='pos').astype(np.float32)
  error = sum(float(np.vdot(f, f)) for f in F) - float(np.vdot(wanted, b))
  return np.split(b, len(F)), error


def _orthonormal(x):
  """Columns that span what those of x [n, rank] do.

  Where they are not too near to each other, by Cholesky, all products of
  matrices; Householder's way was most of the time for 16384 x 231.
  """
  wide = x.astype(np.float64)
  wide /= np.maximum(np.linalg.norm(wide, axis=0), np.finfo(x.dtype).tiny)
  try:
    root = np.linalg.cholesky(wide.T @ wide)
  except np.linalg.LinAlgError:
    return np.linalg.qr(x)[0]
  if root.diagonal().min() < _NEAREST:
    return np.linalg.qr(x)[0]
  return scipy.linalg.solve_triangular(
      root, wide.T, lower=True).T.astype(x.dtype)
