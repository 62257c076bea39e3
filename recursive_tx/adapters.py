"""The per-loop adapter: LoRA factors, and norms and biases per loop.

Adapters are values: modules here only make them, stacked over loops and
layers by `nn.vmap`; the model's scans slice them and hand each layer its own.
Relaxed Recursive Transformers, section 2.3, equation 3.
"""

import math

from flax import linen as nn
from jax.nn import initializers
import jax.numpy as jnp

from recursive_tx import config as config_lib

# {name: {leaf: (letters, rank or None, initializer)}}
Table = dict[str, dict[str, tuple]]


def lora_table(cfg: config_lib.ModelConfig) -> Table:
  """Leaves `a` [*in, R] and `b` [R, *out] of every kernel of rank > 0.

  `b` starts at zero, so that a fresh adapter changes nothing. `a` has the
  scale of the orthonormal columns that an SVD gives it.
  """
  table = {}
  for name, rank in cfg.ranks.items():
    if rank:
      inner, outer = config_lib.split(cfg.kernels[name])
      std = 1 / math.sqrt(cfg.in_out(name)[0])
      table[name] = {'a': (inner + 'R', rank, initializers.normal(std)),
                     'b': ('R' + outer, rank, initializers.zeros)}
  return table


def vector_table(cfg: config_lib.ModelConfig) -> Table:
  """Norm scales and biases of one layer, and the biases of its linears."""
  table = {'attn_norm': norm_leaves(cfg), 'mlp_norm': norm_leaves(cfg)}
  for name, spec in cfg.kernels.items():
    if cfg.has_bias(name):
      outer = config_lib.split(spec)[1]
      table[name] = {'bias': (outer, None, initializers.zeros)}
  return table


def norm_leaves(cfg: config_lib.ModelConfig) -> dict[str, tuple]:
  """Leaves of one norm over D."""
  neutral = initializers.zeros if cfg.norm == 'rms+1' else initializers.ones
  leaves = {'scale': ('D', None, neutral)}
  if cfg.norm == 'layer':
    leaves['bias'] = ('D', None, initializers.zeros)
  return leaves


class Leaves(nn.Module):
  """Parameters named and shaped by one row of a Table."""
  cfg: config_lib.ModelConfig
  table: dict[str, tuple]

  @nn.compact
  def __call__(self) -> dict[str, jnp.ndarray]:
    values = {}
    for leaf, (letters, rank, init) in self.table.items():
      shape = tuple(rank if letter == 'R' else getattr(self.cfg, letter)
                    for letter in letters)
      values[leaf] = self.param(
          leaf, nn.with_logical_partitioning(init, tuple(letters)), shape)
    return values


class LayerValues(nn.Module):
  """All values of one layer that are passed in, by name."""
  cfg: config_lib.ModelConfig
  table: Table

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jnp.ndarray]]:
    return {name: Leaves(self.cfg, leaves, name=name)()
            for name, leaves in self.table.items()}


def stacked(axes: tuple[tuple[str, int], ...]):
  """LayerValues whose every leaf has the leading `axes`, (name, size) each."""
  module = LayerValues
  for name, size in reversed(axes):
    module = nn.vmap(
        module, in_axes=(), axis_size=size, variable_axes={'params': 0},
        split_rngs={'params': True},
        metadata_params={nn.PARTITION_NAME: name})
  return module


def adapter_table(cfg: config_lib.ModelConfig) -> Table:
  """What the adapters of the looped block hold."""
  vectors = vector_table(cfg) if cfg.has_loop_vectors else {}
  return overlay(vectors, lora_table(cfg))


def overlay(*trees: dict[str, dict]) -> dict[str, dict]:
  """One dictionary of leaves per name, from several with disjoint leaves."""
  joined = {}
  for tree in trees:
    for name, leaves in tree.items():
      joined[name] = {**joined.get(name, {}), **leaves}
  return joined
