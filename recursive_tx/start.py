"""Where a run's weights come from: a directory of any kind, as one model.

Knows directories and configs. Does not know meshes, data or steps.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from recursive_tx import adapters, checkpoint, disk, hf, model, saved
from recursive_tx.config import ModelConfig
from recursive_tx.relax import parts as relaxed_parts
from recursive_tx.relax import target

# Path of a leaf, leading indices, and what is there.
Part = tuple[str, tuple[int, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """A model in a directory, read leaf by leaf when asked.

  Attributes:
    directory: where.
    cfg: the model.
    read: (path, layer or None) -> the leaf or one layer of it, as stored.
  """

  directory: str
  cfg: ModelConfig
  read: Callable[[str, int | None], np.ndarray]


def source(directory: str) -> Source:
  """The model of a workdir, a saved directory or one of Hugging Face.

  Raises:
    ValueError: none of them, or one with a fault.
  """
  if checkpoint.is_workdir(directory):
    params = checkpoint.Params(directory)
    cfg = ModelConfig(**params.settings['model'])
    return Source(directory, cfg, _by_layer(params.read))
  if saved.is_saved(pathlib.Path(directory)):
    cfg = saved.read_config(pathlib.Path(directory))
    reader = disk.Reader(directory)
    if reader.shapes != model.flat_shapes(cfg):
      raise ValueError(
          f'the tensors in {directory} do not fit its config.json; save the'
          ' model anew'
      )
    return Source(directory, cfg, _by_layer(reader.read))
  origin = hf.Source(directory)
  return Source(directory, origin.cfg, origin.read)


def load(directory: str) -> tuple[ModelConfig, Any]:
  """(cfg, variables), numpy, of a workdir, a saved directory or one of HF.

  Raises:
    ValueError: none of them, or one with a fault.
  """
  if not checkpoint.is_workdir(directory):
    return saved.load(directory)
  settings, params = checkpoint.load_params(directory)
  return ModelConfig(**settings['model']), {'params': params}


def parts(origin: Source) -> Iterator[Part]:
  """All of a model's parameters, in the dtype on disk, some at a time."""
  for path in model.flat_shapes(origin.cfg):
    if path.startswith('block/'):
      for layer in range(origin.cfg.layers_per_loop):
        yield path, (layer,), origin.read(path, layer)
    else:
      yield path, (), origin.read(path, None)


def parts_as(
    origin: Source, wanted: ModelConfig, *, init: str, lora: str, seed: int
) -> Iterator[Part]:
  """The parameters of a directory's model, made recursive if need be.

  Args:
    origin: of `source`.
    wanted: the model they are for. Where it is not the directory's, that is
      given a fresh adapter of the head or exit gate, if this is all it lacks;
      else it must be vanilla, and is relaxed. Either way its loops may share
      keys that they did not, or stop to.
    init: how `relax` makes the shared layers.
    lora: how `relax` makes the adapters.
    seed: of what `relax` draws.

  Raises:
    ValueError: relaxing does not lead to the model wanted.
  """
  if origin.cfg.loops > 1:  # No parameter tells who reads which keys.
    origin = dataclasses.replace(origin, cfg=dataclasses.replace(
        origin.cfg, loop_keys=wanted.loop_keys))
  if origin.cfg == wanted:
    return parts(origin)
  if _lacks_exits(origin.cfg, wanted):
    there = adapters.exit_tables(origin.cfg)
    fresh = adapters.fresh_exits(wanted, seed)
    return itertools.chain(parts(origin), (
        (f'adapters/{path}', (), value) for path, value in fresh.items()
        if path.split('/')[0] not in there))
  relaxed = dataclasses.replace(target(
      origin.cfg, init=init, lora=lora, loops=wanted.loops, rank=wanted.rank,
      prelude=wanted.prelude, coda=wanted.coda, loop_norms=wanted.loop_norms,
  ), exit_gate=wanted.exit_gate if wanted.loops > 1 else 0,
      loop_keys=wanted.loop_keys)
  differences = [
      f'{field.name} {getattr(relaxed, field.name)!r} but config.model has'
      f' {getattr(wanted, field.name)!r}'
      for field in dataclasses.fields(ModelConfig)
      if getattr(relaxed, field.name) != getattr(wanted, field.name)
  ]
  if differences:
    raise ValueError(
        f'init_from {origin.directory} holds another model:'
        f' {"; ".join(differences)}.'
    )
  return relaxed_parts(
      origin.cfg, relaxed, origin.read, init=init, lora=lora, seed=seed
  )


def companions(directory: str) -> str:
  """Where the tokenizer and the other files that go with the weights lie."""
  if directory and checkpoint.is_workdir(directory):
    return os.path.join(directory, 'model')
  return directory


def _lacks_exits(cfg: ModelConfig, wanted: ModelConfig) -> bool:
  """Whether what exits have of their own is all that sets the two apart."""
  old, new = ((adapters.head_rank(x), x.exit_gate) for x in (cfg, wanted))
  return (
      old != new
      and all(x in (0, y) for x, y in zip(old, new, strict=True))
      and (cfg.loops, cfg.ranks) == (wanted.loops, wanted.ranks)
      and dataclasses.replace(
          cfg, rank=wanted.rank, exit_gate=wanted.exit_gate) == wanted
  )


def _by_layer(
    read: Callable[[str], np.ndarray]
) -> Callable[[str, int | None], np.ndarray]:
  """A reader of layers from one of whole leaves; it keeps the last leaf."""
  read = functools.lru_cache(maxsize=1)(read)
  return lambda path, layer: read(path)[() if layer is None else layer]
