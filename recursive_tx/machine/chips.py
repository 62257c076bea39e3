"""What accelerators can do at most, by published figures.

Knows chips by name and by what JAX calls their devices; nothing of models.
"""

import dataclasses
from typing import Any

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    name: as in TPU topologies and in `plan`.
    flops: bf16 FLOP/s of its matrix units, dense.
    hbm_bytes: memory; a little less of it is free to programs.
    hbm_bytes_per_second: between memory and compute.
    link_bytes_per_second: what it sends to other chips over all of its fast
      links together, while receiving as much (ICI, NVLink). Of data sheets'
      two-way figures this is half.
    cores: TensorCores of a TPU chip, which are one JAX device or one each.
  """

  name: str
  flops: float
  hbm_bytes: int
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  cores: int = 1


# By JAX's device_kind. Memory that is sold as GB has binary ones.
CHIPS = {
    # cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s. Links: 6 of
    # 50 GB/s each way (Jouppi et al., arxiv.org/abs/2304.01433, table 4).
    'TPU v4': Chip('v4', 275e12, 32 * _GIB, 1200e9, 300e9, cores=2),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s
    # both ways together.
    'TPU v5 lite': Chip('v5e', 197e12, 16 * _GIB, 819e9, 200e9),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, ICI
    # 1200 GB/s both ways together.
    'TPU v5': Chip('v5p', 459e12, 95 * _GIB, 2765e9, 600e9, cores=2),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, ICI
    # 800 GB/s both ways together.
    'TPU v6 lite': Chip('v6e', 918e12, 32 * _GIB, 1638e9, 400e9),
    # NVIDIA A100 data sheet, SXM: 312 TFLOP/s without sparsity, 1,555 GB/s at
    # 40 GB and 2,039 GB/s at 80 GB, NVLink 600 GB/s both ways together.
    'NVIDIA A100-SXM4-40GB': Chip(
        'a100-40gb', 312e12, 40 * _GIB, 1555e9, 300e9),
    'NVIDIA A100-SXM4-80GB': Chip('a100', 312e12, 80 * _GIB, 2039e9, 300e9),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOP/s with sparsity, of which dense
    # is half, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways together.
    'NVIDIA H100 80GB HBM3': Chip('h100', 989.5e12, 80 * _GIB, 3350e9, 450e9),
    # NVIDIA H200 data sheet, SXM: the same but 141 GB, 4.8 TB/s.
    'NVIDIA H200': Chip('h200', 989.5e12, 141 * _GIB, 4800e9, 450e9)}
_NAMES = {chip.name: chip for chip in CHIPS.values()}


def find(which: Any) -> Chip | None:
  """What is known of a chip.

  Args:
    which: a jax.Device, its `device_kind`, or a name such as 'v5e' or 'H100'.
      Other builds of a GPU (PCIe, NVL, slices) have other figures and are not
      known.

  Returns:
    The chip, or None for a CPU and for what is not in the table. Of a device
    that is one of two cores of its chip, half of everything.
  """
  kind = getattr(which, 'device_kind', which)
  chip = CHIPS.get(kind) or _NAMES.get(kind.lower())
  # TPU devices have their number of cores; others have no such attribute.
  cores = getattr(which, 'num_cores', None)
  if chip is None or cores is None or cores == chip.cores:
    return chip
  share = cores / chip.cores
  return dataclasses.replace(
      chip, flops=chip.flops * share, hbm_bytes=int(chip.hbm_bytes * share),
      hbm_bytes_per_second=chip.hbm_bytes_per_second * share,
      link_bytes_per_second=chip.link_bytes_per_second * share, cores=cores)
