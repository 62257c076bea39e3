"""JSON files."""

import json
import pathlib
from typing import Any

from etils import epath

from recursive_tx.errors import UserError


def read_json(path: pathlib.Path | epath.Path) -> dict:
  """A JSON object. Raises UserError naming the file."""
  try:
    value = json.loads(path.read_text('utf-8-sig'))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(f'{path} is not JSON: {error}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} holds {type(value).__name__}, not an object')
  return value


def write_json(path: pathlib.Path, value: Any) -> None:
  """Indented JSON."""
  path.write_text(json.dumps(value, indent=2) + '\n', 'utf-8')
