"""How the benchmark of starts reads a curve of uptraining."""

from benchmarks.uptraining import tokens_to
import pytest


def test_between_two_points_it_is_a_line():
  curve = [[0, 4.0], [100, 3.0], [200, 3.5], [300, 2.0]]
  assert tokens_to(curve, 3.25) == pytest.approx(75)
  assert tokens_to(curve, 3.0) == 100
  # The first time counts; from the point before, wherever that is.
  assert tokens_to(curve, 2.75) == pytest.approx(250)


def test_what_starts_there_takes_none_and_what_never_comes_is_none():
  assert tokens_to([[0, 4.0], [100, 3.0]], 4.5) == 0
  assert tokens_to([[0, 4.0], [100, 3.0]], 2.9) is None
