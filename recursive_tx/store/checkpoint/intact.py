"""Which checkpoints are as they were when their last byte was written.

A list of every file's size goes into a checkpoint before it gets its name. A
file that is missing or of another size shows that the directory was copied
in part, truncated by a full disk or a crash, or edited. Contents are not read.
"""

from collections.abc import Iterator, Mapping
import json

from etils import epath

_LIST = 'files/sizes.json'


def write(step: epath.Path, parts: Mapping[str, epath.Path]) -> None:
  """Writes the list of all files below a checkpoint's folders, by name."""
  sizes = {f'{name}/{path.relative_to(folder)}': path.stat().length
           for name, folder in parts.items() for path in _below(folder)}
  (step / _LIST).parent.mkdir(exist_ok=True)
  (step / _LIST).write_text(json.dumps({'sizes': sizes}, indent=1))


def fault(step: epath.Path) -> str:
  """What is wrong with a checkpoint, in a few words; '' where nothing is."""
  path = step / _LIST
  if not path.exists():
    return f'{_LIST} is missing'
  try:
    sizes = json.loads(path.read_text())['sizes']
  except (ValueError, KeyError, TypeError):
    return f'{_LIST} is truncated'
  for name, size in sizes.items():
    path = step / name
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
