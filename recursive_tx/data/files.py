"""Which files a task names, and bytes of them, on disk or in a bucket.

A name is a glob, or @FILE for a file that lists names, one a line.

TensorFlow is imported only to reach paths such as gs://.
"""

from collections.abc import Iterator
import glob
import os

from etils import epath

from recursive_tx.data.config import Task
from recursive_tx.errors import UserError


def find(task: Task, split: str) -> list[str]:
  """The split's files, sorted; held-out files are taken off train.

  Raises:
    UserError: a pattern matches nothing, or all is held out.
  """
  held = _expand(task, task.heldout)
  if split == 'heldout' and held:
    return held
  # By their real paths: ./a.txt and a link to it are a.txt.
  real = set(map(_real, held))
  paths = [
      path for path in _expand(task, task.train) if _real(path) not in real]
  if not paths:
    raise UserError(
        f'data task {task.name!r}: every file of train={task.train} is held '
        f'out by heldout={task.heldout}; hold out fewer')
  return paths


def exist(task: Task) -> bool:
  """Whether any of a task's files is there."""
  try:
    patterns = list(_listed(task, (*task.train, *task.heldout)))
  except UserError:
    return False
  return any(_glob(pattern) for pattern in patterns)


def size(path: str) -> int:
  """Bytes of a file."""
  if '://' not in path:
    return os.path.getsize(path)
  import tensorflow as tf

  return tf.io.gfile.stat(path).length


def read_bytes(path: str, start: int, size: int | None) -> bytes:
  """Part of a file, on disk or in a bucket; `size` None is to its end."""
  with epath.Path(path).open('rb') as file:
    file.seek(start)
    return file.read() if size is None else file.read(size)


def _expand(task: Task, patterns: tuple[str, ...]) -> list[str]:
  paths = set()
  for pattern in _listed(task, patterns):
    found = _glob(pattern)
    if not found:
      raise UserError(
          f'data task {task.name!r}: no file matches {pattern!r}'
          f'{_nearest(pattern)}')
    paths.update(found)
  return sorted(paths)


def _listed(task: Task, patterns: tuple[str, ...]) -> Iterator[str]:
  """The patterns, and in place of @FILE those that are its lines."""
  for pattern in patterns:
    path = epath.Path(pattern.removeprefix('@'))
    if not pattern.startswith('@') or epath.Path(pattern).exists():
      yield pattern
      continue
    if not path.is_file():
      raise UserError(
          f'data task {task.name!r}: {pattern!r} names the list {str(path)!r},'
          ' which is no file; write the paths into it, one a line')
    lines = path.read_text().splitlines()
    yield from filter(None, (line.strip() for line in lines))


def _glob(pattern: str) -> list[str]:
  """The files that a pattern matches; a path that exists is that path."""
  if '://' in pattern:
    import tensorflow as tf

    if glob.has_magic(pattern) and tf.io.gfile.exists(pattern):
      return [pattern]
    return tf.io.gfile.glob(pattern)
  # Folders too: in 'data[1]/*.txt' there may be a folder of that name.
  parts = pattern.split('/')
  count = len(parts)
  if not os.path.exists(pattern):
    while count and not os.path.isdir('/'.join(parts[:count]) or '/'):
      count -= 1
  parts[:count] = map(glob.escape, parts[:count])
  found = glob.glob('/'.join(parts), recursive=True)
  return [path for path in found if os.path.isfile(path)]


def _real(path: str) -> str:
  return path if '://' in path else os.path.realpath(path)


def _nearest(pattern: str) -> str:
  """Where on disk a pattern stops being true, for an error."""
  if '://' in pattern:
    return '; check the bucket and the pattern'
  if os.path.isdir(pattern):
    return f', a directory; write {os.path.join(pattern, "*")!r}'
  if os.path.exists(pattern):
    return ', which is no file; write what a pipe gives to a file'
  path = os.path.abspath(pattern)
  while not os.path.exists(path):
    path = os.path.dirname(path)
  return f'; {path!r} exists, nothing below it matches the rest'
