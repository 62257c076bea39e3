"""The host's part: it admits requests and collects their tokens.

A burst is several steps in one dispatch. Knows token ids; nothing of text.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import numbers
from typing import NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
import numpy as np

from recursive_tx import exits, machine, model
from recursive_tx.config import ModelConfig, Run
from recursive_tx.engine import sampling, step, weights
from recursive_tx.engine import state as state_lib
from recursive_tx.errors import UserError, in_range, one_of
from recursive_tx.model import kv_cache

# A call of prefill has this many tokens, of one prompt or of several.
_CHUNK = 256
_SHORTEST = 16
# Slots whose head is computed at once, at least.
_FEW = 8
# Prompts' tokens between two bursts, so that long ones do not hold up the
# requests that are being answered.
_BETWEEN = 8 * _CHUNK


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue. `Engine.submit` checks it.

  Attributes:
    prompt: token ids, integers from 0 to V - 1, at least one.
    max_new_tokens: most tokens to add, at least 1; with the prompt at most
      the engine's `max_len`.
    sampler: how they are drawn.
    ignore_eos: continue after an end-of-text token.
  """
  prompt: Sequence[int]
  max_new_tokens: int = 64
  sampler: sampling.Sampler = sampling.Sampler()
  ignore_eos: bool = False


class Event(NamedTuple):
  """A token of a request.

  Attributes:
    id: the request's.
    token: token id; an end-of-text token too.
    depth: how many loops it took.
    log_p: natural logarithm of its probability at temperature 1.
    finish: None, or why it is the last: 'stop' (end of text) or 'length'.
  """
  id: int
  token: int
  depth: int
  log_p: float
  finish: str | None


