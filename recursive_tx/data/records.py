"""Documents in the bytes of one file: lines of JSON, or text with separators.

A document belongs to the block of bytes in which it starts, so that blocks cut
a file as the whole file is cut. Lines end at \\n alone: U+2028, U+0085 and the
form feed are text. A byte order mark at the start of a file is no text.

Functions take what reads the file: `Plain` here, or `compressed.Reader`.
"""

import codecs
from collections.abc import Callable, Iterator
import dataclasses
import json
import re
from typing import Any

from recursive_tx.data import compressed, files
from recursive_tx.data.compressed import Reader
from recursive_tx.errors import UserError

# Makes text of the messages of a chat; raises UserError where it cannot.
Render = Callable[[list[dict[str, Any]]], bytes]

# What can be wrong with a document. One that is longer than the context is
# cut into pieces and loses nothing; the others are left out. 'broken' is what
# a damaged file no longer gives, which counts once.
FAULTS = ('not_utf8', 'not_json', 'no_text', 'empty', 'long', 'not_chat',
          'broken')

# The number of a line is looked up this far into a file, and not further.
_COUNTED_BYTES = 1 << 26

# The first bytes of files that are often named like text.
_FORMATS = {
    b'\x1f\x8b': ('gzip', '.gz'), b'\x28\xb5\x2f\xfd': ('zstd', '.zst'),
    b'PAR1': ('Parquet', '.parquet'), b'\xfd7zXZ': ('xz', ''),
    b'BZh': ('bzip2', ''), b'PK\x03\x04': ('zip', '')}


@dataclasses.dataclass(frozen=True)
class Fault:
  """A document, or a whole file, that cannot be used.

  Attributes:
    kind: one of FAULTS.
    path: the file.
    reason: what was found, what was expected, the way out.
    offset: of a record in lines, the first byte of its line.
    record: of a record in Parquet, its number from 1.
  """

  kind: str
  path: str
  reason: str
  offset: int | None = None
  record: int | None = None

  @property
  def code(self) -> int:
    """The number of the kind, from 1."""
    return 1 + FAULTS.index(self.kind)

  def __str__(self) -> str:
    """One line. Counts lines from the file's start, so it is not for all."""
    if self.record is not None:
      return f'{self.path}, record {self.record}: {self.reason}'
    if self.offset is None:
      return f'{self.path} {self.reason}'
    if self.offset > _COUNTED_BYTES:
      return f'{self.path}, byte {self.offset}: {self.reason}'
    if compressed.is_compressed(self.path):
      read = Reader(self.path).read
    else:
      read = Plain(self.path, self.offset).read
    line = read(0, self.offset).count(b'\n') + 1
    return f'{self.path}:{line}: {self.reason}'


@dataclasses.dataclass(frozen=True)
class Plain:
  """The bytes of a file by place, with what `compressed.Reader` has too."""

  path: str
  size: int

  broken = None

  def read(self, start: int, size: int | None) -> bytes:
    """`size` bytes from `start`, fewer at the end; None is to the end."""
    return files.read_bytes(self.path, start, size)

  def holds(self, start: int) -> bool:
    """Whether there is a byte at a place."""
    return start < self.size


def whole(source: Plain | Reader, path: str) -> Iterator[bytes | Fault]:
  """The text of a file that is one document."""
  text = unmarked(source.read(0, None))
  if source.broken:
    yield _broken(source, path, 0)
  else:
    yield checked(text, path)


def records(
    source: Plain | Reader, path: str, start: int, stop: int, key: str,
    render: Render | None = None,
) -> Iterator[bytes | Fault]:
  """What the JSON lines that start in [start, stop) hold under `key`.

  Arguments as of `field`.
  """
  offset, lines = lines_of(source, start, stop)
  if source.broken:
    # The line that the end cuts short.
    lines = lines[:lines.rfind(b'\n') + 1]
  for line in lines.split(b'\n'):
    if not offset:
      line, offset = unmarked(line), len(line) - len(unmarked(line))
    if line.strip():
      found = _record(line, key, render)
      if isinstance(found, tuple):
        kind, reason = found
        found = Fault(kind, path, reason, offset)
      yield found
    offset += len(line) + 1
  yield from _broken_within(source, path, start, stop)


def separated(
    source: Plain | Reader, path: str, start: int, stop: int, line: bytes
) -> Iterator[bytes | Fault]:
  """What stands between separator lines, from those in [start, stop) on.

  The line ends next to a separator belong to it, and so does one at the end
  of the file; blank documents are left out.
  """
  for part in _separated(source, start, stop, line):
    yield checked(part, path)
  yield from _broken_within(source, path, start, stop)


def field(
    record: Any, key: str, render: Render | None = None
) -> bytes | tuple[str, str]:
  """A record's text under a key, or the kind of its fault and the reason.

  Args:
    record: as JSON has it.
    key: the field's name.
    render: of a chat: what makes text of its messages.
  """
  value = record.get(key) if isinstance(record, dict) else None
  if render and isinstance(value, list):
    return _chat(value, key, render)
  if not isinstance(value, str) or render:
    has = sorted(record) if isinstance(record, dict) else type(record).__name__
    kind, what = ('not_chat', 'messages') if render else ('no_text', 'text')
    return kind, (
        f'no {what} under key {key!r}, the record has {has}; set the key of '
        'the data task')
  if not value:
    return 'empty', f'the text under key {key!r} is empty; remove the record'
  try:
    return value.encode('utf-8')
  except UnicodeEncodeError:
    return 'not_utf8', (
        f'the text under key {key!r} has half a surrogate pair, which UTF-8 '
        'cannot hold; repair the record')


