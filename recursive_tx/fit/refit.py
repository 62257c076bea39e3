"""Layers anew, one by one, for the inputs that they will really get.

The layers before a converted one give it another stream than the original's.
So its factors are fitted to do to that stream what brings it to where the
original's is after the same kernel; those that write to it also make up for
what went astray before (as GPTQ does within a kernel; Frantar et al., 2022).
Where kernels have no factors, the loop's norm before them does what it can.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np
import scipy.linalg

from recursive_tx import config as config_lib
from recursive_tx import tree
from recursive_tx.fit import align, kernels, layers, matrices, moments
from recursive_tx.fit.share import factors

# Kernels that are fitted at once; the next ones read what these give.
_STAGES = (('q', 'k', 'v'), ('o',), ('gate', 'up'), ('down',))
_NORMS = {'q': 'attn_norm', 'gate': 'mlp_norm'}  # By a stage's first kernel.
# Pulls what a kernel shall do to what the original's does, as a share of the
# input moment's mean diagonal: some thousand tokens say little of most
# directions. Of 0.001 to 1, the best on held-out text.
_DAMPING = 0.3
# The same for what a norm's scales shall do, of which there are few.
_NORM_DAMPING = 0.01


def refitted(rcfg: config_lib.ModelConfig) -> list[str]:
  """Kernels that have factors, and a whole input moment to fit them by."""
  return [name for name, rank in rcfg.ranks.items()
          if rank and not moments.is_wide(rcfg.in_out(name)[0])]


def fits_norms(rcfg: config_lib.ModelConfig) -> bool:
  """Whether loops have norms of their own, and a whole moment to fit them by.
  """
  return rcfg.has_loop_vectors and not moments.is_wide(rcfg.D)


def refit(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig,
    original: align.Aligned, converted: layers.Read, store: kernels.Store,
    tell: Callable[[float], Any] = lambda share: None,
) -> dict[tuple[str, int], np.ndarray]:
  """Puts factors into `store`, of the kernels that `refitted` names.

  Args:
    cfg, original: the original.
    rcfg: the recursive model.
    converted: its layers, unrolled.
    store: its kernels.
    tell: told the share of the work done since it was last told.

  Returns:
    The loops' norms, if they have their own, by path and layer.
  """
  norms = {}
  last = rcfg.prelude + rcfg.loops * rcfg.layers_per_loop - 1
  y_NTD = original.stream(rcfg.prelude)
  for layer in range(rcfg.prelude, last + 1):
    values = layers.read_layer(cfg, original.read, layer)
    ours = layers.read_layer(cfg, converted, layer)
    _refit(rcfg, layer, values, ours, store, original.output, functools.partial(
        _sums, cfg, jax.device_put(values), ours, original.stream(layer),
        y_NTD))
    for norm in _NORMS.values() if fits_norms(rcfg) else ():
      for leaf, value in ours['vectors'][norm].items():
        norms[f'block/vectors/{norm}/{leaf}', layer] = value
    ours = jax.device_put(ours)
    for rows in layers.batches(y_NTD[..., 0]) if layer < last else ():
      y_NTD[rows] = layers.forward(cfg, ours, y_NTD[rows])
    tell(1 / rcfg.loops / rcfg.layers_per_loop)
  return norms


def _refit(rcfg, layer, values, ours, store, output, sums):
  """One layer: its factors in `store`, its kernels and norms in `ours`."""
  loop, place = divmod(layer - rcfg.prelude, rcfg.layers_per_loop)
  for name in refitted(rcfg):  # Until its turn, a kernel is the original's.
    tree.put(ours, _path(name), tree.get(values, _path(name)))
  for stage in _STAGES:
    names = tuple(name for name in stage if name in refitted(rcfg))
    for name, (moment, pull) in sums(names).items():
      kernel = tree.get(values, _path(name))
      matrix = kernel.reshape(rcfg.in_out(name))
      shared = store.shared(name, place).reshape(matrix.shape)
      a, b = factors(
          matrix + _solved(moment, pull), shared, moment,
          output(name, layer), rcfg.ranks[name])
      store.replace(name, place, loop, kernels.kept(
          rcfg, name, matrix - shared, a, b))
      tree.put(ours, _path(name), (shared + a @ b).reshape(kernel.shape))
    if not names and stage[0] in _NORMS and fits_norms(rcfg):
      names = tuple(name for name in stage if name in rcfg.kernels)
      _scale(rcfg, ours['vectors'][_NORMS[stage[0]]], _factor([
          (*found, tree.get(ours, _path(name)).reshape(rcfg.in_out(name)),
           output(name, layer)) for name, found in sums(names).items()]))


def _scale(rcfg, norm, factor):
  """Multiplies what a norm gives, by its leaves."""
  for leaf, value in norm.items():
    # What is stored may be by how much a scale differs from 1.
    base = rcfg.norm == 'rms+1' and leaf == 'scale'
    norm[leaf] = ((base + value) * factor - base).astype(np.float32)


def _factor(found):
  """By what to multiply a norm's output, [D], so that kernels give what they
  should: least squares, each kernel's errors weighted by S.

  Of each kernel: the moment C of its input, what it is pulled to, itself M,
  and S. With z the input, sum_k z_k M_k (f_k - 1) shall be z X, X what would
  be added to M: the system is the sum of C * (M S M^T), elementwise.
  """
  system, wanted = 0.0, 0.0
  for moment, pull, kernel, moved in found:
    weighted = matrices.columns(
        kernel.astype(np.float64), moved.astype(np.float64))
    system = system + moment * (weighted @ kernel.T)
    wanted = wanted + (weighted * (moment @ _solved(moment, pull))).sum(axis=1)
  return 1 + scipy.linalg.solve(
      matrices.damped(system, _NORM_DAMPING), wanted, assume_a='pos')


def _path(name):
  """Where `layers.read_layer` puts a kernel."""
  return kernels.path(name).removeprefix('block/')


def _sums(cfg, values, ours, x_NTD, y_NTD, stage):
  """Of each kernel, E[z z^T] of its input z in the converted model, and
  E[z g^T], g what its output lacks while the kernel is the original's."""
  if not stage:
    return {}
  sums, ours = {}, jax.device_put(ours)
  for rows in layers.batches(x_NTD[..., 0]):
    found = layers.lacks(cfg, values, ours, x_NTD[rows], y_NTD[rows], stage)
    for name, (z, g) in found.items():
      z = np.asarray(z)
      square, pull = sums.get(name, (0.0, 0.0))
      sums[name] = (square + (z.T @ z).astype(np.float64),
                    pull + (z.T @ np.asarray(g)).astype(np.float64))
  tokens = x_NTD[..., 0].size
  return {name: (square / tokens, pull / tokens)
          for name, (square, pull) in sums.items()}


def _solved(moment, pull):
  """What to add to the kernel: damped least squares, [rows, columns]."""
  # So damped, the system is no harder than fp32 can tell.
  return scipy.linalg.solve(
      matrices.damped(moment, _DAMPING).astype(np.float32),
      pull.astype(np.float32), assume_a='pos')
