"""A conversation as text and tokens, of a prompt or to train on.

A template is a program in Jinja that comes with the weights. It gets what
transformers' `apply_chat_template` gives it, and runs in a sandbox in which it
can change nothing and reach nothing.
"""

from collections.abc import Mapping, Sequence
import datetime
import hashlib
import json
import os
import pathlib
from typing import Any

from recursive_tx.errors import UserError
from recursive_tx.text.special import Files
from recursive_tx.text.tokenizer import Tokenizer

_NAMED = 'additional_chat_templates'


class Chat:
  """Messages to token ids, by the template of a directory.

  It is chat_template.jinja, with additional_chat_templates/NAME.jinja beside
  it, or else `chat_template` of tokenizer_config.json; of several the one
  named 'default'. A directory without a template has lines of
  'role: content', ended by 'assistant:'.
  """

  def __init__(
      self, directory: str | os.PathLike, tokenizer: Tokenizer, *,
      now: datetime.datetime | None = None):
    """Finds the template; it is read when it is first used.

    Args:
      directory: where the template is, if there is one.
      tokenizer: of the text.
      now: the time that templates may write; None is that of the rendering.
    """
    self._directory, self._tokenizer = pathlib.Path(directory), tokenizer
    self._template, self._settings = None, Files(self._directory).settings
    self._now = now
    self.has_template = any(
        (self._directory / name).exists()
        for name in ('chat_template.jinja', _NAMED)) or bool(
            self._settings.get('chat_template'))

  def render(
      self, messages: Sequence[Mapping[str, Any]], *,
      add_generation_prompt: bool = True,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: of {'role': ..., 'content': ...}; keys of None are left out.
      add_generation_prompt: end where the assistant's answer begins.

    Raises:
      UserError: the template cannot be read, or does not take these messages.
    """
    return self._render(messages, add_generation_prompt)[0]

  def render_spans(
      self, messages: Sequence[Mapping[str, Any]]
  ) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation to train on, and what the assistant wrote.

    That is what stands in the template's own {% generation %} tags, where it
    has them. Otherwise it is what rendering an assistant's message adds to the
    prompt for it, the end of the turn included, but for white space after that
    end.

    Returns:
      The text, and the places in it, (start, end) in characters.

    Raises:
      UserError: as `render`; or a template without the tags writes earlier
        messages in another way once there are later ones.
    """
    text, spans = self._render(messages, False)
    if spans:
      return text, spans
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      before = self.render(messages[:i])
      after = text
      if i + 1 < len(messages):
        after = self.render(messages[: i + 1], add_generation_prompt=False)
      if not (after.startswith(before) and text.startswith(after)):
        raise UserError(
            f"the model's chat template writes the messages before message {i}"
            ' in another way where more follow; mark what the assistant writes'
            ' with {% generation %} and {% endgeneration %} in the template')
      added = after[len(before):].rstrip()
      if added.endswith(message['content'].rstrip()):
        # Nothing but white space ends the turn.
        added = after[len(before):]
      spans.append((len(before), len(before) + len(added)))
    return text, spans

  def _render(
      self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
  ) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it the template has {% generation %}."""
    messages = [{key: value for key, value in message.items()
                 if value is not None} for message in messages]
    if not self.has_template:
      return ''.join(
          f'{message["role"]}: {message["content"]}\n' for message in messages
      ) + ('assistant:' if add_generation_prompt else ''), []
    parts, spans = [], []
    try:
      if self._template is None:
        self._template = _environment(self._now).from_string(self.source())
      self._template.environment.generation = (parts, spans)
      for part in self._template.generate(
          messages=messages, tools=None, documents=None,
          add_generation_prompt=add_generation_prompt,
          **self._tokenizer.names):
        parts.append(part)
    except Exception as error:  # Whatever the program does.
      reason = ' '.join(str(error).split())[:200] or type(error).__name__
      raise UserError(
          f"the model's chat template refuses the messages: {reason}"
      ) from None
    return ''.join(parts), spans

  @property
  def digest(self) -> str:
    """Hexadecimal digest of the template, '' without one.

    Raises:
      UserError: there are several, and no default.
    """
    if not self.has_template:
      return ''
    source = self.source().encode()
    return hashlib.blake2b(source, digest_size=16).hexdigest()

  def encode(
      self, messages: Sequence[Mapping[str, Any]], *,
      add_generation_prompt: bool = True,
  ) -> list[int]:
    """The ids of a conversation.

    The rendered text is tokenised once, with special tokens recognised; BOS is
    what the template writes. Lines without a template are a plain text, which
    opens as documents do. Arguments and errors as of `render`.
    """
    text = self.render(messages, add_generation_prompt=add_generation_prompt)
    if self.has_template:
      return self._tokenizer.encode(text, special=True)
    return self._tokenizer.opening + self._tokenizer.encode(text)

  def source(self) -> str:
    """The template to use. Raises UserError where none is the default."""
    files = {path.stem: path
             for path in (self._directory / _NAMED).glob('*.jinja')}
    alone = self._directory / 'chat_template.jinja'
    if alone.exists():
      files['default'] = alone
    if files:
      sources = {name: path.read_text('utf-8')
                 for name, path in files.items() if name == 'default'}
    else:
      found = self._settings['chat_template']
      if isinstance(found, list):  # Several, by name.
        found = {x['name']: x['template'] for x in found}
      sources = found if isinstance(found, dict) else {'default': found}
    if not isinstance(sources.get('default'), str):
      raise UserError("there are several templates, but no 'default'")
    return sources['default']


def _environment(now: datetime.datetime | None):
  """The Jinja of transformers' chat templates: its tags, filters, globals.

  Its attribute `generation` is the parts of the text rendered so far and a
  list, to which the tag adds where it stands.
  """
  import jinja2
  from jinja2 import ext, nodes
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(ext.Extension):
    """{% generation %}: what the assistant wrote, for masks in training."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(
          ['name:endgeneration'], drop_needle=True)
      call = self.call_method('_body')
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller):
      body = caller()
      parts, spans = self.environment.generation
      start = sum(map(len, parts))
      spans.append((start, start + len(body)))
      return body

  def to_json(value, ensure_ascii=False, indent=None, separators=None,
              sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[Generation, ext.loopcontrols])
  environment.filters['tojson'] = to_json
  environment.globals |= {
      'raise_exception': refuse,
      'strftime_now': lambda form: (
          now or datetime.datetime.now()).strftime(form)}
  return environment
