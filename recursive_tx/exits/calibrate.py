"""Thresholds of exits, chosen to agree with full depth.

Held-out sequences are run with exits (see forward.py), and each has a share of
tokens whose likeliest next token is not the full depth's. Learn then Test
(Angelopoulos et al., arxiv.org/abs/2110.01052; for exits CALM,
arxiv.org/abs/2207.07061): a part of the sequences selects thresholds to test
(see thresholds.py). They are tested on the others, the most careful first, each
by a p-value for "the mean share is above delta", and the last before the first
failure is taken. With at least the stated confidence over the draw of the
sequences, their true mean share is then at most delta.

The guarantee: on text like that given, read token by token, the next token
chosen is the full depth's at least so often. There is none for text that the
model generates, nor where sequences are not drawn independently, as pieces of
one book are not. Every token of a sequence may exit here, while generation
reads a prompt at full depth.

Knows a model and batches; not where they come from.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import exits
from recursive_tx.errors import UserError, one_of
from recursive_tx.exits import forward, thresholds

# Those whose threshold is a matter of degree.
RULES = tuple(rule for rule in exits.RULES
              if rule not in ('last', 'static'))
# One of so many sequences selects thresholds and tests none: on it they would
# look better than they are.
_CHOOSE = 4
# The greatest share of his wealth that the gambler of `p_value` may lose.
_STAKE = 0.9
# Where the curve that is shown ends.
_LEAST_AGREEMENT = 0.9


@dataclasses.dataclass(frozen=True)
class Point:
  """Thresholds: what share agreed with full depth, and at what depth."""
  thresholds: tuple[float, ...]
  agreement: float
  depth: float
  p_value: float


@dataclasses.dataclass(frozen=True)
class Result:
  """A calibration.

  Attributes:
    rule, delta, confidence: as given.
    units: sequences that tested.
    tokens: of all sequences.
    points: the curve, the most careful thresholds first.
    chosen: of `points`; None where not even the first one passed.
    oracle_depth: mean of the earliest loops that agree with the final one.
    agreement_E: share of tokens on which each loop agrees, without exits.
    area_E: under the ROC curve of the score as a predictor of that; 0.5 is
      chance, NaN where all tokens are alike.
  """
  rule: str
  delta: float
  confidence: float
  units: int
  tokens: int
  points: tuple[Point, ...]
  chosen: Point | None
  oracle_depth: float
  agreement_E: tuple[float, ...]
  area_E: tuple[float, ...]


def calibrate(
    cfg: config_lib.ModelConfig, variables: Any, heldout: Any, *, rule: str,
    delta: float = 0.01, confidence: float = 0.95,
    run: config_lib.Run = config_lib.Run(),
    progress: Callable[[Sequence, str], Iterable] = (
        lambda items, phase: items),
) -> Result:
  """Chooses a rule's thresholds on held-out text.

  Args:
    cfg, variables: a model with several loops.
    heldout: `batches`, as `evaluate` reads them; a row is a sequence.
    rule: one of RULES.
    delta: share of a sequence's tokens, on average, that may differ from full
      depth.
    confidence: probability, over the draw of the sequences, that they do not
      differ more often.
    run: how to execute the model.
    progress: is given the items of each phase and its name, and iterates over
      them, as `tqdm` does: batches at 'full depth', prices in the 'search' for
      thresholds, and the 'thresholds' that are tested.

  Raises:
    UserError: a rule, model or number that cannot be, or too few sequences
      for any threshold to pass.
  """
  _check(cfg, rule, delta, confidence)
  full = forward.forward(cfg, run, rule, every=True)
  batches = [batch for batch in heldout.batches if batch['weight_BT'].any()]
  chooses, tests = _split(batches)
  units = sum(int(mask_BT.any(axis=1).sum()) for mask_BT in tests)
  _check_units(units, delta, confidence)
  known = [jax.tree.map(np.asarray, full(
      variables, batch, np.full(cfg.loops - 1, np.inf)))
           for batch in progress(batches, 'full depth')]
  points, level = [], 1 - confidence
  path = thresholds.path(*_scores(known, chooses), progress=lambda prices: (
      progress(prices, 'search')))
  for tried in progress(path, 'thresholds'):
    wrongs_Q, depths_Q = [], []
    for batch, first, mask_BT in zip(batches, known, tests, strict=True):
      best_BT, depth_BT = _passed(
          cfg, run, rule, variables, batch, first, tried)
      wrongs_Q += _by_row(best_BT != first.best_BT, mask_BT)
      depths_Q += _by_row(depth_BT, mask_BT)
    wrong = float(np.mean(wrongs_Q))
    points.append(Point(tried, 1 - wrong, float(np.mean(depths_Q)),
                        p_value(np.array(wrongs_Q), delta, level)))
    if points[-1].p_value > level and 1 - wrong < _LEAST_AGREEMENT:
      break
  passed = last_passed([point.p_value for point in points], level)
  score_ET, same_ET = _scores(
      known, [batch['weight_BT'] > 0 for batch in batches])
  return Result(
      rule, delta, confidence, units, score_ET.shape[1], tuple(points),
      None if passed is None else points[passed],
      float(oracle_depth(same_ET).mean()),
      tuple(same_ET.mean(axis=1).tolist()),
      tuple(area(score_T, same_T) for score_T, same_T in zip(
          score_ET, same_ET, strict=True)))


def _split(batches) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Tokens of every batch to choose by, and those to test, bool [B, T]."""
  chooses, tests, last = [], [], 0
  for batch in batches:
    counted_BT = batch['weight_BT'] > 0
    number_B = last + counted_BT.any(axis=1).cumsum()
    last = number_B[-1]
    chooses_B1 = (number_B % _CHOOSE == 1)[:, None]
    chooses.append(counted_BT & chooses_B1)
    tests.append(counted_BT & ~chooses_B1)
  return chooses, tests


