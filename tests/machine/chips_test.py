"""Devices are found by what JAX and people call them, and by nothing else."""

import os
import subprocess
import sys
import types

import jax
import pytest

from recursive_tx.machine import chips

GIB = 1 << 30


def test_names_and_kinds_are_the_same_chips():
  for kind, chip in chips.CHIPS.items():
    assert chips.find(kind) is chip
    assert chips.find(chip.name) is chip
  names = {chip.name for chip in chips.CHIPS.values()}
  assert len(names) == len(chips.CHIPS)
  assert {'v4', 'v5e', 'v5p', 'v6e', 'a100', 'h100', 'h200'} <= names
  assert chips.find('H100') is chips.find('h100')


@pytest.mark.parametrize('unknown', [
    'cpu', 'TPU v99', 'v5', 'NVIDIA H100 PCIe', 'NVIDIA H200 NVL', ''])
def test_what_is_not_in_the_table_is_not_guessed(unknown):
  assert chips.find(unknown) is None


def test_this_cpu_is_not_an_accelerator():
  assert chips.find(jax.devices('cpu')[0]) is None


def test_figures_are_in_base_units():
  """A slip of a prefix would be a factor of 1000."""
  for chip in chips.CHIPS.values():
    assert 1e14 < chip.flops < 1e15
    assert 16 * GIB <= chip.hbm_bytes <= 141 * GIB
    assert 8e11 < chip.hbm_bytes_per_second < 5e12
    # Chips are faster inside than between them.
    assert 1e11 < chip.link_bytes_per_second < chip.hbm_bytes_per_second


def test_half_a_chip_does_half():
  whole = chips.find('v4')
  core = chips.find(types.SimpleNamespace(device_kind='TPU v4', num_cores=1))
  for field in ('flops', 'hbm_bytes', 'hbm_bytes_per_second',
                'link_bytes_per_second', 'cores'):
    assert 2 * getattr(core, field) == getattr(whole, field)
  both = types.SimpleNamespace(device_kind='TPU v4', num_cores=2)
  assert chips.find(both) is whole


def test_compilers_devices_are_known():
  """The TPU compiler's own device kinds, of topologies that are not here."""
  pytest.importorskip('libtpu')
  code = '''
from jax.experimental import topologies
from recursive_tx.machine import chips
for name in ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
  devices = topologies.get_topology_desc(
      platform='tpu', topology_name=name).devices
  print(name, sum(chips.find(d).flops for d in devices) / 4e12)
'''
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True,
      env={**os.environ, 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  # Of a chip, in TFLOP/s, whether its cores are devices or not.
  assert done.stdout.split() == [
      'v4:2x2x1', '275.0', 'v5e:2x2', '197.0', 'v5p:2x2x1', '459.0',
      'v6e:2x2', '918.0']
