"""Several processes as one program: how they meet, agree and are preempted.

JAX's own runtime does the work. These are the calls that a program which may
be a single process needs. Knows processes. Does not know what they compute.
"""

import os
import signal
import threading
import types

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from recursive_tx.errors import UserError

# Where one of these counts more than one task, a launcher started this one.
_TASKS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def initialize(
    coordinator: str = '', processes: int = 0, process: int = -1
) -> None:
  """Joins this process to the others; before anything else that uses JAX.

  Without arguments, the others are found in a TPU pod's metadata, or through
  Slurm or Open MPI (of which JAX wants a task for each device). Without any of
  these the process is alone.

  Args:
    coordinator: HOST:PORT of process 0, which listens there.
    processes: how many there are.
    process: which one this is, from 0. It takes all devices of its host.

  Raises:
    UserError: only some of the arguments, or ones that contradict.
  """
  given = [bool(coordinator), processes > 0, process >= 0]
  if any(given):
    host, _, port = coordinator.rpartition(':')
    if not all(given) or process >= processes or not host or not (
        port.isdecimal() and 0 < int(port) < 1 << 16):
      raise UserError(
          f'coordinator {coordinator!r}, processes {processes}, process'
          f' {process}; expected HOST:PORT, a number of processes, and which'
          ' of them this is, from 0. Give all three or none.')
    # Else JAX would take the launcher's devices, one for every process.
    jax.distributed.initialize(
        coordinator, processes, process, cluster_detection_method='deactivate')
  elif any(int(os.environ.get(name) or 1) > 1 for name in _TASKS):
    jax.distributed.initialize()
  elif _on_tpu():
    try:
      jax.distributed.initialize()
    except ValueError:
      # It has chips, and nothing that speaks of other hosts.
      logging.info('Alone: %s belongs to no pod.', os.uname().nodename)


def agree(value: int) -> int:
  """Process 0's value, in every process; all must call it."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def is_main() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


class Preemption:
  """Whether the machine is about to be taken away, which SIGTERM announces.

  Use as a context manager, and call `reached` at every step. Any one of
  several processes may get the signal; `reached` is then true in all of them,
  at one step. Later signals change nothing, so that none cuts short what the
  first one began.
  """

  def __init__(self):
    self._signalled = False
    self._former = None

  def __enter__(self) -> 'Preemption':
    # The runtime of several processes has a handler of its own, and Python
    # lets no other thread set one.
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._former = signal.signal(signal.SIGTERM, self._on_sigterm)
    return self

  def __exit__(self, *unused) -> None:
    if self._former is not None:
      signal.signal(signal.SIGTERM, self._former)

  def reached(self, step: int) -> bool:
    """Whether to stop after this step; `step` grows from call to call."""
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signalled

  def _on_sigterm(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self._signalled = True


def _on_tpu() -> bool:
  """Whether JAX found libtpu and chips, and is to use them."""
  return (os.environ.get('TPU_ML_PLATFORM') == 'JAX'
          and os.environ.get('JAX_PLATFORMS') != 'cpu')
