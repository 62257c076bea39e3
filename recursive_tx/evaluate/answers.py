"""What a model answered, on disk, so that an interrupted evaluation continues.

A file of JSON lines holds the answers of one model, named after its content:
another model, tokenizer, dtype or length has another file. Lines are only
added; one that was cut short when the program was killed is ignored.
"""

from collections.abc import Iterable
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError
from recursive_tx.files import paths


def fingerprint(cfg: ModelConfig, variables: dict, *others: object) -> str:
  """Hexadecimal digest of a model's config and weights, and of other values.

  Args:
    cfg, variables: the model.
    others: what else its answers depend on, such as the tokenizer's digest.
  """
  digest = hashlib.blake2b(digest_size=16)
  fields = sorted(dataclasses.asdict(cfg).items())
  digest.update(repr((fields, others)).encode())
  for path, leaf in sorted(paths.items(variables['params'])):
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest.update(repr((path, array.shape, str(array.dtype))).encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def key(kind: str, *parts: Any) -> str:
  """Digest of a request: its kind and its parts, as JSON has them."""
  return hashlib.blake2b(
      json.dumps([kind, *parts]).encode(), digest_size=16).hexdigest()


class Answers:
  """Answers by key; those of a file, and what is added to it."""

  def __init__(self, path: pathlib.Path | None = None):
    """Reads them.

    Args:
      path: the file, made when there is something to write; None keeps
        answers in memory.

    Raises:
      UserError: it cannot be read.
    """
    self._path = path
    self._found: dict[str, Any] = {}
    if path is None or not path.exists():
      return
    try:
      lines = path.read_bytes().split(b'\n')
    except OSError as error:
      raise UserError(
          f'{path} cannot be read ({error.strerror}); remove it, or name'
          ' another --cache') from None
    for line in lines:
      try:
        name, value = json.loads(line)
      except ValueError:
        continue
      self._found[name] = value

  def __contains__(self, name: str) -> bool:
    return name in self._found

  def __getitem__(self, name: str) -> Any:
    return self._found[name]

  def add(self, several: Iterable[tuple[str, Any]]) -> None:
    """Adds (key, value) pairs; values are what JSON can hold.

    Raises:
      UserError: the file cannot be written.
    """
    several = list(several)
    self._found.update(several)
    if self._path is None:
      return
    # A line of its own even after one that was cut short.
    text = ''.join(f'\n{json.dumps(pair)}' for pair in several)
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with open(self._path, 'ab') as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      raise UserError(
          f'{self._path} cannot be written ({error.strerror}); make room, or'
          ' name another --cache') from None
