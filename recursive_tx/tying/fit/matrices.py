"""Arithmetic of second moments that are whole, [n, n], or diagonals, [n]."""

import numpy as np
import scipy.linalg

from recursive_tx.tying import lapack


def damped(moment, share):
  """The moment, with a share of its mean diagonal added to its diagonal."""
  least = share * (trace(moment) / len(moment) or 1.0)
  return moment + (least if moment.ndim == 1 else least * np.eye(len(moment)))


def trace(moment) -> float:
  """Sum of the diagonal."""
  return float(moment.sum() if moment.ndim == 1 else np.trace(moment))


def centred(moment, mean):
  """The moment about the mean."""
  return moment - (mean * mean if moment.ndim == 1 else np.outer(mean, mean))


def diagonal(moment):
  """[n]."""
  return moment if moment.ndim == 1 else np.diagonal(moment)


def root(matrix):
  """Lower triangular, or a diagonal: Z of Z Z^T."""
  return np.sqrt(matrix) if matrix.ndim == 1 else lapack.cholesky(matrix)


def solved(root, x):
  """root^-1 x, of two roots that are both whole or both diagonals."""
  return x / root if root.ndim == 1 else scipy.linalg.solve_triangular(
      root, x, lower=True)


def apply(matrix, x):
  """matrix x, [n, columns]."""
  return matrix[:, None] * x if matrix.ndim == 1 else matrix @ x


def unapply(matrix, x):
  """Solves for what a root, transposed, was applied to."""
  if matrix.ndim == 1:
    return x / matrix[:, None]
  return scipy.linalg.solve_triangular(matrix, x)


def columns(x, matrix):
  """x matrix, [rows, n]."""
  return x * matrix if matrix.ndim == 1 else x @ matrix


def columns_back(x, root):
  """Solves for what was multiplied by a root."""
  return x / root if root.ndim == 1 else scipy.linalg.solve_triangular(
      root.T, x.T).T
