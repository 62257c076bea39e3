"""The shared block runs once over all slots, each at its own loop.

A slot whose token is decided and whose passes are done starts its next token,
or the next request that waits, at the first loop, in the same step. Relaxed
Recursive Transformers, section 2.4: continuous depth-wise batching.

Everything here is traced; nothing waits for the host.
"""

import dataclasses

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx import exits, machine
from recursive_tx.engine import sampling
from recursive_tx.engine.state import Log, Queue, Slots, State
from recursive_tx.engine.weights import Weights
from recursive_tx.model import Decoder, kv_cache, normalize

# static: requests start together, when every one before has ended.
# csb: continuous sequence-wise; a request's end frees its slot, all slots are
#   at the same loop.
# cdb: continuous depth-wise; every slot is at its own.
SCHEDULES = ('static', 'csb', 'cdb')
# The keys and values of the loops that a token skips.
# propagate: computed from the hidden state that it exited with; where loops
#   share keys (loop_keys=False) there is nothing to compute.
# complete: the slot runs those loops as well, after its token was emitted.
FILLS = ('propagate', 'complete')


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a burst is compiled for.

  Attributes:
    cfg, run: the model, and how it is executed.
    exit: when a token exits.
    fill, schedule: see FILLS and SCHEDULES.
    group: slots whose head is computed at once.
    rules: where letters go on the mesh, see machine.make_rules; () without.
  """
  cfg: config_lib.ModelConfig
  run: config_lib.Run
  exit: exits.Exit
  fill: str
  schedule: str
  group: int
  rules: machine.Rules

  def apply(self, weights, *args, method):
    with nn.logical_axis_rules(self.rules):
      return Decoder(self.cfg, self.run).apply(
          weights.variables, *args, method=method)


def burst(
    plan: Plan, steps: int, weights: Weights, state: State
) -> tuple[State, Log]:
  """Up to so many steps; fewer once every slot is idle."""
  slots, idle = len(state.slots.row), len(state.rows.token)
  log = Log(*(jnp.full((steps, slots), fill, dtype) for fill, dtype in (
      (-1, jnp.int32), (0, jnp.int32), (0, jnp.int32), (0.0, jnp.float32))))

  def has_work(carry):
    i, state, _ = carry
    return (i < steps) & (state.slots.row < idle).any()

  def body(carry):
    i, state, log = carry
    state, entry = _step(plan, weights, state)
    log = Log(*(leaf.at[i].set(new)
                for leaf, new in zip(log, entry, strict=True)))
    return i + 1, state, log

  # Requests that came while every slot was idle.
  state = _advance(plan, weights, state)
  _, state, log = lax.while_loop(has_work, body, (jnp.int32(0), state, log))
  return state, log


def prefill(
    plan: Plan, weights: Weights, state: State, token_PT: jax.Array,
    start_P: jax.Array, row_P: jax.Array
) -> State:
  """Puts the keys and values of a part of some prompts into their rows.

  Args:
    plan, weights, state: of the engine.
    token_PT: tokens of each; what pads them on the right leaves keys that are
      overwritten before they are read.
    start_P: position of the first.
    row_P: their rows; the number of rows where there is no prompt.
  """
  position_PT = start_P[:, None] + jnp.arange(token_PT.shape[1])
  _, cache = plan.apply(
      weights, token_PT, position_PT, row_P, state.cache, weights.mixed_M,
      weights.head_DV, method='decode')
  return state._replace(cache=cache)


def _step(plan, weights, state: State) -> tuple[State, Log]:
  slots, rows = state.slots, state.rows
  nowhere = len(rows.token)
  busy_B = (slots.row < nowhere) & ~slots.done
  row_B = jnp.where(busy_B, slots.row, nowhere)
  place = _place(rows, row_B)
  x_B1D, (cache, _) = plan.apply(
      weights, slots.x_BD[:, None], slots.loop[:, None], None,
      kv_cache.Cached(state.cache, place), '__call__', weights.mixed_M,
      method='loop')
  x_BD = jnp.where(busy_B[:, None], x_B1D[:, 0], slots.x_BD)
  slots, cache, exits_B, log_p_B = _decide(
      plan, weights, slots._replace(x_BD=x_BD), rows, busy_B, cache, place)
  rows = rows._replace(left=rows.left.at[
      jnp.where(exits_B, row_B, nowhere)].add(-1, mode='drop'))
  entry = Log(jnp.where(exits_B, slots.row, -1), slots.token, slots.loop + 1,
              log_p_B)
  # The host may give the row to another as soon as it sees the token.
  ends_B = exits_B & (
      (slots.token[:, None] == rows.eos.at[row_B].get(mode='clip')).any(-1)
      | (rows.left.at[row_B].get(mode='clip') <= 0))
  finished_B = busy_B & _last(plan, slots)
  if plan.fill == 'propagate':
    early_B = exits_B & ~finished_B & ~ends_B
    cache = _propagate(plan, weights, slots, early_B, cache, place)
    finished_B |= exits_B
  slots = slots._replace(
      row=jnp.where(ends_B, nowhere, slots.row), loop=slots.loop + ~finished_B,
      done=slots.done | finished_B & ~ends_B)
  state = state._replace(cache=cache, slots=slots, rows=rows)
  return _advance(plan, weights, state), entry


def _decide(plan, weights, slots: Slots, rows, busy_B, cache, place):
  """Which slots' tokens exit after this loop, and which tokens those are.

  An example: 3 loops, the rule 'top' with thresholds (0.9, 0.8), 4 slots.

    slot                    0     1     2     3
    loop (from 0)           0     1     2     1
    token decided already   no    no    no    yes ('complete')
    pending_B               yes   yes   yes   no
    score                   0.95  0.7   0.1   -
    threshold of its loop   0.9   0.8   -inf  -
    confident_B             yes   no    yes   -
    exits_B                 yes   no    yes   no

  Slot 0 emits its token after one loop, slot 1 runs another loop, slot 2 is at
  the last loop and emits whatever its score. The head runs for the pending
  slots; where the rule needs no logits, for those alone that exit.

  Returns:
    The slots with their tokens, the cache, exits_B and log_p_B.
  """
  threshold_B = jnp.array([*plan.exit.thresholds, -jnp.inf])[slots.loop]
  pending_B = busy_B & (slots.token < 0)
  confident_B = _confident(plan, weights, slots, threshold_B)
  by_head = plan.exit.needs == 'logits'
  if not by_head:
    pending_B &= confident_B

  def choose(index_C, carry):
    *old, cache = carry
    (token_C, log_p_C, logits_CV), cache = _sample(
        plan, weights, slots, rows, index_C, cache, place)
    confident_C = jnp.full(len(index_C), True)
    if by_head:
      score_C = exits.score(plan.exit.rule, logits=logits_CV)
      confident_C = score_C >= threshold_B.at[index_C].get(mode='clip')
    new = token_C, confident_C, log_p_C
    return *(x_B.at[index_C].set(x_C, mode='drop')
             for x_B, x_C in zip(old, new, strict=True)), cache

  token_B, confident_B, log_p_B, cache = _grouped(
      plan.group, pending_B, choose,
      (slots.token, confident_B, jnp.zeros(len(busy_B), jnp.float32), cache))
  exits_B = pending_B & confident_B
  if plan.fill == 'complete' and plan.cfg.coda:
    # The coda has run on an earlier state; these are the keys of the last.
    cache = _close(plan, weights, slots, busy_B & _last(plan, slots) & ~exits_B,
                   cache, place)
  slots = slots._replace(token=jnp.where(exits_B, token_B, slots.token))
  return slots, cache, exits_B, log_p_B


def _confident(plan, weights, slots: Slots, threshold_B):
  """Which slots exit whatever their logits; all do at the last loop."""
  last_B = _last(plan, slots)
  if plan.exit.needs == 'gate':
    h_BD = normalize(
        plan.cfg, slots.x_BD, weights.variables['params']['norm'])
    gate_B = plan.apply(weights, h_BD, slots.loop, method='gate')
    return last_B | (exits.score('gate', gate=gate_B) >= threshold_B)
  if plan.exit.rule == 'static':
    return last_B | (exits.score('static') >= threshold_B)
  return last_B


def _last(plan, slots: Slots):
  return slots.loop == plan.cfg.loops - 1


def _close(plan, weights, slots: Slots, mask_B, cache, place):
  """The cache after the coda has run in some slots."""
  def close(index_C, cache):
    part = _take(place, index_C, cache.k.shape[1])
    _, (cache, _) = plan.apply(
        weights, _inputs(slots, index_C), None, kv_cache.Cached(cache, part),
        method='finish')
    return cache

  return _grouped(plan.group, mask_B, close, cache)


def _sample(plan, weights, slots: Slots, rows, index_C, cache, place):
  """The tokens that some slots would emit if they exited now.

  Returns:
    token_C, its log-probability and logits_CV; and the cache.
  """
  part = _take(place, index_C, len(rows.token))
  row_C, position_C = part.row_BT[:, 0], part.position_BT[:, 0]
  h_C1D, (cache, _) = plan.apply(
      weights, _inputs(slots, index_C), None, kv_cache.Cached(cache, part),
      method='finish')
  logits_CV = plan.apply(
      weights, h_C1D[:, 0], slots.loop.at[index_C].get(mode='clip'),
      weights.head_DV, method='logits')
  samplers = jax.tree.map(
      lambda leaf: leaf.at[row_C].get(mode='clip'), rows.samplers)
  allowed_CV = logits_CV
  if weights.known_V is not None:
    allowed_CV = jnp.where(weights.known_V, logits_CV, -jnp.inf)
  token_C = sampling.sample(
      plan.run, samplers, allowed_CV, position_C)
  chosen_C1 = jnp.take_along_axis(logits_CV, token_C[:, None], axis=1)
  log_p_C = chosen_C1[:, 0] - jax.nn.logsumexp(logits_CV, axis=1)
  return (token_C, log_p_C, logits_CV), cache


def _propagate(plan, weights, slots: Slots, early_B, cache, place):
  """Keys and values of the loops that tokens skip, from their last state."""
  cfg = plan.cfg
  if cfg.loops == 1 or plan.exit.rule == 'last' or not cfg.loop_keys:
    return cache
  nowhere, later = cache.k.shape[1], jnp.arange(1, cfg.loops)
  alike = not (cfg.has_loop_vectors or any(cfg.ranks.values())
               or cfg.mixed_kinds)

  def fill(index_C, cache):
    part = _take(place, index_C, nowhere)
    exit_C1 = slots.loop.at[index_C].get(mode='clip')[:, None]
    x_C1D = _inputs(slots, index_C)
    loop_CE = jnp.broadcast_to(later, (len(index_C), len(later)))
    # No row where a later loop is not skipped.
    part = part._replace(
        row_BT=jnp.where(loop_CE > exit_C1, part.row_BT, nowhere))
    if not alike:  # Every loop makes its own: one row for each.
      x_C1D = jnp.repeat(x_C1D, len(later), axis=0)
      position_CE = jnp.broadcast_to(part.position_BT, loop_CE.shape)
      part, loop_CE = jax.tree.map(
          lambda leaf: leaf.reshape(-1, 1),
          (part._replace(position_BT=position_CE, virtual_BT=loop_CE), loop_CE))
    _, (cache, _) = plan.apply(
        weights, x_C1D, loop_CE, None, kv_cache.Cached(cache, part), 'fill',
        weights.mixed_M, method='loop')
    return cache

  return _grouped(plan.group, early_B, fill, cache)


def _advance(plan, weights, state: State) -> State:
  """Slots that are done, or idle, start their next token where they may."""
  cache, slots, rows, queue = state
  nowhere = len(rows.token)
  free_B = slots.row >= nowhere
  together = (slots.done | free_B).all()
  next_B = slots.done & (plan.schedule == 'cdb' or together)
  at_B = jnp.where(next_B, slots.row, nowhere)
  rows = rows._replace(
      token=rows.token.at[at_B].set(slots.token, mode='drop'),
      position=rows.position.at[at_B].add(1, mode='drop'))

  may = {'cdb': True, 'csb': together, 'static': free_B.all()}[plan.schedule]
  rank_B = jnp.cumsum(free_B) - 1
  takes_B = free_B & may & (rank_B < queue.last - queue.first)
  row_B = jnp.where(
      takes_B, queue.row[(queue.first + rank_B) % len(queue.row)], slots.row)
  queue = Queue(queue.row, queue.first + takes_B.sum(), queue.last)

  starts_B = next_B | takes_B
  x_BD, cache = _enter(
      plan, weights, rows, row_B, starts_B, slots.x_BD, cache)
  slots = Slots(
      row=row_B, x_BD=x_BD, loop=jnp.where(starts_B, 0, slots.loop),
      token=jnp.where(starts_B, -1, slots.token),
      done=slots.done & ~next_B)
  return State(cache, slots, rows, queue)


def _enter(plan, weights, rows, row_B, starts_B, x_BD, cache):
  """The input of the first loop, in the slots that start a token."""
  nowhere = len(rows.token)
  place = _place(rows, jnp.where(starts_B, row_B, nowhere))
  token_B = rows.token.at[row_B].get(mode='clip')
  if not plan.cfg.prelude:
    new_B1D, _ = plan.apply(
        weights, token_B[:, None], None, kv_cache.Cached(cache, place),
        method='enter')
    return jnp.where(starts_B[:, None], new_B1D[:, 0], x_BD), cache

  def enter(index_C, carry):
    x_BD, cache = carry
    part = _take(place, index_C, nowhere)
    new_C1D, (cache, _) = plan.apply(
        weights, token_B.at[index_C].get(mode='clip')[:, None], None,
        kv_cache.Cached(cache, part), method='enter')
    return x_BD.at[index_C].set(new_C1D[:, 0], mode='drop'), cache

  return _grouped(plan.group, starts_B, enter, (x_BD, cache))


def _grouped(group: int, mask_B, body, carry):
  """carry = body(index_C, carry) over the slots of a mask, a group at a time.

  Work that is done once per token then costs no more than there are tokens.
  Indices past the last are the number of slots.
  """
  B = len(mask_B)
  group = min(group, B)
  order_B = jnp.argsort(~mask_B, stable=True).astype(jnp.int32)
  count = mask_B.sum()
  order = jnp.where(jnp.arange(B) < count, order_B, B)
  order = jnp.concatenate([order, jnp.full(-B % group, B, jnp.int32)])

  def next_group(carry):
    i, inner = carry
    return i + group, body(lax.dynamic_slice(order, (i,), (group,)), inner)

  return lax.while_loop(
      lambda carry: carry[0] < count, next_group, (jnp.int32(0), carry))[1]


def _place(rows, row_B) -> kv_cache.Place:
  row_B1 = row_B[:, None]
  return kv_cache.Place(
      row_B1, rows.position.at[row_B1].get(mode='clip'),
      jnp.zeros_like(row_B1))


def _inputs(slots: Slots, index_C) -> jax.Array:
  """x_C1D of some slots; anything for indices past the last."""
  return slots.x_BD.at[index_C].get(mode='clip')[:, None]


def _take(place, index_C, nowhere: int) -> kv_cache.Place:
  """The places of some slots; no row for indices past the last."""
  return kv_cache.Place(
      place.row_BT.at[index_C].get(mode='fill', fill_value=nowhere),
      place.position_BT.at[index_C].get(mode='clip'),
      jnp.zeros_like(index_C[:, None]))
