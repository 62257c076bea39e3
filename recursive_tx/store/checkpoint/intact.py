"""Which directories are as they were when their last byte was written.

A list of every file's size goes into a directory before it gets its name. A
file that is missing or of another size shows that the directory was copied
in part, truncated by a full disk or a crash, or edited. Contents are not read.
"""

from collections.abc import Iterator
import json

from etils import epath

_LIST = 'sizes.json'


def record(directory: epath.Path, parts: tuple[str, ...]) -> str:
  """The list for `directory`, of all files below its `parts`, as JSON."""
  sizes = {}
  for part in parts:
    for path in _below(directory / part):
      sizes[str(path.relative_to(directory))] = path.stat().length
  return json.dumps({'sizes': sizes}, indent=1)


def write(directory: epath.Path, text: str) -> None:
  """Writes what `record` made into one of the directory's own folders."""
  (directory / _LIST).write_text(text)


def fault(directory: epath.Path, folder: str) -> str:
  """What is wrong with a directory, in a few words; '' where nothing is.

  Args:
    directory: the directory.
    folder: in which of its own folders the list lies.
  """
  path = directory / folder / _LIST
  if not path.exists():
    return f'{folder}/{_LIST} is missing'
  try:
    sizes = json.loads(path.read_text())['sizes']
  except (ValueError, KeyError, TypeError):
    return f'{folder}/{_LIST} is truncated'
  for name, size in sizes.items():
    path = directory / name
    if not path.exists():
      return f'{name} is missing'
    found = path.stat().length
    if found != size:
      return f'{name} has {found} bytes of {size}'
  return ''


def _below(folder: epath.Path) -> Iterator[epath.Path]:
  """All files of a folder and of those in it."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _below(path)
    else:
      yield path
