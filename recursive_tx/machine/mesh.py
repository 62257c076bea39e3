"""The mesh, and where the letters of the alphabet go on it.

Parameters and activations carry the letters of their dimensions as logical
axis names. One table has the axes of the mesh that each letter is cut along,
so a tensor's sharding follows from its name. XLA derives the collectives.

Knows letters and sizes. Does not know layers, losses or files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from absl import logging
from flax import linen as nn
from flax.linen import meta
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from recursive_tx.errors import UserError, check_ranges

AXES = ('data', 'fsdp', 'tensor')

# In order of precedence: an axis of the mesh cuts one dimension of an array,
# so where 'B' is present it takes 'fsdp' and 'D' stays whole. The vocabulary
# takes 'fsdp' too where it divides: its tables are never gathered, tokens are.
LETTERS = {
    'B': ('data', 'fsdp'),
    'V': ('fsdp', 'tensor'),
    'F': ('tensor',),
    'N': ('tensor',),
    'K': ('tensor',),
    'D': ('fsdp',),
    'R': ('fsdp',)}
# The batch where the vocabulary is cut along 'fsdp': at the head.
HEAD_BATCH = 'B_head'
# Never cut: time and heads' inner size (attention mixes them), the stacks of
# layers and loops and the exit gate (small), and groups of query heads.
WHOLE = ('T', 'S', 'H', 'G', 'L', 'W', 'layers', 'loops')

Rules = tuple[tuple[str, tuple[str, ...] | None], ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; one of them may be -1, the rest.

  Each is in [-1, inf), and not 0.

  Attributes:
    data: copies of the model, each on its part of the batch.
    fsdp: parts of the batch over which parameters are cut as well.
    tensor: parts of heads, MLP and vocabulary.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  RANGES = dict.fromkeys(AXES, '[-1, inf)')

  def __post_init__(self):
    check_ranges('mesh', self)


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh over all devices; enter it with `jax.set_mesh(mesh)`.

  Where the devices are of several slices, between which the network is slow,
  each slice holds whole copies of the model: only 'data' goes across.

  Args:
    config: sizes of the axes.
    devices: those of another machine; None is those of this one.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or 'data'
      cannot be divided among the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  types = (AxisType.Auto,) * len(AXES)
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if len(slices) == 1:
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
  if sizes[0] % len(slices):
    raise UserError(
        f'mesh data={sizes[0]} does not divide among {len(slices)} slices; make'
        f' it a multiple of {len(slices)}.')
  inner = (sizes[0] // len(slices), *sizes[1:])
  outer = (len(slices), *(1 for _ in sizes[1:]))
  grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
  return Mesh(grid, AXES, axis_types=types)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
  """Sizes of the axes for a number of devices; raises as `make_mesh`."""
  sizes = [getattr(config, axis) for axis in AXES]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if min(sizes) < 1 or math.prod(sizes) != devices:
    given = ', '.join(f'{a}={getattr(config, a)}' for a in AXES)
    raise UserError(
        f'mesh {given} does not multiply to the {devices} device(s) here; set'
        ' one axis to -1 to let it take the rest.')
  return tuple(sizes)


def make_rules(mesh: Mesh, sizes: Mapping[str, int]) -> Rules:
  """Axes of the mesh for every letter, for flax's `logical_axis_rules`.

  A letter whose size the axes do not divide is left whole, in every array
  alike, and logged: one key head cannot be cut, the rest of the model still
  can. Only the batch must divide.

  Args:
    mesh: of `make_mesh`.
    sizes: the size of each letter of LETTERS; of 'R' what divides all ranks.

  Raises:
    UserError: the batch does not divide.
  """
  rules = []
  for letter, axes in LETTERS.items():
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if letter == 'V' and sizes[letter] % parts:
      axes = ('tensor',)
      parts = mesh.shape['tensor']
    if sizes[letter] % parts == 0:
      rules.append((letter, axes))
      continue
    if letter == 'B':
      raise UserError(
          f'A batch of {sizes["B"]} sequences (after accumulation) does not'
          f' divide over {parts} devices (mesh data x fsdp); make it a'
          f' multiple of {parts}.')
    logging.info(
        'Sharding: %s=%d stays whole, %d parts along %s do not divide it.',
        letter, sizes[letter], parts, axes)
    rules.append((letter, None))
  batch = ('data',) if 'fsdp' in (dict(rules)['V'] or ()) else LETTERS['B']
  return (*rules, (HEAD_BATCH, batch), *((letter, None) for letter in WHOLE))


def of_boxed(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """NamedSharding of every leaf of a tree whose arrays carry their letters."""
  return nn.logical_to_mesh_sharding(
      nn.get_partition_spec(tree), mesh, list(rules))


def abstract(tree: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs that carry shardings, for lowering and restoring."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      meta.unbox(tree), shardings)


def place(tree: Any, shardings: Any) -> Any:
  """Puts a tree of host arrays, whole on every process, onto the mesh.

  Args:
    tree: NumPy arrays.
    shardings: a tree of the same form, or one sharding for all of it.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def put(x, s):
    return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

  return jax.tree.map(put, tree, shardings)


def place_rows(
    batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Puts a batch onto the mesh, of which each process has its own rows.

  Args:
    batch: arrays [rows, ...], of the rows that `local_rows` names.
    mesh: of `make_mesh`.
  """
  return {
      key: jax.make_array_from_process_local_data(rows(mesh), value)
      for key, value in batch.items()}


def local_rows(mesh: Mesh, batch: int) -> list[int]:
  """Rows of the global batch that this process's devices hold, in order."""
  held = rows(mesh).addressable_devices_indices_map((batch,)).values()
  return sorted({row for (part,) in held for row in range(batch)[part]})


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(LETTERS['B']))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
