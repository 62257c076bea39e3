"""Where a run's weights come from: a directory of any kind, as one model.

Knows directories and configs. Does not know meshes, data or steps.
"""

import dataclasses
import os
from typing import Any

from recursive_tx import checkpoint, saved
from recursive_tx.config import ModelConfig
from recursive_tx.relax import relax


def load(directory: str) -> tuple[ModelConfig, Any]:
  """(cfg, variables), numpy, of a workdir, a saved directory or one of HF.

  Raises:
    ValueError: none of them, or one with a fault.
  """
  if not checkpoint.is_workdir(directory):
    return saved.load(directory)
  settings, params = checkpoint.load_params(directory)
  return ModelConfig(**settings['model']), {'params': params}


def load_as(
    directory: str, wanted: ModelConfig, *, init: str, lora: str, seed: int
) -> Any:
  """The variables of a directory's model, made recursive if need be.

  Args:
    directory: see `load`.
    wanted: the model they are for. Where it is not the directory's, which
      must then be vanilla, that is relaxed.
    init: how `relax` makes the shared layers.
    lora: how `relax` makes the adapters.
    seed: of what `relax` draws.

  Raises:
    ValueError: relaxing does not lead to the model wanted.
  """
  cfg, variables = load(directory)
  if cfg == wanted:
    return variables
  way = dict(loops=wanted.loops, rank=wanted.rank, prelude=wanted.prelude,
             coda=wanted.coda, loop_norms=wanted.loop_norms)
  relaxed, variables = relax(
      cfg, variables, init=init, lora=lora, seed=seed, **way
  )
  differences = [
      f'{field.name} {getattr(relaxed, field.name)!r} but config.model has'
      f' {getattr(wanted, field.name)!r}'
      for field in dataclasses.fields(ModelConfig)
      if getattr(relaxed, field.name) != getattr(wanted, field.name)
  ]
  if differences:
    raise ValueError(
        f'init_from {directory} holds another model: {"; ".join(differences)}.'
    )
  return variables


def companions(directory: str) -> str:
  """Where the tokenizer and the other files that go with the weights lie."""
  if directory and checkpoint.is_workdir(directory):
    return os.path.join(directory, 'model')
  return directory
