"""Thresholds of the least depth for their share of wrong tokens."""

import itertools

import numpy as np

from recursive_tx.exits import thresholds


def some(tokens=12, exits=2, seed=0):
  """Scores on a coarse grid, so that there are ties, and what they predict."""
  rng = np.random.default_rng(seed)
  score_ET = rng.integers(0, 5, (exits, tokens)) / 4
  return score_ET, rng.random((exits, tokens)) < 0.4 + 0.5 * score_ET


def judged(score_ET, same_ET, tried):
  """Mean depth and share of wrong tokens, one token at a time."""
  depths, wrongs = [], []
  for score_E, same_E in zip(score_ET.T, same_ET.T, strict=True):
    left = [loop for loop, (score, least) in enumerate(
        zip(score_E, tried, strict=True)) if score >= least]
    depths.append(left[0] + 1 if left else len(score_E) + 1)
    wrongs.append(not same_E[left[0]] if left else False)
  return np.mean(depths), np.mean(wrongs)


def test_tokens_leave_at_the_first_loop_that_lets_them():
  score_ET = np.array([[0.9, 0.1, 0.1, 0.5], [0.9, 0.9, 0.1, 0.1]])
  assert thresholds.exit_loop(score_ET, (0.5, 0.6)).tolist() == [0, 1, 2, 0]
  assert thresholds.exit_loop(score_ET[:, :, None], (2.0, 0.05)).tolist() == [
      [1], [1], [1], [1]]


def test_no_pair_is_better_in_both():
  """Brute force over every pair that differs."""
  values = (*(i / 4 for i in range(5)), thresholds.NEVER)
  for seed in range(5):
    score_ET, same_ET = some(seed=seed)
    everywhere = np.array([judged(score_ET, same_ET, pair)
                           for pair in itertools.product(values, repeat=2)])
    found = np.array([judged(score_ET, same_ET, tried)
                      for tried in thresholds.path(score_ET, same_ET)])
    for depth, wrong in found:
      # One loop at a time may end beside the best pair, not behind it.
      better = (everywhere[:, 0] < depth) & (everywhere[:, 1] < wrong)
      assert not better.any()


def test_the_example_of_the_docstring():
  score_ET = np.array([[0.9, 0.8, 0.6, 0.4]])
  same_ET = np.array([[True, True, False, True]])
  assert thresholds.path(score_ET, same_ET) == [(0.8,), (0.4,)]
  for price, expected in ((2.0, 0.8), (1.0, 0.4)):
    change_T = np.where(same_ET[0], 0.0, price) - 1
    assert thresholds._best(score_ET[0], change_T) == expected


def test_the_path_goes_from_careful_to_bold():
  score_ET, same_ET = some(tokens=400, exits=3)
  found = [judged(score_ET, same_ET, tried)
           for tried in thresholds.path(score_ET, same_ET)]
  depths, wrongs = zip(*found, strict=True)
  assert len(found) > 3 and len(set(found)) == len(found)
  assert list(depths) == sorted(depths, reverse=True)
  assert list(wrongs) == sorted(wrongs)


def test_a_score_that_tells_nothing_true_leaves_nobody():
  score_ET = np.linspace(0, 1, 9)[None]
  assert thresholds.path(score_ET, np.zeros((1, 9), bool)) == []
  assert thresholds.path(np.zeros((1, 0)), np.zeros((1, 0), bool)) == []
