"""Shared kernels and their factors, one place of the block at a time."""

from collections.abc import Callable
import pathlib

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import tying
from recursive_tx.tying.fit.layers import Read

# Factors of a loop, a [*in, R] and b [R, *out], the energy of the residual
# that they keep, and the energy of the residual.
Factors = tuple[np.ndarray, np.ndarray, float, float]
# (kernel's name, place in the block) -> the shared kernel, and the factors of
# every loop; none at rank 0.
Kernel = Callable[[str, int], tuple[np.ndarray, list[Factors]]]


def path(name: str) -> str:
  """Where a vanilla model has a kernel."""
  group = next(group for group, names in config_lib.GROUPS.items()
               if name in names)
  return f'block/layers/{group}/{name}/kernel'


def virtual(rcfg: config_lib.ModelConfig, place: int) -> list[int]:
  """The virtual layers that one place of the block stands for."""
  return [rcfg.prelude + loop * rcfg.layers_per_loop + place
          for loop in range(rcfg.loops)]


def matrix(
    cfg: config_lib.ModelConfig, read: Read, name: str, layer: int
) -> np.ndarray:
  """A layer's kernel, [rows, columns] fp32."""
  return read(path(name), layer).astype(np.float32).reshape(cfg.in_out(name))


def folded(
    rcfg: config_lib.ModelConfig, read: Read, init: str, name: str, place: int
) -> np.ndarray:
  """The shared kernel by one of the paper's inits, in its letters."""
  taken = tying.sources(
      init, loops=rcfg.loops, layers_per_loop=rcfg.layers_per_loop)[place]
  return tying.fold([read(path(name), rcfg.prelude + i) for i in taken])


def energy(residual: np.ndarray) -> float:
  """Sum of squares, in fp64."""
  return float(np.linalg.norm(residual.astype(np.float64))) ** 2


def shaped(
    rcfg: config_lib.ModelConfig, name: str, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Factors [rows, R] and [R, columns] in the kernel's letters."""
  inner, outer = config_lib.split(rcfg.kernels[name])
  rank = len(b)
  return (a.reshape(*rcfg.shape(inner), rank),
          b.reshape(rank, *rcfg.shape(outer)))


def kept(
    rcfg: config_lib.ModelConfig, name: str, residual: np.ndarray,
    a: np.ndarray, b: np.ndarray,
) -> Factors:
  """Any factors of a residual [rows, columns], with what they keep of it."""
  total = energy(residual)
  return (*shaped(rcfg, name, a, b),
          max(0.0, total - energy(residual - a @ b)), total)


def product(factors: Factors) -> np.ndarray:
  """What they add to the kernel, [rows, columns]."""
  a, b = factors[:2]
  rank = len(b)
  return a.reshape(-1, rank) @ b.reshape(rank, -1)


class Store:
  """The kernels of one initialisation, in files of `directory`."""

  def __init__(self, directory: pathlib.Path, loops: int):
    directory.mkdir()
    self.directory, self._loops = directory, loops

  def put(self, name: str, place: int, shared: np.ndarray,
          factors: list[Factors]) -> None:
    """Stores the kernels of a place."""
    np.save(self._path(name, place, 'shared.npy'), shared)
    for loop, row in enumerate(factors):
      self.replace(name, place, loop, row)

  def replace(self, name: str, place: int, loop: int, row: Factors) -> None:
    """Stores the factors of a loop."""
    np.savez(self._path(name, place, f'{loop}.npz'), *row)

  def shared(self, name: str, place: int) -> np.ndarray:
    """The shared kernel."""
    return np.load(self._path(name, place, 'shared.npy'))

  def kernel(self, name: str, place: int) -> tuple[np.ndarray, list[Factors]]:
    """As `Kernel` does."""
    factors = [self.factors(name, place, loop) for loop in range(self._loops)]
    return self.shared(name, place), [row for row in factors if row]

  def factors(self, name: str, place: int, loop: int) -> Factors | None:
    """Those of a loop, if there are any."""
    file = self._path(name, place, f'{loop}.npz')
    if not file.exists():
      return None
    with np.load(file) as arrays:
      a, b, share, total = (arrays[key] for key in arrays.files)
    return a, b, float(share), float(total)

  def _path(self, name, place, what):
    return self.directory / f'{name}.{place}.{what}'


def unrolled(
    rcfg: config_lib.ModelConfig, read: Read, rule: str, store: Store
) -> Read:
  """A relaxed model's layers as those of a vanilla one.

  Args:
    rcfg: the relaxed config.
    read: the original's layers.
    rule: init whose layers give norms and biases, where loops share them.
    store: its kernels.
  """
  M = rcfg.layers_per_loop

  def layer_of(path, layer):
    if layer is None:
      return read(path, None)
    loop, place = divmod(layer - rcfg.prelude, M)
    if not 0 <= loop < rcfg.loops:
      return read(path, layer)
    if path.startswith('block/vectors/'):
      if rcfg.has_loop_vectors:
        return read(path, layer)
      taken = tying.sources(rule, loops=rcfg.loops, layers_per_loop=M)[place]
      return tying.fold([read(path, rcfg.prelude + i) for i in taken])
    name = path.split('/')[3]
    shared, row = store.shared(name, place), store.factors(name, place, loop)
    return shared + product(row).reshape(shared.shape) if row else shared
  return layer_of
