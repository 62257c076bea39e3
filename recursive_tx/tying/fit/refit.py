"""Layers fitted again, one by one, for the inputs that they will really get.

The layers before a converted one give it another residual stream than the
original's. So its factors are fitted by least squares: from that stream, the
kernel's output shall be the original's. Kernels that write to the stream also
compensate its error so far (as GPTQ does within a kernel; Frantar et al.,
2022). Where kernels have no factors, the loop's norm before them is fitted.
A loop's own biases keep the means of its kernels' outputs.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from recursive_tx import config as config_lib
from recursive_tx.files import paths
from recursive_tx.tying import kernels
from recursive_tx.tying.fit import align, layers, matrices, moments
from recursive_tx.tying.fit.share import factors

# Kernels that are fitted at once; the next ones read what these give.
_STAGES = (('q', 'k', 'v'), ('o',), ('gate', 'up'), ('down',))
_NORMS = {'v': 'attn_norm', 'up': 'mlp_norm'}  # By a stage's last kernel.
# Pulls a kernel towards the original's, as a share of the input moment's mean
# diagonal: some thousand tokens determine few directions. Of 0.001 to 1, the
# best on held-out text.
_DAMPING = 0.3
# The same for a norm's scales, of which there are few.
_NORM_DAMPING = 0.01


def refitted(rcfg: config_lib.ModelConfig) -> list[str]:
  """Kernels that have factors, and a whole input moment to fit them by."""
  return [name for name, rank in rcfg.ranks.items()
          if rank and not moments.is_wide(rcfg.in_out(name)[0])]


def fits_norms(rcfg: config_lib.ModelConfig) -> bool:
  """Whether loops have norms of their own, and a whole moment to fit them by.
  """
  return rcfg.has_loop_vectors and not moments.is_wide(rcfg.D)


def fits_bias(rcfg: config_lib.ModelConfig, name: str) -> bool:
  """Whether a kernel has a bias that is each loop's own."""
  return rcfg.has_loop_vectors and rcfg.has_bias(name)


def refit(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig,
    original: align.Aligned, converted: layers.Read, store: kernels.Store,
    report: Callable[[float], Any] = lambda share: None,
) -> dict[tuple[str, int], np.ndarray]:
  """Puts factors into `store`, of the kernels that `refitted` names.

  Args:
    cfg, original: the original.
    rcfg: the recursive model.
    converted: its layers, unrolled.
    store: its kernels.
    report: given the share of the work done since the last report.

  Returns:
    The loops' norms and biases, if they have their own, by path and layer.
  """
  vectors = {}
  last = rcfg.prelude + rcfg.loops * rcfg.layers_per_loop - 1
  y_QTD = original.stream(rcfg.prelude)
  for layer in range(rcfg.prelude, last + 1):
    values = layers.read_layer(cfg, original.read, layer)
    ours = layers.read_layer(cfg, converted, layer)
    _refit(rcfg, layer, values, ours, store, original.output, functools.partial(
        _sums, cfg, jax.device_put(values), ours, original.stream(layer),
        y_QTD))
    for path, value in paths.items(ours['vectors']) if (
        rcfg.has_loop_vectors) else ():
      vectors[f'block/vectors/{path}', layer] = value
    ours = jax.device_put(ours)
    for rows in layers.batches(y_QTD[..., 0]) if layer < last else ():
      y_QTD[rows] = layers.forward(cfg, ours, y_QTD[rows])
    report(1 / rcfg.loops / rcfg.layers_per_loop)
  return vectors


def _refit(rcfg, layer, values, ours, store, output, sums_of):
  """One layer: its factors into `store`; the layer itself into `ours`."""
  loop, place = divmod(layer - rcfg.prelude, rcfg.layers_per_loop)
  for name in refitted(rcfg):  # Until it is fitted, it is the original's.
    paths.put(ours, _path(name), paths.get(values, _path(name)))
  for stage in _STAGES:
    stage = [name for name in stage if name in rcfg.kernels]
    names = [name for name in stage if name in refitted(rcfg)]
    norm = _NORMS.get(stage[-1])
    if names or not fits_norms(rcfg) or norm not in rcfg.norms:
      norm = None
    biased = fits_bias(rcfg, stage[0])
    if not (names or norm or biased):
      continue
    sums = sums_of(stage[0])
    around = _centred(sums) if biased and (names or norm) else sums
    for name in names:
      matrix, shared = _matrix(rcfg, name, values), store.shared(name, place)
      flat = shared.reshape(matrix.shape)
      a, b = factors(
          matrix + _solved(around.square, _pull(
              rcfg, name, values, ours, around)),
          flat, around.square, output(name, layer), rcfg.ranks[name])
      store.replace(name, place, loop, kernels.kept(
          rcfg, name, matrix - flat, a, b))
      paths.put(ours, _path(name), (flat + a @ b).reshape(shared.shape))
    factor = 1.0
    if norm:
      factor = _factor(around.square, [
          (_pull(rcfg, name, values, ours, around), _matrix(rcfg, name, ours),
           output(name, layer)) for name in stage])
      _scale(rcfg, ours['vectors'][norm], factor)
    for name in stage if biased else ():
      _balance(rcfg, name, values, ours, sums, sums.mean * factor)


