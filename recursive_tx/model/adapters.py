"""The per-loop adapter: LoRA factors, and norms and biases per loop.

Adapters are values: modules here only make them, stacked over loops and
layers by `nn.vmap`; the model's scans slice them and hand each layer its own.
Relaxed Recursive Transformers, section 2.3, equation 3.

The head may have factors too, for the exits alone: a pair for every loop but
the final one, whose logits they do not change (section 3.7, where they are
trained on a frozen model, at rank 128). The exits may also have a gate: a small
MLP for every loop but the final one, which predicts from a loop's output
whether a token may exit. It changes no logits.
"""

import math
from typing import NamedTuple

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib


class LinearValues(NamedTuple):
  """What is added to one kernel's product.

  Attributes:
    a, b: factors [*in, R] and [R, *out]; None without rank.
    bias: [*out]; None without.
    mask_B1R: which columns of `a` are of a row's loop, where `a` and `b` hold
      those of all loops; None where they are of one.
  """
  a: jax.Array | None = None
  b: jax.Array | None = None
  bias: jax.Array | None = None
  mask_B1R: jax.Array | None = None


class LayerValues(NamedTuple):
  """What a layer is passed beside its kernels, each may vary by loop.

  Attributes:
    norms: leaves of each norm of `ModelConfig.norms`.
    linears: by kernel.
    kind: what it attends to, where layers differ: an index into
      `config.KINDS`, int32, of all rows or [B, 1].
  """
  norms: dict[str, dict[str, jax.Array]]
  linears: dict[str, LinearValues]
  kind: jax.Array | None = None


def layer_values(
    cfg: config_lib.ModelConfig, *trees: dict[str, dict], kind=None
) -> LayerValues:
  """From trees of leaves by name, of one layer or stacked."""
  merged = overlay(*trees)
  return LayerValues(
      {name: merged[name] for name in cfg.norms},
      {name: LinearValues(**merged.get(name, {})) for name in cfg.kernels},
      kind)


def kinds(
    cfg: config_lib.ModelConfig, first: int, loops: int, layers: int
) -> np.ndarray | None:
  """[loops, layers] of a run whose first virtual layer is `first`, int32.

  None where all layers of the model attend alike.
  """
  if not cfg.mixed_kinds:
    return None
  return np.array([
      [config_lib.KINDS.index(cfg.kind(first + loop * layers + layer))
       for layer in range(layers)] for loop in range(loops)], np.int32)


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


def head_rank(cfg: config_lib.ModelConfig) -> int:
  """Rank of the head's factors, capped at min(D, V); 0 is none.

  A rank for all kernels, '64' or 'full', is of the block's alone.
  """
  return min(cfg.D, cfg.V, config_lib.parse_rank(cfg.rank).get('head', 0))


def head_leaves(cfg: config_lib.ModelConfig) -> dict[str, tuple]:
  """Leaves `a` [D, R] and `b` [R, V] of one loop's head; see `lora_table`."""
  rank, std = head_rank(cfg), cfg.D**-0.5
  return {'a': ('DR', rank, initializers.normal(std)),
          'b': ('RV', rank, initializers.zeros)}


def gate_leaves(cfg: config_lib.ModelConfig) -> dict[str, tuple]:
  """Leaves of one loop's gate: `a` [D, W] and `b` [W], and their biases.

  The logit of a fresh gate is 0.
  """
  zeros = initializers.zeros
  return {'a': ('DW', None, initializers.normal(cfg.D**-0.5)),
          'a_bias': ('W', None, zeros), 'b': ('W', None, zeros),
          'b_bias': ('', None, zeros)}


def exit_tables(cfg: config_lib.ModelConfig) -> Table:
  """The leaves of the exit of every loop but the final one."""
  table = {'head': head_leaves(cfg)} if head_rank(cfg) else {}
  return {**table, 'exit': gate_leaves(cfg)} if cfg.exit_gate else table


