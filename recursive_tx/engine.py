"""Generation: prefill the prompts, then one token a step for all of them.

Knows nothing of tokenizers or text.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import model, sampling


def generate(
    cfg: config_lib.ModelConfig, variables: dict,
    prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64,
    sampler: sampling.Sampler = sampling.Sampler(),
    eos_id: int | None = None, seed: int = 0,
    run: config_lib.Run = config_lib.Run(),
) -> list[list[int]]:
  """Continues token prompts.

  Args:
    cfg, variables: any model of this library.
    prompts: token ids, one list a prompt, none empty.
    max_new_tokens: most tokens to add to each.
    sampler: how tokens are drawn.
    eos_id: ends a continuation, and is not returned.
    seed: of the draws.
    run: how the model is executed.

  Returns:
    The new tokens of each prompt.

  Raises:
    ValueError: no prompts, an empty one, or ids outside the vocabulary.
  """
  _check(cfg, prompts, max_new_tokens)
  length_B = np.array([len(prompt) for prompt in prompts], np.int32)
  # Compiled once for each multiple of 64, not for each length.
  longest = -(-int(length_B.max()) // 64) * 64
  token_BT = np.zeros((len(prompts), longest), np.int32)
  for row, prompt in zip(token_BT, prompts, strict=True):
    row[:len(prompt)] = prompt
  slots = longest + -(-max_new_tokens // 64) * 64
  cache = model.init_cache(cfg, len(prompts), slots, run.dtype)
  key = jax.random.key(seed)
  new_B, cache = _prefill(
      cfg, run, sampler, variables, token_BT, length_B, cache, key)
  new, done_B = [], np.zeros(len(prompts), bool)
  for i in range(max_new_tokens):
    new.append(np.asarray(new_B))
    done_B |= new[-1] == (-1 if eos_id is None else eos_id)
    if done_B.all() or i + 1 == max_new_tokens:
      break
    new_B, cache = _step(cfg, run, sampler, variables, new_B, length_B + i,
                         cache, jax.random.fold_in(key, i))
  return [_until(row.tolist(), eos_id) for row in np.stack(new, axis=1)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _prefill(cfg, run, sampler, variables, token_BT, length_B, cache, key):
  """Fills the cache with the prompts, and draws the first token of each."""
  position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]),
                                 token_BT.shape)
  logits_BTV, cache = model.Decoder(cfg, run).apply(
      variables, token_BT, position_BT, cache, method='decode')
  last_BV = logits_BTV[jnp.arange(len(length_B)), length_B - 1]
  return sampling.sample(sampler, last_BV, key), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _step(cfg, run, sampler, variables, token_B, position_B, cache, key):
  logits_BTV, cache = model.Decoder(cfg, run).apply(
      variables, token_B[:, None], position_B[:, None], cache,
      method='decode')
  return sampling.sample(sampler, logits_BTV[:, 0], key), cache


def _check(cfg, prompts, max_new_tokens) -> None:
  if not len(prompts) or not all(len(prompt) for prompt in prompts):
    raise ValueError('there is an empty prompt; give at least one token each')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}; expected at least 1')
  highest = max(max(prompt) for prompt in prompts)
  lowest = min(min(prompt) for prompt in prompts)
  if lowest < 0 or highest >= cfg.V:
    raise ValueError(f'token ids {lowest}..{highest} are outside the '
                     f"model's vocabulary of {cfg.V}")


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
  return tokens[:tokens.index(eos_id)] if eos_id in tokens else tokens