def _balance(rcfg, name, values, ours, sums, mean):
  """Sets the bias that keeps the mean of the kernel's output; `mean`: of its
  input."""
  bias = values['vectors'][name]['bias']
  given = (sums.mean + sums.shift) @ _matrix(rcfg, name, values) + sums.lack
  ours['vectors'][name]['bias'] = (bias + np.reshape(
      given - mean @ _matrix(rcfg, name, ours), bias.shape)).astype(np.float32)


def _scale(rcfg, norm, factor):
  """Multiplies a norm's output, by its leaves."""
  for leaf, value in norm.items():
    # What is stored may be the scale less 1.
    base = rcfg.norm == 'rms+1' and leaf == 'scale'
    norm[leaf] = ((base + value) * factor - base).astype(np.float32)


def _factor(moment, found):
  """The factor f, [D], of a norm's output z, so that kernels' outputs are the
  wanted ones: least squares, each kernel's errors weighted by S.

  `moment` is C, of z. `found` has for each kernel its `_pull`, itself M, and
  S, the second moment of the gradient in its output. sum_k z_k M_k (f_k - 1)
  shall be z X, X what would be added to M: the system is the sum of
  C * (M S M^T), elementwise.
  """
  system, wanted = 0.0, 0.0
  for pull, kernel, output_moment in found:
    weighted = matrices.columns(
        kernel.astype(np.float64), output_moment.astype(np.float64))
    system = system + moment * (weighted @ kernel.T)
    wanted = wanted + (weighted * (moment @ _solved(moment, pull))).sum(axis=1)
  return 1 + scipy.linalg.solve(
      matrices.damped(system, _NORM_DAMPING), wanted, assume_a='pos')


def _path(name):
  """Where `layers.read_layer` puts a kernel."""
  return kernels.path(name).removeprefix('block/')


def _matrix(cfg, name, values):
  """A kernel, [rows, columns]."""
  return paths.get(values, _path(name)).reshape(cfg.in_out(name))


class _Sums(NamedTuple):
  """Means over tokens, of a kernel's input z in the converted model and x in
  the original, and of s, the original's stream less the converted one (0 for
  kernels that do not write to it). The last three are [1] where z is wide.

  Attributes:
    mean, shift, lack: E[z], E[x - z], E[s].
    square, cross_shift, cross_lack: E[z z^T], E[z (x - z)^T], E[z s^T].
  """
  mean: np.ndarray
  shift: np.ndarray
  lack: np.ndarray
  square: np.ndarray
  cross_shift: np.ndarray
  cross_lack: np.ndarray


def _sums(cfg, values, ours, x_QTD, y_QTD, name) -> _Sums:
  total, ours = None, jax.device_put(ours)
  for rows in layers.batches(x_QTD[..., 0]):
    new = _batch_sums(*layers.both_inputs(
        cfg, values, ours, x_QTD[rows], y_QTD[rows], name))
    total = jax.tree.map(jnp.add, total, new) if total else new
  return jax.tree.map(
      lambda value: np.asarray(value) / x_QTD[..., 0].size, total)


@jax.jit
def _batch_sums(x, z, s) -> _Sums:
  right = [z, x - z, jnp.zeros((len(z), 1)) if s is None else s]
  return _Sums(*(y.sum(axis=0) for y in right), *(
      jnp.zeros(1) if moments.is_wide(z.shape[1]) else z.T @ y
      for y in right))


def _centred(sums: _Sums) -> _Sums:
  """The same of z less its mean, where a bias is fitted as well."""
  return _Sums(
      np.zeros_like(sums.mean), sums.shift, sums.lack,
      *(value - np.outer(sums.mean, mean) for value, mean in zip(
          sums[3:], sums[:3], strict=True)))


def _pull(cfg, name, values, ours, sums):
  """E[z g^T], [rows, columns], g = x W + b + s - (z M + c): what the kernel's
  output lacks. fp32: some thousand tokens are no more exact."""
  kernel, mine = (_matrix(cfg, name, layer) for layer in (values, ours))
  pull = _change(sums, kernel, kernel - mine)
  if cfg.has_bias(name):
    pull += np.outer(sums.mean, np.ravel(
        values['vectors'][name]['bias'] - ours['vectors'][name]['bias']))
  return pull


@jax.jit
def _change(sums, kernel, change):
  """What is lacking without biases; `change` is 0 where factors are fitted."""
  return (sums.cross_shift @ kernel + sums.cross_lack
          + sums.square @ change)


@jax.jit
def _solved(moment, pull):
  """What to add to the kernel: damped least squares, [rows, columns]."""
  # So damped, the system is well conditioned in fp32.
  mean = jnp.trace(moment) / len(moment)
  least = _DAMPING * jnp.where(mean > 0, mean, 1.0)
  return jax.scipy.linalg.solve(
      moment + least * jnp.eye(len(moment)), pull, assume_a='pos')