class Engine:
  """Continues prompts; every slot is at its own token and loop.

  `submit` and `poll` until nothing is `pending`. One thread at a time.
  """
  replicas = 1  # See replicas.py.

  def __init__(
      self, cfg: ModelConfig, variables: dict, *, slots: int = 32,
      max_len: int = 2048, exit: exits.Exit = exits.Exit(),
      fill: str = 'propagate', schedule: str = 'cdb',
      eos_id: int | Sequence[int] | None = None,
      known_V: np.ndarray | None = None, steps: int = 16, run: Run = Run(),
      mesh: Mesh | None = None, device: jax.Device | None = None,
  ):
    """Allocates the cache.

    Args:
      cfg, variables: any model of this library.
      slots: tokens that a step computes, at least 1.
      max_len: most tokens of a prompt and its continuation, at least 1.
      exit: when a token exits the loops.
      fill: keys and values of the loops that it skips: 'propagate' (made of
        the hidden state that it exited with) or 'complete' (the slot runs
        those loops as well, after the token was emitted).
      schedule: 'cdb', 'csb' or 'static', see step.py.
      eos_id: the token that ends a continuation, or several of which each
        does (`Tokenizer.end_ids`); None is none.
      known_V: tokens that may be generated, bool [V] (`Tokenizer.known`);
        None is all of them.
      steps: passes of the block in one dispatch, at least 1.
      run: how the model is executed.
      mesh: of `machine.make_mesh`, to cut the model along 'tensor'; None is
        one device.
      device: which one, without a mesh; None is JAX's first.

    Raises:
      UserError: a size below 1, an unknown fill or schedule, an exit that is
        not this model's, ends that are no token ids, no known token, or a mesh
        that is cut along another axis.
    """
    for name, value in (
        ('slots', slots), ('max_len', max_len), ('steps', steps)):
      in_range(name, value, '[1, inf)', numbers.Integral)
    one_of('fill', fill, step.FILLS)
    one_of('schedule', schedule, step.SCHEDULES)
    exit.check(cfg)
    cfg = cfg.opened_for(max_len)
    self.cfg, self.max_len, self.slots = cfg, max_len, slots
    self._ends = _ends(eos_id)
    known_V = _known(known_V, cfg.V)
    self._mesh, self._device = mesh, device
    rules = _rules(cfg, mesh) if mesh else ()
    # Half the slots: where all exit together the groups are full, and where a
    # third do little is computed in vain. A few rows take as long as one.
    self._plan = step.Plan(
        cfg, run, exit, fill, schedule, max(_FEW, -(-slots // 2)), rules)
    self._steps = steps
    variables = _placed(cfg, variables, mesh, device, rules)
    self._weights = self._call(
        weights.prepare, cfg, run, bool(mesh), variables, known_V)
    # Half as many requests more wait with their prompts read.
    self._rows = slots + -(-slots // 2)
    self._state = self._call(
        _init, self._plan, slots, self._rows, max_len, len(self._ends))
    self._ids = itertools.count()
    self._waiting: dict[int, Request] = {}  # In the order of arrival.
    self._owner: dict[int, tuple[int, Request]] = {}  # Of a row.
    self._left: dict[int, int] = {}  # Tokens that may still come, by id.
    self._free = collections.deque(range(self._rows))
    self._cancelled: set[int] = set()

  @property
  def pending(self) -> int:
    """Requests that are not finished."""
    return len(self._waiting) + len(self._left) - len(self._cancelled)

  @property
  def waiting(self) -> int:
    """Requests that have no row yet."""
    return len(self._waiting)

  def submit(self, request: Request) -> int:
    """Queues a request; returns its id.

    Raises:
      UserError: an empty prompt, one that leaves no room for
        `max_new_tokens`, or ids outside the vocabulary.
    """
    prompt, most = np.asarray(request.prompt), request.max_new_tokens
    if not prompt.size:
      raise UserError('there is an empty prompt; give at least one token')
    if prompt.ndim != 1 or prompt.dtype.kind not in 'iu':
      raise UserError(
          f'a prompt is {prompt.dtype} of shape {prompt.shape}; expected one'
          ' list of token ids')
    in_range('max_new_tokens', most, '[1, inf)', numbers.Integral)
    if prompt.min() < 0 or prompt.max() >= self.cfg.V:
      raise UserError(
          f"token ids {prompt.min()}..{prompt.max()} are outside the model's "
          f'vocabulary of {self.cfg.V}')
    if len(prompt) + most > self.max_len:
      raise UserError(
          f'a prompt of {len(prompt)} tokens and max_new_tokens={most} exceed '
          f'max_len={self.max_len}; shorten one or make the other larger')
    new = next(self._ids)
    self._waiting[new] = request
    return new

  def cancel(self, id: int) -> None:
    """Ends a request: it has no more events. Unknown ids are ignored."""
    if self._waiting.pop(id, None) is None and id in self._left:
      self._cancelled.add(id)

  def poll(self) -> list[Event]:
    """Admits waiting requests, runs a burst, and returns its tokens."""
    return self.collect(self.dispatch())

  def dispatch(self) -> state_lib.Log | None:
    """The first half of `poll`: does not wait for the burst."""
    self._admit()
    self._stop_cancelled()
    if not self._owner:
      return None
    self._state, log = self._call(
        _burst, self._plan, self._steps, self._weights, self._state)
    return log

  def _admit(self) -> None:
    """Reads prompts into free rows, in the order of arrival."""
    while self._free and self._waiting:
      batch = []
      budget = _BETWEEN
      while (self._free and self._waiting and budget > 0
             and len(batch) < self.slots):
        id = next(iter(self._waiting))
        request = self._waiting.pop(id)
        batch.append((self._free.popleft(), id, request))
        budget -= len(request.prompt)
      self._prefill(batch)
      self._insert(batch)
      if budget <= 0:
        return

  def _prefill(self, batch) -> None:
    """All but the last token of each prompt, which is a step's to read."""
    chunks = collections.defaultdict(list)  # By their place in the prompt.
    for row, _, request in batch:
      prompt = request.prompt[:-1]
      for start in range(0, len(prompt), _CHUNK):
        tokens = prompt[start:start + _CHUNK]
        width = _SHORTEST
        while width < len(tokens):
          width *= 2
        chunks[start, width].append((row, tokens))
    for (start, width), parts in sorted(chunks.items()):
      most = max(1, _CHUNK // width)
      while parts:
        size = 1 if len(parts) == 1 else most
        now, parts = parts[:size], parts[size:]
        token_PT = np.zeros((size, width), np.int32)
        row_P = np.full(size, self._rows, np.int32)
        for i, (row, tokens) in enumerate(now):
          token_PT[i, :len(tokens)], row_P[i] = tokens, row
        self._state = self._call(
            _prefill, self._plan, self._weights, self._state, token_PT,
            np.full(size, start, np.int32), row_P)

  def _insert(self, batch) -> None:
    size = self.slots
    row_P = np.full(size, self._rows, np.int32)
    token_P, position_P, left_P = np.zeros((3, size), np.int32)
    eos = np.full((size, len(self._ends)), -1, np.int32)
    samplers = [sampling.Sampler()] * size
    for i, (row, id, request) in enumerate(batch):
      row_P[i], token_P[i] = row, request.prompt[-1]
      position_P[i] = len(request.prompt) - 1
      left_P[i] = request.max_new_tokens
      if not request.ignore_eos:
        eos[i] = self._ends
      samplers[i] = request.sampler
      self._owner[row] = id, request
      self._left[id] = request.max_new_tokens
    self._state = self._call(
        _insert, self._plan, self._state, row_P, state_lib.Rows(
            token_P, position_P, left_P, eos, sampling.stack(samplers)))

  def _stop_cancelled(self) -> None:
    """Makes their next token their last, which frees the row."""
    rows = [row for row, (id, _) in self._owner.items()
            if id in self._cancelled]
    if rows:
      row_P = np.full(self._rows, self._rows, np.int32)
      row_P[:len(rows)] = rows
      self._state = self._call(_stop, self._plan, self._state, row_P)

  def collect(self, log: state_lib.Log | None) -> list[Event]:
    """The second half of `poll`: the tokens of a dispatched burst."""
    if log is None:
      return []
    log, events = jax.device_get(log), []
    at = np.nonzero(log.row >= 0)
    for row, token, depth, log_p in zip(
        *(leaf[at].tolist() for leaf in log), strict=True):
      id, request = self._owner[row]
      self._left[id] -= 1
      finish = None if self._left[id] else 'length'
      if token in self._ends and not request.ignore_eos:
        finish = 'stop'
      if id in self._cancelled:
        self._cancelled.remove(id)
        finish = 'cancelled'
      else:
        events.append(Event(id, token, depth, log_p, finish))
      if finish:
        del self._owner[row], self._left[id]
        self._free.append(row)
    return events

  def _call(self, function, *args):
    with jax.set_mesh(self._mesh) if self._mesh else jax.default_device(
        self._device):
      return function(*args)


def _placed(cfg: ModelConfig, variables: dict, mesh, device, rules) -> dict:
  """The variables on their devices."""
  if mesh:
    params = machine.of_boxed(model.abstract_params(cfg), mesh, rules)
    return machine.place(variables, {'params': params})
  return jax.device_put(variables, device) if device else variables


def _rules(cfg: ModelConfig, mesh: Mesh) -> machine.Rules:
  if mesh.shape['data'] * mesh.shape['fsdp'] > 1:
    raise UserError(
        f'a mesh of {dict(mesh.shape)}; an engine is cut along tensor alone, '
        'make the other axes 1')
  sizes = {letter: getattr(cfg, letter) for letter in 'VDFNK'}
  return machine.make_rules(mesh, {**sizes, 'R': 1, 'B': 1})


def _ends(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
  """At least one id; -1 is none."""
  several = eos_id if isinstance(eos_id, Sequence) else [
      -1 if eos_id is None else eos_id]
  ids = [int(id) for id in several if isinstance(id, numbers.Integral)]
  if len(ids) < len(several) or max([0, *ids]) >= 2**31:
    raise UserError(f'eos_id={eos_id}; expected a token id, or several')
  return tuple(ids) or (-1,)


def _known(known_V: np.ndarray | None, V: int) -> np.ndarray | None:
  """None where all tokens may be generated, which then costs nothing."""
  if known_V is None or np.all(known_V):
    assert known_V is None or len(known_V) == V, len(known_V)
    return None
  if not np.any(known_V):
    raise UserError('no token may be generated; the tokenizer knows none of'
                    " the model's ids")
  return np.asarray(known_V, bool)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _init(plan, slots, rows, length, ends):
  return _settle(plan, state_lib.init(
      plan.cfg, plan.run, slots=slots, rows=rows, length=length, ends=ends))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _burst(plan, steps, weights, state):
  state, log = step.burst(plan, steps, weights, state)
  return _settle(plan, state), log


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(plan, weights, state, token_PT, start_P, row_P):
  return _settle(plan, step.prefill(
      plan, weights, state, token_PT, start_P, row_P))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _insert(plan, state, row_P, new):
  return _settle(plan, state_lib.insert(state, row_P, new))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _stop(plan, state, row_P):
  left = state.rows.left.at[row_P].set(0, mode='drop')
  return _settle(plan, state._replace(rows=state.rows._replace(left=left)))


def _settle(plan, state):
  """Lays a state out as it came in, whatever the compiler would prefer."""
  if not plan.rules:
    return state
  with nn.logical_axis_rules(plan.rules):
    cache = jax.tree.map(
        lambda leaf: nn.with_logical_constraint(leaf, kv_cache.LETTERS),
        state.cache)
  whole = jax.sharding.PartitionSpec()
  return jax.tree.map(
      lambda leaf: jax.lax.with_sharding_constraint(leaf, whole),
      state._replace(cache=None))._replace(cache=cache)
