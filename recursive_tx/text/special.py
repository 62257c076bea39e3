"""Special and added tokens, as the JSON files beside a tokenizer name them.

  tokenizer_config.json    named tokens (`bos_token`), added tokens, flags
  special_tokens_map.json  named tokens of older files, which replace those
  added_tokens.json        ids of added tokens of older files
  generation_config.json   `eos_token_id`, before that of config.json
  config.json              `bos_token_id`, `eos_token_id`

As in transformers, the files of older versions count only where
tokenizer_config.json has no `added_tokens_decoder`.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

from recursive_tx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Added:
  """A token that is not in the vocabulary that was trained.

  Attributes:
    content: its text.
    special: it controls the model, and is no text.
    lstrip, rstrip: it includes white space before it, after it.
  """
  content: str
  special: bool
  lstrip: bool = False
  rstrip: bool = False


class Files:
  """What the files of a directory hold about its special tokens.

  Attributes:
    directory: where they are.
    named: {'bos_token': '<s>', ...}, also names of a model's own.
    extra: further special tokens, which have no name.
    added: added tokens by id.
    settings: tokenizer_config.json as read.
  """

  def __init__(self, directory: pathlib.Path):
    """Reads them.

    Raises:
      UserError: a file that is not JSON, or an entry that has no meaning.
    """
    self.directory = directory
    found = self._read('tokenizer_config.json')
    self.settings = dict(found)
    older = 'added_tokens_decoder' not in found
    if older:
      found |= self._read('special_tokens_map.json')
    self.named = {
        name: text for name, value in found.items()
        if name.endswith('_token') and (text := _content(value))}
    self.extra = []
    for name in ('additional_special_tokens', 'extra_special_tokens'):
      value = found.get(name) or []
      if isinstance(value, dict):  # Newer files name these too.
        self.named |= {
            key: text for key, x in value.items() if (text := _content(x))}
      else:
        self.extra += [text for x in value if (text := _content(x))]
    self.added = self._added(found, older)
    self._model = self._token_ids('config.json', 'source.json')
    self._generation = self._token_ids('generation_config.json')

  def adds_bos(self) -> bool | None:
    """`add_bos_token`, None where it is not set."""
    return self.settings.get('add_bos_token')

  def special_id(
      self, name: str, to_id: Callable[[str], int | None], default: int | None
  ) -> int | None:
    """The id of 'bos' or 'eos': of the named token, of config.json, default.

    An explicit null in config.json means that there is none.
    """
    piece = self.named.get(f'{name}_token')
    if piece is not None and to_id(piece) is not None:
      return to_id(piece)
    key = f'{name}_token_id'
    if key not in self._model:
      return default
    # Models with several ends name that of a document first.
    return next(iter(self._model[key]), None)

  def end_ids(
      self, eos_id: int, to_id: Callable[[str], int | None]
  ) -> tuple[int, ...]:
    """Every token that ends a generated text, without repetitions.

    Those of generation_config.json, else of config.json, and `eos_token`,
    without which text after the end of a document would be generated.

    Args:
      eos_id: the end of a document, for where the files name none.
      to_id: the tokenizer's.
    """
    ids = (self._generation.get('eos_token_id')
           or self._model.get('eos_token_id') or [eos_id])
    named = to_id(self.named.get('eos_token', ''))
    return tuple(dict.fromkeys([*ids, *([] if named is None else [named])]))

  def check(self, bos_id: int | None, eos_id: int | None, V: int) -> None:
    """Raises UserError where an id that is needed is missing or absurd."""
    if eos_id is None:
      raise UserError(
          f'{self.directory}: nothing names the token that ends a document; '
          'add eos_token_id to config.json')
    for name, value in (('bos', bos_id), ('eos', eos_id)):
      if value is not None and value >= V:
        raise UserError(
            f'{self.directory}: {name}_token_id {value} is outside the '
            f'{V} ids of the tokenizer; the files do not belong together')

  def _added(self, found: dict[str, Any], older: bool) -> dict[int, Added]:
    special = {*self.named.values(), *self.extra}
    if older:
      entries = [(id, {'content': content, 'special': content in special})
                 for content, id in self._read('added_tokens.json').items()]
    else:
      entries = [(int(id) if str(id).isdecimal() else id, token)
                 for id, token in found['added_tokens_decoder'].items()]
    added = {}
    for id, token in entries:
      content = _content(token)
      if not content or type(id) is not int or id < 0:
        raise UserError(
            f'{self.directory}: added token {token!r} with id {id!r}; expected'
            ' a text and a number; correct the tokenizer\'s files')
      added[id] = Added(
          content, bool(token.get('special')) or content in special,
          bool(token.get('lstrip')), bool(token.get('rstrip')))
    return dict(sorted(added.items()))

  def _token_ids(self, *names: str) -> dict[str, list[int]]:
    """Lists of ids by key; empty for an explicit null."""
    found = {}
    # A directory saved here keeps the source's config.json in source.json,
    # and its own config.json has no token ids.
    for name in names:
      values = self._read(name)
      for key in ('bos_token_id', 'eos_token_id'):
        if key in values:
          found[key] = self._ids(name, key, values[key])
    return found

  def _ids(self, name: str, key: str, value: object) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if value is None:
      return []
    if not ids or any(type(id) is not int or id < 0 for id in ids):
      raise UserError(
          f'{self.directory}: {key} is {value!r}, expected a token id, a list'
          f' of them or null; correct {name}')
    return ids

  def _read(self, name: str) -> dict[str, Any]:
    path = self.directory / name
    if not path.is_file():
      return {}
    try:
      value = json.loads(path.read_text('utf-8-sig'))
    except ValueError as error:
      raise unreadable(path, error) from None
    if not isinstance(value, dict):
      raise unreadable(path, 'expected a JSON object')
    return value


def unreadable(path: pathlib.Path, error: object) -> UserError:
  """An error for a file whose content is not what its name promises."""
  reason = ' '.join(str(error).split())
  return UserError(
      f'{path} cannot be read ({reason}); copy the file again from its source')


def _content(token: object) -> str:
  """The text of a token, which may be an object; '' where it has none."""
  if isinstance(token, dict):
    token = token.get('content')
  return token if isinstance(token, str) else ''
