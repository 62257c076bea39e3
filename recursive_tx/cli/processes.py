"""The flags of a run of several processes, for the verbs that can be one."""

from collections.abc import Callable

from absl import flags

from recursive_tx import machine
from recursive_tx.errors import in_range

# The verb that calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()


def define() -> Callable[[], None]:
  """Defines them. Returns what joins this process to the others."""
  coordinator = flags.DEFINE_string(
      'coordinator', '', 'HOST:PORT at which process 0 meets the others.')
  processes = flags.DEFINE_integer(
      'processes', 0, 'How many processes the run has, in [0, inf), all with'
      ' the same command but for --process; 0: not given.')
  process = flags.DEFINE_integer(
      'process', -1, 'Which of them this one is, from 0; -1: not given.')

  def join() -> None:
    in_range('--processes', processes.value, '[0, inf)', int)
    in_range('--process', process.value, '[-1, inf)', int)
    machine.initialize(coordinator.value, processes.value, process.value)

  return join
