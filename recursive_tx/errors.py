"""What a person can mend: one line with the value and the way out."""

import dataclasses
import difflib
import importlib
import numbers
from typing import Any

_FLOAT32_MAX = 3.4028234663852886e38


class UserError(ValueError):
  """Input, a file or a setting is wrong, and whoever gave it can mend it.

  Its text is one line that says what was found, what was expected and the way
  out. The command line prints it without a traceback. Any other exception is
  a fault of the program and keeps its traceback.
  """


def optional(module: str, *, extra: str, what: str) -> Any:
  """Imports a module that an extra of the package installs.

  Args:
    module: its name.
    extra: the extra.
    what: for which it is needed.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError:
    raise UserError(
        f'{what} needs the package {module.split(".")[0]}, which is not'
        f" installed; pip install 'recursive_tx[{extra}]'") from None


def one_of(what: str, value: str, known) -> None:
  """Raises UserError, naming the nearest, unless `value` is in `known`."""
  if value not in known:
    raise UserError(
        f'{what} {value!r} is not known{nearest(value, known)}; '
        f'expected one of {", ".join(known)}')


def nearest(value: str, known) -> str:
  """', did you mean X?' where something in `known` resembles `value`."""
  close = difflib.get_close_matches(str(value), list(known), n=1)
  return f', did you mean {close[0]!r}?' if close else ''


def in_range(what: str, value: Any, span: str, kind: type = float) -> None:
  """Raises UserError unless a value is a number in an interval.

  NaN and infinity are in no interval. A bool is not a number.

  Args:
    what: the name of the value, such as 'optim.b1' or '--best'.
    value: of any type.
    span: the interval, such as '[0, 1)'. A square bracket includes its end, a
      round one does not; an end may be 'inf'.
    kind: int takes Python's whole numbers only and float both; neither takes
      what is infinite in float32, in which the program computes.
      numbers.Integral and numbers.Real take NumPy's numbers and any size too.
  """
  ends = span[1:-1].split(', ')
  low, high = map(float, ends)
  kinds: Any = int | float if kind is float else kind
  if isinstance(value, kinds) and not isinstance(value, bool):
    above = value > low or (span[0] == '[' and value == low)
    below = value < high or (span[-1] == ']' and value == high)
    if above and below and (
        kind not in (int, float) or abs(value) <= _FLOAT32_MAX):
      return
  number = ('a whole number' if issubclass(kind, numbers.Integral) else
            'a finite number')
  least = f' of at least {ends[0]}' if span[0] == '[' else (
      '' if ends[0] == '-inf' else f' above {ends[0]}')
  most = f' and at most {ends[1]}' if span[-1] == ']' else (
      '' if ends[1] == 'inf' else f' and below {ends[1]}')
  raise UserError(f'{what} is {value!r}, expected {number}{least}{most}')


def check_ranges(where: str, config: Any) -> None:
  """Checks every number of a section of a config.

  Args:
    where: the section's name, such as 'optim'.
    config: a dataclass. Its fields of type int, float and tuple[float, ...]
      are checked. Its class has a dictionary `RANGES`, with the interval of
      each of these fields, see `in_range`; none may be missing.

  Raises:
    UserError: a value outside its interval.
  """
  for field in dataclasses.fields(config):
    name, value = f'{where}.{field.name}', getattr(config, field.name)
    if field.type in (int, float):
      in_range(name, value, config.RANGES[field.name], field.type)
    elif field.type == tuple[float, ...]:
      if not isinstance(value, tuple):
        raise UserError(f'{name} is {value!r}, expected a tuple of numbers')
      for number in value:
        in_range(f'a number of {name}={value!r}', number,
                 config.RANGES[field.name])
