"""Chats as transformers' apply_chat_template makes them."""

import json

import pytest
import tiny
from tiny_tokenizers import copy, write
import tokenizers

from recursive_tx.errors import UserError
from recursive_tx.text import Chat, tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + "
    "m['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# As the models of these names have them.
TEMPLATES = {
    'chatml': CHATML,
    'llama_2': (
        "{% if messages[0].role == 'system' %}"
        "{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0].content + "
        "'\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}"
        "{% endif %}{% for m in loop_messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if "
        "loop.index0 == 0 else '') + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"),
    'llama_3': (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%Y') %}\n{%- endif %}\n"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n"
        "{%- if tools is not none %}{{ tools | tojson(indent=4) }}"
        "{%- endif %}\n"
        "{{- 'Today: ' + date_string }}\n{%- for m in messages %}\n"
        "    {{- '<|im_start|>' + m['role'] + '\\n\\n'+ m['content'] | trim + "
        "'<|im_end|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n\\n' }}\n{%- endif %}\n"),
    'gemma': (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set role = 'model' %}{% else %}{% set role = m.role %}{% endif %}"
        "{{ '<|im_start|>' + role + '\\n' + m.content | trim + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{'<|im_start|>model\\n'}}{% endif %}"),
    'generation': (
        "{% for m in messages %}{% if m.role == 'assistant' %}\n"
        "  {% generation %}\n{% set x = 1 %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{{ x }}\n{% else %}<s>{{ m.content }}{% endif %}"
        "{% endfor %}"),
    'globals': (
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.name is defined %}{{ m.name }}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}"
        "{{ m | tojson(sort_keys=True, ensure_ascii=True) }}"
        "{{ [1, m.content] | tojson(separators=(',', ':')) }}{% endfor %}"
        "{{ documents }}{{ unk_token }}{{ dict(a=1) }}{{ nothing }}"),
}
TURNS = [
    {'role': 'user', 'content': ' the cat\n'},
    {'role': 'assistant', 'content': 'sät on <|im_end|>', 'name': None},
    {'role': 'user', 'content': 'a "dog" & </s> 日本'}]


@pytest.fixture
def directory(byte_level_dir, tmp_path):
  """tokenizer.json, and what transformers must know of it."""
  model = tokenizers.Tokenizer.from_file(
      str(byte_level_dir / 'tokenizer.json'))
  model.add_special_tokens(['<s>', '</s>', '<unk>'])
  model.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', model.token_to_id('<s>'))])
  model.save(str(tmp_path / 'tokenizer.json'))
  size = model.get_vocab_size()
  write(tmp_path, 'config.json', {'model_type': 'llama', 'eos_token_id': 0})
  write(tmp_path, 'added_tokens.json', {
      '<|im_start|>': size, '<|im_end|>': size + 1})
  write(tmp_path, 'special_tokens_map.json', {
      'bos_token': '<s>', 'eos_token': {'content': '</s>'},
      'unk_token': '<unk>', 'additional_special_tokens': ['<|im_start|>']})
  write(tmp_path, 'tokenizer_config.json', {
      'tokenizer_class': 'PreTrainedTokenizerFast'})
  return tmp_path


def _set(directory, **settings):
  path = directory / 'tokenizer_config.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  write(directory, path.name, found | settings)


def _chat(directory):
  return Chat(directory, tokenizer.load(directory))


def _same_as_transformers(directory, turns=TURNS):
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  ours = _chat(directory)
  for prompt in (True, False):
    how = dict(add_generation_prompt=prompt)
    text = theirs.apply_chat_template(turns, tokenize=False, **how)
    assert ours.render(turns, **how) == text
    assert ours.encode(turns, **how) == theirs.apply_chat_template(
        turns, return_dict=False, **how)
  return text


@pytest.mark.parametrize('name', TEMPLATES)
def test_three_turns_are_those_of_transformers(directory, name):
  _set(directory, chat_template=TEMPLATES[name])
  assert _same_as_transformers(directory)


def test_a_rendered_chat_is_tokenised_once(sentencepiece_dir, tmp_path):
  """No space after a special token, and BOS where the template has it."""
  directory = copy(sentencepiece_dir, tmp_path)
  _set(directory, added_tokens_decoder={
      '290': {'content': '<|im_start|>', 'special': True},
      '291': {'content': '<|im_end|>', 'special': True}})
  _set(directory, chat_template=CHATML)
  ours = tokenizer.load(directory)
  ids = _chat(directory).encode(TURNS[:1])
  assert [ids[0], ids.count(290), ids.count(291)] == [290, 2, 1]
  assert ours.token_bytes(ids[1])[:1] == b'u'
  assert ours.decode(ids) == (
      '<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n')


def test_which_template_is_used(directory):
  """As transformers choose among the files."""
  _set(directory, chat_template='config {{ messages[0].role }}')
  assert _same_as_transformers(directory).startswith('config')
  _set(directory, chat_template=[
      {'name': 'tool_use', 'template': 'tools'},
      {'name': 'default', 'template': 'named'}])
  assert _same_as_transformers(directory) == 'named'
  (directory / 'chat_template.jinja').write_text('alone')
  assert _same_as_transformers(directory) == 'alone'
  more = directory / 'additional_chat_templates'
  more.mkdir()
  (more / 'tool_use.jinja').write_text('tools')
  assert _same_as_transformers(directory) == 'alone'
  (directory / 'chat_template.jinja').unlink()
  with tiny.refused("no 'default'"):
    _chat(directory).encode(TURNS)


def test_without_a_template_a_chat_is_its_lines(sentencepiece_dir):
  ours = tokenizer.load(sentencepiece_dir)
  assert _chat(sentencepiece_dir).encode(TURNS[:1]) == [
      1, *ours.encode('user:  the cat\n\nassistant:')]


@pytest.mark.parametrize('template', [
    "{{ raise_exception('no\nsystem') }}", '{{ messages.append(1) }}',
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    '{{ messages[0].content | nothing }}', '{% for %}', '{{ 1 / 0 }}',
    '{{ messages[9].role.x }}', '{% include "x" %}', 7, ['x'],
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', b'\xff'])
def test_a_template_that_fails_is_an_error_of_the_chat(directory, template):
  """Made is the chat in any case: a server starts all the same."""
  if isinstance(template, bytes):
    (directory / 'chat_template.jinja').write_bytes(template)
  else:
    _set(directory, chat_template=template)
  chat = _chat(directory)
  for _ in range(2):
    with pytest.raises(UserError, match='chat template refuses') as caught:
      chat.encode(TURNS)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 300
