"""libtpu, the TPU's runtime and compiler: when JAX shall load it.

JAX loads an installed libtpu on every host. Without a TPU it then prints
warnings of its own, and a second process that loads it aborts.
"""

import contextlib
import glob
import os

import jax

# JAX cannot load this, notes so in its own log, and takes the other platforms.
_NOT_A_LIBRARY = __file__


def leave_out() -> None:
  """Keeps JAX from loading libtpu on a host without a TPU.

  Call it before JAX's first computation. It does nothing where the host has a
  TPU's device files, where JAX has found a TPU by itself, or where
  JAX_PLATFORMS or TPU_LIBRARY_PATH is set. Other platforms, GPUs above all,
  are found as ever.
  """
  # JAX, when imported, takes JAX_PLATFORMS and looks for TPUs on the PCI bus.
  if jax.config.jax_platforms or _device_files():
    return
  with contextlib.suppress(ImportError):
    import libtpu  # It sets the variable, where that is not set.
    if os.environ['TPU_LIBRARY_PATH'] == libtpu.get_library_path():
      os.environ['TPU_LIBRARY_PATH'] = _NOT_A_LIBRARY


def compile_only() -> None:
  """Loads libtpu for its compiler, in a process that computes on the CPU."""
  if os.environ.get('TPU_LIBRARY_PATH') == _NOT_A_LIBRARY:
    del os.environ['TPU_LIBRARY_PATH']
  # One process at a time may hold a TPU; this one holds none, and queries no
  # metadata server for the machine that it is on.
  os.environ.update(
      ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_SKIP_MDS_QUERY='1',
      TPU_MIN_LOG_LEVEL='3', TPU_STDERR_LOG_LEVEL='3',
      TPU_ACCELERATOR_TYPE='v5litepod-1', TPU_WORKER_HOSTNAMES='localhost')
  jax.config.update('jax_platforms', 'cpu')


def _device_files() -> bool:
  """Whether there are those of a TPU: up to v5e the first, later the second.
  """
  return bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))
