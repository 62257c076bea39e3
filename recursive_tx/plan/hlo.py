"""What a compiled program does: counted over its optimised HLO.

XLA's own cost analysis counts a loop's body once; here every computation
counts as often as it runs. Knows XLA's text format; nothing of models.
"""

from collections import defaultdict
from collections.abc import Iterator
import dataclasses
import math
import re

from recursive_tx.errors import UserError

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all',
               'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2,
          'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
# Matrix products that a kernel's pass makes of the scores' size.
_KERNELS = {'fwd': 2, 'dq': 3, 'dkv': 4}


@dataclasses.dataclass(frozen=True)
class Account:
  """Per device and run of the program.

  Attributes:
    flops: of matrix products, 2 a multiply-add.
    kernel_flops: of attention kernels, by their shapes as if every score below
      the diagonal were computed; not in `flops`.
    bytes: sent to other devices, by kind of collective.
    largest: the largest arrays, (bytes, 'f32[8,512]'), first the largest.
  """

  flops: float
  kernel_flops: float
  bytes: dict[str, float]
  largest: list[tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # One, or a tuple's.
  opcode: str
  operands: tuple[str, ...]
  rest: str  # Everything after the operands.

  def attribute(self, name: str) -> str | None:
    match = re.search(rf'\b{name}=(%?[\w.\-]+|\{{[^}}]*\}})', self.rest)
    return match and match[1].lstrip('%')

  @property
  def size(self) -> int:
    """Bytes of the result, of all parts of a tuple."""
    return sum(_bytes(*shape) for shape in self.shapes)


def account(text: str) -> Account:
  """Counts a program.

  Args:
    text: `compiled.as_text()`.

  Raises:
    UserError: a loop of which the text does not say how often it runs.
  """
  computations, entry = _parse(text)
  times = defaultdict(float)
  for name, count in _calls(computations, entry, 1.0):
    times[name] += count
  flops = kernel_flops = 0.0
  sent, seen = defaultdict(float), set()
  largest = {}
  for name, count in times.items():
    values = computations[name]
    for each in values.values():
      if each.opcode in ('convolution', 'dot'):
        flops += count * _flops(each, values)
      elif each.opcode == 'custom-call':
        kernel_flops += count * _kernel_flops(each, values)
      kind = each.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        # A collective that is overlapped is written once for every step of
        # it, under one channel.
        channel = each.attribute('channel_id')
        if channel is None or (channel, count) not in seen:
          seen.add((channel, count))
          sent[kind] += count * _sent(kind, each, values)
      for shape in each.shapes:
        largest[f'{shape[0]}[{",".join(map(str, shape[1]))}]'] = _bytes(*shape)
  order = sorted(((size, name) for name, size in largest.items()), reverse=True)
  return Account(flops, kernel_flops, dict(sent), order[:20])


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  computations, entry, values = {}, '', {}
  for line in text.splitlines():
    if head := _HEAD.match(line):
      values = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif match := _LINE.match(line):
      values[match[2]] = _instruction(match[2], match[3])
  return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
  # The type: an array, or a tuple in brackets, with layouts in braces.
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shapes = tuple((kind, tuple(int(n) for n in sizes.split(',') if n))
                 for kind, sizes in _ARRAY.findall(text[:end]))
  opcode, _, _ = text[end:].strip().partition('(')
  start = text.index('(', end)
  stop = _closing(text, start)
  operands = re.findall(r'%?([\w.\-]+)(?=[,)]|$)', text[start + 1:stop])
  return _Instruction(name, shapes, opcode, tuple(operands), text[stop + 1:])


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  return len(text)


def _calls(computations, name, count) -> Iterator[tuple[str, float]]:
  """Each computation that runs, and how often, once for each caller."""
  yield name, count
  for each in computations[name].values():
    if each.opcode == 'while':
      trips = count * _trips(each, computations, name)
      yield from _calls(computations, each.attribute('body'), trips)
    else:
      called = each.attribute('calls') or (
          each.attribute('to_apply') if each.opcode == 'call' else None)
      branches = re.findall(
          r'%([\w.\-]+)', each.attribute('branch_computations') or '')
      for target in ([called] if called else []) + branches:
        yield from _calls(computations, target, count)


def _trips(loop: _Instruction, computations, where: str) -> int:
  """How often a loop runs: from a constant, by a constant, below another."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = computations[loop.attribute('condition')]
  body = computations[loop.attribute('body')]
  compare = _last(condition)
  counter, limit = (condition.get(name) for name in compare.operands)
  index = int(counter.attribute('index'))
  step = body[_last(body).operands[index]]
  start = computations[where][loop.operands[0]].operands[index]
  numbers = (
      _constant(computations[where], start), _constant(condition, limit.name),
      _constant(body, step.operands[1]) if step.opcode == 'add' else None)
  if None in numbers or compare.attribute('direction') != 'LT':
    raise UserError(
        f'the compiled loop {loop.name} does not say how often it runs')
  start, limit, step = numbers
  return max(0, -(-(limit - start) // step))


def _last(computation: dict[str, _Instruction]) -> _Instruction:
  """Its result."""
  return list(computation.values())[-1]


def _constant(computation, name: str) -> int | None:
  """The number that a name stands for, through copies."""
  each = computation.get(name)
  while each is not None and each.opcode in ('copy', 'bitcast'):
    each = computation.get(each.operands[0])
  if each is None or each.opcode != 'constant':
    return None
  return int(each.operands[0])


def _flops(each: _Instruction, values: dict[str, _Instruction]) -> float:
  """Of a matrix product; TPUs write it as a convolution."""
  left, right = (values[name].shapes[0][1] for name in each.operands[:2])
  out = each.shapes[0][1]
  if each.opcode == 'dot':
    summed = re.findall(r'\d+', each.attribute('lhs_contracting_dims'))
    return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in summed)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', each.rest)
  lhs, rhs, result = labels.groups()
  flops = 2.0 * out[result.index('b')] * out[result.index('f')]
  flops *= right[rhs.index('i')]
  window = _window(each.attribute('window') or '', len(out) - 2)
  for i in range(len(out) - 2):
    dim = str(i)
    flops *= _pairs(left[lhs.index(dim)], right[rhs.index(dim)],
                    out[result.index(dim)], window[i])
  groups = int(each.attribute('batch_group_count') or 1)
  return flops / groups


def _window(text: str, dims: int) -> list[dict[str, int]]:
  """{size=1x8 pad=0_0x7_7 ...} as a dictionary for each spatial dimension."""
  fields = dict(part.split('=') for part in text.strip('{}').split())

  def numbers(name, default):
    return [int(x) for x in fields[name].split('x')] if name in fields else [
        default] * dims

  pads = fields['pad'].split('x') if 'pad' in fields else ['0_0'] * dims
  return [
      {'stride': stride, 'low': int(pad.split('_')[0]), 'lhs': lhs, 'rhs': rhs}
      for stride, pad, lhs, rhs in zip(
          numbers('stride', 1), pads, numbers('lhs_dilate', 1),
          numbers('rhs_dilate', 1), strict=True)]


def _pairs(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
  """Pairs of a result and a kernel place that meet an input, not padding."""
  pairs = 0
  for k in range(kernel):
    for o in range(out):
      place = o * window['stride'] + k * window['rhs'] - window['low']
      inside = 0 <= place < (size - 1) * window['lhs'] + 1
      pairs += inside and place % window['lhs'] == 0
  return pairs


def _kernel_flops(each: _Instruction, values) -> float:
  """Of a splash attention kernel, named by its pass; of others 0."""
  found = re.match(r'splash_\w*?_(fwd|dq|dkv)_', each.name)
  if not found:
    return 0.0
  # The first operand of floats is the queries [..., N, T, H].
  *rows, T, H = next(
      sizes for kind, sizes in (
          values[name].shapes[0] for name in each.operands)
      if kind in ('bf16', 'f32'))
  return _KERNELS[found[1]] * math.prod(rows) * T * (T + 1) * H


def _sent(kind: str, each: _Instruction, values) -> float:
  """Bytes that one device sends, by a ring; n devices take part."""
  n = _group(each)
  size = sum(values[name].size for name in each.operands if name in values)
  if kind == 'all-gather':
    return size * (n - 1)
  if kind == 'all-reduce':
    return 2 * size * (n - 1) / n
  if kind == 'collective-permute':
    return size
  return size * (n - 1) / n


def _group(each: _Instruction) -> int:
  """Devices that exchange with each other."""
  text = each.rest
  if named := re.search(r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}', text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis])
                     for axis in re.findall(r"'(\w+)'", named[2]))
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=', text):
    return int(iota[2])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return len(listed[1].split(','))
  return 1


def _bytes(kind: str, sizes: tuple[int, ...]) -> int:
  return _BYTES.get(kind, 4) * math.prod(sizes)
