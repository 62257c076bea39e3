"""A few steps of distillation, in which all of the looped layers learn at once.

What comes before it fits one kernel, or one layer, at a time. Here the loss is
the one that counts, the KL divergence from the original's predictions, and its
gradient reaches every part but embedding, final norm and head.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_tx import config as config_lib
from recursive_tx import losses, model

# Larger models would not fit: a parameter takes 16 bytes here.
_MOST_PARAMETERS = 1 << 29
# Tokens of a step. One pass over the calibration tokens, since a second learns
# them by heart; but not fewer steps.
_BATCH, _LEAST_STEPS = 512, 24
_RATE, _WARMUP = 2e-4, 0.1
# Bytes of fp32 logits at once.
_LOGITS = 64 << 20
_LOSS = losses.LossConfig(next_token=(), distill=(1.0,))
# Embedding, final norm and head stay the original's.
_FIXED = ('embed', 'norm', 'head')


def polishes(rcfg: config_lib.ModelConfig) -> bool:
  """Whether the model is small enough."""
  sizes = [np.prod(shape) for shape in model.flat_shapes(rcfg).values()]
  return sum(sizes) <= _MOST_PARAMETERS


def polish(
    rcfg: config_lib.ModelConfig, params: dict, token_QT: np.ndarray,
    final_QTD: np.ndarray, *, seed: int,
    report: Callable[[float], Any] = lambda share: None,
) -> dict:
  """Distils for a pass over the tokens, or some passes over a few.

  Args:
    rcfg, params: the recursive model, fp32.
    token_QT: int32 token ids.
    final_QTD: the original's output of its last layer, see `distance.final`.
    seed: of the order of the sequences.
    report: given the share of the work done since the last report.

  Returns:
    New params, fp32 numpy.
  """
  Q, T = token_QT.shape
  rows = min(Q, max(1, _BATCH // T))
  steps = max(_LEAST_STEPS, Q // rows)
  rng = np.random.default_rng(seed)
  order = np.concatenate([
      rng.permutation(Q) for _ in range(-(-steps * rows // Q))])
  fixed, trained = ({key: value for key, value in params.items() if (
      key in _FIXED) == kept} for kept in (True, False))
  run = config_lib.Run(remat='dots', logits_mib=_LOGITS >> 20)
  start, update = _training(rcfg, run, steps, run.chunk(T, 4 * rows * rcfg.V))
  fixed, trained = jax.device_put((fixed, trained))
  state = start(trained)
  for step in range(steps):
    at = order[step * rows:(step + 1) * rows]
    # Waited for, so that what is reported is done.
    trained, state = jax.block_until_ready(update(
        trained, state, fixed, token_QT[at], final_QTD[at]))
    report(1 / steps)
  return {**params, **jax.tree.map(np.asarray, trained)}


@functools.cache
def _training(rcfg, run, steps, chunk):
  """The optimizer's first state, and a step, (trained, state, fixed, tokens,
  original's output) -> the first two."""
  decoder = model.Decoder(rcfg, run)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(
      0.0, _RATE, max(1, int(steps * _WARMUP)), steps), b2=0.95)

  def loss(trained, fixed, token_BT, final_BTD):
    h_LBTD = decoder.apply(
        {'params': {**fixed, **trained}}, token_BT, method='hidden')

    def logits(_, h_BTD):
      return decoder.apply({'params': fixed}, h_BTD, method='logits')

    def original(fixed, x_BTD):
      return logits(None, model.normalize(rcfg, x_BTD, fixed['norm']))

    batch = {'target_BT': token_BT, 'weight_BT': jnp.ones(token_BT.shape)}
    return losses.total(
        _LOSS, h_LBTD[-1:], batch, losses.Head(None, logits),
        norm=jnp.float32(token_BT.size), chunk=chunk,
        teacher=(final_BTD, losses.Head(fixed, original)))[0]

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(trained, state, fixed, token_BT, final_BTD):
    d = jax.grad(loss)(trained, fixed, token_BT, final_BTD)
    updates, state = optimizer.update(d, state, trained)
    return optax.apply_updates(trained, updates), state

  return optimizer.init, update
