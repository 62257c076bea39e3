"""The one thread that drives the engine; others hand it requests.

Requests go in under a condition, on which the thread sleeps while there is
nothing to do; tokens come out as calls in the asyncio loop. Knows nothing of
HTTP or text.
"""

import asyncio
import collections
from collections.abc import Callable
import dataclasses
import logging
import threading

from recursive_tx.engine import Engine, Event, Replicas, Request
from recursive_tx.errors import UserError

# The callback of a ticket gets tokens, or the error that ended them.
Deliver = Callable[[list[Event] | Exception], None]


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request in the worker.

  Attributes:
    request: the prompt and how to continue it.
    deliver: called in the loop, with every token once, in order.
    cancelled: nothing more is delivered.
    id: the engine's id, set and read by the thread alone.
  """
  request: Request
  deliver: Deliver
  cancelled: bool = False
  id: int = -1


class Worker:
  """Drives an engine from a separate thread.

  Methods are called from the asyncio loop, those under "In the thread" from
  the thread.

  Attributes:
    live: requests that hold a place in the engine or its queue.
    failure: what ended the thread; None while all is well.
  """

  def __init__(self, engine: Engine | Replicas):
    self.live = 0
    self.failure: Exception | None = None
    self._engine = engine
    self._tickets: dict[int, Ticket] = {}  # By the engine's id.
    self._change = threading.Condition()
    self._orders: collections.deque[tuple[str, Ticket]] = collections.deque()
    self._stopping = False
    self._thread = threading.Thread(target=self._run, name='engine',
                                    daemon=True)

  @property
  def slots(self) -> int:
    """Tokens that the engine computes at once."""
    return self._engine.slots

  def warm_up(self, longest: int) -> None:
    """Compiles what requests will need; before `start`.

    Prompts of all lengths, alone and in pairs, since the engine compiles for
    some lengths and numbers of prompts.

    Args:
      longest: tokens of a prompt; the engine reads long ones in parts, so
        some hundreds do for all.
    """
    most = max(1, min(longest, self._engine.max_len - 1))
    lengths = {min(2**k + 1, most) for k in range(most.bit_length())}
    for length in sorted(lengths):
      for count in (1, 2):
        self._answer(length, count)
    self._answer(1, 1, cancel=True)

  def start(self, loop: asyncio.AbstractEventLoop) -> None:
    """Begins to answer, calling back in a loop."""
    self._loop = loop
    self._thread.start()

  def submit(self, request: Request, deliver: Deliver) -> Ticket:
    """Queues a request."""
    ticket = Ticket(request, deliver)
    self.live += 1
    self._order('submit', ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Nothing more is delivered; its slot is freed soon."""
    if not ticket.cancelled:
      ticket.cancelled = True
      self._order('cancel', ticket)

  def stop(self) -> None:
    """Ends the thread after what it does now."""
    with self._change:
      self._stopping = True
      self._change.notify()
    if self._thread.ident:
      self._thread.join()

  def _answer(self, length: int, count: int, cancel: bool = False) -> None:
    """Runs prompts of token 0 through the engine; with `cancel`, a part."""
    room = self._engine.max_len - length
    news = [
        self._engine.submit(Request(
            [0] * length, room if cancel else 1, ignore_eos=True))
        for _ in range(count * self._engine.replicas)]
    self._engine.poll()
    if cancel:
      for new in news:
        self._engine.cancel(new)
      self._engine.poll()
    while self._engine.pending:
      self._engine.poll()

  def _order(self, what: str, ticket: Ticket) -> None:
    with self._change:
      self._orders.append((what, ticket))
      self._change.notify()

  # In the thread.

  def _run(self) -> None:
    try:
      while not self._stopping:
        with self._change:
          self._change.wait_for(
              lambda: self._orders or self._engine.pending or self._stopping)
          orders = list(self._orders)
          self._orders.clear()
        self._turn(orders)
    except Exception as error:
      logging.getLogger(__name__).exception('The engine failed.')
      self._call(self._fail, error)

  def _turn(self, orders: list[tuple[str, Ticket]]) -> None:
    """Executes orders, and one burst of the engine."""
    answers: dict[Ticket, list[Event] | Exception] = {}
    ended: list[Ticket] = []
    for what, ticket in orders:
      if what == 'submit':
        try:
          ticket.id = self._engine.submit(ticket.request)
          self._tickets[ticket.id] = ticket
        except UserError as error:
          answers[ticket] = error
          ended.append(ticket)
      elif self._tickets.pop(ticket.id, None):  # Else it ended meanwhile.
        self._engine.cancel(ticket.id)
        ended.append(ticket)
    # Once more after a cancel, for it is a burst that frees the slot.
    for event in self._engine.poll():
      ticket = self._tickets[event.id]
      answers.setdefault(ticket, []).append(event)
      if event.finish:
        ended.append(self._tickets.pop(event.id))
    if answers or ended:
      self._call(self._deliver, answers, len(ended))

  def _call(self, function: Callable[..., None], *arguments) -> None:
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # The loop is closed, and nobody listens.
      assert self._stopping or self._loop.is_closed()

  # In the loop again.

  def _deliver(
      self, answers: dict[Ticket, list[Event] | Exception], ended: int
  ) -> None:
    self.live -= ended
    for ticket, events in answers.items():
      if not ticket.cancelled:
        ticket.deliver(events)

  def _fail(self, error: Exception) -> None:
    self.failure = error
    for ticket in (*self._tickets.values(), *(
        ticket for what, ticket in self._orders if what == 'submit')):
      if not ticket.cancelled:
        ticket.deliver(error)
