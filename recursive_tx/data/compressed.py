"""What gzip and zstd files hold, read by place.

Neither format can be entered in the middle. A reader goes forwards through its
file and starts again at the front where an earlier place is asked for, so that
what it gives is a function of the file and the place alone. A saved position
is therefore only a number, and restoring it costs one decompression of what
lies before it.
"""

from collections.abc import Callable
from typing import Any
import zlib

from etils import epath

from recursive_tx.errors import optional

SUFFIXES = ('.gz', '.zst')

# Compressed bytes that are taken at once. The text that one such piece gives
# before a fault inside it is lost.
_PIECE = 1 << 16
# The largest window that zstd writes (--ultra --long=31).
_WINDOW = 1 << 31


class Reader:
  """The bytes that a compressed file holds, several members or frames too.

  Attributes:
    broken: None, or why nothing can be read beyond `size`: found when a read
      gets there.
    size: how many bytes there are, None until a read gets to their end.
  """

  def __init__(self, path: str):
    """Opens a file. Raises UserError where zstd is not installed."""
    self._path = path
    self._file: Any = None
    self._open = _opener(path)
    self.broken: str | None = None
    self.size: int | None = None
    self._rewind()

  def read(self, start: int, size: int | None) -> bytes:
    """`size` bytes from `start`, fewer at the end; None is to the end.

    Raises:
      OSError: the file itself cannot be read.
    """
    if start < self._start:
      self._rewind()
    while self.size is None and (
        size is None or self._start + len(self._held) < start + size):
      self._held += self._more()
      # What was read before the place is kept in no case.
      gone = min(start - self._start, len(self._held))
      del self._held[:gone]
      self._start += gone
    offset = start - self._start
    stop = None if size is None else offset + size
    return bytes(self._held[offset:stop])

  def holds(self, start: int) -> bool:
    """Whether there is a byte at a place."""
    return bool(self.read(start, 1))

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def __del__(self):
    # Whoever reads a stream ends somewhere within a file.
    self.close()

  def _rewind(self) -> None:
    self.close()
    self._start, self._held = 0, bytearray()
    self._decoder: Any = None
    self.broken = self.size = None

  def _more(self) -> bytes:
    """The next bytes; none at the end, and where a fault is found."""
    if self._file is None:
      self._file = epath.Path(self._path).open('rb')
    piece, found = self._file.read(_PIECE), []
    if not piece:
      self._end(
          'ends within a member' if self._decoder and not self._decoder.eof
          else None)
    try:
      while piece:
        if self._decoder is None or self._decoder.eof:
          # Some writers fill the last block of gzip files with zeros.
          piece = piece.lstrip(b'\0')
          if not piece:
            break
          self._decoder = self._open()
        found.append(self._decoder.decompress(piece))
        piece = self._decoder.unused_data if self._decoder.eof else b''
    except _errors() as error:
      self._end(' '.join(str(error).split()), b''.join(found))
    return b''.join(found)

  def _end(self, broken: str | None, found: bytes = b'') -> None:
    self.broken = broken
    self.size = self._start + len(self._held) + len(found)
    self.close()


def is_compressed(path: str) -> bool:
  """Whether a file's name says so."""
  return path.lower().endswith(SUFFIXES)


def _opener(path: str) -> Callable[[], Any]:
  """What makes a decoder of one member: `decompress`, `eof`, `unused_data`."""
  if path.lower().endswith('.gz'):
    return lambda: zlib.decompressobj(wbits=31)
  zstandard = optional('zstandard', extra='data', what=path)
  made = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
  return made.decompressobj


def _errors() -> tuple[type[Exception], ...]:
  try:
    import zstandard
  except ImportError:
    return (zlib.error,)
  return zlib.error, zstandard.ZstdError
