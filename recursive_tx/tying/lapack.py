"""LAPACK's factorisations in fp64, on one thread.

OpenBLAS spins while it waits for its threads. Where cores are shared, or many
for a small matrix, that is most of the time: on two busy cores the leading
eigenvectors of 1536 x 1536 took 5.4 CPU seconds on two threads, and 0.8 on one.
Products of matrices, which gain from threads, are left alone.
"""

import contextlib
import functools

import numpy as np
import scipy.linalg
import threadpoolctl


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
  return threadpoolctl.ThreadpoolController()


def _one_thread() -> contextlib.AbstractContextManager:
  return _libraries().limit(limits=1, user_api='blas')


def cholesky(matrix: np.ndarray) -> np.ndarray:
  """Z, lower triangular, of Z Z^T."""
  with _one_thread():
    return np.linalg.cholesky(matrix)


def qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Q with orthonormal columns and R, upper triangular, of Q R."""
  with _one_thread():
    return np.linalg.qr(matrix)


def eigenvalues(matrix: np.ndarray) -> np.ndarray:
  """Those of a symmetric matrix, rising."""
  with _one_thread():
    return scipy.linalg.eigvalsh(matrix)


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The largest eigenvalues of a symmetric matrix, falling, and their
  eigenvectors, [n, rank]. The matrix is spoilt."""
  last = len(matrix) - 1
  with _one_thread():
    values, vectors = scipy.linalg.eigh(
        matrix, subset_by_index=[last - rank + 1, last], overwrite_a=True,
        check_finite=False)
  return values[::-1], vectors[:, ::-1]
