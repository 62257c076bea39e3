"""A saved directory: weights, config.json, tokenizer, and where it came from.

  model.safetensors   leaves by path, such as 'block/layers/attn/q/kernel'
  config.json         {'format': 'recursive_tx', 'version': 1, 'model': {...}}
  source.json         the Hugging Face config as read, and its dtype
  tokenizer files, licence and card of the source, as they were
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import files, model
from recursive_tx.errors import UserError, one_of
from recursive_tx.files import paths
from recursive_tx.store import hf

VERSION = 1

def save(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig,
    variables: dict, *, companions: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
  """Saves a model, in its leaves' dtypes; appears whole or not at all.

  Args:
    directory: must not exist, or be empty, unless `overwrite`.
    cfg, variables: any model of this library.
    companions: a directory whose tokenizer, licence, card and source.json
      (or config.json, if it is a Hugging Face directory) are carried along.
    overwrite: replace what is there.
  """
  hf.check_shapes(cfg, variables)
  leaves = {k: np.asarray(v) for k, v in paths.items(variables['params'])}
  shapes = {k: (v.shape, v.dtype) for k, v in leaves.items()}
  size = sum(v.nbytes for v in leaves.values())
  with files.new_directory(
      directory, overwrite=overwrite, size=size) as new:
    with files.Writer(new / 'model.safetensors', shapes) as writer:
      for name, value in leaves.items():
        writer.write(name, value)
    describe(new, cfg, companions)


def describe(
    new: pathlib.Path, cfg: config_lib.ModelConfig,
    companions: str | os.PathLike | None,
) -> None:
  """Writes all but the weights of a saved directory into `new`."""
  files.write_json(new / 'config.json', {
      'format': 'recursive_tx', 'version': VERSION,
      'model': dataclasses.asdict(cfg)})
  if companions is None:
    return
  companions = pathlib.Path(companions)
  if not companions.is_dir():
    raise UserError(f'companions={str(companions)!r} is no directory; expected'
                    ' one with the tokenizer that goes with the model')
  source = read_source(companions)
  if source is not None:
    files.write_json(new / 'source.json', source)
  hf.copy_companions(companions, new)


def restore(
    directory: str | os.PathLike
) -> tuple[config_lib.ModelConfig, dict]:
  """Loads what `save` wrote.

  Raises:
    UserError: not such a directory, a newer format, or tensors that do not
      fit its config.
  """
  cfg, reader = opened(pathlib.Path(directory))
  params = {}
  for name in reader.shapes:
    paths.put(params, name, reader.read(name))
  return cfg, {'params': params}


def opened(
    directory: pathlib.Path
) -> tuple[config_lib.ModelConfig, files.Reader]:
  """The config of a saved directory and its leaves; raises as `restore`."""
  cfg, reader = read_config(directory), files.Reader(directory)
  shapes = model.flat_shapes(cfg)
  odd = [name for name in {*shapes, *reader.shapes}
         if shapes.get(name) != reader.shapes.get(name)]
  if odd:
    raise UserError(
        f'{directory}: tensor {sorted(odd)[0]!r} and {len(odd) - 1} others '
        f'do not fit config.json; save the model anew')
  return cfg, reader


def is_saved(directory: pathlib.Path) -> bool:
  """Whether a directory is of `save` (of any version)."""
  path = directory / 'config.json'
  return path.is_file() and files.read_json(path).get(
      'format') == 'recursive_tx'


def read_source(directory: pathlib.Path) -> dict[str, Any] | None:
  """The Hugging Face config that a directory's model came from, if any.

  Beside its fields, 'dtype_on_disk' is the dtype of its tensors, and
  'dtypes_on_disk' has those that have another, by name, if any do.
  """
  found = source_config(directory)
  if not found or (directory / 'source.json').is_file():
    return found or None
  source = hf.Source(directory)
  others = {name: str(dtype) for name, dtype in source.dtypes.items()}
  return {**source.hf, 'dtype_on_disk': str(source.dtype),
          **({'dtypes_on_disk': others} if others else {})}


def source_config(directory: pathlib.Path) -> dict[str, Any]:
  """As `read_source` without a look at the weights; {} where there is none."""
  for name in ('source.json', 'config.json'):
    if (directory / name).is_file():
      found = files.read_json(directory / name)
      return {} if found.get('format') == 'recursive_tx' else found
  return {}


def read_config(directory: pathlib.Path) -> config_lib.ModelConfig:
  """ModelConfig of a saved directory."""
  if not is_saved(directory):
    raise UserError(f'{directory} is not a saved model: its config.json does '
                     f"not say 'format': 'recursive_tx'; convert it first")
  stored = files.read_json(directory / 'config.json')
  if not isinstance(stored.get('version'), int) or not isinstance(
      stored.get('model'), dict):
    raise UserError(f"{directory}/config.json lacks 'version' or 'model'; "
                     f'save the model anew')
  if stored['version'] > VERSION:
    raise UserError(
        f'{directory} has format version {stored["version"]}; this library '
        f'reads up to {VERSION}; install a newer recursive_tx')
  fields = dataclasses.fields(config_lib.ModelConfig)
  for name in stored['model']:
    one_of(f'{directory}/config.json: field', name,
                      [field.name for field in fields])
  missing = [field.name for field in fields if field.name not in
             stored['model'] and field.default is dataclasses.MISSING]
  if missing:
    raise UserError(f'{directory}/config.json: model lacks {missing}; save '
                     f'the model anew')
  return config_lib.ModelConfig(**stored['model'])
