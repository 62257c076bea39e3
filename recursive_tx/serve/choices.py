"""The continuations of one request's prompts, as their tokens come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
import functools
from typing import NamedTuple

from recursive_tx.engine import Event, Request
from recursive_tx.serve.worker import Worker
from recursive_tx.text.stream import TextStream
from recursive_tx.text.tokenizer import Tokenizer


class Token(NamedTuple):
  """A token as logprobs report it.

  Attributes:
    text: what it adds to the answer; U+FFFD for a part of a character.
    bytes: what it adds, also where that is a part of a character.
    log_p: natural logarithm of its probability.
    offset: characters of the answer that are certain before it.
  """
  text: str
  bytes: bytes
  log_p: float
  offset: int


class Piece(NamedTuple):
  """Text that is certain, and the tokens since the last one.

  Attributes:
    index: of the prompt.
    text: may be empty at the end.
    depths: loops that each token took.
    tokens: one for each depth.
    finish: None, 'stop' or 'length'.
  """
  index: int
  text: str
  depths: list[int]
  tokens: list[Token]
  finish: str | None


class Choices:
  """Several prompts in the worker; iterate `bursts`, and always `close`."""

  def __init__(
      self, worker: Worker, tokenizer: Tokenizer, requests: Sequence[Request],
      stops: Sequence[str]):
    """Submits them."""
    self._worker, self._tokenizer = worker, tokenizer
    self._arrived: asyncio.Queue[tuple[int, list[Event] | Exception]] = (
        asyncio.Queue())
    self._streams, self._before = [], []
    for request in requests:
      prompt = list(request.prompt)
      if prompt[:1] == [tokenizer.bos_id]:
        prompt = prompt[1:]
      self._streams.append(TextStream(tokenizer, prompt, stops))
      self._before.append(prompt[-1:])
    self._parts = [([], []) for _ in requests]  # Depths and tokens, not given.
    self._tickets = [
        worker.submit(request, functools.partial(self._deliver, i))
        for i, request in enumerate(requests)]

  def close(self) -> None:
    """Cancels what is not finished."""
    for ticket in self._tickets:
      self._worker.cancel(ticket)

  async def bursts(self) -> AsyncIterator[tuple[list[Event], list[Piece]]]:
    """Events as they come, and the pieces of text that they complete.

    Raises:
      Exception: any that the engine raised.
    """
    left = len(self._tickets)
    while left:
      index, arrived = await self._arrived.get()
      if isinstance(arrived, Exception):
        raise arrived
      pieces = list(self._pieces(index, arrived))
      left -= any(piece.finish for piece in pieces)
      yield arrived, pieces

  def _deliver(self, index: int, arrived: list[Event] | Exception) -> None:
    self._arrived.put_nowait((index, arrived))

  def _pieces(self, index: int, events: list[Event]):
    stream, (depths, tokens) = self._streams[index], self._parts[index]
    if stream.stopped:  # Tokens that came while it was being cancelled.
      return
    for event in events:
      text, finish = '', event.finish
      if finish != 'stop':  # Else the token is the end of text.
        depths.append(event.depth)
        tokens.append(self._token(index, event))
        text = stream.push(event.token)
      if finish:
        text += stream.finish()
      if stream.stopped:
        finish = 'stop'
        self._worker.cancel(self._tickets[index])
      if text or finish:
        yield Piece(index, text, depths[:], tokens[:], finish)
        depths.clear()
        tokens.clear()
      if finish:
        return

  def _token(self, index: int, event: Event) -> Token:
    decode = self._tokenizer.decode
    before, self._before[index] = self._before[index], [event.token]
    own = self._tokenizer.token_bytes(event.token)
    try:
      own.decode()
    except UnicodeDecodeError:
      text = own.decode(errors='replace')
    else:  # Whole characters, but for a space that opens a text.
      base, both = decode(before), decode([*before, event.token])
      text = (both[len(base):] if both.startswith(base) else
              decode([event.token]))
      own = text.encode()
    return Token(text, own, max(event.log_p, -9999.0),
                 self._streams[index].length)
