"""Continues prompts, all at once."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from recursive_tx import exits
from recursive_tx.config import ModelConfig, Run
from recursive_tx.engine import sampling
from recursive_tx.engine.engine import Engine, Request
from recursive_tx.errors import UserError


def generate(
    cfg: ModelConfig, variables: dict, prompts: Sequence[Sequence[int]], *,
    max_new_tokens: int = 64, sampler: sampling.Sampler = sampling.Sampler(),
    exit: exits.Exit = exits.Exit(),
    eos_id: int | Sequence[int] | None = None,
    known_V: np.ndarray | None = None, run: Run = Run(), slots: int = 32,
) -> list[list[int]]:
  """Continues token prompts.

  Args:
    cfg, variables: any model of this library.
    prompts: token ids, one list a prompt, none empty.
    max_new_tokens: most tokens to add to each, at least 1.
    sampler: how tokens are drawn; its seed, plus the number of the prompt.
    exit: when a token exits the loops.
    eos_id: a token that ends a continuation and is not returned, or several.
    known_V: tokens that may be generated, bool [V]; None is all of them.
    run: how the model is executed.
    slots: prompts that are continued at the same time, at least 1.

  Returns:
    The new tokens of each prompt.

  Raises:
    UserError: no prompts, an empty one, or ids outside the vocabulary.
  """
  if not len(prompts):
    raise UserError('there is no prompt; give at least one')
  longest = max(len(prompt) for prompt in prompts) + max_new_tokens
  engine = Engine(
      cfg, variables, slots=min(slots, len(prompts)), exit=exit, eos_id=eos_id,
      known_V=known_V,
      # Compiled once for each multiple of 64, not for each length.
      max_len=-(-longest // 64) * 64, run=run)
  news = {
      engine.submit(Request(
          prompt, max_new_tokens,
          dataclasses.replace(sampler, seed=sampler.seed + i))): []
      for i, prompt in enumerate(prompts)}
  while engine.pending:
    for event in engine.poll():
      if event.finish != 'stop':
        news[event.id].append(event.token)
  return list(news.values())
