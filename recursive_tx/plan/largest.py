"""The largest batch that fits a chip's memory."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from recursive_tx import machine
from recursive_tx.machine import chips
from recursive_tx.plan import costs
from recursive_tx.train.config import Config


def largest(
    config: Config, devices: list[Any], chip: chips.Chip, peak_bytes: int,
    report: Callable[[str], Any],
) -> int:
  """The largest batch that fits, a multiple of what the mesh requires.

  Memory grows nearly in proportion to the batch, so that a line through the
  last two batches gives the next to try.

  Args:
    config, devices, chip, report: as for `costs.costs`.
    peak_bytes: of `config.data.batch`, which is known.

  Returns:
    Sequences; 0 where not even the smallest batch fits.
  """
  mesh = costs.mesh_of(config, devices)
  unit = math.lcm(
      math.prod(mesh.shape[axis] for axis in machine.LETTERS['B']),
      config.data.shards) * config.optim.accumulate
  known = {config.data.batch // unit: peak_bytes}

  def peak(units):
    if units not in known:
      data = dataclasses.replace(config.data, batch=units * unit)
      known[units] = costs.costs(
          dataclasses.replace(config, data=data), devices, chip, report
      )['peak_bytes_per_chip']
    return known[units]

  room = costs.SPARE * chip.hbm_bytes
  low, high = 0, None  # The largest that fits, the smallest that does not.
  units = next(iter(known))
  while True:
    low, high = (
        (max(low, units), high) if peak(units) <= room else
        (low, min(units, high or units)))
    if high is not None and high - low <= max(1, low // 16):
      return low * unit
    if len(known) == 1:
      units = units * 2 if low else max(1, units // 2)
      continue
    (x, a), (y, b) = sorted(known.items())[-2:]
    slope = max((b - a) / (y - x), 1.0)
    estimate = int(x + (room - a) / slope)
    top = high - 1 if high is not None else 4 * low
    units = min(max(estimate, low + 1), max(top, low + 1))
