"""Which thresholds of the exits to test, from scores of some tokens.

A token costs the loops that it runs, and a price where its exit's token is not
that of full depth. For one price after the other, from high to low, the
thresholds of least total cost are searched, one exit at a time with the others
held.

Knows arrays; nothing of models or of guarantees.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from recursive_tx.exits.rules import NEVER

# Of one wrong token, in loops; the most careful first.
_PRICES = tuple(2.0 ** (step / 4) for step in range(40, -1, -1))
_SWEEPS = 20


def path(
    score_ET: np.ndarray, same_ET: np.ndarray, *,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[tuple[float, ...]]:
  """Thresholds of every exit, the most careful first, without repetition.

  An example with one exit and four tokens, of which the exit has the third
  wrong: scores 0.9, 0.8, 0.6, 0.4. A token that exits saves one loop, and the
  third costs the price. At price 2, exits down to each score change the cost by
  -1, -2, -1, -2: the threshold is 0.8, the first of the least. At price 1 it
  is by -1, -2, -2, -3: the threshold is 0.4. So the path is (0.8,), (0.4,).

  Args:
    score_ET: of every loop but the final one, at most 1.
    same_ET: whether the likeliest token after that loop is the final loop's.
    progress: is given the prices and iterates over them, as `tqdm` does.
  """
  found, thresholds_E = [], np.full(len(score_ET), NEVER)
  nobody = tuple(thresholds_E.tolist())
  wrong_LT = ~np.concatenate([same_ET, np.ones_like(same_ET[:1])])
  loop_L1 = np.arange(len(wrong_LT))[:, None]
  for price in progress(_PRICES):
    cost_LT = loop_L1 + price * wrong_LT
    thresholds_E = _descend(score_ET, cost_LT, thresholds_E)
    point = tuple(thresholds_E.tolist())
    if point != nobody and point not in found:
      found.append(point)
  return found


def exit_loop(score_E: np.ndarray, thresholds_E: Sequence[float]) -> np.ndarray:
  """After which loop, from 0, tokens exit; [...] of score_E [E, ...]."""
  exits_L = np.ones((len(score_E) + 1, *score_E.shape[1:]), bool)
  for loop, threshold in enumerate(thresholds_E):
    exits_L[loop] = score_E[loop] >= threshold
  return exits_L.argmax(axis=0)


def _descend(score_ET, cost_LT, thresholds_E):
  """Coordinate descent: thresholds of less cost, until no exit's changes.

  For each exit, only tokens that reach it matter, and the alternative to its
  cost is that of the later exit (or the last loop) that they would take.
  """
  thresholds_E = thresholds_E.copy()
  for _ in range(_SWEEPS):
    before = thresholds_E.copy()
    for loop in reversed(range(len(score_ET))):
      reaches_T = exit_loop(score_ET[:loop], thresholds_E[:loop]) == loop
      next_T = loop + 1 + exit_loop(
          score_ET[loop + 1:, reaches_T], thresholds_E[loop + 1:])
      costs = cost_LT[:, reaches_T]
      later_T = np.take_along_axis(costs, next_T[None], axis=0)[0]
      thresholds_E[loop] = _best(
          score_ET[loop, reaches_T], costs[loop] - later_T)
    if (thresholds_E == before).all():
      break
  return thresholds_E


def _best(score_T, change_T) -> float:
  """The threshold at and above which the changes have the least sum; NEVER
  where no sum is below 0.

  In the example of `path` at price 2: changes -1, -1, +1, -1 have the running
  sums -1, -2, -1, -2, and the result is 0.8.
  """
  if not len(score_T):
    return NEVER
  order = np.argsort(-score_T, kind='stable')
  sorted_T = score_T[order]
  sum_T = change_T[order].cumsum()
  # Of equal scores all exit or none.
  sum_T[:-1][sorted_T[:-1] == sorted_T[1:]] = np.inf
  last = int(sum_T.argmin())
  return float(sorted_T[last]) if sum_T[last] < 0 else NEVER
