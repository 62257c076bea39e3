"""The bodies of requests to OpenAI's endpoints, as strict pydantic models.

A field's type, range, default and error text stand in its declaration. One
error is reported, the first in the body. Knows nothing of language models or
tokenizers.
"""

import dataclasses
import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from recursive_tx.errors import UserError, nearest


@dataclasses.dataclass
class Refused(Exception):
  """An answer that is an error, in OpenAI's form.

  Attributes:
    message: for people.
    param: the field at fault, if it is one.
    code: for programs, such as 'context_length_exceeded'.
    status: of HTTP.
  """
  message: str
  param: str | None = None
  code: str | None = None
  status: int = 400


def _show(value: Any) -> str:
  return reprlib.repr(value)[:80]


def _wrong(value: Any, expected: str) -> PydanticCustomError:
  return PydanticCustomError(
      'invalid_value', f'is {_show(value)}; expected {expected}')


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise _wrong(value, 'a string')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise PydanticCustomError('invalid_utf8', (
        'holds half a surrogate pair; send whole characters')) from None
  return value


def _stop(value: Any) -> list[str]:
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > 4:
    raise _wrong(value, 'a string or a list of up to 4')
  if not all(_text(stop) for stop in stops):
    raise _wrong(value, 'strings that are not empty')
  return stops


def _prompt(value: Any) -> list[str | list[int]]:
  """One or several, each a text or token ids."""
  def is_ids(x):
    return isinstance(x, list) and x and all(
        type(i) is int and 0 <= i < 2**31 for i in x)
  several = [value] if isinstance(value, str) or is_ids(value) else value
  if not isinstance(several, list) or not several or not all(
      isinstance(x, str) or is_ids(x) for x in several):
    raise _wrong(value, 'a string, token ids, or a list of either')
  return [_text(x) if isinstance(x, str) else x for x in several]


def _content(value: Any) -> str:
  """A text; of several parts, all of them."""
  if not isinstance(value, list):
    return _text(value)
  for part in value:
    if not isinstance(part, dict) or part.keys() != {
        'type', 'text'} or part['type'] != 'text':
      raise _wrong(part, 'parts of type text')
  return ''.join(_text(part['text']) for part in value)


def _integer(least: int, most: int, default: int | None = None) -> Any:
  return Field(default, ge=least, le=most,
               description=f'an integer from {least} to {most}')


_Text = Annotated[str, BeforeValidator(_text)]
_ROLES = 'system', 'developer', 'user', 'assistant'


class _Object(pydantic.BaseModel):
  """A JSON object, in which null is as good as nothing.

  Attributes:
    NEUTRAL: fields of OpenAI's that this server does not have, and the values
      that ask for nothing.
    EXPECTED: what an error calls the object.
  """
  NEUTRAL: ClassVar[dict[str, tuple]] = {}
  EXPECTED: ClassVar[str] = 'an object'
  model_config = pydantic.ConfigDict(strict=True, extra='forbid')

  @pydantic.model_validator(mode='before')
  @classmethod
  def _without_neutral(cls, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
      raise _wrong(value, cls.EXPECTED)
    kept = {}
    for name, x in value.items():
      if x is not None and not any(x == y and type(x) is type(y)
                                   for y in cls.NEUTRAL.get(name, ())):
        # Errors name it, and half a surrogate pair cannot be sent.
        kept[name.encode('utf-8', 'backslashreplace').decode()] = x
        if name not in cls.model_fields:  # Of 10^5 such, one is reported.
          break
    return kept


class StreamOptions(_Object):
  """include_usage: a stream ends with the count of tokens."""
  include_usage: bool = Field(False, description='true or false')


class Message(_Object):
  """Of a chat. A content of several parts becomes their concatenation."""
  EXPECTED = "an object with 'role' and 'content'"
  role: Literal[*_ROLES] = Field(
      None, validate_default=True, description=f'one of {", ".join(_ROLES)}')
  content: Annotated[str, BeforeValidator(_content)] = Field(
      None, validate_default=True)
  name: _Text | None = None


class Body(_Object):
  """What both endpoints take, under OpenAI's names; top_k as in Sampler.

  A max_tokens of None is the endpoint's default, a seed of None is drawn, and
  n and user have no effect.
  """
  NEUTRAL = {
      'frequency_penalty': (0, 0.0), 'presence_penalty': (0, 0.0),
      'logit_bias': ({},)}
  model: _Text | None = None
  max_tokens: int | None = _integer(1, 2**31 - 1)
  temperature: float = Field(
      1.0, ge=0, le=2, description='a number from 0 to 2')
  top_p: float = Field(
      1.0, gt=0, le=1, description='a number above 0 and at most 1')
  top_k: int = _integer(0, 2**31 - 1, 0)
  seed: int | None = _integer(-2**63, 2**63 - 1)
  n: int = Field(1, ge=1, le=1, description=(
      '1; send the request again for another answer'))
  stop: Annotated[list[str], BeforeValidator(_stop)] = []
  stream: bool = Field(False, description='true or false')
  stream_options: StreamOptions = StreamOptions()
  user: _Text | None = None


class Completion(Body):
  """Of /v1/completions; logprobs, 0 or 1: report each token's."""
  NEUTRAL = Body.NEUTRAL | {
      'best_of': (1,), 'echo': (False,), 'suffix': ('',)}
  prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt)]
  logprobs: int | None = _integer(0, 1)


