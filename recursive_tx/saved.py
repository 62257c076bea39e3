"""A saved directory: weights, config.json, tokenizer, and where it came from.

  model.safetensors   leaves by path, such as 'block/layers/attn/q/kernel'
  config.json         {'format': 'recursive_tx', 'version': 1, 'model': {...}}
  source.json         the Hugging Face config as read, and its dtype
  tokenizer files, licence and card of the source, as they were
"""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import disk, hf, model, tree

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
  leaves = {k: np.asarray(v) for k, v in tree.items(variables['params'])}
  with disk.new_directory(directory, overwrite=overwrite) as new:
    shapes = {k: (v.shape, v.dtype) for k, v in leaves.items()}
    with disk.Writer(new / 'model.safetensors', shapes) as writer:
      for name, value in leaves.items():
        writer.write(name, value)
    describe(new, cfg, companions)


def describe(
    new: pathlib.Path, cfg: config_lib.ModelConfig,
    companions: str | os.PathLike | None,
) -> None:
  """Writes all but the weights of a saved directory into `new`."""
  disk.write_json(new / 'config.json', {
      'format': 'recursive_tx', 'version': VERSION,
      'model': dataclasses.asdict(cfg)})
  if companions is None:
    return
  companions = pathlib.Path(companions)
  if is_saved(companions):
    if (companions / 'source.json').exists():
      shutil.copy(companions / 'source.json', new / 'source.json')
  else:
    source = hf.Source(companions)
    disk.write_json(new / 'source.json',
                    {**source.hf, 'dtype_on_disk': str(source.dtype)})
  hf.copy_companions(companions, new)


def restore(
    directory: str | os.PathLike
) -> tuple[config_lib.ModelConfig, dict]:
  """Loads what `save` wrote.

  Raises:
    ValueError: not such a directory, a newer format, or tensors that do not
      fit its config.
  """
  directory = pathlib.Path(directory)
  cfg = read_config(directory)
  reader = disk.Reader(directory)
  shapes = model.flat_shapes(cfg)
  odd = [name for name in {*shapes, *reader.shapes}
         if shapes.get(name) != reader.shapes.get(name)]
  if odd:
    raise ValueError(
        f'{directory}: tensor {sorted(odd)[0]!r} and {len(odd) - 1} others '
        f'do not fit config.json; save the model anew')
  params = {}
  for name in shapes:
    tree.put(params, name, reader.read(name))
  return cfg, {'params': params}


def load(
    directory: str | os.PathLike
) -> tuple[config_lib.ModelConfig, dict]:
  """Loads either a saved directory or a Hugging Face directory."""
  if is_saved(pathlib.Path(directory)):
    return restore(directory)
  return hf.load_hf(directory)


def is_saved(directory: pathlib.Path) -> bool:
  """Whether a directory is of `save` (of any version)."""
  path = directory / 'config.json'
  return path.is_file() and disk.read_json(path).get(
      'format') == 'recursive_tx'


def read_source(directory: pathlib.Path) -> dict[str, Any] | None:
  """The Hugging Face config that a saved directory's model came from."""
  path = directory / 'source.json'
  return disk.read_json(path) if path.exists() else None


def read_config(directory: pathlib.Path) -> config_lib.ModelConfig:
  """ModelConfig of a saved directory."""
  if not is_saved(directory):
    raise ValueError(f'{directory} is not a saved model: its config.json does '
                     f"not say 'format': 'recursive_tx'; convert it first")
  stored = disk.read_json(directory / 'config.json')
  if not isinstance(stored.get('version'), int) or not isinstance(
      stored.get('model'), dict):
    raise ValueError(f"{directory}/config.json lacks 'version' or 'model'; "
                     f'save the model anew')
  if stored['version'] > VERSION:
    raise ValueError(
        f'{directory} has format version {stored["version"]}; this library '
        f'reads up to {VERSION}; install a newer recursive_tx')
  fields = dataclasses.fields(config_lib.ModelConfig)
  for name in stored['model']:
    config_lib.one_of(f'{directory}/config.json: field', name,
                      [field.name for field in fields])
  missing = [field.name for field in fields if field.name not in
             stored['model'] and field.default is dataclasses.MISSING]
  if missing:
    raise ValueError(f'{directory}/config.json: model lacks {missing}; save '
                     f'the model anew')
  return config_lib.ModelConfig(**stored['model'])
