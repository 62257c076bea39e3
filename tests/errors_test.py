"""Every number of every section of a config has its interval, and keeps it."""

import dataclasses
import inspect
import math
from numbers import Integral, Real
import re

import numpy as np
import pytest
import tiny

from recursive_tx import data, errors
from recursive_tx.config import ModelConfig, Run
from recursive_tx.losses import LossConfig
from recursive_tx.machine.mesh import MeshConfig
from recursive_tx.store.checkpoint import CheckpointConfig
from recursive_tx.train.config import Config, EvalConfig
from recursive_tx.train.log import LogConfig
from recursive_tx.train.optim import OptimConfig

TASK = data.Task('t', 'text', 'x')
DATA = data.DataConfig((TASK,), seq_len=8, batch=8)
OPTIM = OptimConfig(steps=1, lr=0.1)
SECTIONS = [
    tiny.FAMILIES['llama'], Run(), TASK, DATA, OPTIM, LossConfig(),
    MeshConfig(), CheckpointConfig(), LogConfig(), EvalConfig(),
    Config(tiny.FAMILIES['llama'], DATA, OPTIM)]
NUMBERS = [
    (section, field) for section in SECTIONS
    for field in dataclasses.fields(section)
    if field.type in (int, float, tuple[float, ...])]
NAMES = [f'{type(x).__name__}.{field.name}' for x, field in NUMBERS]


def change(section, field, value):
  if field.type == tuple[float, ...]:
    value = (value,)
  return dataclasses.replace(section, **{field.name: value})


def ends(span):
  """(end, whether it belongs to the interval), of both, read by hand."""
  opens, low, high, closes = re.fullmatch(
      r'([\[(])(\S+), (\S+)([\])])', span).groups()
  return ((-1, float(low), opens == '['), (1, float(high), closes == ']'))


def test_the_table_has_every_section():
  assert {f.type for f in dataclasses.fields(Config)
          if dataclasses.is_dataclass(f.type)} <= {*map(type, SECTIONS)}
  assert ModelConfig in map(type, SECTIONS)


@pytest.mark.parametrize(('section', 'field'), NUMBERS, ids=NAMES)
def test_every_number_is_checked_at_the_door(section, field):
  bad = [math.nan, math.inf, -math.inf, 1e39, -1e39, True, '1', None]
  if field.type is int:
    bad += [1.0, 0.5]
  for side, end, belongs in ends(section.RANGES[field.name]):
    if math.isfinite(end):
      step = 1 if field.type is int else 1e-3 * max(1, abs(end))
      beyond = end + side * step if belongs else end
      bad.append(int(beyond) if field.type is int else beyond)
  for value in bad:
    with tiny.refused(field.name, repr(value), 'expected a'):
      change(section, field, value)


@pytest.mark.parametrize(('section', 'field'), NUMBERS, ids=NAMES)
def test_every_interval_is_in_the_docstring(section, field):
  text = inspect.getdoc(type(section)).partition('Attributes:')
  names = rf'(?ms)^ +(?:\w+, )*{field.name}(?:, \w+)*: .*?(?=^ +[\w, ]+: |\Z)'
  own = re.search(names, text[2])
  span = section.RANGES[field.name]
  assert span in ' '.join(own[0].split()) or span in ' '.join(text[0].split())


@pytest.mark.parametrize(('value', 'span', 'kind', 'inside'), [
    (0, '[0, 1)', float, True), (1, '[0, 1)', float, False),
    (0, '(0, 1]', float, False), (1.0, '(0, 1]', float, True),
    (-0.0, '[0, inf)', float, True), (3e38, '[0, inf)', float, True),
    (3.5e38, '[0, inf)', float, False), (2**31, '[1, inf)', int, True),
    (1e-46, '(0, inf)', float, True), (math.nan, '[0, inf)', float, False),
    (1.0, '[0, inf)', int, False), (False, '[0, inf)', int, False),
    # A config is written as JSON, which takes no NumPy numbers.
    (np.int64(1), '[0, inf)', int, False),
    (np.int64(1), '[0, inf)', float, False),
    (np.int64(1), '[1, inf)', Integral, True),
    (np.int64(0), '[1, inf)', Integral, False),
    (np.float32(0.5), '[0, 1]', Real, True),
    (np.float32(0.5), '[0, 1]', Integral, False),
    (np.bool_(True), '[0, 1]', Integral, False),
    (True, '[0, 1]', Real, False), (1e300, '[0, inf)', Real, True),
    (math.inf, '[0, inf)', Real, False), (math.nan, '[0, inf)', Real, False),
    (-10**400, '(-inf, inf)', Integral, True),
])
def test_an_interval_holds_what_its_brackets_say(value, span, kind, inside):
  if inside:
    errors.in_range('x', value, span, kind)
  else:
    with tiny.refused('x is ', repr(value)):
      errors.in_range('x', value, span, kind)
