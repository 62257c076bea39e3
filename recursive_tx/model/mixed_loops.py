"""Adapters for a batch whose rows are at different loops.

A row's norms and biases are gathered. The factors of all loops are
concatenated, A_1 .. A_L and B_1 .. B_L: x A is computed for all loops, and a
mask sets to zero what is not of the row's loop before it is multiplied by B.
"""

import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib


def mixed(
    cfg: config_lib.ModelConfig, values: dict[str, dict]
) -> list[dict[str, dict]]:
  """Values [loops, layers, ...] of all loops, separated by layer.

  Returns:
    For every layer {name: {'a': [*in, loops * R], 'b': [loops * R, *out],
    'scale' | 'bias': [loops, ...]}}.
  """
  names = [name for name in values if name in (
      *cfg.kernels, 'attn_norm', 'mlp_norm')]
  forms = {'a': lambda v: jnp.moveaxis(v, 0, -2).reshape(*v.shape[1:-1], -1),
           'b': lambda v: v.reshape(-1, *v.shape[2:])}
  return [
      {name: {leaf: forms.get(leaf, lambda v: v)(value[:, layer])
              for leaf, value in values[name].items()} for name in names}
      for layer in range(cfg.layers_per_loop)]


def at(
    cfg: config_lib.ModelConfig, mixed_M: list[dict[str, dict]], loop
) -> list[dict[str, dict]]:
  """What every layer adds at a loop, an int, or each row's, int32 [B, 1]."""
  if isinstance(loop, int):
    rank = cfg.ranks
    def pick(name, leaf, value):
      if leaf in 'ab':
        rows = slice(loop * rank[name], (loop + 1) * rank[name])
        return value[..., rows] if leaf == 'a' else value[rows]
      return value[loop]
  else:
    def pick(name, leaf, value):
      return value if leaf in 'ab' else jnp.asarray(value)[loop]
  picked_M = [
      {name: {leaf: pick(name, leaf, value) for leaf, value in leaves.items()}
       for name, leaves in values.items()} for values in mixed_M]
  if isinstance(loop, int):
    return picked_M
  own_B1L = jax.nn.one_hot(loop, cfg.loops)
  for values in picked_M:
    for name, leaves in values.items():
      if 'a' in leaves:
        leaves['mask_B1R'] = jnp.repeat(own_B1L, cfg.ranks[name], axis=2)
  return picked_M