def fresh_exits(
    cfg: config_lib.ModelConfig, seed: int
) -> dict[str, np.ndarray]:
  """{'head/a': [loops - 1, ...], ...} that change nothing yet, fp32.

  {} where the exits have nothing of their own.
  """
  exits, values = cfg.loops - 1, {}
  for name, leaves in exit_tables(cfg).items():
    for leaf, (letters, rank, _) in leaves.items():
      shape = (exits, *leaf_shape(cfg, letters, rank))
      value = np.zeros(shape, np.float32)
      if leaf == 'a':
        rng = np.random.default_rng([seed, shape[-1]])
        value = rng.normal(0, cfg.D**-0.5, shape).astype(np.float32)
      values[f'{name}/{leaf}'] = value
  return values


def leaf_shape(
    cfg: config_lib.ModelConfig, letters: str, rank: int | None
) -> tuple[int, ...]:
  """Sizes of a leaf's dimensions."""
  return tuple(rank if letter == 'R' else getattr(cfg, letter)
               for letter in letters)


def vector_table(cfg: config_lib.ModelConfig) -> Table:
  """Norm scales and biases of one layer, and the biases of its linears."""
  table = {name: norm_leaves(cfg, letters)
           for name, letters in cfg.norms.items()}
  for name, spec in cfg.kernels.items():
    if cfg.has_bias(name):
      outer = config_lib.split(spec)[1]
      table[name] = {'bias': (outer, None, initializers.zeros)}
  return table


def norm_leaves(
    cfg: config_lib.ModelConfig, letters: str = 'D'
) -> dict[str, tuple]:
  """Leaves of one norm over the dimensions of `letters`."""
  neutral = initializers.zeros if cfg.norm == 'rms+1' else initializers.ones
  leaves = {'scale': (letters, None, neutral)}
  if cfg.norm == 'layer' and letters == 'D':
    leaves['bias'] = (letters, None, initializers.zeros)
  return leaves


class Leaves(nn.Module):
  """Parameters named and shaped by one row of a Table."""
  cfg: config_lib.ModelConfig
  table: dict[str, tuple]

  @nn.compact
  def __call__(self) -> dict[str, jnp.ndarray]:
    values = {}
    for leaf, (letters, rank, init) in self.table.items():
      shape = leaf_shape(self.cfg, letters, rank)
      values[leaf] = self.param(
          leaf, nn.with_logical_partitioning(init, tuple(letters)), shape)
    return values


class LayerLeaves(nn.Module):
  """All leaves of one layer that are passed in, by name."""
  cfg: config_lib.ModelConfig
  table: Table

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jnp.ndarray]]:
    return {name: Leaves(self.cfg, leaves, name=name)()
            for name, leaves in self.table.items()}


class Adapters(nn.Module):
  """All of `params['adapters']`: the block's, and what the exits have."""
  cfg: config_lib.ModelConfig

  @nn.compact
  def __call__(
      self, *, head: bool = False, gate: bool = False
  ) -> dict[str, dict]:
    """The block's values [loops, layers, ...] by name.

    Or the leaves [loops - 1, ...] of `head` or `gate` instead. Only the leaves
    that are returned need exist, so that these can be applied alone.
    """
    cfg = self.cfg
    if head or gate:
      loops, name = (('loops', cfg.loops - 1),), 'head' if head else 'exit'
      return stacked(loops, Leaves)(cfg, exit_tables(cfg)[name], name=name)()
    stack = (('loops', cfg.loops), ('layers', cfg.layers_per_loop))
    return {name: stacked(stack, Leaves)(cfg, leaves, name=name)()
            for name, leaves in adapter_table(cfg).items()}


def stacked(axes: tuple[tuple[str, int], ...], module=LayerLeaves):
  """A module whose every leaf has the leading `axes`, (name, size) each."""
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
  merged = {}
  for tree in trees:
    for name, leaves in tree.items():
      merged[name] = {**merged.get(name, {}), **leaves}
  return merged
