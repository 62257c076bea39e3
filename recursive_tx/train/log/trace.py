"""A profile of a few steps, at a planned step or on request.

It is written where TensorBoard looks for it, workdir/plugins/profile.
"""

from absl import logging
from etils import epath
import jax


class Trace:
  """Starts the profiler before a step and stops it after some more."""

  def __init__(self, folder: epath.Path, *, step: int, steps: int):
    """Plans.

    Args:
      folder: the workdir. A file `profile` in it asks for a profile, and is
        removed when it is seen.
      step: the first one to profile; 0 plans none.
      steps: how many.
    """
    self._folder, self._first, self._steps = folder, step, steps
    self._last = None

  def poll(self, step: int) -> None:
    """Looks for the file, when `step` is done."""
    request = self._folder / 'profile'
    if self._last is None and request.exists() and not request.is_dir():
      request.unlink()
      # The step after this one has been started already.
      self._first = step + 2

  def before(self, step: int) -> None:
    """To be called before a step is started."""
    if step != self._first or self._last is not None:
      return
    try:
      jax.profiler.start_trace(str(self._folder))
    except RuntimeError as error:
      # Somebody else is profiling this process; no reason to end a run.
      logging.warning('No profile of step %d: %s', step, error)
      return
    self._last = step + self._steps - 1
    logging.info('Profiling steps %d to %d.', step, self._last)

  def after(self, step: int) -> None:
    """To be called when a step is done."""
    if self._last is not None and step >= self._last:
      self.close()

  def close(self) -> None:
    """Ends a profile that is being taken."""
    if self._last is not None:
      self._last = None
      jax.profiler.stop_trace()
      logging.info('Profile: %s.', self._folder / 'plugins' / 'profile')
