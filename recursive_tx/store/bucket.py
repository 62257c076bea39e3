"""A Hugging Face directory in a bucket, gs://bucket/model.

Its small files are copied to this machine for as long as the process lives.
Weights stay where they are; `files.Reader` reads them tensor by tensor.
"""

import atexit
import functools
import pathlib
import shutil
import tempfile

from etils import epath

from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint

# Larger ones are weights, of whatever format.
_SMALL_BYTES = 1 << 27
_NEVER = ('.safetensors', '.bin', '.pt', '.pth', '.py', '.h5', '.msgpack')

_origins: dict[str, str] = {}


def is_bucket(directory: str) -> bool:
  """Whether it is a URL, and not of a run, which Orbax reads."""
  return '://' in directory and not checkpoint.is_workdir(directory)


def fetch(directory: str) -> str:
  """A directory here with all files but the weights.

  Raises:
    UserError: there is no such directory, or it cannot be read.
  """
  local = _fetch(directory)
  _origins[local] = directory
  return local


def origin(local: str) -> str:
  """Where the weights of a directory are: in a bucket, or in itself."""
  return _origins.get(local, local)


@functools.cache
def _fetch(directory: str) -> str:
  local = tempfile.mkdtemp(prefix='recursive_tx-')
  atexit.register(shutil.rmtree, local, ignore_errors=True)
  try:
    there = epath.Path(directory)
    paths = [path for path in there.iterdir() if not path.is_dir()]
    for path in paths:
      if path.suffix in _NEVER or path.stat().length > _SMALL_BYTES:
        continue
      pathlib.Path(local, path.name).write_bytes(path.read_bytes())
  except Exception as error:  # Of whatever library reaches the bucket.
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
        f'{directory} cannot be read ({type(error).__name__}: {reason}); check'
        ' the path and the right to read it, or copy it to a disk') from None
  return local
