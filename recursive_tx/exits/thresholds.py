"""Which thresholds of an exit are worth trying, from scores of some tokens.

A token is worth leaving early as many loops as it saves, less a price where it
is then another than at full depth. For one price after the other the best
thresholds are found, one loop at a time, the others held.

Knows arrays; nothing of models or of what is promised.
"""

from collections.abc import Sequence

import numpy as np

# Loops that one wrong token is worth, the most careful first.
_PRICES = tuple(2.0 ** (step / 4) for step in range(40, -1, -1))
# A score that none has.
NEVER = 2.0
_SWEEPS = 20


def path(
    score_ET: np.ndarray, same_ET: np.ndarray
) -> list[tuple[float, ...]]:
  """Thresholds of every exit, the most careful first, without repetition.

  Args:
    score_ET: of every loop but the final one, at most 1.
    same_ET: whether that loop's token is the final one's.
  """
  found, thresholds_E = [], np.full(len(score_ET), NEVER)
  nobody = tuple(thresholds_E.tolist())
  wrong_LT = ~np.concatenate([same_ET, np.ones_like(same_ET[:1])])
  loop_L1 = np.arange(len(wrong_LT))[:, None]
  for price in _PRICES:
    cost_LT = loop_L1 + price * wrong_LT
    thresholds_E = _descend(score_ET, cost_LT, thresholds_E)
    point = tuple(thresholds_E.tolist())
    if point != nobody and point not in found:
      found.append(point)
  return found


def leave(score_E: np.ndarray, thresholds_E: Sequence[float]) -> np.ndarray:
  """After which loop, from 0, tokens leave; [...] of score_E [E, ...]."""
  leaves_L = np.ones((len(score_E) + 1, *score_E.shape[1:]), bool)
  for loop, threshold in enumerate(thresholds_E):
    leaves_L[loop] = score_E[loop] >= threshold
  return leaves_L.argmax(axis=0)


def _descend(score_ET, cost_LT, thresholds_E):
  """Thresholds of least cost, from some that may not be the best."""
  thresholds_E = thresholds_E.copy()
  for _ in range(_SWEEPS):
    before = thresholds_E.copy()
    for loop in reversed(range(len(score_ET))):
      comes_T = leave(score_ET[:loop], thresholds_E[:loop]) == loop
      next_T = loop + 1 + leave(
          score_ET[loop + 1:, comes_T], thresholds_E[loop + 1:])
      costs = cost_LT[:, comes_T]
      later_T = np.take_along_axis(costs, next_T[None], axis=0)[0]
      thresholds_E[loop] = _best(score_ET[loop, comes_T], costs[loop] - later_T)
    if (thresholds_E == before).all():
      break
  return thresholds_E


def _best(score_T, loss_T) -> float:
  """Threshold from which on the losses' sum is least; NEVER if above 0."""
  if not len(score_T):
    return NEVER
  order = np.argsort(-score_T, kind='stable')
  sorted_T = score_T[order]
  sum_T = loss_T[order].cumsum()
  # Of equal scores all leave or none.
  sum_T[:-1][sorted_T[:-1] == sorted_T[1:]] = np.inf
  last = int(sum_T.argmin())
  return float(sorted_T[last]) if sum_T[last] < 0 else NEVER