class Chat(Body):
  """Of /v1/chat/completions; logprobs: report each token's."""
  NEUTRAL = Body.NEUTRAL | {
      'audio': (), 'function_call': ('none', 'auto'), 'functions': ([],),
      'metadata': ({},), 'modalities': (['text'],), 'moderation': (),
      'parallel_tool_calls': (True, False), 'prediction': (),
      'prompt_cache_key': (), 'prompt_cache_retention': (),
      'reasoning_effort': ('none',), 'response_format': ({'type': 'text'},),
      'safety_identifier': (), 'service_tier': ('auto', 'default'),
      'store': (False,), 'tool_choice': ('none', 'auto'), 'tools': ([],),
      'top_logprobs': (0,), 'verbosity': (), 'web_search_options': ()}
  messages: list[Message] = Field(
      min_length=1, fail_fast=True, description='a list of messages')
  logprobs: bool | None = Field(None, description='true or false')
  max_completion_tokens: int | None = _integer(1, 2**31 - 1)

  @pydantic.model_validator(mode='after')
  def _newer_name(self):
    self.max_tokens = self.max_completion_tokens or self.max_tokens
    return self


def parse(raw: bytes, *, chat: bool) -> Completion | Chat:
  """Reads the body of a request.

  Raises:
    Refused: it is not what OpenAI's endpoint takes, or asks for what this
      server does not have.
  """
  model, found = Chat if chat else Completion, _json(raw)
  try:
    body = model.model_validate(found)
  except pydantic.ValidationError as error:
    raise _first(model, found, error) from None
  if 'stream_options' in body.model_fields_set and not body.stream:
    raise Refused("'stream_options' needs 'stream': true", 'stream_options')
  return body


def _json(raw: bytes) -> dict[str, Any]:
  """The object in a body."""
  def no_number(word):
    raise UserError(f'{word} is not JSON')
  try:
    value = json.loads(raw.decode('utf-8'), parse_constant=no_number)
  except UnicodeDecodeError as error:
    raise Refused(f'the body is not UTF-8 at byte {error.start}',
                  code='invalid_utf8') from None
  except (ValueError, RecursionError) as error:
    reason = str(error) if isinstance(error, ValueError) else 'too deep'
    raise Refused(f'the body is not JSON: {reason[:200]}',
                  code='invalid_json') from None
  if not isinstance(value, dict):
    raise Refused(f'the body is {_show(value)}; expected a JSON object',
                  code='invalid_json')
  return value


def _first(model: type[Body], found: dict[str, Any], errors) -> Refused:
  """The first error in the body; a name that is missing may be misspelt."""
  order = {name: i for i, name in enumerate(found)}
  error = min(errors.errors(include_url=False), key=lambda error: (
      error['type'] == 'missing', order.get(error['loc'][0], -1),
      error['type'] != 'extra_forbidden'))
  *outer, name = error['loc']
  owner = (model if not outer else
           Message if outer[0] == 'messages' else StreamOptions)
  if error['type'] == 'extra_forbidden':
    if name in owner.NEUTRAL:
      return Refused(f'{name!r} is not supported; leave it out', name,
                     'unsupported_field')
    near = nearest(name, [*owner.model_fields, *owner.NEUTRAL])
    inside = f' in {_path(outer)!r}' if outer else ''
    rest = '; only texts are supported' if owner is Message else ''
    return Refused(f'there is no field {_show(name)}{inside}{near}{rest}',
                   _path(outer) or name[:99], 'unknown_field')
  if error['type'] == 'missing':
    return Refused(f'{name!r} is missing', name, 'missing_field')
  # The text is the field's description, or that of its own validator.
  path, field = _path(error['loc']), owner.model_fields.get(name)
  if field and field.description:
    wrong = _wrong(error['input'], field.description)
    error = {'msg': wrong.message(), 'type': wrong.type}
  return Refused(f'{path!r} {error["msg"]}', path, error['type'])


def _path(at) -> str:
  """Such as 'messages[0].role'."""
  parts = (f'[{x}]' if isinstance(x, int) else f'.{x}' for x in at)
  return ''.join(parts)[1:].removeprefix('stream_options.')
