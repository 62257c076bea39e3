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

from recursive_tx import losses, train
from recursive_tx.config import ModelConfig
import recursive_tx.configs
from recursive_tx.data import DataConfig, Task
from recursive_tx.errors import UserError, one_of
from recursive_tx.store import opening
from recursive_tx.store.inherit import inherit

# The verb that calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()

_MODEL_FIELDS = {
    field.name: field for field in dataclasses.fields(ModelConfig)}
# What configs share is none.
_NO_CONFIG = ('__init__', 'common', 'published')
_SHIPPED = pathlib.Path(recursive_tx.configs.__file__).parent


def define() -> flags.FlagHolder:
  """Defines --config and, for every value in the file, --config.KEY."""
  holder = config_flags.DEFINE_config_file(
      'config', None,
      'A config that ships, by name, or the path of one, and its arguments:'
      ' gemma_2b:loops=3, or my/own.py;'
      ' any value in it can be set after it, --config.optim.lr=1e-4.',
      lock_config=True)
  flag = flags.FLAGS['config']
  flag.parse = _in_one_line(flag.parse)
  return holder


def typed(config: ConfigDict) -> train.Config:
  """The ConfigDict of a config file as the program's own types.

  Fields that `model` does not set are those of the directory `init_from`, or
  without one those of the section `published`, the model of a recipe. Where a
  teacher is wanted and not named, it is `init_from`, if that is vanilla.

  Raises:
    UserError: a key that does not exist (names the nearest), a missing or a
      bad value, or one that contradicts the directory.
  """
  values = config.to_dict()
  published = values.pop('published', {})
  source = values.get('init_from')
  model = {key: value for key, value in values['model'].items()
           if value is not None}
  if source:
    for key in model:
      one_of('config.model key', key, _MODEL_FIELDS)
    model = dataclasses.asdict(inherit(
        source, model, init=values['init'], lora=values['lora']))
  values['model'] = {**published, **model}
  missing = [key for key, field in _MODEL_FIELDS.items()
             if field.default is dataclasses.MISSING
             and key not in values['model']]
  if missing:
    raise UserError(
        f'config.model.{missing[0]} is not set; give --config.init_from=DIR'
        f' to take it from a model, or --config.model.{missing[0]}=')
  built = _build(train.Config, values, 'config')
  if losses.uses_teacher(built.losses) and source and not built.teacher:
    if opening.config(source).loops == 1:
      built = dataclasses.replace(built, teacher=source)
  return built


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
  fields = {field.name: field for field in dataclasses.fields(kind)}
  built = {}
  for key, value in values.items():
    one_of(f'{where} key', key, fields)
    if value is None:
      raise UserError(f'{where}.{key} is not set; give --{where}.{key}=')
    if kind is DataConfig and key == 'tasks':
      value = tuple(
          _build(Task, {'name': name, **task}, f'{where}.tasks.{name}')
          for name, task in value.items())
    elif dataclasses.is_dataclass(fields[key].type):
      value = _build(fields[key].type, value, f'{where}.{key}')
    built[key] = value
  return kind(**built)


def _path(name: str) -> str:
  """The file of a config: a path, or the name of one that ships.

  Raises:
    UserError: there is neither.
  """
  if pathlib.Path(name).is_file():
    return name
  shipped = {path.stem: path for path in sorted(_SHIPPED.glob('*.py'))
             if path.stem not in _NO_CONFIG}
  # `configs/NAME.py` is what a clone calls it.
  stem = name.removeprefix('configs/').removesuffix('.py')
  if stem in shipped:
    return str(shipped[stem])
  if '/' in name or name.endswith('.py'):
    raise UserError(f'--config={name}: there is no such file')
  one_of('config', name, shipped)
  raise AssertionError(name)


def _in_one_line(parse: Callable[[str], None]) -> Callable[[str], None]:
  """`config_flags` lets errors through as they come, tracebacks in them."""

  def parse_or_refuse(value: str) -> None:
    name, colon, arg = value.partition(':')
    try:
      parse(_path(name) + colon + arg)
    except UserError:
      raise
    except (AttributeError, KeyError) as error:
      # An AttributeError around a KeyError whose text names the nearest.
      cause = error.args[0]
      text = cause.args[0] if isinstance(cause, KeyError) else str(cause)
      message = ': '.join(text.splitlines()).replace('"', "'")
      raise UserError(f'unknown config key {message}') from error
    except (TypeError, ValueError, flags.Error) as error:
      # The text may be a whole traceback, of which this is the message.
      message = str(error).strip().splitlines()[-1]
      raise UserError(re.sub(r'^\w+Error: ', '', message)) from error

  return parse_or_refuse
