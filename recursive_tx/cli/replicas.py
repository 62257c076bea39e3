"""The flag of how many devices answer, for the verbs that generate."""

from collections.abc import Callable

from absl import flags
import jax

from recursive_tx.engine import Engine, Replicas
from recursive_tx.errors import UserError

# Whoever calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()

# (slots, device) -> an engine.
Build = Callable[[int, jax.Device | None], Engine]


def define() -> Callable[[], int]:
  """Defines it. Returns what reads it, before JAX computes anything."""
  flag = flags.DEFINE_integer(
      'replicas', 1, 'Copies of the model, each on a device of its own, that'
      ' share the slots. A CPU counts as so many devices: small models answer'
      ' several requests faster with a core for each copy.')

  def read() -> int:
    if flag.value < 1:
      raise UserError(f'--replicas={flag.value}; expected at least 1')
    if flag.value > 1:
      jax.config.update('jax_num_cpu_devices', flag.value)
    return flag.value

  return read


def make(count: int, slots: int, build: Build) -> Engine | Replicas:
  """One engine, or several that have so many slots between them."""
  if count == 1:
    return build(slots, None)
  devices = jax.local_devices()
  if len(devices) < count:
    raise UserError(f'--replicas={count}, but there are {len(devices)}'
                     ' devices; give no more than that')
  return Replicas([
      build(-(-slots // count), device) for device in devices[:count]])
