"""Which share of a run's time was useful, over all its sessions.

`workdir/sessions.jsonl` has a line when a session starts, when a row of
metrics is written and after each pause: the time, the step, and what had
been achieved at it. A session that resumes at an earlier step takes that
step's achievements, so the steps that it repeats count once.

Knows times and steps; needs nothing but the workdir.
"""

from etils import epath

from recursive_tx.train.log import rows


class Sessions:
  """What the steps of the run so far took and brought.

  Attributes:
    useful: seconds in steps that were not repeated later and changed the
      state.
    skipped: steps that changed nothing, their gradients not being finite.
  """

  def __init__(self, folder: epath.Path, *, start: int, began: float):
    """Opens a session.

    Args:
      folder: the workdir.
      start: steps done.
      began: when the session began, seconds since the epoch.
    """
    path = folder / 'sessions.jsonl'
    marks = rows.read(path)
    self._first = min([began, *(mark['time'] for mark in marks)])
    self.useful, self.skipped = _achieved(marks, start)
    self._file = rows.Rows(path, marks)
    self.mark(start, began)

  def mark(self, step: int, now: float) -> None:
    """Writes what has been achieved at a step."""
    self._file.write({
        'time': now, 'step': step, 'useful': self.useful,
        'skipped': self.skipped})

  def goodput(self, now: float) -> float:
    """Useful share of the time since the first session began, 0 to 1."""
    return self.useful / max(now - self._first, 1e-9)

  def close(self) -> None:
    self._file.close()


def _achieved(marks, start: int) -> tuple[float, int]:
  """Useful seconds and skipped steps of the first `start` steps."""
  # Each session's marks continue those of the ones before, up to its start.
  line = [{'step': 0, 'useful': 0.0, 'skipped': 0}]
  for mark in marks:
    while line and line[-1]['step'] >= mark['step']:
      line.pop()
    line.append(mark)
  before = [mark for mark in line if mark['step'] <= start]
  after = [mark for mark in line if mark['step'] > start]
  last = before[-1]
  useful = last['useful']
  if after:
    # No mark at this very step: in proportion to the steps.
    gap = after[0]['step'] - last['step']
    gained = after[0]['useful'] - useful
    useful += gained * (start - last['step']) / gap
  return useful, last['skipped']