def _scores(known, masks) -> tuple[np.ndarray, np.ndarray]:
  """Scores, and whether the token is the final one, [E, tokens of a mask]."""
  pairs = [(first.score_EBT[:, mask_BT],
            (first.best_EBT == first.best_BT)[:, mask_BT])
           for first, mask_BT in zip(known, masks, strict=True)]
  score_ET, same_ET = (
      np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
  return score_ET, same_ET


def _passed(cfg, run, rule, variables, batch, first, tried):
  """A batch with exits at some thresholds: best_BT and depth_BT."""
  if cfg.loop_keys or cfg.coda:
    passed = forward.forward(cfg, run, rule)(variables, batch, np.array(tried))
    return np.asarray(passed.best_BT), np.asarray(passed.depth_BT)
  # No token reads keys that an exit has skipped: one pass is enough.
  best_LBT = np.concatenate([first.best_EBT, first.best_BT[None]])
  loop_BT = thresholds.exit_loop(first.score_EBT, tried)
  return np.take_along_axis(best_LBT, loop_BT[None], 0)[0], loop_BT + 1


def p_value(share_Q: np.ndarray, delta: float, level: float) -> float:
  """Of "the mean share is above delta", by betting against it.

  A gambler stakes on every share's being below delta, as much as the shares
  before it advise. Where the hypothesis is true he expects no gain, whatever
  he does, and his greatest wealth is rarely high (Ville's inequality): its
  inverse is a p-value (Waudby-Smith and Ramdas, arxiv.org/abs/2010.09686,
  section 4). It is smaller where shares differ little from each other, which
  bounds by the mean alone (Hoeffding's, Bentkus') do not use.

  Args:
    share_Q: in [0, 1], independent and alike.
    delta: in (0, 1).
    level: at which it is to be small; what is staked depends on it.
  """
  wealth = most = 1.0
  total, spread = 0.5, 0.25  # As if there were one share of a half before.
  for count, share in enumerate(share_Q.tolist(), 1):
    stake = math.sqrt(2 * math.log(1 / level) * count / (len(share_Q) * spread))
    # He never stakes everything: a share of 1 leaves some wealth.
    wealth *= 1 + min(stake, _STAKE / (1 - delta)) * (delta - share)
    most = max(most, wealth)
    total += share
    spread += (share - total / (count + 1)) ** 2
  return 1 / most


def last_passed(p_values: Sequence[float], level: float) -> int | None:
  """Number of the last before the first p-value above the level, from 0.

  Tests in an order that is fixed need no correction for their number, if they
  end at the first that fails. None where that is the very first.
  """
  passed = [p <= level for p in p_values]
  count = passed.index(False) if False in passed else len(passed)
  return count - 1 if count else None


def oracle_depth(same_ET: np.ndarray) -> np.ndarray:
  """Earliest loop, from 1, that agrees with the final one; depth_T.

  Args:
    same_ET: whether every loop but the final one does.
  """
  final_1T = np.ones((1, same_ET.shape[1]), bool)
  return np.concatenate([same_ET, final_1T]).argmax(axis=0) + 1


def area(score_T: np.ndarray, same_T: np.ndarray) -> float:
  """How often a token that agrees has a higher score than one that does not.

  Ties count half; NaN where there are none of a kind.
  """
  _, group_T, size = np.unique(
      score_T, return_inverse=True, return_counts=True)
  rank_T = (np.cumsum(size) - (size - 1) / 2)[group_T]
  same = int(same_T.sum())
  pairs = same * (len(same_T) - same)
  if not pairs:
    return math.nan
  return float((rank_T[same_T].sum() - same * (same + 1) / 2) / pairs)


def _by_row(value_BT: np.ndarray, mask_BT: np.ndarray) -> list[float]:
  """Means over the tokens of the mask of every row that has some."""
  return [float(value_T[mask_T].mean())
          for value_T, mask_T in zip(value_BT, mask_BT, strict=True)
          if mask_T.any()]


def _check_units(units: int, delta: float, confidence: float) -> None:
  level = 1 - confidence

  def enough(units):
    return p_value(np.zeros(units), delta, level) <= level

  if not enough(units):
    most = max(1, units)
    while not enough(most):
      most *= 2
    least = bisect.bisect_left(range(most), True, key=enough)
    raise UserError(
        f'{units} sequences, beside those to choose by, are too few to be'
        f' {confidence:g} sure of a delta of {delta:g}, even if none differed;'
        f' that takes {least}: give more --text, a smaller --seq_len or a'
        ' larger --delta')


def check(rule: str, delta: float, confidence: float) -> None:
  """Raises UserError for a rule or a number that no model could have."""
  one_of('rule', rule, RULES)
  for name, value in (('delta', delta), ('confidence', confidence)):
    if not 0 < value < 1:
      raise UserError(f'{name} is {value}; expected above 0 and below 1')


def _check(cfg, rule, delta, confidence) -> None:
  check(rule, delta, confidence)
  if cfg.loops == 1:
    raise UserError(
        'the model has one loop (model.loops=1) and no exit before it;'
        ' calibrate one with several')
  exits.Exit(rule, (1.0,) * (cfg.loops - 1)).check(cfg)
