"""Second moments of kernels' inputs and of the gradients in their outputs.

One pass forward through the original and one back, a layer at a time.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.tying.fit import layers

# Wider inputs and outputs have the diagonal of their moment only: the whole
# one of Gemma 2B's MLP would take 1 GiB a layer, and 4 TFLOP to factor.
_WIDEST = 4096
# Hidden units' gradients depend less on each other, and have the diagonal only
# where there are more than this: their products were half of the time.
_WIDEST_HIDDEN = 1024


def is_wide(size: int) -> bool:
  """Whether an input or output of that size has its moment's diagonal only."""
  return size > _WIDEST


def has_diagonal(name: str, columns: int) -> bool:
  """Whether a kernel's output has its moment's diagonal only."""
  return is_wide(columns) or (
      name in ('gate', 'up') and columns > _WIDEST_HIDDEN)


class Moments:
  """Those of every layer, and its input, in files of a directory, fp32."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def input(self, kernel: str, layer: int) -> np.ndarray:
    """E[x x^T] of a kernel's input, [rows, rows], or its diagonal [rows]."""
    return np.load(self._path(layers.INPUT[kernel], layer, 'input'))

  def mean(self, kernel: str, layer: int) -> np.ndarray:
    """E[x] of a kernel's input, [rows]."""
    return np.load(self._path(layers.INPUT[kernel], layer, 'mean'))

  def output(self, kernel: str, layer: int) -> np.ndarray:
    """E[g g^T] of the gradient in its output: [columns, columns], or its
    diagonal [columns]."""
    return np.load(self._path(kernel, layer, 'output'))

  def stream(self, layer: int) -> np.ndarray:
    """The layer's input, the residual stream, [Q, T, D]."""
    return np.load(self._directory / f'{layer}.npy')

  def put(self, kernel: str, layer: int, side: str, value: np.ndarray):
    """Stores a moment; `side`: 'input', 'mean' or 'output'."""
    np.save(self._path(kernel, layer, side), value.astype(np.float32))

  def put_stream(self, layer: int, x_QTD: np.ndarray):
    """Stores a layer's input."""
    np.save(self._directory / f'{layer}.npy', x_QTD)

  def _path(self, kernel, layer, side):
    return self._directory / f'{layer}.{kernel}.{side}.npy'


def measure(
    cfg: config_lib.ModelConfig, read: layers.Read, token_QT: np.ndarray,
    directory: pathlib.Path, *, seed: int,
    report: Callable[[float], Any] = lambda share: None,
) -> Moments:
  """Runs the vanilla model over the tokens and back.

  The gradients are of -log p(next token), the token drawn from the model's
  own distribution, so that their second moments are a factor of the Fisher
  matrix, by which the KL divergence grows with a change of the kernel.

  Args:
    cfg, read: the model.
    token_QT: int32 token ids, sequences of one length.
    directory: for what `Moments` has; holds nothing else.
    seed: of the drawn tokens.
    report: given the share of the work done since the last report.
  """
  variables, moments = layers.ends(cfg, read), Moments(directory)
  for layer, x_QTD in enumerate(
      layers.stream(cfg, read, variables, token_QT)):
    if layer < cfg.num_layers:
      moments.put_stream(layer, x_QTD)
    report(0.25 / (cfg.num_layers + 1))
  d_QTD = _drawn(cfg, variables, token_QT, x_QTD, seed)
  for layer in reversed(range(cfg.num_layers)):
    values = jax.device_put(layers.read_layer(cfg, read, layer))
    x_QTD, sums = moments.stream(layer), _zeros(cfg)
    for rows in layers.batches(token_QT):
      d_QTD[rows], sums = _add(cfg, values, sums, x_QTD[rows], d_QTD[rows])
    for side, totals in sums.items():
      for name, total in totals.items():
        moments.put(name, layer, side, np.asarray(total) / token_QT.size)
    report(0.75 / cfg.num_layers)
  return moments


def _zeros(cfg) -> dict[str, dict[str, jax.Array]]:
  """Sums of no tokens, by side and kernel."""
  def moment(size, diagonal):
    return jnp.zeros(size if diagonal else (size, size))
  sizes = {name: cfg.in_out(name) for name in cfg.kernels}
  inputs = {name: rows for name, (rows, _) in sizes.items()
            if layers.INPUT[name] == name}
  return {
      'input': {name: moment(rows, is_wide(rows))
                for name, rows in inputs.items()},
      'mean': {name: jnp.zeros(rows) for name, rows in inputs.items()},
      'output': {name: moment(columns, has_diagonal(name, columns))
                 for name, (_, columns) in sizes.items()}}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add(cfg, values, sums, x_BTD, d_BTD):
  """One batch: the gradient in the layer's input, and the sums."""
  def more(total, x):
    return total + (
        x.T @ x if total.ndim == 2 else jnp.sum(x * x, axis=0))
  d_BTD, inputs, outputs = layers.backward(cfg, values, x_BTD, d_BTD)
  return d_BTD, {
      'input': jax.tree.map(more, sums['input'], inputs),
      'mean': jax.tree.map(lambda total, x: total + x.sum(axis=0),
                           sums['mean'], inputs),
      'output': jax.tree.map(more, sums['output'], outputs)}


def _drawn(cfg, variables, token_QT, x_QTD, seed) -> np.ndarray:
  """Gradient in the last layer's output, [Q, T, D]."""
  row_bytes = 4 * token_QT.shape[1] * cfg.V
  return np.concatenate([
      # Each is waited for: the logits of several are too much to hold.
      np.asarray(_gradient(
          cfg, variables, x_QTD[rows],
          jax.random.fold_in(jax.random.key(seed), rows.start)))
      for rows in layers.batches(token_QT, row_bytes)])


@functools.partial(jax.jit, static_argnums=0)
def _gradient(cfg, variables, x_BTD, key):
  def nats(x_BTD):
    scores_BTV = layers.logprobs(cfg, variables, x_BTD)
    drawn_BT = jax.random.categorical(key, jax.lax.stop_gradient(scores_BTV))
    return -jnp.take_along_axis(scores_BTV, drawn_BT[..., None], -1).sum()
  return jax.grad(nats)(x_BTD)
