"""Sharing one kernel by weighted error: closed forms, bounds, rank."""

import numpy as np
import pytest

from recursive_tx import tying
from recursive_tx.tying.fit import share as share_lib
from recursive_tx.tying.fit.share import factors as factors_of
from recursive_tx.tying.fit.share import share, spectra

ROWS, COLUMNS = 12, 9


def _problem(layers=2, rows=ROWS, columns=COLUMNS, seed=0):
  """Kernels, second moments of their inputs, and of gradients."""
  rng = np.random.default_rng(seed)
  kernels = [rng.normal(size=(rows, columns)).astype(np.float32)
             for _ in range(layers)]
  def moment(size):
    x = rng.normal(size=(4 * size, size)) * rng.exponential(size=size)
    return x.T @ x / len(x)
  inputs = [moment(rows) for _ in kernels]
  common = moment(columns)
  # The same up to a number, for which the arithmetic is exact.
  return kernels, inputs, [common * (1 + i) for i in range(layers)]


def _share(problem, rank):
  shared = share(*problem, rank)
  return shared, [factors_of(kernel, shared, C, S, rank)
                  for kernel, C, S in zip(*problem, strict=True) if rank]


def _error(problem, shared, factors):
  error = 0.0
  for i, (kernel, C, S) in enumerate(zip(*problem, strict=True)):
    gap = kernel - shared - (factors[i][0] @ factors[i][1] if factors else 0)
    error += np.trace(gap.T @ C @ gap @ S)
  return error


def _as_the_paper(problem, rank):
  kernels = problem[0]
  shared = tying.fold(kernels)
  return shared, [
      tying.factor(kernel - shared, rank, scale=1.0,
                   rng=np.random.default_rng(0))[:2] for kernel in kernels]


@pytest.mark.parametrize('earlier, mean, error', [(1, 2.5, 3.0), (3, 2.0, 4.0)])
def test_the_example_of_nearest(earlier, mean, error):
  """Its docstring's figures, of one kernel in two layers."""
  kernels, inputs = [np.eye(1), 3 * np.eye(1)], [np.eye(1), 3 * np.eye(1)]
  shared = share(
      kernels, inputs, [np.eye(1), np.eye(1) * earlier**-1.0], 0)
  assert shared[0, 0] == pytest.approx(mean)
  errors = {M: _error((kernels, inputs, [np.eye(1)] * 2), np.full((1, 1), M),
                      []) for M in (mean, 2.0, 1.0)}
  assert errors[mean] == pytest.approx(error)
  assert (errors[2.0], errors[1.0]) == (4.0, 12.0)


def test_without_factors_it_is_the_weighted_mean():
  kernels, inputs, outputs = problem = _problem(3)
  shared, factors = _share(problem, 0)
  weights = [C * np.trace(S) for C, S in zip(inputs, outputs, strict=True)]
  mean = np.linalg.solve(sum(weights), sum(
      weight @ kernel for weight, kernel in zip(weights, kernels,
                                                strict=True)))
  assert factors == [] and shared.dtype == np.float32
  assert np.abs(shared - mean).max() < 2e-2
  # Nothing near it is better.
  rng = np.random.default_rng(1)
  for _ in range(5):
    shifted = shared + 0.1 * rng.normal(size=shared.shape)
    assert _error(problem, shifted, []) > _error(problem, shared, [])


def test_equal_moments_without_factors_give_the_plain_mean():
  kernels = _problem(3)[0]
  same = [np.eye(ROWS)] * 3, [np.eye(COLUMNS)] * 3
  assert np.abs(_share((kernels, *same), 0)[0] - tying.fold(kernels)
                ).max() < 1e-6


@pytest.mark.parametrize('shape', [(12, 9), (9, 12)])
@pytest.mark.parametrize('layers', [2, 3])
def test_error_falls_with_rank_and_is_below_the_papers(layers, shape):
  problem = _problem(layers, *shape)
  errors = []
  for rank in (0, 1, 3, 5, 9):
    shared, factors = _share(problem, rank)
    errors.append(_error(problem, shared, factors))
    if 0 < rank < 9:
      assert errors[-1] < 0.7 * _error(problem, *_as_the_paper(problem, rank))
  assert all(a > b for a, b in zip(errors, errors[1:], strict=False))
  assert errors[-1] < 1e-9 * errors[0]


@pytest.mark.parametrize('shape', [(12, 9), (9, 12)])
@pytest.mark.parametrize('rounds', [0, 100])
def test_two_layers_leave_what_no_two_factors_could_take(
    shape, rounds, monkeypatch):
  """Weighed alike, the error is half of what they differ by, beyond twice the
  rank (Eckart and Young); and the search begins there."""
  monkeypatch.setattr(share_lib, '_MOST_ROUNDS', rounds)
  one, two = kernels = _problem(2, *shape)[0]
  problem = kernels, [np.eye(shape[0])] * 2, [np.eye(shape[1])] * 2
  left = np.linalg.svd(one - two, compute_uv=False)**2 / 2
  for rank in (1, 2, 4):
    assert _error(problem, *_share(problem, rank)) == pytest.approx(
        left[2 * rank:].sum(), rel=1e-4)


def test_neither_side_can_be_bettered_alone():
  """At the end the shared kernel is best for the factors, and they for it."""
  kernels, inputs, outputs = problem = _problem(2)
  shared, factors = _share(problem, 2)
  error = _error(problem, shared, factors)
  left = [kernel - a @ b for kernel, (a, b) in zip(kernels, factors,
                                                   strict=True)]
  again = _share((left, inputs, outputs), 0)[0]
  assert _error(problem, again, factors) > 0.97 * error


def test_factors_are_as_those_of_an_svd():
  kernels, inputs, outputs = problem = _problem(2)
  shared, factors = _share(problem, 3)
  for kernel, C, (a, b) in zip(kernels, inputs, factors, strict=True):
    assert a.shape == (ROWS, 3) and b.shape == (3, COLUMNS)
    assert a.dtype == b.dtype == np.float32
    assert np.abs(a.T @ a - np.eye(3)).max() < 1e-5
    # The best b for this a.
    gap = kernel - shared - a @ b
    assert np.abs(a.T @ C @ gap).max() < 1e-2 * np.abs(a.T @ C @ kernel).max()


@pytest.mark.parametrize('side', [0, 1])
def test_a_diagonal_is_a_matrix_with_nothing_beside_it(side):
  problem = list(_problem(2))
  diagonals = [moment.diagonal() for moment in problem[1 + side]]
  whole = [np.diag(diagonal) for diagonal in diagonals]
  one, two = ([*problem[:1 + side], moments, *problem[2 + side:]]
              for moments in (diagonals, whole))
  for rank in (0, 3):
    (kernel, factors), (other, others) = _share(one, rank), _share(two, rank)
    assert np.abs(kernel - other).max() < 1e-4
    for (a, b), (c, d) in zip(factors, others, strict=True):
      assert np.abs(a @ b - c @ d).max() < 1e-4


def test_a_layer_that_does_nothing_to_the_output_weighs_nothing():
  kernels, inputs, outputs = _problem(2)
  shared, _ = _share((kernels, inputs, [outputs[0], 1e-9 * outputs[1]]), 0)
  assert np.abs(shared - kernels[0]).max() < 1e-3


def test_equal_layers_need_no_factors():
  kernels, inputs, outputs = _problem(2)
  shared, factors = _share(([kernels[0]] * 2, inputs, outputs), 3)
  assert np.abs(shared - kernels[0]).max() < 1e-5
  for a, b in factors:
    assert np.abs(a @ b).max() < 1e-5 and np.abs(a).max() > 0.1


def test_moments_of_nothing_are_no_division_by_zero():
  kernels, inputs, outputs = _problem(2)
  shared, factors = _share(
      (kernels, [0 * C for C in inputs], [0 * S for S in outputs]), 3)
  assert np.isfinite(shared).all()
  assert all(np.isfinite(x).all() for pair in factors for x in pair)


@pytest.mark.parametrize('shape', [(12, 9), (9, 12)])
def test_spectra_are_what_ranks_take_off(shape):
  kernels, inputs, _ = _problem(3, *shape)
  problem = kernels, inputs, [np.eye(shape[1]) * (1 + i) for i in range(3)]
  shared, _ = _share(problem, 0)
  falling = spectra(*problem)
  assert (np.diff(falling) <= 0).all() and len(falling) == 9
  for rank in (0, 2):
    left = _error(problem, shared, [
        factors_of(kernel, shared, C, S, rank)
        for kernel, C, S in zip(*problem, strict=True) if rank])
    # Moments are damped, which adds a little.
    assert left == pytest.approx(falling[rank:].sum(), rel=0.05)


@pytest.mark.parametrize('shape', [(150, 120), (120, 150), (12, 9)])
def test_directions_hold_what_the_leading_singular_vectors_do(shape):
  """Where they are found by iteration, and where all are found at once."""
  matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  matrix *= np.geomspace(1, 1e-3, shape[1])
  best = np.linalg.svd(matrix, compute_uv=False)
  for rank in (1, 5):
    U = np.asarray(share_lib.directions(matrix, rank))
    assert np.abs(U.T @ U - np.eye(rank)).max() < 1e-5
    assert np.square(U.T @ matrix).sum() == pytest.approx(
        np.square(best[:rank]).sum(), rel=1e-4)
