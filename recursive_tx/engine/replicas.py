"""Several engines, each on its own device, as one.

A request's tokens depend on that request alone, so any of them may answer it.
"""

from collections.abc import Sequence

from recursive_tx.engine.engine import Engine, Event, Request


class Replicas:
  """An engine's methods; the replica with the fewest requests takes the next.

  Their bursts run at the same time, and a poll waits for all of them.

  Attributes:
    cfg, max_len: of each.
    slots: tokens that a step of all computes.
    replicas: how many there are.
  """

  def __init__(self, engines: Sequence[Engine]):
    """Takes over engines that are alike, each on another device."""
    self._engines = tuple(engines)
    self.replicas = len(self._engines)
    self.cfg, self.max_len = engines[0].cfg, engines[0].max_len
    self.slots = sum(engine.slots for engine in engines)

  @property
  def pending(self) -> int:
    """Requests that are not finished."""
    return sum(engine.pending for engine in self._engines)

  @property
  def waiting(self) -> int:
    """Requests that have no row yet."""
    return sum(engine.waiting for engine in self._engines)

  def submit(self, request: Request) -> int:
    """As `Engine.submit`."""
    which = min(range(self.replicas), key=lambda i: self._engines[i].pending)
    return self._engines[which].submit(request) * self.replicas + which

  def cancel(self, id: int) -> None:
    """As `Engine.cancel`."""
    number, which = divmod(id, self.replicas)
    self._engines[which].cancel(number)

  def poll(self) -> list[Event]:
    """Runs a burst of each engine and returns their events."""
    logs = [engine.dispatch() for engine in self._engines]
    return [
        event._replace(id=event.id * self.replicas + which)
        for which, (engine, log) in enumerate(
            zip(self._engines, logs, strict=True))
        for event in engine.collect(log)]
