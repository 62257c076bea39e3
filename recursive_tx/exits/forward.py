"""A forward pass over whole sequences in which tokens exit early.

It equals generating them one by one, where keys and values of the loops that a
token skips are computed from its state at the exit (the engine's `propagate`):
a token that has exited stays as it is, and later loops read it like the others.

Knows the decoder and the rules; does not choose thresholds.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from recursive_tx import exits, model
from recursive_tx.config import ModelConfig, Run
from recursive_tx.errors import UserError
from recursive_tx.model import cpu, kv_cache


class Passed(NamedTuple):
  """A batch after the pass.

  Attributes:
    best_BT: likeliest next token at each token's exit, int32.
    depth_BT: after which loop that was, from 1, int32.
    best_EBT: likeliest next token after every loop but the final one; None
      without `every`.
    score_EBT: the rule's score there, fp32.
  """
  best_BT: jax.Array
  depth_BT: jax.Array
  best_EBT: jax.Array | None
  score_EBT: jax.Array


@functools.cache
def forward(cfg: ModelConfig, run: Run, rule: str, *, every: bool = False):
  """(variables, batch, thresholds_E) -> Passed, compiled.

  Args:
    cfg: the model.
    run: how it is executed.
    rule: one of exits.RULES that has a score. Where it reads logits and the
      model has a coda, this pass would give the coda wrong keys of tokens
      that exit later, and such a pair is refused.
    every: also returns `best_EBT`.

  Raises:
    UserError: a rule of logits for a model with a coda.
  """
  if cfg.coda and exits.Exit(rule).needs == 'logits':
    raise UserError(
        f'rule {rule!r} reads logits, and this model has a coda'
        f' (model.coda={cfg.coda}), which can only be run token by token;'
        " take rule 'gate'")
  def passed(
      variables: Any, batch: Mapping[str, jax.Array],
      thresholds_E: jax.Array
  ) -> Passed:
    opened = cfg.opened_for(batch['token_BT'].shape[1])
    decoder = model.Decoder(opened, run)
    best_of = functools.partial(_best, decoder, run)
    bound = decoder.bind(variables)
    context = model.whole(
        opened, batch['token_BT'].shape, batch['segment_BT'],
        batch['position_BT'])
    x_BTD, _ = bound.enter(batch['token_BT'], context)
    keys = kv_cache.of_first_loop(cfg, x_BTD, cfg.layers_per_loop, cfg.loops)
    depth_BT = jnp.full(batch['token_BT'].shape, cfg.loops)
    bests, scores = [], []
    for loop in range(cfg.loops):
      x_BTD, keys = bound.loop(x_BTD, loop, context.at(loop, depth_BT), keys)
      if loop == cfg.loops - 1:
        break
      # An exit here: the gate and the head read this, without a coda.
      h_BTD = model.normalize(cfg, x_BTD, variables['params']['norm'])
      if rule == 'gate':
        gate_BT = bound.gate(h_BTD, loop)
        score_BT = exits.score(rule, gate=gate_BT)
        best_BT = best_of(variables, bound.finish(x_BTD, context)[0], loop)[
            0] if every else None
      else:
        best_BT, score_BT = best_of(variables, h_BTD, loop, rule)
      bests.append(best_BT)
      scores.append(score_BT)
      exits_BT = (depth_BT == cfg.loops) & (
          score_BT >= thresholds_E[loop])
      depth_BT = jnp.where(exits_BT, loop + 1, depth_BT)
    best_BT, _ = best_of(
        variables, bound.finish(x_BTD, context)[0], depth_BT - 1)
    return Passed(best_BT, depth_BT, jnp.stack(bests) if every else None,
                  jnp.stack(scores))

  return jax.jit(passed)


def _best(decoder, run, variables, h_BTD, loop, rule=None):
  """Likeliest tokens, and the rule's score, a chunk of positions at a time.

  `loop` is an int, or int32 [B, T] where tokens exited at different ones.
  """
  B, T, _ = h_BTD.shape
  chunk = run.chunk(T, 4 * B * decoder.cfg.V)
  loop_BT = jnp.broadcast_to(loop, (B, T))

  def of_chunk(start):
    h_BCD, loop_BC = (
        lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
        for x in (h_BTD, loop_BT))
    logits_BCV = decoder.apply(
        variables, h_BCD, loop if isinstance(loop, int) else loop_BC,
        method='logits')
    best_BC = cpu.argmax(run, logits_BCV)
    score_BC = best_BC
    if rule is not None:
      score_BC = exits.score(rule, logits=logits_BCV)
    return best_BC, score_BC

  found = lax.map(of_chunk, jnp.arange(0, T, chunk))
  return jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T), found)
