"""An answer that is being sent to a client, who may disconnect any time."""

import asyncio
import contextlib
import dataclasses
import json
import time
from typing import Any

from starlette.responses import JSONResponse

from recursive_tx.engine import Request
from recursive_tx.serve.answers import Chats, Completions, usage
from recursive_tx.serve.choices import Choices, Piece
from recursive_tx.serve.fields import Body
from recursive_tx.serve.metrics import Metrics
from recursive_tx.serve.worker import Worker
from recursive_tx.text.tokenizer import Tokenizer


@dataclasses.dataclass
class Live:
  """An answer, whole or in pieces, that ends when the client disconnects.

  Attributes:
    worker, tokenizer, metrics: of the service.
    body: of the request.
    form: of the JSON.
    requests: for the engine, one a prompt.
    start: time.monotonic() of its request.
  """
  worker: Worker
  tokenizer: Tokenizer
  metrics: Metrics
  body: Body
  form: Completions | Chats
  requests: list[Request]
  start: float

  async def __call__(self, scope, receive, send) -> None:
    gone = asyncio.ensure_future(_disconnect(receive))
    work = asyncio.ensure_future(
        self._stream(send) if self.body.stream
        else self._whole(scope, receive, send))
    try:
      await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
    finally:
      if not work.done():
        self.metrics.disconnects.inc()
      for task in (gone, work):
        task.cancel()
      # Let them end, so that the slots are free.
      await asyncio.wait({gone, work})
    if not work.cancelled():
      work.result()

  async def _bursts(self):
    """Pieces of all prompts as they come, some at a time."""
    first = True
    choices = Choices(self.worker, self.tokenizer, self.requests,
                      self.body.stop)
    with contextlib.closing(choices):
      async for events, pieces in choices.bursts():
        self.metrics.count(events)
        if first:
          self.metrics.first.observe(time.monotonic() - self.start)
          first = False
        if pieces:
          yield pieces

  async def _whole(self, scope, receive, send) -> None:
    parts = [[] for _ in self.requests]
    async with contextlib.aclosing(self._bursts()) as bursts:
      async for pieces in bursts:
        for piece in pieces:
          parts[piece.index].append(piece)
    whole = [Piece(
        i, ''.join(piece.text for piece in pieces),
        [depth for piece in pieces for depth in piece.depths],
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish) for i, pieces in enumerate(parts)]
    new = sum(len(piece.depths) for piece in whole)
    answer = self.form.whole(whole, self._logprobs)
    await JSONResponse(answer | {'usage': self._usage(new)})(
        scope, receive, send)

  async def _stream(self, send) -> None:
    new, begun = 0, False
    async with contextlib.aclosing(self._bursts()) as bursts:
      async for pieces in bursts:
        chunks = [self.form.chunk(piece, self._logprobs) for piece in pieces]
        new += sum(len(piece.depths) for piece in pieces)
        if not begun:
          await send({'type': 'http.response.start', 'status': 200, 'headers': [
              (b'content-type', b'text/event-stream; charset=utf-8'),
              (b'cache-control', b'no-cache')]})
          begun = True
          chunks = [chunk for i in range(len(self.requests))
                    for chunk in self.form.opening(i)] + chunks
        await self._send(send, chunks)
    ending = [self.form.last() | {'usage': self._usage(new)}
              ] if self.body.stream_options.include_usage else []
    await self._send(send, [*ending, None])
    await send({'type': 'http.response.body'})

  async def _send(self, send, chunks: list[dict[str, Any] | None]) -> None:
    body = ''.join(
        f'data: {"[DONE]" if chunk is None else json.dumps(chunk)}\n\n'
        for chunk in chunks)
    await send({'type': 'http.response.body', 'body': body.encode(),
                'more_body': True})

  @property
  def _logprobs(self) -> bool:
    # For completions 0 means those of the chosen tokens too.
    return self.body.logprobs is not None and self.body.logprobs is not False

  def _usage(self, new: int) -> dict[str, int]:
    return usage(
        sum(len(request.prompt) for request in self.requests), new)


async def _disconnect(receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass
