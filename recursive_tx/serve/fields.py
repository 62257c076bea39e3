"""What a client may ask: the JSON of OpenAI's endpoints, checked by hand.

Each fault is one error that says what was found, what was expected and the
way out. Knows nothing of models or tokenizers.
"""

from collections.abc import Callable
import dataclasses
import json
import reprlib
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request that is well formed.

  Attributes:
    prompts: texts or token ids; of a chat its messages, alone.
    model: its name; None for whichever there is.
    max_tokens: most tokens to add; None for the endpoint's default.
    temperature, top_p, top_k, seed: as in sampling.Sampler; a seed of None is
      drawn.
    stop: strings that end an answer.
    stream: answer in pieces.
    include_usage: end these with the count of tokens.
    logprobs: report each token's; None or False for not, at completions 0 or 1.
  """
  prompts: list[Any]
  model: str | None = None
  max_tokens: int | None = None
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  seed: int | None = None
  stop: tuple[str, ...] = ()
  stream: bool = False
  include_usage: bool = False
  logprobs: int | bool | None = None


def parse(body: bytes, *, chat: bool) -> Asked:
  """Reads the body of a request.

  Raises:
    Refused: it is not what OpenAI's endpoint takes, or asks for what this
      server has not.
  """
  found = {name: value for name, value in _json(body).items()
           if value is not None}
  fields = _COMMON | (_CHAT if chat else _COMPLETIONS)
  ignorable = _UNSUPPORTED | (
      _UNSUPPORTED_CHAT if chat else _UNSUPPORTED_COMPLETIONS)
  values = {}
  for name, value in found.items():
    if name in fields:
      values[name] = fields[name](name, value)
    elif name not in ignorable:
      near = nearest(name, [*fields, *ignorable])
      raise Refused(f'there is no field {_show(name)}{near}', name[:99],
                    'unknown_field')
    elif not any(value == x and type(value) is type(x)
                 for x in ignorable[name]):
      raise Refused(f'{name!r} is not supported; leave it out', name,
                    'unsupported_field')
  for name in ('n', 'user'):  # Checked, and of no effect.
    values.pop(name, None)
  subject = 'messages' if chat else 'prompt'
  if subject not in values:
    raise Refused(f'{subject!r} is missing', subject, 'missing_field')
  options = values.pop('stream_options', None)
  if options is not None and not values.get('stream'):
    raise Refused("'stream_options' needs 'stream': true", 'stream_options')
  if 'max_completion_tokens' in values:
    values['max_tokens'] = values.pop('max_completion_tokens')
  prompts = values.pop(subject)
  return Asked([prompts] if chat else prompts, **values,
               include_usage=bool(options))


def _json(body: bytes) -> dict[str, Any]:
  """The object in a body."""
  def no_number(word):
    raise UserError(f'{word} is not JSON')
  try:
    value = json.loads(body.decode('utf-8'), parse_constant=no_number)
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


# Checks: (name, value) -> the value, or Refused.


def _wrong(name: str, value: Any, expected: str) -> Refused:
  return Refused(f'{name!r} is {_show(value)}; expected {expected}', name,
                 'invalid_value')


def _show(value: Any) -> str:
  return reprlib.repr(value)[:80]


def _text(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise _wrong(name, value, 'a string')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise Refused(f'{name!r} holds half a surrogate pair; send whole'
                  ' characters', name, 'invalid_utf8') from None
  return value


def _boolean(name: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise _wrong(name, value, 'true or false')
  return value


def _integer(least: int, most: int) -> Callable[[str, Any], int]:
  def check(name, value):
    if type(value) is not int or not least <= value <= most:
      raise _wrong(name, value, f'an integer from {least} to {most}')
    return value
  return check


def _temperature(name: str, value: Any) -> float:
  if type(value) not in (int, float) or not 0 <= value <= 2:
    raise _wrong(name, value, 'a number from 0 to 2')
  return float(value)


def _top_p(name: str, value: Any) -> float:
  if type(value) not in (int, float) or not 0 < value <= 1:
    raise _wrong(name, value, 'a number above 0 and at most 1')
  return float(value)


def _one(name: str, value: Any) -> int:
  if type(value) is not int or value != 1:
    raise _wrong(name, value, '1; send the request again for another answer')
  return 1


def _stop(name: str, value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > 4:
    raise _wrong(name, value, 'a string or a list of up to 4')
  if not all(_text(name, stop) for stop in stops):
    raise _wrong(name, value, 'strings that are not empty')
  return tuple(stops)


def _stream_options(name: str, value: Any) -> bool:
  """Whether usage is to be included."""
  if not isinstance(value, dict):
    raise _wrong(name, value, 'an object')
  for key in value:
    if key != 'include_usage':
      raise Refused(f'there is no field {_show(key)} in {name!r}'
                    f'{nearest(key, ["include_usage"])}', name,
                    'unknown_field')
  return _boolean('include_usage', value.get('include_usage', False))


def _prompt(name: str, value: Any) -> list[str | list[int]]:
  """One or several, each a text or token ids."""
  def is_ids(x):
    return isinstance(x, list) and x and all(
        type(i) is int and 0 <= i < 2**31 for i in x)
  several = [value] if isinstance(value, str) or is_ids(value) else value
  if not isinstance(several, list) or not several or not all(
      isinstance(x, str) or is_ids(x) for x in several):
    raise _wrong(name, value, 'a string, token ids, or a list of either')
  return [_text(name, x) if isinstance(x, str) else x for x in several]


def _messages(name: str, value: Any) -> list[dict[str, str]]:
  """Roles and texts; the parts of a text concatenated."""
  if not isinstance(value, list) or not value:
    raise _wrong(name, value, 'a list of messages')
  return [_message(f'messages[{i}]', x) for i, x in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, str]:
  if not isinstance(value, dict):
    raise _wrong(name, value, "an object with 'role' and 'content'")
  for key, content in value.items():
    if key not in ('role', 'content', 'name') and content is not None:
      raise Refused(
          f'there is no field {_show(key)} in {name!r}'
          f'{nearest(key, ["role", "content", "name"])}; only texts are'
          ' supported', name, 'unknown_field')
  roles = ('system', 'developer', 'user', 'assistant')
  if value.get('role') not in roles:
    raise _wrong(f'{name}.role', value.get('role'),
                 f'one of {", ".join(roles)}')
  content = value.get('content')
  if isinstance(content, list):
    for part in content:
      if not isinstance(part, dict) or part.keys() != {
          'type', 'text'} or part['type'] != 'text':
        raise _wrong(f'{name}.content', part, 'parts of type text')
    content = ''.join(
        _text(f'{name}.content', part['text']) for part in content)
  message = {'role': value['role'],
             'content': _text(f'{name}.content', content)}
  if value.get('name') is not None:
    message['name'] = _text(f'{name}.name', value['name'])
  return message


_COMMON = {
    'model': _text, 'max_tokens': _integer(1, 2**31 - 1),
    'temperature': _temperature, 'top_p': _top_p,
    'top_k': _integer(0, 2**31 - 1), 'seed': _integer(-2**63, 2**63 - 1),
    'n': _one, 'stop': _stop, 'stream': _boolean,
    'stream_options': _stream_options, 'user': _text,
}
_COMPLETIONS = {'prompt': _prompt, 'logprobs': _integer(0, 1)}
_CHAT = {'messages': _messages, 'logprobs': _boolean,
         'max_completion_tokens': _integer(1, 2**31 - 1)}
# Fields of OpenAI's, and the values that ask for nothing.
_UNSUPPORTED = {
    'frequency_penalty': (0, 0.0), 'presence_penalty': (0, 0.0),
    'logit_bias': ({},),
}
_UNSUPPORTED_COMPLETIONS = {
    'best_of': (1,), 'echo': (False,), 'suffix': ('',)}
_UNSUPPORTED_CHAT = {
    'audio': (), 'function_call': ('none', 'auto'), 'functions': ([],),
    'metadata': ({},), 'modalities': (['text'],), 'moderation': (),
    'parallel_tool_calls': (True, False), 'prediction': (),
    'prompt_cache_key': (), 'prompt_cache_retention': (),
    'reasoning_effort': ('none',), 'response_format': ({'type': 'text'},),
    'safety_identifier': (), 'service_tier': ('auto', 'default'),
    'store': (False,), 'tool_choice': ('none', 'auto'), 'tools': ([],),
    'top_logprobs': (0,), 'verbosity': (), 'web_search_options': (),
}
