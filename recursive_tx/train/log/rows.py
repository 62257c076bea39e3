"""Files of JSON objects, one a line, that a crash leaves readable."""

from collections.abc import Iterable, Mapping
import json
from typing import Any

from etils import epath

from recursive_tx.errors import UserError


class Rows:
  """A file of rows, kept up to date on disk."""

  def __init__(self, path: epath.Path, kept: Iterable[Mapping[str, Any]]):
    """Makes the file hold `kept`, at once, and opens it for more."""
    new = path.parent / f'{path.name}.new'
    new.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    new.replace(path)
    self._file = path.open('a')

  def write(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def read(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a file, in order; none where there is no file.

  A last line that was cut off while it was written is left out.

  Raises:
    UserError: another line is not JSON.
  """
  if not path.exists():
    return []
  *lines, rest = path.read_text().split('\n')
  del rest  # '', or what a crash left of a line.
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise UserError(
        f'{path} is damaged ({error}); repair or remove it.'
    ) from None


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """The rows of a run's metrics.jsonl, in order; none where it has none."""
  return read(epath.Path(workdir) / 'metrics.jsonl')
