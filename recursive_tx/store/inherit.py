"""The model of a run, as far as its init_from directory determines it."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError
from recursive_tx.model import adapters
from recursive_tx.store import opening
from recursive_tx.tying.relax import target

# Arguments of `target`, which makes a vanilla model recursive.
_RELAXED = dict(rank='0', loop_norms=True, prelude=0, coda=0)
# What training may add to a model that is recursive already.
_ADDED = ('exit_gate', 'loop_keys')


def inherit(
    directory: str, given: Mapping[str, Any], *, init: str, lora: str
) -> ModelConfig:
  """The model of a run that starts from a directory.

  Sizes and family are the directory's. So are loops, ranks and norms where
  its model is recursive; a vanilla one is relaxed as `given` says.

  Args:
    directory: of any kind that `opening.open` opens.
    given: fields of ModelConfig that were set beside it.
    init, lora: of the run, see `relax`.

  Raises:
    UserError: a field that contradicts the directory's, or a vanilla model
      without `loops`.
  """
  origin = opening.config(directory)
  if origin.loops > 1:
    added = {name: given[name] for name in _ADDED if name in given}
    wanted = dataclasses.replace(
        origin, **added, rank=_rank(origin, given.get('rank')))
  else:
    wanted = _relaxed(origin, directory, given, init=init, lora=lora)
  odd = [
      f'config.model.{name} is {value!r}, but {directory} has '
      f'{getattr(wanted, name)!r}'
      for name, value in given.items()
      if not _same(value, getattr(wanted, name))]
  if odd:
    raise UserError(
        f'{"; ".join(odd)}. Leave it out to take what the directory has, or'
        ' name another --config.init_from=')
  return wanted


def _relaxed(origin, directory, given, *, init, lora) -> ModelConfig:
  if 'loops' not in given:
    raise UserError(
        f'{directory} holds a vanilla model of {origin.num_layers} layers; say'
        ' how often its block is to loop, --config.model.loops=2, or 1 to'
        ' train it as it is')
  how = {name: given.get(name, value) for name, value in _RELAXED.items()}
  relaxed = target(origin, loops=given['loops'], init=init, lora=lora, **how)
  added = {name: given[name] for name in _ADDED
           if name in given and relaxed.loops > 1}
  return dataclasses.replace(relaxed, **added)


def _rank(origin: ModelConfig, rank: Any) -> str:
  """The rank given where it adds one of the head, else the directory's."""
  if rank is None:
    return origin.rank
  wanted = dataclasses.replace(origin, rank=str(rank))
  same = wanted.ranks == origin.ranks
  fresh_head = adapters.head_rank(origin) in (0, adapters.head_rank(wanted))
  if not same or not fresh_head:
    return origin.rank  # Which contradicts what was given.
  return origin.rank if not adapters.head_rank(wanted) else wanted.rank


def _same(given: Any, found: Any) -> bool:
  """Whether a value given, as a config file has it, is a field's."""
  if isinstance(found, tuple):
    return tuple(given) == found
  return str(given) == found if isinstance(found, str) else given == found
