"""Writing a run's checkpoints, in the background, several processes at once.

Orbax writes them beside their final place and renames.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import math
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from recursive_tx.errors import UserError
from recursive_tx.store.checkpoint import intact, layout
from recursive_tx.store.checkpoint.config import CheckpointConfig


class Checkpoints:
  """A run's checkpoints, for the run itself: only it may write there.

  Use as a context manager, which waits for the last one to be written.

  Attributes:
    best: (step, score) of the best that was saved, or None.
  """

  def __init__(self, workdir: str, config: CheckpointConfig):
    """Opens them, and clears away what an interrupted save left.

    Raises:
      UserError: it cannot write there.
    """
    self._folder = layout.folder(workdir)
    self._config = config
    self._keep = _Keep(config.keep)
    step = layout.latest_step(workdir)
    if step is not None and config.best:
      stored = layout.run(workdir, step)['best']
      if stored and stored['name'] == config.best:
        self._keep.best = stored['step'], stored['score']
    self._manager = ocp.CheckpointManager(
        self._folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=self._keep, create=True,
            cleanup_tmp_directories=True),
        # They are completed in this order, so that the last sees the others.
        item_handlers={
            'state': ocp.StandardCheckpointHandler(),
            'run': ocp.JsonCheckpointHandler(filename=layout.RUN),
            'data': _PositionHandler()})

  @property
  def best(self) -> tuple[int, float] | None:
    return self._keep.best

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *unused) -> None:
    # Where something else went wrong already, that is what to hear of.
    with contextlib.suppress(Exception) if kind else self._plain_errors():
      self._manager.close()

  def save(
      self, step: int, *, state: Any, position: bytes,
      settings: Mapping[str, Any], score: float | None = None,
  ) -> None:
    """Saves in the background; the arrays may be donated when it returns.

    Args:
      step: updates done.
      state: a tree of arrays.
      position: of this process's data stream.
      settings: JSON values by section, what `check_same` will compare.
      score: the figure by which this is the best so far; None, it is not.

    Raises:
      UserError: this or the one before it could not be written. Those that
        there were are as they were.
    """
    self.mark_best(step, score)
    best = self.best and dict(zip(('step', 'score'), self.best, strict=True))
    run = {'settings': dict(settings),
           'best': best and {'name': self._config.best, **best}}
    with self._plain_errors():
      self._manager.save(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardSave(state), data=_PositionSave(position),
              run=ocp.args.JsonSave(run)),
          force=True)

  def score_of(self, evaluation: Mapping[str, Any]) -> float | None:
    """The figure by which an evaluation is the best so far; None, it is not."""
    if not self._config.best:
      return None
    score = self._config.best_of(evaluation)
    return score if score < (self.best[1] if self.best else math.inf) else None

  def mark_best(self, step: int, score: float | None) -> None:
    """As if an earlier checkpoint had been saved with this score."""
    if score is not None:
      self._keep.best = step, float(score)

  def check(self) -> None:
    """Raises UserError if a save in the background has failed."""
    with self._plain_errors():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Returns when all is written; raises UserError if it cannot be."""
    with self._plain_errors():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _plain_errors(self) -> Iterator[None]:
    """Errors of Orbax in one line, with what is left."""
    try:
      yield
    except Exception as error:
      whole = [step for step in layout.steps(self._folder)
               if not layout.fault(self._folder, step)]
      left = (f'The last good checkpoint is {self._folder / str(max(whole))}'
              if whole else 'There is no earlier one')
      raise UserError(
          f'A checkpoint could not be written to {self._folder}:'
          f' {layout.in_short(error)}. {left}; when there is room to write, the'
          ' same command continues from there.') from error


class _Keep:
  """Orbax's question which checkpoints stay: the latest, and the best."""

  def __init__(self, latest: int):
    self._latest = latest
    self.best = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._latest:], self.best and self.best[0]}
    return [step in kept for step in steps]


class _PositionHandler(ocp.CheckpointHandler):
  """Bytes of every process, one file each; at the end, all files' sizes."""

  def save(self, directory: epath.Path, args: '_PositionSave') -> None:
    name = f'process_{jax.process_index()}_of_{jax.process_count()}'
    (directory / name).write_bytes(args.position)

  def finalize(self, directory: epath.Path) -> None:
    step = directory.parent
    # The own folder has a name for the time being.
    intact.write(step, {
        'state': step / 'state', 'run': step / 'run', 'data': directory})

  def restore(self, directory: epath.Path, args: Any) -> None:
    raise NotImplementedError('`restore` reads the files itself.')


@ocp.args.register_with_handler(
    _PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _PositionSave(ocp.args.CheckpointArgs):
  position: bytes
