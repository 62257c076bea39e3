"""Steps that changed nothing, and states that are not worth keeping.

The step skips an update whose loss or gradient is not finite, and counts that
in its metrics. Some of these are bad luck with a batch; many in a row are a
run that will never recover. A state is kept only if its parameters are finite.
"""

from collections.abc import Callable, Mapping
import hashlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store import checkpoint

# How many of a process's rows, and how many of a row's tokens, are logged.
_ROWS, _TOKENS = 4, 12


class Skips:
  """Counts skipped updates in a row, logs them, and ends a run of them.

  It looks at the metrics of the step before, which the loop has waited for.
  """

  def __init__(self, most: int, decode: Callable[[Any], str], workdir: str):
    """Starts with no skipped step.

    Args:
      most: so many in a row end the run; 0 never does.
      decode: ids -> text.
      workdir: of the run, whose last checkpoint the error names.
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
    what = (
        f'Step {step} was skipped ({self._in_row} in a row): loss'
        f' {float(metrics["loss"]):.4g}, gradient norm'
        f' {float(metrics["grad_norm"]):.4g}. Its batch {self._describe(batch)}'
    )
    logging.warning('%s.', what)
    if self._most and self._in_row >= self._most:
      raise UserError(
          f'{what}. optim.max_skips={self._most} ends the run;'
          f' {_way_out(self._workdir)}')

  def _describe(self, batch: Mapping[str, np.ndarray]) -> str:
    """A batch, as far as it helps to find its documents."""
    token_BT = np.asarray(batch['token_BT'])
    digest = hashlib.blake2b(token_BT.tobytes(), digest_size=4).hexdigest()
    rows = ', '.join(
        f'{self._decode(row[:_TOKENS].tolist())!r}' for row in token_BT[:_ROWS])
    more = f' and {len(token_BT) - _ROWS} more' if len(token_BT) > _ROWS else ''
    return f'({digest}) has rows that begin {rows}{more}'


def check_state(state: Any, *, step: int, steps: int, workdir: str) -> None:
  """Checks that a state is worth an evaluation or a checkpoint.

  All processes must call it.

  Args:
    state: a `TrainState`, on the mesh.
    step: steps done, skipped ones included.
    steps: of the run.
    workdir: of the run, whose last checkpoint the error names.

  Raises:
    UserError: a parameter is not finite, or the run is over and no step of it
      changed anything.
  """
  finite = jax.device_get(_finite(state.params))
  odd = [path for path, is_finite in paths.items(finite) if not is_finite]
  if odd:
    raise UserError(
        f'After step {step} parameter {odd[0]!r} is not finite ({len(odd)} of'
        f' {len(paths.items(finite))} are not), so the run ends;'
        f' {_way_out(workdir)}')
  counts = optax.tree.get_all_with_path(state.opt_state, 'count')
  if step == steps and not any(int(count) for _, count in counts):
    raise UserError(
        f'All {steps} steps were skipped, because the loss or the gradient was'
        f' not finite, so the run ends; {_way_out(workdir)}')


@jax.jit
def _finite(params: Any) -> Any:
  """Whether all of each parameter is finite."""
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _way_out(workdir: str) -> str:
  last = checkpoint.latest_step(workdir)
  if last is None:
    return ('it has no checkpoint yet. Lower optim.lr, or leave out those'
            ' documents.')
  return (f'its last good checkpoint is {workdir}/checkpoints/{last}. Start'
          f' another from there with --config.init_from={workdir} and a lower'
          ' optim.lr, or without those documents.')
