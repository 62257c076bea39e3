"""What an engine holds on the device.

A request has a row from when it is admitted until its text is complete: its
keys and values, and what is known of it. Slots are what a step computes: each
serves one row and is at its own token and loop. There are more rows than
slots, so that a slot whose request ends finds the next one waiting without
asking the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recursive_tx.config import ModelConfig, Run
from recursive_tx.engine import sampling
from recursive_tx.model import kv_cache


class Slots(NamedTuple):
  """Of every slot, [B].

  Attributes:
    row: the row that it serves; the number of rows where it is idle.
    x_BD: what its next pass reads, compute dtype.
    loop: the loop of that pass.
    token: the token that was chosen, -1 until then.
    done: all passes of its token are done, or it has exited and there is
      nothing more to do; under some schedules it waits for the others.
  """
  row: jax.Array
  x_BD: jax.Array
  loop: jax.Array
  token: jax.Array
  done: jax.Array


class Rows(NamedTuple):
  """Of every request, [rows].

  Attributes:
    token: its newest token, the one to be read at `position`.
    position: int32.
    left: how many tokens it may still get.
    eos: the tokens that end it, [rows, ends]; -1 is none.
    samplers: how its tokens are drawn.
  """
  token: jax.Array
  position: jax.Array
  left: jax.Array
  eos: jax.Array
  samplers: sampling.Samplers


class Queue(NamedTuple):
  """Rows that wait for a slot: row[first % rows] to row[(last - 1) % rows]."""
  row: jax.Array
  first: jax.Array
  last: jax.Array


class State(NamedTuple):
  """All of it; donated to every function that returns a new one."""
  cache: kv_cache.Cache
  slots: Slots
  rows: Rows
  queue: Queue


class Log(NamedTuple):
  """The tokens chosen by every step of a burst, [steps, B].

  Attributes:
    row: whose token; -1 where none was chosen.
    token: int32.
    depth: how many loops it took.
    log_p: its log-probability under the model's softmax, of temperature 1.
  """
  row: jax.Array
  token: jax.Array
  depth: jax.Array
  log_p: jax.Array


def init(
    cfg: ModelConfig, run: Run, *, slots: int, rows: int, length: int,
    ends: int,
) -> State:
  """Nothing in any slot.

  Args:
    cfg, run: the model, and how it is executed.
    slots, rows: how many.
    length: tokens of a row, at most.
    ends: tokens that may end a row.
  """
  def full(size, value, dtype=jnp.int32):
    return jnp.full(size, value, dtype)
  return State(
      kv_cache.init(cfg, rows, length, run.dtype),
      Slots(row=full(slots, rows), x_BD=jnp.zeros((slots, cfg.D), run.dtype),
            loop=full(slots, 0), token=full(slots, -1),
            done=full(slots, False, bool)),
      Rows(token=full(rows, 0), position=full(rows, 0), left=full(rows, 0),
           eos=full((rows, ends), -1),
           samplers=sampling.Samplers(
               full(rows, 0, jnp.float32), full(rows, 0),
               full(rows, 1, jnp.float32), full(rows, 0, jnp.uint32))),
      Queue(full(rows, 0), full((), 0), full((), 0)))


def insert(state: State, row_P: jax.Array, new: Rows) -> State:
  """Hands requests over, whose keys `prefill` has put into their rows.

  Args:
    state: of `init` or a later one.
    row_P: their rows; the number of rows where there is none, at the end.
    new: their fields, [P].
  """
  rows = jax.tree.map(
      lambda old, values: old.at[row_P].set(values, mode='drop'),
      state.rows, new)
  queue, size = state.queue, state.queue.row.shape[0]
  count = (row_P < size).sum()
  at_P = jnp.where(
      row_P < size, (queue.last + jnp.arange(len(row_P))) % size, size)
  queue = queue._replace(
      row=queue.row.at[at_P].set(row_P, mode='drop'),
      last=queue.last + count)
  return state._replace(rows=rows, queue=queue)
