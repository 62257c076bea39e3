"""How far an exported model is from the one that it was made of."""

from collections.abc import Callable, Iterator
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import model
from recursive_tx.errors import UserError

PROMPTS, LENGTH = 2, 512

# int token_BT to logits_BTV of any float type.
Logits = Callable[[np.ndarray], Any]


def difference(
    cfg: config_lib.ModelConfig, variables: dict, other: Logits, *,
    progress: Callable[[int, int], Any] = lambda total, done: None,
) -> dict[str, float]:
  """Compares logits on long prompts, fp32.

  Args:
    cfg, variables: the model.
    other: logits of what was made of it.
    progress: called with the tokens there are, and those just compared.

  Returns:
    'max_logit_difference', 'max_logit' (of the model), 'kl' and 'max_kl', the
    mean and the largest KL(model || other) of a token in nats, 'prompts' and
    'length' (tokens of each, drawn uniformly from the vocabulary).
  """
  ours, rows = logits(cfg, variables), []
  for token_BT in _prompts(cfg):
    rows.append(_compare(jnp.asarray(ours(token_BT)), jnp.asarray(
        np.asarray(other(token_BT), np.float32))))
    progress(PROMPTS * LENGTH, token_BT.size)
  gap, largest, mean_kl, max_kl = np.transpose(rows)
  return {
      'max_logit_difference': float(gap.max()),
      'max_logit': float(largest.max()), 'kl': float(mean_kl.mean()),
      'max_kl': float(max_kl.max()), 'prompts': PROMPTS, 'length': LENGTH}


def logits(cfg: config_lib.ModelConfig, variables: dict) -> Logits:
  """Those that this library computes."""
  apply = jax.jit(lambda variables, token_BT: model.Decoder(
      cfg.opened_for(token_BT.shape[1])).apply(variables, token_BT))
  return lambda token_BT: apply(variables, jnp.asarray(token_BT, jnp.int32))


def transformers_logits(directory: str | os.PathLike) -> Logits:
  """Those that transformers computes, with the directory's own code."""
  check_transformers()
  import torch
  import transformers

  made = transformers.AutoModelForCausalLM.from_pretrained(
      directory, trust_remote_code=True, dtype=torch.float32).eval()

  def apply(token_BT):
    with torch.no_grad():
      return made(torch.tensor(token_BT).long(), use_cache=False).logits.numpy()

  return apply


def check_transformers() -> None:
  """Raises UserError where torch and transformers are not installed."""
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError:
    raise UserError(
        '--check of --form=recursive runs the model in transformers; pip'
        ' install torch transformers, or leave --check out') from None


def table(found: dict[str, float]) -> str:
  """What `difference` found, as text."""
  return '\n'.join(f'{name}: {value:.3g}' for name, value in found.items())


def _prompts(cfg: config_lib.ModelConfig) -> Iterator[np.ndarray]:
  for seed in range(PROMPTS):
    yield np.random.default_rng(seed).integers(0, cfg.V, (1, LENGTH))


@jax.jit
def _compare(ours_BTV, theirs_BTV):
  """Largest difference, largest logit, mean and largest KL."""
  one, two = (jax.nn.log_softmax(x) for x in (ours_BTV, theirs_BTV))
  kl_BT = jnp.sum(jnp.exp(one) * (one - two), axis=-1)
  return jnp.stack([
      jnp.abs(ours_BTV - theirs_BTV).max(), jnp.abs(ours_BTV).max(),
      kl_BT.mean(), kl_BT.max()])
