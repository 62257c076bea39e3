"""A model's weights in the form that decoding reads fastest.

Decoding multiplies few rows with every kernel, so its time is that of reading
them. Knows nothing of slots or requests.
"""

import functools
from typing import NamedTuple

import jax

from recursive_tx import config as config_lib
from recursive_tx.model import cpu, mixed_loops
from recursive_tx.model.linear import fuse


class Weights(NamedTuple):
  """What the engine computes with; made by `prepare`.

  Attributes:
    variables: of `Decoder`, in the compute dtype but for norms, biases and
      gates, which are computed in fp32. Layers are a list, so that no step
      slices a stack. Kernels with the same input are fused; not on a mesh,
      which cuts each by its own letters.
    mixed_M: the adapters of all loops for every layer, see mixed_loops.py.
    head_DV: the head's table transposed, where model/cpu.py is used: there
      the product of a few rows with [V, D] takes longer than with [D, V].
    known_V: tokens that may be generated, bool; None is all of them.
  """
  variables: dict
  mixed_M: list[dict[str, dict]]
  head_DV: jax.Array | None
  known_V: jax.Array | None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prepare(
    cfg: config_lib.ModelConfig, run: config_lib.Run, meshed: bool,
    variables: dict, known_V: jax.Array | None = None,
) -> Weights:
  """Weights of a model.

  Args:
    cfg, variables: any model of this library.
    run: how it is executed.
    meshed: the variables are sharded over a mesh.
    known_V: see `Weights`.
  """
  params = jax.tree_util.tree_map_with_path(
      functools.partial(_cast, run.dtype), dict(variables['params']))
  for stack, size in (('prelude', cfg.prelude), ('coda', cfg.coda),
                      ('block', cfg.layers_per_loop)):
    if stack in params:
      params[stack] = {
          part: [jax.tree.map(lambda leaf, i=i: leaf[i], tree)
                 for i in range(size)]
          for part, tree in params[stack].items()}
      if not meshed:
        params[stack]['layers'] = [
            _fused(cfg, tree) for tree in params[stack]['layers']]
  adapters, head_DV = params.pop('adapters', {}), None
  params['adapters'] = {name: leaves for name, leaves in adapters.items()
                        if name in ('head', 'exit')}
  if cpu.chosen(run):
    head_DV = (params['embed']['embedding'] if cfg.tied else
               params.pop('head')['kernel']).T
  return Weights({'params': params}, mixed_loops.mixed(cfg, adapters), head_DV,
                 known_V)


def _cast(dtype, path, leaf):
  names = [step.key for step in path]
  exact = names[-1] in ('scale', 'bias') or 'exit' in names
  return leaf if exact else leaf.astype(dtype)


def _fused(cfg, tree: dict) -> dict:
  """A layer's kernels as one for what attention reads, one for the MLP."""
  tree = {**tree, 'attn': fuse(tree['attn'], ('q', 'k', 'v'))}
  if cfg.gated:
    tree['mlp'] = fuse(tree['mlp'], ('gate', 'up'))
  return tree
