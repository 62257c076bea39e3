"""Who runs when: three ways to batch decoding, without a model or a clock.

A step is one pass of the shared block over at most `capacity` slots; a slot
brings one token of one request one loop further. A request that was admitted
runs in every step until its last token is done, and requests are admitted in
the order in which they arrive. The rules differ in when, and in how deep:

  static  A batch is admitted when all of the batch before has ended.
  csb     Sequence-wise: a slot is refilled when its request has ended. All
          slots are at the same loop, so it waits for the next first loop.
  cdb     Depth-wise: every slot is at its own loop, is refilled at once, and
          only here a token may leave before the last loop.

Steps, not seconds: what a step costs is the caller's business. B are requests
and T all their tokens, one request after the other.
"""

import dataclasses
import heapq

import numpy as np

RULES = ('static', 'csb', 'cdb')


@dataclasses.dataclass(frozen=True)
class Workload:
  """Requests in the order in which they arrive.

  Attributes:
    arrival_B: int, the first step, from 0, in which a request may run.
    tokens_B: int, tokens of each request, at least 1.
    depth_T: int, loops after which each token leaves, at least 1.
  """
  arrival_B: np.ndarray
  tokens_B: np.ndarray
  depth_T: np.ndarray

  def __post_init__(self):
    if len(self.arrival_B) != len(self.tokens_B) or not len(self.tokens_B):
      raise ValueError(
          f'{len(self.arrival_B)} arrivals for {len(self.tokens_B)} requests; '
          'there must be one of each, and at least one request')
    if np.min(self.tokens_B) < 1 or np.sum(self.tokens_B) != len(self.depth_T):
      raise ValueError(
          f'{len(self.depth_T)} depths for {np.sum(self.tokens_B)} tokens, at '
          f'least {np.min(self.tokens_B)} a request; give one depth per token '
          'and one token or more per request')
    if np.min(self.arrival_B) < 0 or np.any(np.diff(self.arrival_B) < 0):
      raise ValueError('arrivals must begin at 0 or later and never fall; '
                       'sort the requests by arrival')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What runs in which step.

  Attributes:
    work: the requests, with the depths that were run.
    start_B: int, the step of each request's first token in the first loop.
  """
  work: Workload
  start_B: np.ndarray

  @property
  def end_B(self) -> np.ndarray:
    """The first step in which a request does not run any more."""
    return self.start_B + _steps(self.work)

  @property
  def steps(self) -> int:
    """Until all is done, those included in which nothing has arrived yet."""
    return int(np.max(self.end_B))

  @property
  def active(self) -> np.ndarray:
    """How many slots are in use, in every step."""
    change = np.bincount(self.start_B, minlength=self.steps + 1)
    change = change - np.bincount(self.end_B, minlength=self.steps + 1)
    return np.cumsum(change)[:-1]

  def passes(self) -> list[list[tuple[int, int, int]]]:
    """(request, its token, loop) of every slot in use, in every step."""
    found = [[] for _ in range(self.steps)]
    depths = np.split(self.work.depth_T, np.cumsum(self.work.tokens_B)[:-1])
    for request, step in enumerate(self.start_B):
      for token, depth in enumerate(depths[request]):
        for loop in range(depth):
          found[step].append((request, token, loop))
          step += 1
    return found


def schedule(
    work: Workload, rule: str, *, capacity: int, loops: int) -> Schedule:
  """Admits all requests by one of the RULES.

  Args:
    work: the requests; static and csb take every token through all loops.
    rule: 'static', 'csb' or 'cdb'.
    capacity: slots of a step, over all loops together.
    loops: how often a token passes the block that leaves last.
  """
  if rule not in RULES:
    raise ValueError(f'rule is {rule!r}; expected one of {", ".join(RULES)}')
  if capacity < 1 or loops < 1:
    raise ValueError(
        f'capacity is {capacity} and loops {loops}; both are at least 1')
  if not 1 <= np.min(work.depth_T) <= np.max(work.depth_T) <= loops:
    raise ValueError(
        f'depths are {np.min(work.depth_T)} to {np.max(work.depth_T)}; '
        f'tokens leave after 1 to {loops} loops')
  if rule == 'cdb':
    return Schedule(work, _continuous(work, capacity, 1))
  work = dataclasses.replace(work, depth_T=np.full_like(work.depth_T, loops))
  if rule == 'csb':
    return Schedule(work, _continuous(work, capacity, loops))
  return Schedule(work, _static(work, capacity))


def expected_ratio(loops: int, depth: float, fixed: float) -> float:
  """How much faster cdb is than csb where no slot is ever empty.

  Args:
    loops: what a token of csb runs.
    depth: what a token of cdb runs on average.
    fixed: what a token costs besides (head, embedding, its share of the
      prompt, keys and values of loops it did not run), in loops.
  """
  return (loops + fixed) / (depth + fixed)


def _steps(work: Workload) -> np.ndarray:
  """Steps that each request runs."""
  first_B = np.cumsum(work.tokens_B) - work.tokens_B
  return np.add.reduceat(work.depth_T, first_B, dtype=np.int64)


def _static(work: Workload, capacity: int) -> np.ndarray:
  start_B = np.zeros(len(work.tokens_B), np.int64)
  steps_B = _steps(work)
  first = free = 0
  while first < len(start_B):
    now = max(free, int(work.arrival_B[first]))
    arrived = int(np.searchsorted(work.arrival_B, now, side='right'))
    last = min(first + capacity, arrived)
    start_B[first:last] = now
    free = now + int(np.max(steps_B[first:last]))
    first = last
  return start_B


def _continuous(work: Workload, capacity: int, every: int) -> np.ndarray:
  """Refills single slots, but only `every` so many steps."""
  start_B = np.zeros(len(work.tokens_B), np.int64)
  free = [0] * capacity  # When each slot is; equal numbers are a heap.
  phase = busy_until = 0
  for request, (arrival, steps) in enumerate(
      zip(work.arrival_B.tolist(), _steps(work).tolist(), strict=True)):
    now = max(arrival, free[0])
    if now >= busy_until:
      phase = now  # Nothing runs: the first loop can be any step.
    now += (phase - now) % every
    start_B[request] = now
    heapq.heapreplace(free, now + steps)
    busy_until = max(busy_until, now + steps)
  return start_B
