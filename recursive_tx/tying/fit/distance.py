"""How far a recursive model is from its original, one layer at a time."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.tying.fit import layers


def final(
    cfg: config_lib.ModelConfig, read: layers.Read, token_NT: np.ndarray
) -> np.ndarray:
  """The output of a vanilla model's last layer, [N, T, D] fp32."""
  stream = layers.stream(cfg, read, layers.ends(cfg, read), token_NT)
  return collections.deque(stream, maxlen=1).pop()


def divergence(
    cfg: config_lib.ModelConfig, read: layers.Read, one_NTD: np.ndarray,
    other_NTD: np.ndarray,
) -> float:
  """KL(one || other) in nats a token, the mean, of two models' `final`.

  Args:
    cfg, read: a model whose final norm and head both models share.
    one_NTD, other_NTD: fp32, of the same tokens.
  """
  variables = layers.ends(cfg, read)
  N, T, _ = one_NTD.shape
  nats = sum(
      float(_divergence(cfg, variables, one_NTD[rows], other_NTD[rows]))
      for rows in layers.batches(one_NTD[..., 0], 4 * T * cfg.V))
  return nats / (N * T)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(cfg, variables, x_BTD, y_BTD):
  one, other = (layers.logprobs(cfg, variables, z) for z in (x_BTD, y_BTD))
  return jnp.sum(jnp.exp(one) * (one - other))
