"""Outputs on disk: checked before the work, and there whole or not at all."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import shutil
import tempfile

from recursive_tx.errors import UserError

# What a disk may answer in the middle of the work.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def check_workdir(path: str | os.PathLike) -> str:
  """A directory that is written into over time, checked before the work.

  Args:
    path: need not exist. '~' is the home directory. A bucket's URL is
      returned as it is.

  Raises:
    UserError: it cannot be made or written.
  """
  path = os.fspath(path)
  if '://' in path:
    return path
  with _one_line(path):
    found = os.path.abspath(os.path.expanduser(path))
    _check_writable(path, pathlib.Path(found))
  return found


def check_directory(
    path: str | os.PathLike, *, overwrite: bool = False, size: int = 0
) -> pathlib.Path:
  """What `new_directory` will make, checked before the work.

  Args:
    path: '~' is the home directory; a symbolic link is followed, and stays.
    overwrite: what is there may be replaced.
    size: bytes that will be written, as far as they are known.

  Returns:
    The absolute path, without links.

  Raises:
    UserError: `path` exists and is not empty, without `overwrite`; or it
      cannot be made: no disk, a mount point, the working directory, a place
      that is read-only or has no room.
  """
  found = _resolved(path)
  with _one_line(path):
    if os.path.ismount(found) or found in (here := pathlib.Path.cwd(),
                                           *here.parents):
      raise UserError(
          f'{path} is a mount point or holds the working directory, and cannot'
          ' be replaced; name a new directory inside it')
    if found.exists() and not overwrite and (
        not found.is_dir() or any(found.iterdir())):
      raise UserError(f'{path} exists; remove it, or name another output')
    _check_writable(path, found.parent, size)
  return found


def check_file(path: str | os.PathLike) -> pathlib.Path:
  """As `check_directory`, for `new_file`, which replaces a file."""
  found = _resolved(path)
  with _one_line(path):
    if found.is_dir():
      raise UserError(f'{path} is a directory; name a file')
    if _is_special(found):
      return found
    _check_writable(path, found.parent)
  return found


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike, *, overwrite: bool = False, size: int = 0
) -> Iterator[pathlib.Path]:
  """A directory that appears at `path` whole, or not at all.

  Yields a directory beside it, which takes its place on success. Otherwise
  what was there stays, and nothing that was made remains.

  Args and raises: as `check_directory`; and UserError where the disk is full.
  """
  found = check_directory(path, overwrite=overwrite, size=size)
  with _beside(path, found) as beside:
    new, old = beside / 'new', beside / 'old'
    new.mkdir()
    yield new
    try:
      if found.exists():
        found.rename(old)
      new.rename(found)
    except BaseException:
      if old.exists() and not found.exists():
        old.rename(found)
      raise


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """As `new_directory`, a file that takes the place of `path`."""
  found = check_file(path)
  if _is_special(found):
    with _one_line(path, _FULL):
      yield found
    return
  with _beside(path, found) as beside:
    yield beside / found.name
    (beside / found.name).rename(found)


@contextlib.contextmanager
def _beside(path, found: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory beside `found`, for a while."""
  made = [folder for folder in found.parents if not folder.exists()]
  try:
    with _one_line(path):
      found.parent.mkdir(parents=True, exist_ok=True)
      beside = pathlib.Path(tempfile.mkdtemp(
          prefix=f'.{found.name}.', dir=found.parent))
    try:
      with _one_line(path, _FULL):
        yield beside
    finally:
      # NFS may hold on to a name; the output is whole without it.
      shutil.rmtree(beside, ignore_errors=True)
  except BaseException:
    for folder in made:
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise


def _resolved(path) -> pathlib.Path:
  if '://' in os.fspath(path):
    raise UserError(
        f'{path} is not on disk; write to a disk, and copy it there')
  found = pathlib.Path(os.path.expanduser(path))
  with _one_line(path):
    if _is_special(found):  # Where /dev/stdout leads, a pipe has no path.
      return found
    return pathlib.Path(os.path.realpath(found))


def _is_special(found: pathlib.Path) -> bool:
  """Whether it is a pipe or a device, which is written to and stays."""
  return found.exists() and not (found.is_file() or found.is_dir())


def _check_writable(path, folder: pathlib.Path, size: int = 0) -> None:
  """Raises unless `folder`, or the nearest that exists, can be written."""
  near = next(p for p in (folder, *folder.parents) if p.exists())
  if not near.is_dir():
    raise UserError(f'{path}: {near} is not a directory; name another output')
  if not os.access(near, os.W_OK | os.X_OK):
    raise UserError(
        f'{path} cannot be written: {near} is read-only; make it writable, or'
        ' name another output')
  free = shutil.disk_usage(near).free
  if size > free:
    raise UserError(
        f'{path} takes {size / 2**30:.3g} GiB and {near} has'
        f' {free / 2**30:.3g} GiB free; make room, or name another output')


@contextlib.contextmanager
def _one_line(path, numbers: tuple[int, ...] | None = None):
  """Makes a UserError of an OSError, of these numbers or any."""
  try:
    yield
  except OSError as error:
    if numbers is None or error.errno in numbers:
      raise UserError(
          f'{path} cannot be written: {error.strerror or error}; make it'
          ' writable and roomy, or name another output') from error
    raise
