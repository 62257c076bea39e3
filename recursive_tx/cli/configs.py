"""The --config flag, and the way from a ConfigDict to the program's types.

This is the door: no ConfigDict goes further in.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from recursive_tx import config as config_lib
from recursive_tx import train
from recursive_tx.data import DataConfig, Task

# Whoever calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()


def define() -> flags.FlagHolder:
  """Defines --config and, for every value in the file, --config.KEY."""
  holder = config_flags.DEFINE_config_file(
      'config', None,
      'Config file and its arguments, such as configs/gemma_2b.py:loops=3;'
      ' any value in it can be set after it, --config.optim.lr=1e-4.',
      lock_config=True,
  )
  flag = flags.FLAGS['config']
  flag.parse = _in_one_line(flag.parse)
  return holder


def typed(config: ConfigDict) -> train.Config:
  """The ConfigDict of a config file as the program's own types.

  Raises:
    ValueError: a key that does not exist (names the nearest), a missing or a
      bad value.
  """
  return _build(train.Config, config.to_dict(), 'config')


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
  fields = {field.name: field for field in dataclasses.fields(kind)}
  built = {}
  for key, value in values.items():
    config_lib.one_of(f'{where} key', key, fields)
    if value is None:
      raise ValueError(f'{where}.{key} is not set; give --{where}.{key}=')
    if kind is DataConfig and key == 'tasks':
      value = tuple(
          _build(Task, {'name': name, **task}, f'{where}.tasks.{name}')
          for name, task in value.items()
      )
    elif dataclasses.is_dataclass(fields[key].type):
      value = _build(fields[key].type, value, f'{where}.{key}')
    built[key] = value
  return kind(**built)


def _in_one_line(parse: Callable[[str], None]) -> Callable[[str], None]:
  """`config_flags` lets errors through as they come, tracebacks in them."""

  def parse_or_refuse(value: str) -> None:
    path = value.partition(':')[0]
    if not pathlib.Path(path).is_file():
      raise ValueError(f'--config={path}: there is no such file')
    try:
      parse(value)
    except (AttributeError, KeyError) as error:
      # An AttributeError around a KeyError whose text names the nearest.
      cause = error.args[0]
      text = cause.args[0] if isinstance(cause, KeyError) else str(cause)
      said = ': '.join(text.splitlines()).replace('"', "'")
      raise ValueError(f'unknown config key {said}') from error
    except (TypeError, ValueError, flags.Error) as error:
      # The text may be a whole traceback, of which this is the message.
      said = str(error).strip().splitlines()[-1]
      raise ValueError(re.sub(r'^\w+Error: ', '', said)) from error

  return parse_or_refuse
