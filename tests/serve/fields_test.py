"""What a body's fields must be, and how the error of each reads."""

import json

import pytest

from recursive_tx.serve import fields

CHAT = {'messages': [{'role': 'user', 'content': 'x'}]}
TEXT = {'prompt': 'x'}


def _parse(body):
  return fields.parse(json.dumps(body).encode(), chat='messages' in body)


@pytest.mark.parametrize('body, message, param, code', [
    (TEXT | {'promt': 'x'}, "there is no field 'promt', did you mean"
     " 'prompt'?", 'promt', 'unknown_field'),
    # The misspelt name, not the one that is missing for it.
    ({'promt': 'x'}, "there is no field 'promt', did you mean 'prompt'?",
     'promt', 'unknown_field'),
    (TEXT | {'ech': 1}, "there is no field 'ech', did you mean 'echo'?", 'ech',
     'unknown_field'),
    ({'stream': True}, "'prompt' is missing", 'prompt', 'missing_field'),
    ({'messages': None}, "'messages' is missing", 'messages', 'missing_field'),
    (TEXT | {'echo': True}, "'echo' is not supported; leave it out", 'echo',
     'unsupported_field'),
    (TEXT | {'best_of': True}, "'best_of' is not supported; leave it out",
     'best_of', 'unsupported_field'),
    (TEXT | {'max_tokens': 0}, "'max_tokens' is 0; expected an integer from 1"
     ' to 2147483647', 'max_tokens', 'invalid_value'),
    (TEXT | {'n': True}, "'n' is True; expected 1; send the request again for"
     ' another answer', 'n', 'invalid_value'),
    (TEXT | {'top_p': True}, "'top_p' is True; expected a number above 0 and"
     ' at most 1', 'top_p', 'invalid_value'),
    # The first of several, in the order of the body.
    (TEXT | {'top_k': -1, 'model': 7}, "'top_k' is -1; expected an integer"
     ' from 0 to 2147483647', 'top_k', 'invalid_value'),
    (TEXT | {'stop': [1]}, "'stop' is 1; expected a string", 'stop',
     'invalid_value'),
    (TEXT | {'stop': ['{}', '']}, "'stop' is ['{}', '']; expected strings that"
     ' are not empty', 'stop', 'invalid_value'),
    (TEXT | {'user': '\ud800'}, "'user' holds half a surrogate pair; send"
     ' whole characters', 'user', 'invalid_utf8'),
    (TEXT | {'\ud800': 1}, r"there is no field '\\ud800'", r'\ud800',
     'unknown_field'),
    (TEXT | {'stream_options': {}}, "'stream_options' needs 'stream': true",
     'stream_options', None),
    (TEXT | {'stream_options': {'include': 1}}, "there is no field 'include' in"
     " 'stream_options', did you mean 'include_usage'?", 'stream_options',
     'unknown_field'),
    (TEXT | {'stream_options': {'include_usage': 1}}, "'include_usage' is 1;"
     ' expected true or false', 'include_usage', 'invalid_value'),
    ({'messages': ['x']}, "'messages[0]' is 'x'; expected an object with"
     " 'role' and 'content'", 'messages[0]', 'invalid_value'),
    ({'messages': [*CHAT['messages'], {'content': 'x'}]}, "'messages[1].role'"
     ' is None; expected one of system, developer, user, assistant',
     'messages[1].role', 'invalid_value'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
     "'messages[0].content' is {'type': 'image_url'}; expected parts of type"
     ' text', 'messages[0].content', 'invalid_value'),
    ({'messages': [{'content': 'x', 'tool_calls': []}]}, "there is no field"
     " 'tool_calls' in 'messages[0]'; only texts are supported", 'messages[0]',
     'unknown_field'),
])
def test_an_error_is_one_line_with_its_field_and_code(
    body, message, param, code):
  with pytest.raises(fields.Refused) as caught:
    _parse(body)
  assert caught.value == fields.Refused(message, param, code, 400)


def test_null_and_what_asks_for_nothing_are_as_good_as_absent():
  nothing = {name: None for name in fields.Completion.model_fields
             if name != 'prompt'}
  assert _parse(TEXT | nothing | {'echo': False, 'promt': None}) == _parse(TEXT)
  assert _parse(CHAT | {'tools': [], 'store': None}) == _parse(CHAT)
  message = {'role': 'user', 'content': 'x', 'name': None, 'refusal': None}
  assert _parse({'messages': [message]}) == _parse(CHAT)


def test_one_form_of_what_has_several():
  assert _parse({'prompt': [5, 6]}).prompt == [[5, 6]]
  assert _parse({'prompt': ['a', [5, 6]]}).prompt == ['a', [5, 6]]
  assert _parse(TEXT | {'stop': 'a'}).stop == ['a']
  assert _parse(TEXT | {'temperature': 1}).temperature == 1.0
  parts = [{'type': 'text', 'text': text} for text in 'ab']
  message, = _parse({'messages': [{'role': 'user', 'content': parts}]}).messages
  assert message.content == 'ab'
  # OpenAI's newer name of the same, which is the stronger.
  both = _parse(CHAT | {'max_completion_tokens': 5, 'max_tokens': 6})
  assert both.max_tokens == 5
