"""The arithmetic of sharing: fold, factor, merge. Arrays in, arrays out.

Relaxed Recursive Transformers, sections 2.2 and 2.3. Knows nothing of where
arrays come from; `relax.py` says which layers.
"""

import dataclasses
import math

from absl import logging
import jax
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.errors import UserError
from recursive_tx.tying import lapack

INITS = ('stepwise', 'average', 'lower', 'random')

# A singular value below this share of the largest, or a residual below this
# share of its kernel, is rounding noise and no direction.
_NOISE = 1e-6


def sources(init: str, *, loops: int, layers_per_loop: int) -> list[list[int]]:
  """Layers whose mean is the shared layer, for each place in the block.

  Args:
    init: 'stepwise': equal intervals, first and last layer included
      (`round(linspace(0, L - 1, M))` with Python's rounding, which reproduces
      figure 2: layers 1, 3 and 6 of 6 for a block of 3); 'average': all
      layers that become this one; 'lower': the first ones.
  """
  M = layers_per_loop
  if init == 'stepwise':
    places = np.linspace(0, loops * M - 1, M).tolist()
    return [[round(place)] for place in places]
  if init == 'average':
    return [[loop * M + layer for loop in range(loops)] for layer in range(M)]
  assert init == 'lower', init
  return [[layer] for layer in range(M)]


def fold(layers: list[np.ndarray]) -> np.ndarray:
  """The shared array of those it replaces: their mean, fp32."""
  if len(layers) == 1:
    return layers[0].astype(np.float32)
  total = layers[0].astype(np.float64)
  for layer in layers[1:]:
    total += layer.astype(np.float64)
  return (total / len(layers)).astype(np.float32)


def factor(
    residual: np.ndarray, rank: int, *, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
  """Truncated SVD of a residual: the nearest product of that rank.

  Equations 4 and 5: with U S V^T the residual, `a` holds the first left
  singular vectors and `b` the right ones times their singular values. A
  direction without residual is initialised as LoRA is, Gaussian and zero
  (appendix C).

  Args:
    residual: [rows, columns], fp32.
    rank: at most min(rows, columns).
    scale: Frobenius norm of the kernel that the residual belongs to.
    rng: for the directions without residual.

  Returns:
    a [rows, rank] and b [rank, columns], fp32, and the energy (sum of
    squared singular values) that they keep.
  """
  rows, columns = residual.shape
  residual = residual.astype(np.float64)
  # fp64 resolves singular values down to 1e-8 of the largest, below fp32's
  # rounding of the residual.
  energy, vectors = leading(residual, rank)
  s = np.sqrt(np.maximum(energy, 0))
  real = s > _NOISE * max(s[0], scale / math.sqrt(min(rows, columns)))
  a = rng.normal(0, 1 / math.sqrt(rows), (rows, rank))
  b = np.zeros((rank, columns))
  if rows <= columns:
    a[:, real] = vectors[:, real]
    b[real] = vectors[:, real].T @ residual
  else:
    a[:, real] = residual @ (vectors[:, real] / s[real])
    b[real] = s[real, None] * vectors[:, real].T
  return (a.astype(np.float32), b.astype(np.float32),
          float((s[real] ** 2).sum()))


def gram(matrix: np.ndarray) -> np.ndarray:
  """Inner products of the rows or of the columns, whichever are fewer."""
  rows, columns = matrix.shape
  return matrix @ matrix.T if rows <= columns else matrix.T @ matrix


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The largest squared singular values, descending, and singular vectors of
  the shorter side of the matrix: [rank] and [side, rank], fp64."""
  return lapack.leading(gram(matrix).astype(np.float64, copy=False), rank)


def merge(
    cfg: config_lib.ModelConfig, variables: dict
) -> tuple[config_lib.ModelConfig, dict]:
  """The vanilla model that computes the same, without loops or adapters.

  Args:
    cfg, variables: any model of this library. An adapter of the head and an
      exit gate are dropped, with a warning: a vanilla model has no early
      exits.

  Returns:
    Its unrolled config and variables, fp32 wherever an
    adapter was added.
  """
  if cfg.loops > 1 and not cfg.loop_keys:
    raise UserError(
        'model.loop_keys=False: no vanilla model has layers that read the keys'
        ' of earlier ones; train it with config.model.loop_keys=True to merge'
        ' or export it')
  flat = dataclasses.replace(
      cfg, loops=1, prelude=0, coda=0, rank='0', exit_gate=0,
      layers_per_loop=cfg.num_layers)
  if flat == cfg:
    return cfg, variables
  params = jax.tree.map(np.asarray, variables['params'])
  looped = dict(params.get('adapters', {}))
  for name, what in (('head', 'adapter of the head'), ('exit', 'exit gate')):
    if looped.pop(name, None):
      logging.warning(
          'Dropped the %s: it is for early exits.', what)
  parts = [params[name] for name in ('prelude', 'block', 'coda')
           if name in params]
  middle = 'prelude' in params
  parts[middle] = _unroll(cfg, params['block'], looped)
  block = jax.tree.map(lambda *stacks: np.concatenate(stacks), *parts)
  kept = {k: v for k, v in params.items() if k in ('embed', 'norm', 'head')}
  return flat, {'params': {**kept, 'block': block}}


def _unroll(cfg, block: dict, adapters: dict) -> dict:
  """The looped block as a plain run of loops * layers_per_loop layers."""
  layers = {}
  for group, kernels in block['layers'].items():
    layers[group] = {
        name: {'kernel': _unroll_kernel(
            cfg, name, leaves['kernel'], adapters.get(name, {}))}
        for name, leaves in kernels.items()}
  if cfg.has_loop_vectors:
    own = {name: {k: v for k, v in leaves.items() if k not in 'ab'}
           for name, leaves in adapters.items()}
    vectors = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]),
                           {name: leaves for name, leaves in own.items()
                            if leaves})
  else:
    vectors = jax.tree.map(lambda v: np.concatenate([v] * cfg.loops),
                           block['vectors'])
  return {'layers': layers, 'vectors': vectors}


def _unroll_kernel(cfg, name, shared, leaves) -> np.ndarray:
  looped = np.broadcast_to(shared, (cfg.loops, *shared.shape))
  if 'a' in leaves:
    rows, columns = cfg.in_out(name)
    stack = (cfg.loops, cfg.layers_per_loop)
    a = leaves['a'].astype(np.float32).reshape(*stack, rows, -1)
    b = leaves['b'].astype(np.float32).reshape(*stack, -1, columns)
    looped = looped.astype(np.float32) + (a @ b).reshape(looped.shape)
  return looped.reshape(-1, *shared.shape[1:])
