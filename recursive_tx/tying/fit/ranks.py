"""One budget of factors' parameters, spread over kernels by their gain."""

import dataclasses

import numpy as np

from recursive_tx import config as config_lib


def may_differ(rcfg: config_lib.ModelConfig) -> bool:
  """Whether the rank is one number for all kernels, above 0 and not full."""
  return rcfg.rank.isdecimal() and bool(
      any(rcfg.ranks.values())) and not is_full(rcfg)


def is_full(rcfg: config_lib.ModelConfig) -> bool:
  """Whether factors can represent any residual exactly."""
  return all(rank == min(rcfg.in_out(name))
             for name, rank in rcfg.ranks.items())


def spread(
    rcfg: config_lib.ModelConfig, gains: dict[str, np.ndarray]
) -> config_lib.ModelConfig:
  """The config with a rank for each kernel, and no more parameters in all.

  Args:
    rcfg: with one rank for all.
    gains: of each kernel, what its next rank would take off the error,
      falling; all layers and loops summed up.

  Returns:
    The config whose ranks, taken one after the other by gain a parameter,
    fit into the parameters of those that it had.
  """
  price = {name: sum(rcfg.in_out(name)) for name in rcfg.kernels}
  left = sum(rank * price[name] for name, rank in rcfg.ranks.items())
  ranks = dict.fromkeys(rcfg.kernels, 0)
  offers = sorted(
      ((-gain / price[name], name, rank) for name, falling in gains.items()
       for rank, gain in enumerate(falling)))
  for _, name, rank in offers:
    # One that is too dear ends its kernel's row; cheaper ones may follow.
    if rank == ranks[name] and price[name] <= left:
      ranks[name] += 1
      left -= price[name]
  return dataclasses.replace(
      rcfg, rank='+'.join(f'{name}{rank}' for name, rank in ranks.items()))
