"""Updates that were skipped because they would have spoilt everything.

The step skips an update whose loss or gradient is not finite, and says so in
its metrics. Some of that is bad luck with a batch; many in a row are a run
that will never recover.
"""

from collections.abc import Callable, Mapping
import hashlib
from typing import Any

from absl import logging
import numpy as np

from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint

# How many of a process's rows, and how many of a row's tokens, are told.
_ROWS, _TOKENS = 4, 12


class Skips:
  """Counts skipped updates in a row, tells of them, and stops a run of them.

  It looks at the metrics of the step before, which the loop has waited for.
  """

  def __init__(self, most: int, decode: Callable[[Any], str], workdir: str):
    """Starts at none.

    Args:
      most: so many in a row end the run; 0 never does.
      decode: ids -> text.
      workdir: of the run, whose last checkpoint the end names.
    """
    self._most = most
    self._workdir = workdir
    self._decode = decode
    self._before = None
    self._in_row = 0

  def update(
      self, step: int, metrics: Mapping[str, Any],
      batch: Mapping[str, np.ndarray],
  ) -> None:
    """Takes a step, and looks at the one before it.

    Args:
      step: updates done, this one included.
      metrics: of this step.
      batch: what this process gave to it.

    Raises:
      UserError: too many in a row.
    """
    self.in_row()
    self._before = step, metrics, batch

  def in_row(self) -> int:
    """How many there are in a row now; waits for the latest step.

    Raises:
      UserError: too many.
    """
    if self._before is not None:
      before, self._before = self._before, None
      self._look(*before)
    return self._in_row

  def _look(self, step, metrics, batch) -> None:
    if not float(metrics['skipped']):
      self._in_row = 0
      return
    self._in_row += 1
    told = (
        f'Step {step} was skipped ({self._in_row} in a row): loss'
        f' {float(metrics["loss"]):.4g}, gradient norm'
        f' {float(metrics["grad_norm"]):.4g}. Its batch {self._describe(batch)}'
    )
    logging.warning('%s.', told)
    if self._most and self._in_row >= self._most:
      last = checkpoint.latest_step(self._workdir)
      raise UserError(
          f'{told}. optim.max_skips={self._most} ends the run; its last good'
          f' checkpoint is {self._workdir}/checkpoints/{last}. Start another'
          f' from there with --config.init_from={self._workdir} and a lower'
          ' optim.lr, or without those documents.'
          if last is not None else
          f'{told}. optim.max_skips={self._most} ends the run, which has no'
          ' checkpoint yet; lower optim.lr, or leave out those documents.'
      )

  def _describe(self, batch: Mapping[str, np.ndarray]) -> str:
    """A batch, as far as it helps to find its documents."""
    token_BT = np.asarray(batch['token_BT'])
    digest = hashlib.blake2b(token_BT.tobytes(), digest_size=4).hexdigest()
    rows = ', '.join(
        f'{self._decode(row[:_TOKENS].tolist())!r}' for row in token_BT[:_ROWS]
    )
    more = f' and {len(token_BT) - _ROWS} more' if len(token_BT) > _ROWS else ''
    return f'({digest}) has rows that begin {rows}{more}'
