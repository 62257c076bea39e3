"""Where checkpoints lie, and which of them are whole."""

import json
import os
import re
from typing import Any

from absl import logging
from etils import epath

from recursive_tx.errors import UserError
from recursive_tx.store.checkpoint import intact

RUN = 'run.json'


def latest_step(workdir: str) -> int | None:
  """Step of the latest checkpoint that is whole, if any; changes nothing.

  Raises:
    UserError: there are checkpoints, and none of them is whole.
  """
  if not is_workdir(workdir):
    return None
  where, broken = folder(workdir), []
  for step in sorted(steps(where), reverse=True):
    wrong = fault(where, step)
    if not wrong:
      for line in broken:
        logging.warning('%s; taking step %d instead.', line, step)
      return step
    broken.append(f'The checkpoint {where / str(step)} is broken: {wrong}')
  if broken:
    raise UserError(
        f'{"; ".join(broken)}. There is no other; put a copy in its place, or'
        ' take another --workdir to start anew.')
  return None


def is_workdir(directory: str) -> bool:
  """Whether a directory holds a run's checkpoints."""
  return folder(directory).is_dir()


def folder(workdir: str) -> epath.Path:
  """Where a workdir's checkpoints are."""
  return epath.Path(workdir) / 'checkpoints'


def steps(where: epath.Path) -> list[int]:
  """Steps that have a directory, whole or not."""
  return [int(path.name) for path in where.iterdir() if path.name.isdigit()]


def fault(where: epath.Path, step: int) -> str:
  """What is wrong with a checkpoint; '' where nothing is."""
  return intact.fault(where / str(step))


def run(workdir: str, step: int) -> dict[str, Any]:
  """The settings and the best score that a checkpoint was saved with."""
  return json.loads((folder(workdir) / str(step) / 'run' / RUN).read_text())


def in_short(error: Exception) -> str:
  """The error of Orbax, TensorStore or the file system in one short line."""
  text = str(error).strip() or type(error).__name__
  # TensorStore's texts name every file on the way to this.
  found = re.search(r"os_error_code='(\d+)'", text)
  if found:
    return os.strerror(int(found.group(1)))
  return text.splitlines()[0][:300]