def checked(text: bytes, path: str) -> bytes | Fault:
  """A text of a file, or why it is none."""
  if not text.strip():
    return Fault('empty', path, (
        'is empty, expected UTF-8 text; remove it or leave it out of the '
        'pattern'))
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return Fault('not_utf8', path, (
        f'is not UTF-8 text ({error.reason}: byte 0x{text[error.start]:02x}); '
        f'{_conversion(text)}'))
  return text


def unmarked(text: bytes) -> bytes:
  """The start of a file without a byte order mark."""
  return text.removeprefix(codecs.BOM_UTF8)


def lines_of(
    source: Plain | Reader, start: int, stop: int
) -> tuple[int, bytes]:
  """The lines that start in [start, stop), whole, and the first's offset."""
  begin = max(start - 1, 0)
  data = source.read(begin, stop - begin)
  if start:
    # The line that holds the byte before `start` belongs to those before.
    cut = data.find(b'\n') + 1
    if not cut:
      return stop, b''
    begin, data = begin + cut, data[cut:]
  if begin == stop:
    return stop, b''
  end, step = [data], 1 << 12
  while not end[-1].endswith(b'\n'):
    more = source.read(stop, step)
    cut = more.find(b'\n') + 1
    end.append(more[:cut] if cut else more)
    if cut or len(more) < step:
      break
    stop, step = stop + step, 2 * step
  return begin, b''.join(end)


def _record(
    line: bytes, key: str, render: Render | None
) -> bytes | tuple[str, str]:
  try:
    # As floats, since Python refuses integers of more than 4300 digits.
    record = json.loads(line.decode('utf-8'), parse_int=float)
  except UnicodeDecodeError as error:
    return 'not_utf8', (
        f'not UTF-8 ({error.reason} at byte {error.start} of the line); '
        f'{_conversion(line)}')
  except (ValueError, RecursionError) as error:
    return 'not_json', (
        f'not a JSON record ({error}); expected one object a line')
  return field(record, key, render)


def _chat(
    messages: list, key: str, render: Render
) -> bytes | tuple[str, str]:
  for i, message in enumerate(messages):
    for name in ('role', 'content'):
      value = message.get(name) if isinstance(message, dict) else None
      if not isinstance(value, str):
        return 'not_chat', (
            f'message {i} under key {key!r} has the {name} {value!r}, expected'
            ' a string; repair the record')
  if not any(
      message['role'] == 'assistant' and message['content'].strip()
      for message in messages):
    roles = [message['role'] for message in messages]
    return 'not_chat', (
        f'no text of an assistant under key {key!r}, the roles are {roles};'
        ' there is nothing to learn, remove the record')
  try:
    return render(messages)
  except UserError as error:
    return 'not_chat', f'{error}; repair the record, or the template'
  except UnicodeEncodeError:
    return 'not_utf8', (
        f'the messages under key {key!r} have half a surrogate pair, which '
        'UTF-8 cannot hold; repair the record')


def _separated(
    source: Plain | Reader, start: int, stop: int, line: bytes
) -> list[bytes]:
  separator = re.compile(rb'^' + re.escape(line) + rb'\r?(?:\n|\Z)', re.M)
  text = lines_of(source, start, stop)[1]
  if not start:
    text = unmarked(text)
  else:
    # What comes before the first separator started in an earlier block.
    first = separator.search(text)
    if not first:
      return []
    text = text[first.end() :]
  tail, step, end = [], stop - start, None
  while not end and source.holds(stop):
    more = lines_of(source, stop, stop + step)[1]
    end = separator.search(more)
    tail.append(more[: end.start()] if end else more)
    stop, step = stop + step, 2 * step
  parts = separator.split(b''.join([text, *tail]))
  if source.broken and not end:
    parts.pop()  # Nobody knows where it would end.
  parts = [re.sub(rb'\r?\n\Z', b'', part) for part in parts]
  return [part for part in parts if part.strip()]


def _broken_within(
    source: Plain | Reader, path: str, start: int, stop: int
) -> Iterator[Fault]:
  """The fault that ends a file, if it is in the bytes [start, stop)."""
  if isinstance(source, Plain):
    return
  source.holds(stop)  # Finds a fault that follows at once.
  if source.broken and source.size <= stop and (
      source.size > start or not start):
    yield _broken(source, path, source.size)


def _broken(source: Plain | Reader, path: str, offset: int) -> Fault:
  return Fault('broken', path, (
      f'the file is damaged from here on ({source.broken}) and what follows is'
      ' lost; copy it again from its source'), offset)


def _conversion(text: bytes) -> str:
  """The way out for bytes that are not UTF-8."""
  for first, (name, suffix) in _FORMATS.items():
    if text.startswith(first):
      way = f'name it {suffix}' if suffix else 'unpack the file first'
      return f'it begins as {name} does; {way}'
  return 'convert the file to UTF-8'
