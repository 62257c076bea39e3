"""Topologies by name: what exists, its chips, and devices to compile for."""

import math
import re
from typing import Any

from jax.experimental import topologies

from recursive_tx.errors import UserError
from recursive_tx.machine import chips, libtpu

TOPOLOGIES = 'v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:8, a100:8'
# A whole pod, of which a slice is a part: cloud.google.com/tpu/docs/v4 and so
# on. The compiler takes others, too, and aborts on some of them later.
_PODS = {'v4': (16, 16, 16), 'v5e': (16, 16), 'v5p': (16, 20, 28),
         'v6e': (16, 16)}
_MOST_GPUS = 1 << 20  # Each has an entry in a list.


def parse(topology: str) -> tuple[chips.Chip, tuple[int, ...]]:
  """The chip and the sizes of a topology such as 'v5e:4x4' or 'h100:8'.

  Raises:
    UserError: an unknown chip, or sizes that no machine of it has.
  """
  kind, _, text = topology.partition(':')
  chip = chips.find(kind)
  if chip is None or not re.fullmatch(r'[0-9]{1,9}(x[0-9]{1,9})*', text):
    raise UserError(
        f'topology {topology!r} is not known; expected one such as'
        f' {TOPOLOGIES}')
  sizes = tuple(int(size) for size in text.split('x'))
  pod = _PODS.get(chip.name)
  if pod is None:
    if len(sizes) > 1 or not 1 <= sizes[0] <= _MOST_GPUS:
      raise UserError(
          f'topology {topology!r}: expected a number of GPUs from 1 to'
          f' {_MOST_GPUS}, such as {chip.name}:8')
  elif len(sizes) != len(pod) or min(sizes) < 1 or any(
      size > most for size, most in zip(sorted(sizes), pod, strict=True)):
    raise UserError(
        f'topology {topology!r}: a slice of {chip.name} has {len(pod)}'
        f' dimensions and fits into a pod of {"x".join(map(str, pod))};'
        f' expected one such as {TOPOLOGIES}')
  return chip, sizes


def is_tpu(topology: str) -> bool:
  """Whether devices of a topology take the TPU compiler; raises as `parse`."""
  return parse(topology)[0].name in _PODS


def devices_of(topology: str) -> tuple[list[Any], chips.Chip]:
  """The devices of a topology, and what one of them can do.

  For a TPU this process loads libtpu to compile with, and computes on the CPU
  from then on.

  Returns:
    JAX's descriptions of the devices, or None for each GPU; the chip.

  Raises:
    UserError: as `parse`, or the TPU compiler does not know the topology.
  """
  chip, sizes = parse(topology)
  if chip.name not in _PODS:
    return [None] * sizes[0], chip
  libtpu.compile_only()
  # The two cores of a v4 chip are one device to programs that train.
  options = {'chip_config_name': 'megacore'} if chip.name == 'v4' else {}
  if sizes == (1, 1):  # Otherwise a host has four chips.
    options['chips_per_host_bounds'] = (1, 1, 1)
  name = f'{chip.name}:{"x".join(map(str, sizes))}'
  try:
    description = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **options)
  except Exception as error:  # Several kinds, the text says which.
    reason = str(error).strip().splitlines()[0]
    if 'libtpu' in reason.lower():
      reason += '; install it with `pip install "jax[tpu]"`'
    raise UserError(f'topology {topology!r}: {reason}') from None
  devices = description.devices
  assert len(devices) * devices[0].num_cores == math.prod(sizes) * chip.cores
  return devices, chips.find(devices[0])
