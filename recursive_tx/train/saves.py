"""When a run is saved: by steps, by minutes, at its best, at its end."""

from collections.abc import Callable, Mapping
import math
import time
from typing import Any

from recursive_tx import machine
from recursive_tx.store.checkpoint import CheckpointConfig


class Saves:
  """Decides at every step whether to save it.

  All processes call it at every step and get the same answer.
  """

  def __init__(
      self,
      config: CheckpointConfig,
      *,
      start: int,
      last: int,
      best: float | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      config: see there.
      start: steps done already.
      last: the last step, which is always saved.
      best: lowest score so far.
      clock: seconds.
    """
    self._config = config
    self._last = last
    self._best = math.inf if best is None else best
    self._clock = clock
    self.saved(start)

  def due(self, step: int) -> bool:
    """Whether this step is to be saved whatever its score."""
    every = self._config.every
    by_steps = step == self._last or (every > 0 and step % every == 0)
    return by_steps or self._minutes_passed(step)

  def best(self, evaluation: Mapping[str, Any]) -> float | None:
    """The score of an evaluation, if it is the best one so far."""
    if not self._config.best:
      return None
    score = self._config.best_of(evaluation)
    if not score < self._best:
      return None
    self._best = score
    return score

  def saved(self, step: int) -> None:
    """Starts the clock anew."""
    self._since, self._start, self._look = self._clock(), step, step + 1

  def _minutes_passed(self, step: int) -> bool:
    # Clocks differ, so process 0's counts. Hosts that exchanged it at every
    # step would wait for each other. So process 0 also names the next step at
    # which to look: where the time will be up at the speed so far, at most
    # twice the steps done.
    if not self._config.minutes or step < self._look:
      return False
    done = step - self._start
    passed = self._clock() - self._since
    left = self._config.minutes * 60 - passed
    more = 0
    if left > 0:
      more = max(1, int(min(left / max(passed / done, 1e-9), done)))
    more = machine.agree(more)
    self._look = step + more
    return more == 0
