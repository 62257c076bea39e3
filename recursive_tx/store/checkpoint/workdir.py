"""What a run checks and clears in its workdir before it starts."""

import shutil

from absl import logging
from etils import epath
import jax

from recursive_tx import machine
from recursive_tx.errors import UserError
from recursive_tx.store.checkpoint import layout


def check_writable(workdir: str, num_bytes: int) -> None:
  """Tries to write into a workdir, and takes away again what it wrote.

  Args:
    workdir: of the run; need not exist.
    num_bytes: of one checkpoint.

  Raises:
    UserError: it cannot be written, has no room for a checkpoint, or is not
      the same for all processes.
  """
  folder = epath.Path(workdir)
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  probe, problem = folder / '.probe', ''
  if machine.is_main():
    try:
      folder.mkdir(parents=True, exist_ok=True)
      probe.write_text('?')
      problem = _no_room(folder, num_bytes)
    except OSError as error:
      problem = f'{workdir} cannot be written: {error.strerror or error}'
  failed = machine.agree(bool(problem))
  is_shared = failed or probe.exists()
  machine.wait('the workdir was looked at')
  if machine.is_main():
    if probe.exists():
      probe.unlink()
    for path in made:
      if path.exists():
        path.rmdir()
  if failed:
    raise UserError(
        f'{problem or f"process 0 cannot write to {workdir}"}; make it writable'
        ' and roomy, or take another --workdir.')
  if not is_shared:
    raise UserError(
        f'{workdir} of process {jax.process_index()} is not that of process'
        ' 0; all need the same directory, on a file system or bucket that'
        ' they share.')


def set_aside_broken(workdir: str) -> None:
  """Moves broken checkpoints after the latest whole one to workdir/broken.

  The run will write those steps again, and nothing of a user's is deleted.
  """
  step, folder = layout.latest_step(workdir), layout.folder(workdir)
  # Nobody moves one before all have seen that it is broken.
  machine.wait('broken checkpoints')
  if step is not None and machine.is_main():
    for later in sorted(s for s in layout.steps(folder) if s > step):
      aside = epath.Path(workdir) / 'broken' / str(later)
      count = 1
      while aside.exists():
        count += 1
        aside = aside.parent / f'{later}-{count}'
      aside.parent.mkdir(exist_ok=True)
      (folder / str(later)).rename(aside)
      logging.warning('Moved it from %s to %s.', folder / str(later), aside)
  machine.wait('broken checkpoints are aside')


def _no_room(folder: epath.Path, num_bytes: int) -> str:
  if '://' in str(folder):
    return ''
  free = shutil.disk_usage(folder).free
  if free >= num_bytes:
    return ''
  return (f'{folder} has {free / 2**30:.3g} GiB free, and a checkpoint takes'
          f' {num_bytes / 2**30:.3g} GiB')
