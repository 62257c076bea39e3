"""Records of Parquet files, row group by row group.

Only the column that is wanted is read, some records at a time.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath

from recursive_tx.data.records import Fault, Render, field
from recursive_tx.errors import optional

SUFFIX = '.parquet'

# Records of a block: what is decoded and held at once.
BLOCK = 256


class RowGroup:
  """The records of one row group, in blocks, read forwards."""

  def __init__(
      self, path: str, group: int, key: str, render: Render | None = None):
    """Nothing is read yet. `group` counts from 0; others as `field`."""
    self._path, self._group, self._key = path, group, key
    self._render = render
    self._next, self._blocks = 0, self._read()

  def block(self, number: int) -> list[bytes | Fault] | None:
    """The records of a block, None beyond the last.

    Raises:
      OSError: the file itself cannot be read.
    """
    if number < self._next:
      self.close()
      self._next, self._blocks = 0, self._read()
    found = None
    while self._next <= number:
      self._next += 1
      found = next(self._blocks, None)
    return found

  def close(self) -> None:
    """Closes the file."""
    self._blocks.close()

  def _read(self) -> Iterator[list[bytes | Fault]]:
    import pyarrow

    with epath.Path(self._path).open('rb') as raw:
      record = 1
      try:
        file = _file(raw)
        groups = file.metadata
        record += sum(groups.row_group(i).num_rows for i in range(self._group))
        rows = groups.row_group(self._group).num_rows
        if self._key not in file.schema_arrow.names:
          for start in range(0, rows, BLOCK):
            one = dict.fromkeys(file.schema_arrow.names)
            yield [self._found(one, record + i)
                   for i in range(start, min(start + BLOCK, rows))]
          return
        for batch in file.iter_batches(
            BLOCK, row_groups=[self._group], columns=[self._key]):
          values = _values(batch.column(0))
          yield [self._found({self._key: value}, record + i)
                 for i, value in enumerate(values)]
          record += len(values)
      except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
          raise
        reason = ' '.join(str(error).split())
        yield [Fault('broken', self._path, (
            f'the file is damaged here ({reason}) and what follows in its row'
            ' group is lost; copy it again from its source'), record=record)]

  def _found(self, record: dict[str, Any], number: int) -> bytes | Fault:
    value = record.get(self._key)
    if isinstance(value, bytes):
      try:
        record = {self._key: value.decode()}
      except UnicodeDecodeError as error:
        return Fault('not_utf8', self._path, (
            f'not UTF-8 ({error.reason} at byte {error.start}); convert it'
            ' to UTF-8'), record=number)
    found = field(record, self._key, self._render)
    if isinstance(found, tuple):
      return Fault(found[0], self._path, found[1], record=number)
    return found


def num_groups(path: str) -> int:
  """Row groups of a file; 1 for one that is damaged, to be counted.

  Raises:
    UserError: Parquet files cannot be read here.
    OSError: the file itself cannot be read.
  """
  optional('pyarrow.parquet', extra='data', what=path)
  import pyarrow

  with epath.Path(path).open('rb') as raw:
    try:
      return max(1, _file(raw).metadata.num_row_groups)
    except (pyarrow.ArrowException, OSError) as error:
      if isinstance(error, FileNotFoundError | PermissionError):
        raise
      return 1


def is_parquet(path: str) -> bool:
  """Whether a file's name says so."""
  return path.lower().endswith(SUFFIX)


def _file(raw: Any) -> Any:
  import pyarrow.parquet

  return pyarrow.parquet.ParquetFile(raw)


def _values(column: Any) -> list[Any]:
  """Python's values; of text the bytes, since nobody checked that it is UTF-8.
  """
  import pyarrow

  kinds = pyarrow.types
  if kinds.is_dictionary(column.type):
    column = column.dictionary_decode()
  if kinds.is_string(column.type):
    column = column.cast(pyarrow.binary())
  elif kinds.is_large_string(column.type):
    column = column.cast(pyarrow.large_binary())
  return column.to_pylist()
