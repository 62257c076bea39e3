"""The endpoints: requests are checked, answered and counted.

No answer names a path of this machine, and no header lets other sites in.
"""

import asyncio
import base64
import dataclasses
import hashlib
import pathlib
import re
import secrets
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recursive_tx.engine import Request
from recursive_tx.engine.sampling import Sampler
from recursive_tx.errors import UserError
from recursive_tx.serve import answers, fields, metrics
from recursive_tx.serve.fields import Body, Refused
from recursive_tx.serve.live import Live
from recursive_tx.serve.worker import Worker
from recursive_tx.text.chat import Chat
from recursive_tx.text.tokenizer import Tokenizer

_PAGE = pathlib.Path(__file__).with_name('page.html')
_UPLOAD_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may not exceed.

  Attributes:
    max_len: tokens of a prompt and its answer.
    queue: requests that may wait for a slot.
    body: bytes of a request.
  """
  max_len: int = 2048
  queue: int = 256
  body: int = 2**20


@dataclasses.dataclass
class Service:
  """What the endpoints share.

  Attributes:
    name, loops, V: of the model.
    draining: no new requests are taken.
  """
  worker: Worker
  tokenizer: Tokenizer
  chat: Chat
  limits: Limits
  name: str
  loops: int
  V: int
  draining: bool = False

  def __post_init__(self):
    self.metrics = metrics.Metrics(self.worker)
    self.created = int(time.time())

  async def completions(self, http: HttpRequest) -> Live:
    """POST /v1/completions."""
    return await self._answer(http, answers.Completions(self.name))

  async def chats(self, http: HttpRequest) -> Live:
    """POST /v1/chat/completions."""
    return await self._answer(http, answers.Chats(self.name))

  async def models(self, http: HttpRequest) -> Response:
    """GET /v1/models; `loops` and `max_len` are additions."""
    return JSONResponse({'object': 'list', 'data': [self._about()]})

  async def model(self, http: HttpRequest) -> Response:
    """GET /v1/models/NAME."""
    self._check_name(http.path_params['name'])
    return JSONResponse(self._about())

  async def health(self, http: HttpRequest) -> Response:
    """GET /health: 200 where requests are taken."""
    status = ('failed' if self.worker.failure else
              'draining' if self.draining else 'ok')
    return JSONResponse({'status': status},
                        200 if status == 'ok' else 503)

  async def figures(self, http: HttpRequest) -> Response:
    """GET /metrics."""
    return Response(self.metrics.text(), media_type=metrics.CONTENT_TYPE)

  def _about(self) -> dict[str, Any]:
    return {'id': self.name, 'object': 'model', 'created': self.created,
            'owned_by': 'recursive_tx', 'loops': self.loops,
            'max_len': self.limits.max_len}

  def _check_name(self, name: str | None) -> None:
    if name not in (None, self.name):
      raise Refused(f'there is no model {name[:80]!r}; this is {self.name!r}',
                    'model', 'model_not_found', 404)

  async def _body(self, http: HttpRequest) -> bytes:
    """All of it, unless it is too large, too slow or no JSON."""
    if self.worker.failure or self.draining:
      raise Refused('the server takes no more requests; try another',
                    code='unavailable', status=503)
    kind = http.headers.get('content-type', '').split(';')[0].strip().lower()
    if kind != 'application/json':
      raise Refused(f'content-type is {kind[:80]!r}; send application/json',
                    code='unsupported_media_type', status=415)
    most, body = self.limits.body, bytearray()
    large = Refused(f'the body is larger than {most} bytes; send less',
                    code='body_too_large', status=413)
    length = http.headers.get('content-length', '0')
    if length.isdecimal() and int(length[:19]) > most:
      raise large
    try:
      async with asyncio.timeout(_UPLOAD_SECONDS):
        async for part in http.stream():
          body += part
          if len(body) > most:
            raise large
    except ClientDisconnect:
      raise Refused('the body did not come whole', status=499) from None
    except TimeoutError:
      raise Refused('the body did not come in time', status=408,
                    code='timeout') from None
    return bytes(body)

  async def _answer(self, http: HttpRequest, form) -> Live:
    raw, start = await self._body(http), time.monotonic()
    # In another thread: a long body takes a while.
    body, prompts = await asyncio.to_thread(self._read, raw, form)
    requests = self._requests(body, form, prompts)
    live, most = self.worker.live, self.worker.slots + self.limits.queue
    if len(requests) > most:
      raise Refused(f"'prompt' holds {len(requests)} prompts; send at most"
                    f' {most}', 'prompt')
    if live + len(requests) > most:
      raise Refused(f'{live} requests are being answered or wait, of at most'
                    f' {most}; try again', code='queue_full', status=429)
    self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    return Live(self.worker, self.tokenizer, self.metrics, body, form,
                requests, start)

  def _read(self, raw: bytes, form) -> tuple[Body, list[list[int]]]:
    """The body, and the token ids of its prompts."""
    body = fields.parse(raw, chat=isinstance(form, answers.Chats))
    self._check_name(body.model)
    if isinstance(body, fields.Chat):
      try:
        return body, [self.chat.encode(body.model_dump()['messages'])]
      except UserError as error:
        raise Refused(str(error), 'messages', 'invalid_value') from None
    return body, [
        self.tokenizer.opening + self.tokenizer.encode(prompt)
        if isinstance(prompt, str) else prompt for prompt in body.prompt]

  def _requests(self, body: Body, form, prompts) -> list[Request]:
    """For the engine, one a prompt."""
    most, requests = self.limits.max_len, []
    seed = secrets.randbits(32) if body.seed is None else body.seed
    for i, prompt in enumerate(prompts):
      if not prompt and isinstance(form, answers.Chats):
        raise Refused("the model's chat template makes no text of the"
                      ' messages', 'messages', 'invalid_value')
      if not prompt:
        raise Refused("'prompt' is empty, and this model has no token that"
                      ' opens a text; send some text', 'prompt')
      if max(prompt) >= self.V:
        raise Refused(f"'prompt' holds token id {max(prompt)}; the model has"
                      f' ids 0 to {self.V - 1}', 'prompt', 'invalid_value')
      wanted = body.max_tokens
      if wanted is None:
        chat = isinstance(form, answers.Chats)
        wanted = max(1, most - len(prompt)) if chat else 16
      if len(prompt) + wanted > most:
        raise Refused(
            f'a prompt of {len(prompt)} tokens and max_tokens={wanted} exceed'
            f' the {most} tokens that both may have together; shorten one',
            'max_tokens' if len(prompt) < most else 'prompt',
            'context_length_exceeded')
      requests.append(Request(prompt, wanted, Sampler(
          body.temperature, body.top_k, body.top_p, seed + i)))
    return requests


def make(service: Service):
  """The ASGI application."""
  async def refused(http, error: Refused):
    headers = {'retry-after': '1'} if error.status in (429, 503) else {}
    return JSONResponse(answers.error(
        error.message, error.status, error.param, error.code), error.status,
        headers)

  async def http_error(http, error: HTTPException):
    return JSONResponse(
        answers.error(f'{error.detail}: {http.method} {http.url.path[:80]}',
                      error.status_code), error.status_code, error.headers)

  async def failed(http, error):
    return JSONResponse(answers.error('the server failed', 500), 500)

  page, headers = _page()
  async def root(http):
    return Response(page, media_type='text/html', headers=headers)

  app = Starlette(routes=[
      Route('/', root),
      Route('/health', service.health),
      Route('/metrics', service.figures),
      Route('/v1/models', service.models),
      Route('/v1/models/{name:path}', service.model),
      Route('/v1/completions', service.completions, methods=['POST']),
      Route('/v1/chat/completions', service.chats, methods=['POST']),
  ], exception_handlers={
      Refused: refused, HTTPException: http_error, Exception: failed})

  async def counted(scope, receive, send):
    if scope['type'] != 'http' or not scope['path'].startswith('/v1/'):
      return await app(scope, receive, send)
    status = 499
    async def watch(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)
    try:
      await app(scope, receive, watch)
    finally:
      service.metrics.requests.labels(str(status)).inc()

  return counted


def _page() -> tuple[str, dict[str, str]]:
  """The page, and headers under which its own script and style run alone."""
  page = _PAGE.read_text('utf-8')
  def hashes(tag):
    return ' '.join(
        f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'"
        for x in re.findall(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL))
  return page, {
      'content-security-policy':
          f"default-src 'none'; script-src {hashes('script')}; style-src"
          f" {hashes('style')}; connect-src 'self'; base-uri 'none';"
          " form-action 'none'; frame-ancestors 'none'",
      'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer'}
