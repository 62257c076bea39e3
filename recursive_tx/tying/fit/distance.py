"""How far a recursive model is from its original, one layer at a time."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.tying.fit import layers


def final(
    cfg: config_lib.ModelConfig, read: layers.Read, token_QT: np.ndarray
) -> np.ndarray:
  """The output of a vanilla model's last layer, [Q, T, D] fp32."""
  stream = layers.stream(cfg, read, layers.ends(cfg, read), token_QT)
  return collections.deque(stream, maxlen=1).pop()


def divergence(
    cfg: config_lib.ModelConfig, read: layers.Read, one_QTD: np.ndarray,
    other_QTD: np.ndarray,
) -> float:
  """KL(one || other) in nats a token, the mean, of two models' `final`.

  Args:
    cfg, read: a model whose final norm and head both models share.
    one_QTD, other_QTD: fp32, of the same tokens.
  """
  variables = layers.ends(cfg, read)
  Q, T, _ = one_QTD.shape
  nats = sum(
      float(_divergence(cfg, variables, one_QTD[rows], other_QTD[rows]))
      for rows in layers.batches(one_QTD[..., 0], 4 * T * cfg.V))
  return nats / (Q * T)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(cfg, variables, x_BTD, y_BTD):
  one, other = (layers.logprobs(cfg, variables, z) for z in (x_BTD, y_BTD))
  return jnp.sum(jnp.exp(one) * (one - other))
