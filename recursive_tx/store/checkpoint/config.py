"""When a run is saved, and which of its checkpoints are kept."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from recursive_tx.errors import UserError, check_ranges

_SCORE = r'eval/loop(\d+)/(loss|perplexity|bits_per_byte)'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save; the end of a run and SIGTERM save it in any case.

  Attributes:
    every: steps between checkpoints, in [0, inf); 0 does not count steps.
    keep: how many of the latest to keep, in [0, inf); 0 keeps all.
    best: a figure of the held-out set, such as 'eval/loop2/bits_per_byte'.
      Every evaluation at which it is lower than ever before is saved, and the
      lowest is kept beside the latest. '' does not look for one.
  """

  every: int = 1000
  keep: int = 2
  best: str = ''

  RANGES = dict(every='[0, inf)', keep='[0, inf)')

  def __post_init__(self):
    check_ranges('checkpoint', self)
    if self.best and not re.fullmatch(_SCORE, self.best):
      raise UserError(
          f'checkpoint.best is {self.best!r}; expected the name of a figure of'
          " the held-out set, such as 'eval/loop1/bits_per_byte' (or loss,"
          ' perplexity; any loop).')

  def best_of(self, evaluation: Mapping[str, Any]) -> float:
    """The figure that `best` names, in a result of `evaluate`.

    Raises:
      UserError: there is no such loop.
    """
    loop, key = re.fullmatch(_SCORE, self.best).groups()
    for row in evaluation['loops']:
      if row['loop'] == int(loop):
        return row[key]
    raise UserError(
        f'checkpoint.best is {self.best!r}, but the model has'
        f' {len(evaluation["loops"])} loops.')
