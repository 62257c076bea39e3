"""A model's directory, of any kind, opened.

Three kinds: a Hugging Face directory; a saved one (`native`); and a run's
workdir, which stands for its `model/`, or while the run has not ended for its
latest checkpoint. `recursive_tx/demo` is the model that ships, wherever the
program runs; another name that is no path is one on the Hugging Face hub, and
`gs://...` is a directory in a bucket.

Knows directories and configs. Does not know meshes, data or steps.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import NamedTuple

import numpy as np

from recursive_tx import demo, exits, model
from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError
from recursive_tx.model import adapters
from recursive_tx.store import bucket, checkpoint, hf, hub, native
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.tokenizer import Tokenizer
from recursive_tx.tying.relax import parts as relaxed_parts
from recursive_tx.tying.relax import target

# Path of a leaf, leading indices, and what is there.
Part = tuple[str, tuple[int, ...], np.ndarray]


class Opened(NamedTuple):
  """A model with all that goes with it.

  Attributes:
    config: what the model computes.
    variables: {'params': ...}, numpy, in the dtypes on disk.
    tokenizer: the directory's, or None where it has none.
    companions: the directory whose tokenizer, chat template, licence and card
      go with the weights: where they lie themselves, but for a run that has
      not ended, which has those of its tokenizer or `init_from`.
    exit: the thresholds that `calibrate` wrote beside these weights, or None.
  """

  config: ModelConfig
  variables: dict
  tokenizer: Tokenizer | None
  companions: pathlib.Path
  exit: exits.Exit | None


@dataclasses.dataclass(frozen=True)
class Source:
  """A model in a directory, read leaf by leaf on demand.

  Attributes:
    directory: where.
    cfg: the model.
    read: (path, layer or None) -> the leaf or one layer of it, as stored.
    companions: as `Opened` has it.
  """

  directory: str
  cfg: ModelConfig
  read: Callable[[str, int | None], np.ndarray]
  companions: pathlib.Path


def open(directory: str | os.PathLike) -> Opened:
  """Opens a model's directory, of any kind, whole.

  Args:
    directory: of Hugging Face, of `rtx.save` or `convert`, or the workdir of a
      run; or the name of a model on the hub, 'org/name' or
      'org/name@revision'.

  Raises:
    UserError: none of them, or one with a fault, by name.
  """
  where, run = _found(directory)
  cfg, variables = _loaded(where, run)
  beside = _companions(where, run)
  tokenizer = None
  if tokenizer_lib.has_tokenizer(beside):
    tokenizer = tokenizer_lib.load(beside)
    tokenizer_lib.check_vocab(tokenizer, cfg.V)
  # The exit of a run's source is not that of what became of it.
  exit = exits.load(where) if str(beside) == where else None
  return Opened(cfg, variables, tokenizer, beside, exit)


def load(directory: str | os.PathLike) -> tuple[ModelConfig, dict]:
  """The config and the variables that `open` gives, and nothing else."""
  return _loaded(*_found(directory))


def source(directory: str | os.PathLike) -> Source:
  """As `open`, but leaves are read on demand. Raises as `open`."""
  where, run = _found(directory)
  beside = _companions(where, run)
  if run:
    cfg = ModelConfig(**run.settings['model'])
    return Source(where, cfg, _by_layer(run.read), beside)
  if native.is_saved(pathlib.Path(where)):
    cfg, reader = native.opened(pathlib.Path(where))
    return Source(where, cfg, reader.read, beside)
  origin = hf.Source(where, weights=bucket.origin(where))
  return Source(where, origin.cfg, origin.read, beside)


def config(directory: str | os.PathLike) -> ModelConfig:
  """What the model of a directory computes; its weights need not be there.

  Raises:
    UserError: the directory is of no kind that `open` opens, or a config that
      is not implemented.
  """
  where = _here(directory, whole=False)
  if checkpoint.is_workdir(where):
    return ModelConfig(**checkpoint.Latest(where).settings['model'])
  if native.is_saved(pathlib.Path(where)):
    return native.read_config(pathlib.Path(where))
  return hf.read_config(where)[1]


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a directory that `open` opens.

  Raises:
    UserError: it has none, or files that cannot be read.
  """
  return tokenizer_lib.load(companions(directory))


def companions(directory: str | os.PathLike) -> pathlib.Path:
  """Where the tokenizer and the other files that go with the weights lie."""
  where = _here(directory, whole=False)
  return _companions(where, _run(where))


def _found(
    directory: str | os.PathLike
) -> tuple[str, checkpoint.Latest | None]:
  """Where the weights lie, and the run that has not ended there, if any."""
  where = weights(directory)
  return where, _run(where)


def _run(where: str) -> checkpoint.Latest | None:
  return checkpoint.Latest(where) if checkpoint.is_workdir(where) else None


def _loaded(
    where: str, run: checkpoint.Latest | None
) -> tuple[ModelConfig, dict]:
  if run:
    return ModelConfig(**run.settings['model']), {'params': run.params()}
  if native.is_saved(pathlib.Path(where)):
    return native.restore(where)
  return hf.load_hf(where, weights=bucket.origin(where))


def _companions(where: str, run: checkpoint.Latest | None) -> pathlib.Path:
  near = run and (run.settings['tokenizer'] or run.settings['init_from'])
  if near and os.path.abspath(near) != os.path.abspath(where):
    return companions(near)
  return pathlib.Path(where)


def weights(directory: str | os.PathLike) -> str:
  """Where a model's weights lie: a workdir's `model/` once there is one."""
  return _here(directory, whole=True)


def _here(directory: str | os.PathLike, *, whole: bool) -> str:
  """As `weights`; unless `whole`, weights on the hub are not fetched."""
  directory = os.path.expanduser(directory)
  if os.path.normpath(directory) == demo.NAME and not os.path.exists(
      directory):
    return str(demo.DIRECTORY)
  if hub.is_name(directory):
    return hub.fetch(directory, weights=whole)
  if bucket.is_bucket(directory):
    return bucket.fetch(directory)
  if checkpoint.is_workdir(directory):
    ended = os.path.join(directory, 'model')
    if native.is_saved(pathlib.Path(ended)):
      return ended
  return directory


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
    UserError: relaxing does not lead to the model wanted.
  """
  if origin.cfg.loops > 1:  # Parameters do not show who reads which keys.
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
      if getattr(relaxed, field.name) != getattr(wanted, field.name)]
  if differences:
    raise UserError(
        f'init_from {origin.directory} holds another model:'
        f' {"; ".join(differences)}.')
  return relaxed_parts(
      origin.cfg, relaxed, origin.read, init=init, lora=lora, seed=seed)


def _lacks_exits(cfg: ModelConfig, wanted: ModelConfig) -> bool:
  """Whether what exits have of their own is all that sets the two apart."""
  old, new = ((adapters.head_rank(x), x.exit_gate) for x in (cfg, wanted))
  return (
      old != new
      and all(x in (0, y) for x, y in zip(old, new, strict=True))
      and (cfg.loops, cfg.ranks) == (wanted.loops, wanted.ranks)
      and dataclasses.replace(
          cfg, rank=wanted.rank, exit_gate=wanted.exit_gate) == wanted)


def _by_layer(
    read: Callable[[str], np.ndarray]
) -> Callable[[str, int | None], np.ndarray]:
  """A reader of layers from one of whole leaves; it keeps the last leaf."""
  read = functools.lru_cache(maxsize=1)(read)
  return lambda path, layer: read(path)[() if layer is None else layer]
