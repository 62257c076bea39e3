"""Models by their names on the Hugging Face hub: 'org/name', 'org/name@v1'.

`huggingface_hub` fetches files into its cache, and serves from there what it
has where the hub is not reached. Only weights in safetensors, configs and
tokenizers are fetched, never code or pickles.
"""

import functools
import os
import pathlib
import re

from recursive_tx.errors import UserError, optional

_NAME = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(?:@([\w.][\w./-]*))?')
# Below the top only templates are wanted.
_SMALL = ('*.json', '*.jinja', '*.model', 'tokenizer*', 'vocab*', 'merges*',
          'LICEN[CS]E*', 'NOTICE*', 'README*')
_WEIGHTS = ('*.safetensors',)
_NEVER = ('*.py', '*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl', '*.h5',
          '*/*.json', '*/*.model', '*/*.safetensors')


def is_name(directory: str | os.PathLike) -> bool:
  """Whether it is no path that exists and may be a name on the hub."""
  return bool(_NAME.fullmatch(os.fspath(directory))) and not os.path.exists(
      directory)


def fetch(name: str, *, weights: bool) -> str:
  """The directory of a model's files, fetched where they are not yet here.

  Args:
    name: see `is_name`.
    weights: fetch the weights too.

  Raises:
    UserError: there is no such model, or the hub is not reached.
  """
  small = _fetch(name, None, _SMALL)
  if not weights:
    return small
  # Of the same commit, should the branch move in between.
  return _fetch(name, pathlib.Path(small).name, _WEIGHTS)


@functools.cache
def _fetch(name: str, commit: str | None, patterns: tuple[str, ...]) -> str:
  what = f'{name!r} is no directory here, and as a name on the hub it'
  hub = optional('huggingface_hub', extra='data', what=what)
  found = _NAME.fullmatch(name)
  assert found, name
  repo, revision = found.groups()
  try:
    return hub.snapshot_download(
        repo, revision=commit or revision, allow_patterns=list(patterns),
        ignore_patterns=list(_NEVER))
  except Exception as error:  # It has dozens of kinds, all worth one line.
    reason = ' '.join(str(error).split())
    raise UserError(
        f'{what} cannot be fetched ({type(error).__name__}: {reason[:200]}); '
        'correct the path or the name, or fetch it where the hub is reached '
        f'and name that directory'
    ) from None
