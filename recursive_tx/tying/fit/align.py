"""Hidden units of tied MLPs, permuted to match before the layers share.

Hidden units have no order: a layer whose units are permuted, in all its
kernels alike, computes the same. So each tied layer's are put where they are
most like those of the layers before it.
"""

import numpy as np
import scipy.optimize

from recursive_tx import config as config_lib
from recursive_tx.tying import kernels
from recursive_tx.tying.fit import matrices
from recursive_tx.tying.fit.layers import Read
from recursive_tx.tying.fit.moments import Moments

# Wider MLPs stay as they are: matching takes up to the cube of the units, and
# their square in memory (17 s and 1.5 GiB for so many).
_WIDEST = 8192


class Aligned:
  """A model's layers and moments, with hidden units in the given orders."""

  def __init__(
      self, read: Read, moments: Moments, orders: dict[int, np.ndarray]
  ):
    """`orders`: [F] of each permuted layer, which unit comes where."""
    self._read, self._moments, self._orders = read, moments, orders

  def read(self, path: str, layer: int | None) -> np.ndarray:
    """As the model's own."""
    value = self._read(path, layer)
    if layer not in self._orders:
      return value
    name = path.split('/')[-2]
    if name in ('gate', 'up'):  # Kernels' columns, and biases.
      return value[..., self._orders[layer]]
    return value[self._orders[layer]] if path.endswith(
        'down/kernel') else value

  def input(self, kernel: str, layer: int) -> np.ndarray:
    """As `Moments.input`."""
    return self._permuted(
        self._moments.input(kernel, layer), layer, kernel == 'down')

  def mean(self, kernel: str, layer: int) -> np.ndarray:
    """As `Moments.mean`."""
    return self._permuted(
        self._moments.mean(kernel, layer), layer, kernel == 'down')

  def output(self, kernel: str, layer: int) -> np.ndarray:
    """As `Moments.output`."""
    return self._permuted(self._moments.output(kernel, layer), layer,
                       kernel in ('gate', 'up'))

  def stream(self, layer: int) -> np.ndarray:
    """As `Moments.stream`: the residual stream is not permuted."""
    return self._moments.stream(layer)

  def _permuted(self, moment, layer, hidden):
    order = self._orders.get(layer)
    if order is None or not hidden:
      return moment
    return moment[order] if moment.ndim == 1 else moment[
        np.ix_(order, order)]


def orders(
    rcfg: config_lib.ModelConfig, read: Read, moments: Moments
) -> dict[int, np.ndarray]:
  """Which unit comes where, [F], of each tied layer but the first of a place.

  Args:
    rcfg: which layers are tied.
    read, moments: of the vanilla model.
  """
  found = {}
  if rcfg.F <= _WIDEST:
    for place in range(rcfg.layers_per_loop):
      found.update(_orders(
          rcfg, read, moments, kernels.virtual(rcfg, place)))
  return found


def _orders(rcfg, read, moments, tied):
  """Orders of the tied layers but the first, one after the other.

  If units u and v, of weights a and b, share a vector, the best is their
  weighted mean, and the error a b / (a + b) ||u - v||^2 (Ward, 1963). A
  matched pair then counts as one unit, with the sum of the weights.
  """
  names = [name for name in ('gate', 'up', 'down') if name in rcfg.kernels]
  found, merged = {}, {}
  metrics = {name: sum(
      (moments.output if name == 'down' else moments.input)(name, layer)
      .astype(np.float64) for layer in tied) for name in names}
  for layer in tied:
    cost, new = 0.0, {}
    for name in names:
      units, weights = _units(rcfg, read, moments, name, layer)
      new[name] = units, weights
      if merged:
        cost = cost + _costs(*merged[name], units, weights, metrics[name])
    if merged:
      order = scipy.optimize.linear_sum_assignment(cost)[1]
      found[layer] = order
      new = {name: (units[order], weights[order])
             for name, (units, weights) in new.items()}
    for name, (units, weights) in new.items():
      if merged:
        old, before = merged[name]
        total = np.maximum(before + weights, np.finfo(np.float64).tiny)
        units = ((before[:, None] * old + weights[:, None] * units)
                 / total[:, None])
        weights = total
      new[name] = units, weights
    merged = new
  return found


def _units(rcfg, read, moments, name, layer):
  """A kernel's vector of each hidden unit, [F, D], and its weight, [F]."""
  units = kernels.matrix(rcfg, read, name, layer)
  if name == 'down':
    moment = moments.input(name, layer)
  else:
    units, moment = units.T, moments.output(name, layer)
  return (units.astype(np.float64),
          matrices.diagonal(moment).astype(np.float64))


def _costs(one, a, other, b, metric):
  """Error of every pair of units, [F, F]."""
  weighted = matrices.columns(other, metric)
  squares = (
      np.einsum('fd,fd->f', matrices.columns(one, metric), one)[:, None]
      - 2 * one @ weighted.T + np.einsum('fd,fd->f', weighted, other))
  total = np.maximum(a[:, None] + b, np.finfo(np.float64).tiny)
  return a[:, None] * b / total * squares
