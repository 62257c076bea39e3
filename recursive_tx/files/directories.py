"""Directories that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from recursive_tx.errors import UserError


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, *, overwrite: bool = False):
  """A directory that appears at `path` whole, or not at all.

  Yields a directory beside it, which takes its place on success.

  Raises:
    UserError: `path` exists and is not empty, without `overwrite`.
  """
  path = pathlib.Path(path)
  if path.exists() and not overwrite and (
      not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} exists; remove it, or name another output')
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = pathlib.Path(tempfile.mkdtemp(
      prefix=f'.{path.name}.', dir=path.parent))
  try:
    new = beside / 'new'
    new.mkdir()
    yield new
    if path.exists():
      path.rename(beside / 'old')
    new.rename(path)
  finally:
    shutil.rmtree(beside)
