"""When JAX loads libtpu, in fresh processes."""

import os
import subprocess
import sys

import pytest
import tiny


def _fresh(*words, **environment):
  """A process that knows nothing of the tests' JAX_PLATFORMS."""
  env = {name: value for name, value in os.environ.items()
         if name not in ('JAX_PLATFORMS', 'TPU_LIBRARY_PATH')}
  return subprocess.run(
      [sys.executable, *words], cwd=tiny.ROOT, env={**env, **environment},
      capture_output=True, text=True)


def test_a_verb_on_a_host_without_a_tpu_prints_its_own_lines_only():
  pytest.importorskip('libtpu')
  done = _fresh(
      '-m', 'recursive_tx', 'generate', '--checkpoint=recursive_tx/demo',
      '--prompt=Once upon a time', '--max_new_tokens=4')
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()
  assert 'TPU' not in done.stderr and 'libtpu' not in done.stderr


# Device files are those of the host, so that a process is given some.
_DEVICES = '''
import glob, os, sys
glob.glob = lambda pattern: [path for path in {files!r} if __import__(
    'fnmatch').fnmatch(path, pattern)]
import jax
from recursive_tx.machine import libtpu
libtpu.leave_out()
print(os.environ.get('TPU_LIBRARY_PATH') == libtpu.__file__)
'''


@pytest.mark.parametrize('files, environment, left_out', [
    ([], {}, True),
    (['/dev/nvidia0', '/dev/nvidiactl', '/dev/vfio/vfio'], {}, True),
    (['/dev/accel/accel0'], {}, True),  # Not a TPU: an Intel NPU.
    (['/dev/accel0'], {}, False),  # v2 to v5e.
    (['/dev/vfio/0'], {}, False),  # v5p and later.
    ([], {'JAX_PLATFORMS': 'tpu,cpu'}, False),
    ([], {'JAX_FORCE_TPU_INIT': '1'}, False),
    ([], {'TPU_LIBRARY_PATH': sys.executable}, False)])
def test_only_hosts_without_a_tpu_leave_it_out(files, environment, left_out):
  pytest.importorskip('libtpu')
  done = _fresh('-c', _DEVICES.format(files=files), **environment)
  assert done.stdout.split() == [str(left_out)], done.stderr


def test_other_platforms_are_found_as_ever():
  """JAX tries each of them, in its own order; only libtpu fails to load."""
  pytest.importorskip('libtpu')
  done = _fresh('-c', '''
from recursive_tx.machine import libtpu
libtpu.leave_out()
import jax
from jax._src import xla_bridge
assert jax.config.jax_platforms is None
print(jax.devices()[0].platform, *xla_bridge._backend_errors)
''')
  assert done.returncode == 0, done.stderr
  platform, *errors = done.stdout.split()
  assert platform in ('cpu', 'gpu') and errors[:1] == ['tpu']


def test_it_can_still_be_loaded_to_compile():
  pytest.importorskip('libtpu')
  done = _fresh('-c', '''
from recursive_tx.machine import libtpu
libtpu.leave_out()
from recursive_tx import plan
print(len(plan.devices_of('v5e:2x4')[0]))
''')
  assert done.stdout.split() == ['8'], done.stderr
