"""The JSON of answers, in the form of OpenAI's two endpoints.

`depth`, the loops that each token took, is an addition.
"""

import time
from typing import Any
import uuid

from recursive_tx.serve.choices import Piece, Token


class Completions:
  """Of /v1/completions."""

  def __init__(self, model: str):
    self._facts = {'id': f'cmpl-{uuid.uuid4().hex}', 'created':
                   int(time.time()), 'model': model,
                   'object': 'text_completion'}

  def opening(self, index: int) -> list[dict[str, Any]]:
    """Chunks before the first piece."""
    return []

  def chunk(self, piece: Piece, logprobs: bool) -> dict[str, Any]:
    """A piece of a streamed answer."""
    return self.whole([piece], logprobs)

  def whole(self, pieces: list[Piece], logprobs: bool) -> dict[str, Any]:
    """Complete answers, one a prompt."""
    return self._facts | {'choices': [{
        'index': piece.index, 'text': piece.text, 'depth': piece.depths,
        'logprobs': self._logprobs(piece.tokens) if logprobs else None,
        'finish_reason': piece.finish} for piece in pieces]}

  def last(self) -> dict[str, Any]:
    """The chunk that has the usage only."""
    return self._facts | {'choices': []}

  def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
    return {
        'tokens': [token.text for token in tokens],
        'token_logprobs': [token.log_p for token in tokens],
        'top_logprobs': [{token.text: token.log_p} for token in tokens],
        'text_offset': [token.offset for token in tokens]}


class Chats:
  """Of /v1/chat/completions."""

  def __init__(self, model: str):
    self._facts = {'id': f'chatcmpl-{uuid.uuid4().hex}',
                   'created': int(time.time()), 'model': model}

  def opening(self, index: int) -> list[dict[str, Any]]:
    """The chunk with the role."""
    return [self._chunk({
        'index': index, 'delta': {'role': 'assistant', 'content': ''},
        'logprobs': None, 'finish_reason': None})]

  def chunk(self, piece: Piece, logprobs: bool) -> dict[str, Any]:
    """A piece of a streamed answer."""
    return self._chunk({
        'index': piece.index, 'depth': piece.depths,
        'delta': {'content': piece.text} if piece.text else {},
        'logprobs': self._logprobs(piece.tokens) if logprobs else None,
        'finish_reason': piece.finish})

  def whole(self, pieces: list[Piece], logprobs: bool) -> dict[str, Any]:
    """A complete answer."""
    return self._facts | {'object': 'chat.completion', 'choices': [{
        'index': piece.index, 'depth': piece.depths,
        'message': {'role': 'assistant', 'content': piece.text,
                    'refusal': None},
        'logprobs': self._logprobs(piece.tokens) if logprobs else None,
        'finish_reason': piece.finish} for piece in pieces]}

  def last(self) -> dict[str, Any]:
    """The chunk that has the usage only."""
    return self._chunk()

  def _chunk(self, *choices) -> dict[str, Any]:
    return self._facts | {'object': 'chat.completion.chunk',
                          'choices': list(choices)}

  def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
    return {'refusal': None, 'content': [{
        'token': token.text, 'logprob': token.log_p,
        'bytes': list(token.bytes), 'top_logprobs': []}
                                         for token in tokens]}


def usage(prompt: int, new: int) -> dict[str, int]:
  """Tokens; the end-of-text token is not counted."""
  return {'prompt_tokens': prompt, 'completion_tokens': new,
          'total_tokens': prompt + new}


def error(message: str, status: int, param: str | None = None,
          code: str | None = None) -> dict[str, Any]:
  """An error in OpenAI's form."""
  kind = {429: 'rate_limit_error', 500: 'server_error',
          503: 'server_error'}.get(status, 'invalid_request_error')
  return {'error': {
      'message': message, 'type': kind, 'param': param, 'code': code}}
