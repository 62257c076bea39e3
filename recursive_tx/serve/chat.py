"""A conversation as the tokens of one prompt.

A template is a program that comes with the weights; it runs in a sandbox that
lets it change nothing and reach nothing.
"""

import datetime
import json
import os
import pathlib
import re

from recursive_tx.errors import UserError
from recursive_tx.serve.fields import Refused
from recursive_tx.text.tokenizer import Tokenizer


class Chat:
  """Messages to token ids.

  By chat_template.jinja or the `chat_template` of tokenizer_config.json, or
  else line by line as 'role: content', ended by 'assistant:'.
  """

  def __init__(self, directory: str | os.PathLike, tokenizer: Tokenizer):
    """Reads the template of a directory.

    Raises:
      UserError: a template that cannot be read.
    """
    self._tokenizer, self._template = tokenizer, None
    path = pathlib.Path(directory) / 'tokenizer_config.json'
    found = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    special = {name: _content(found.get(f'{name}_token'))
               for name in ('bos', 'eos')}
    # What a template writes for them, and what it means.
    self._ids = {
        text: id for text, id in (
            (special['bos'], tokenizer.bos_id),
            (special['eos'], tokenizer.eos_id)) if text and id is not None}
    self._names = {f'{name}_token': text for name, text in special.items()}
    source = found.get('chat_template')
    if isinstance(source, list):  # Several, by name.
      source = {x.get('name'): x.get('template') for x in source}.get('default')
    alone = path.with_name('chat_template.jinja')
    if alone.is_file():  # Where newer tools put it; it goes before the other.
      path, source = alone, alone.read_text('utf-8')
    if source is not None:
      self._template = _compile(path, source)

  def encode(self, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation, up to where the assistant speaks.

    Raises:
      Refused: the template does not take these messages.
    """
    parts, ids = [self._render(messages)], []
    if self._template and self._ids:
      special = '|'.join(map(re.escape, self._ids))
      parts = re.split(f'({special})', parts[0])
    for part in filter(None, parts):
      one = self._ids.get(part) if self._template else None
      ids += self._tokenizer.encode(part) if one is None else [one]
    opening = self._tokenizer.opening
    return ids if ids[:len(opening)] == opening else opening + ids

  def _render(self, messages: list[dict[str, str]]) -> str:
    if self._template is None:
      return ''.join(f'{message["role"]}: {message["content"]}\n'
                     for message in messages) + 'assistant:'
    try:
      return self._template.render(
          messages=messages, add_generation_prompt=True, **self._names)
    except Exception as error:  # Whatever the program does.
      reason = ' '.join(str(error).split())[:200]
      raise Refused(f"the model's chat template refuses 'messages': {reason}",
                    'messages') from None


def _compile(path: pathlib.Path, source: object):
  """A template, as Hugging Face's tokenizers run them."""
  import jinja2
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'])
  environment.filters['tojson'] = lambda value, **how: json.dumps(
      value, ensure_ascii=False, **how)
  environment.globals |= {
      'raise_exception': refuse,
      'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
  try:
    return environment.from_string(source)
  except (jinja2.TemplateError, TypeError) as error:
    raise UserError(
        f"{path}: the chat template is no template"
        f' ({" ".join(str(error).split())}); correct or remove it') from None


def _content(piece: object) -> str:
  """The text of a special token, which may be an object."""
  if isinstance(piece, dict):
    piece = piece.get('content')
  return piece if isinstance(piece, str) else ''
