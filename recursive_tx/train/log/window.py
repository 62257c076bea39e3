"""What the steps since the last row add up to."""

from collections.abc import Mapping
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step does, on what.

  Attributes:
    tokens: of a step.
    flops: model FLOPs of a step.
    chips: how many share it.
    peak: FLOP/s of one of them; None is not known.
  """

  tokens: int
  flops: float
  chips: int
  peak: float | None

  def speeds(self, seconds: float) -> dict[str, float]:
    """Rates at which steps of so many seconds get on."""
    speed = self.tokens / max(seconds, 1e-9)
    found = {
        'tokens_per_second': speed,
        'tokens_per_second_per_chip': speed / self.chips}
    if self.peak and self.flops:
      rate = self.flops / max(seconds, 1e-9)
      found['mfu'] = rate / (self.peak * self.chips)
    return found


class Window:
  """The metrics and times of some steps."""

  def __init__(self, work: Work):
    self._work = work
    self._steps, self._seconds, self._waits = [], [], []

  def add(
      self, values: Mapping[str, float], seconds: float | None, waited: float
  ) -> None:
    """Takes a step.

    Args:
      values: its metrics.
      seconds: its time; None is not known.
      waited: seconds of waiting for its data.
    """
    self._steps.append(values)
    self._waits.append(waited)
    if seconds is not None:
      self._seconds.append(seconds)

  def speeds(self) -> dict[str, float]:
    """Of the steps whose time is known; empty where there is none."""
    if not self._seconds:
      return {}
    return self._work.speeds(float(np.mean(self._seconds)))

  def row(self) -> dict[str, float]:
    """Means of the metrics, and times; see `History` for the names."""
    last = self._steps[-1]
    # A skipped step's loss is not finite, and has taught nothing.
    taken = [step for step in self._steps if not step.get('skipped')]
    row = {
        key: float(np.mean([step[key] for step in taken]))
        for key in last if taken}
    row['lr'] = last['lr']
    row['skipped'] = float(len(self._steps) - len(taken))
    row['input_wait_seconds'] = float(np.mean(self._waits))
    if self._seconds:
      row |= {
          f'step_seconds/p{percent}': float(
              np.percentile(self._seconds, percent))
          for percent in (50, 90, 99)}
    return row | self.speeds()
