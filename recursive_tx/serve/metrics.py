"""What Prometheus reads: counters, gauges and one histogram."""

import collections
import math
import time

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from recursive_tx.engine import Event
from recursive_tx.serve.worker import Worker

_SECONDS = 10.0
_FIRST = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
  """The server's figures; all from one thread."""

  def __init__(self, worker: Worker):
    """Gauges call the worker when they are collected."""
    self._registry = registry = CollectorRegistry()
    self._recent = collections.deque()  # (when, tokens, their loops)
    self.requests = Counter(
        'recursive_tx_requests', 'Answers of /v1 by HTTP status; 499: the'
        ' client disconnected before it began.', ['status'], registry=registry)
    self.disconnects = Counter(
        'recursive_tx_disconnects', 'Clients that disconnected before the end.',
        registry=registry)
    self.prompt_tokens = Counter(
        'recursive_tx_prompt_tokens', 'Tokens of prompts.', registry=registry)
    self.first = Histogram(
        'recursive_tx_time_to_first_token_seconds', 'From a request to its'
        ' first token.', buckets=_FIRST, registry=registry)
    self._tokens = Counter(
        'recursive_tx_tokens', 'Tokens generated.', registry=registry)
    self._loops = Counter(
        'recursive_tx_loops', 'Loops that these took.', registry=registry)
    for name, about, read in (
        ('slots', 'Tokens computed at once.', lambda: worker.slots),
        ('slots_in_use', 'Of these, with a request.',
         lambda: min(worker.live, worker.slots)),
        ('queue_length', 'Requests that wait for a slot.',
         lambda: max(0, worker.live - worker.slots)),
        ('tokens_per_second', f'Over the last {_SECONDS:.0f} seconds.',
         lambda: self._sums()[0] / _SECONDS),
        ('mean_depth', 'Loops a token, over the same; NaN without tokens.',
         self._mean_depth)):
      Gauge(f'recursive_tx_{name}', about,
            registry=registry).set_function(read)

  def count(self, events: list[Event]) -> None:
    """Adds a burst's tokens."""
    loops = sum(event.depth for event in events)
    self._tokens.inc(len(events))
    self._loops.inc(loops)
    self._recent.append((time.monotonic(), len(events), loops))
    self._forget()

  def text(self) -> bytes:
    """All of it, as Prometheus reads it."""
    return prometheus_client.generate_latest(self._registry)

  def _forget(self) -> None:
    while self._recent and self._recent[0][0] < time.monotonic() - _SECONDS:
      self._recent.popleft()

  def _sums(self) -> tuple[int, int]:
    self._forget()
    return (sum(tokens for _, tokens, _ in self._recent),
            sum(loops for _, _, loops in self._recent))

  def _mean_depth(self) -> float:
    tokens, loops = self._sums()
    return loops / tokens if tokens else math.nan
