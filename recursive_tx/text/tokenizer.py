"""A directory's tokenizer: text to token ids and back.

Reads `tokenizer.model` (SentencePiece) or `tokenizer.json` (the `tokenizers`
library) and the special ids that the files beside it name. It knows nothing
of documents or batches, and does not import TensorFlow.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
import pathlib

from recursive_tx.errors import UserError


class Tokenizer:
  """Text to ids and back, the same whichever library is behind it.

  `decode(encode(text)) == text` wherever the tokenizer's own normalisation
  loses nothing (byte fallback or byte-level, identity normaliser).

  Attributes:
    vocab_size: one more than the largest id.
    bos_id: the id that opens a document, None where the family adds none.
    opening: the ids that open a document: `bos_id`, or none.
    eos_id: the id that ends a document.
    digest: hexadecimal digest of the tokenizer's file.
  """

  def __init__(
      self,
      encode_batch: Callable[[Sequence[str]], list[list[int]]],
      decode: Callable[[list[int]], str],
      *,
      vocab_size: int,
      bos_id: int | None,
      eos_id: int,
      digest: str,
  ):
    self._encode_batch = encode_batch
    self._decode = decode
    self.vocab_size = vocab_size
    self.bos_id = bos_id
    self.opening = [] if bos_id is None else [bos_id]
    self.eos_id = eos_id
    self.digest = digest

  def encode(self, text: str) -> list[int]:
    """The ids of `text`; no special token is added."""
    return self._encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text; no special token is added."""
    return self._encode_batch(texts)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`."""
    return self._decode([int(i) for i in ids])


def load(directory: str | pathlib.Path) -> Tokenizer:
  """The tokenizer of a Hugging Face directory or of one saved here.

  Raises:
    UserError: there is no tokenizer, it cannot be read, or a special id
      cannot be found or lies outside its vocabulary.
  """
  directory = pathlib.Path(directory)
  facts = _Facts(directory)
  for name, read in _KINDS.items():
    path = directory / name
    if path.is_file():
      return read(path, facts)
  raise UserError(
      f'{directory} holds no tokenizer: expected tokenizer.model '
      '(SentencePiece) or tokenizer.json; copy it there from the model '
      'the weights came with'
  )


def has_tokenizer(directory: str | pathlib.Path) -> bool:
  """Whether `load` would find a tokenizer's file there."""
  return any((pathlib.Path(directory) / name).is_file() for name in _KINDS)


def check_vocab(tokenizer: Tokenizer, V: int) -> None:
  """Raises UserError where the tokenizer has ids that the model lacks."""
  if tokenizer.vocab_size > V:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids but the model embeds '
        f'only {V}: use the tokenizer that belongs to this model'
    )


class _Facts:
  """What the JSON files beside a tokenizer say about its special ids."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._tokenizer = _read_json(directory / 'tokenizer_config.json')
    self._model = {}
    # A directory saved here keeps the source's config.json in source.json,
    # and its own config.json says nothing of token ids.
    for name in ('config.json', 'source.json'):
      top = _read_json(directory / name)
      for part in (top, top.get('hf_config'), top.get('config')):
        if isinstance(part, dict):
          keys = {'bos_token_id', 'eos_token_id'} & part.keys()
          self._model |= {key: part[key] for key in keys}

  def adds_bos(self) -> bool | None:
    """Whether the tokenizer adds BOS, None where the files do not say."""
    return self._tokenizer.get('add_bos_token')

  def special_id(
      self, name: str, to_id: Callable[[str], int | None], default: int | None
  ) -> int | None:
    """The id of 'bos' or 'eos': the tokenizer's piece, the model's, default.

    A model's explicit null means that there is none.
    """
    piece = self._tokenizer.get(f'{name}_token')
    if isinstance(piece, dict):
      piece = piece.get('content')
    if isinstance(piece, str) and to_id(piece) is not None:
      return to_id(piece)
    key = f'{name}_token_id'
    if key not in self._model:
      return default
    value = self._model[key]
    # Models with several ends name the document's end first.
    if isinstance(value, list) and value:
      value = value[0]
    if value is not None and (type(value) is not int or value < 0):
      raise UserError(
          f'{self.directory}: {key} is {self._model[key]!r}, expected a '
          'token id or null; correct config.json'
      )
    return value

  def check(self, bos_id: int | None, eos_id: int | None, V: int) -> None:
    """Raises UserError where an id that is needed is missing or absurd."""
    if bos_id is None and self.adds_bos():
      raise UserError(
          f'{self.directory}: tokenizer_config.json has add_bos_token but '
          'nothing names the token; add bos_token_id to config.json'
      )
    if eos_id is None:
      raise UserError(
          f'{self.directory}: nothing names the token that ends a document; '
          'add eos_token_id to config.json'
      )
    for name, value in (('bos', bos_id), ('eos', eos_id)):
      if value is not None and value >= V:
        raise UserError(
            f'{self.directory}: {name}_token_id {value} is outside the '
            f'{V} ids of the tokenizer; the files do not belong together'
        )


def _sentencepiece(path: pathlib.Path, facts: _Facts) -> Tokenizer:
  import sentencepiece

  try:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (OSError, RuntimeError) as error:
    raise _unreadable(path, error) from None

  def to_id(piece: str) -> int | None:
    i = model.piece_to_id(piece)
    return i if model.id_to_piece(i) == piece else None

  # SentencePiece writes -1 where it has no such piece.
  own_bos, own_eos = (
      i if i >= 0 else None for i in (model.bos_id(), model.eos_id())
  )
  bos_id = facts.special_id('bos', to_id, own_bos)
  if facts.adds_bos() is False or (
      facts.adds_bos() is None and own_bos is None
  ):
    bos_id = None
  eos_id = facts.special_id('eos', to_id, own_eos)
  facts.check(bos_id, eos_id, model.vocab_size())
  return Tokenizer(
      lambda texts: model.encode(list(texts)),
      model.decode,
      vocab_size=model.vocab_size(),
      bos_id=bos_id,
      eos_id=eos_id,
      digest=_digest(path),
  )


def _tokenizers(path: pathlib.Path, facts: _Facts) -> Tokenizer:
  import tokenizers

  try:
    model = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises bare Exception.
    raise _unreadable(path, error) from None
  model.no_padding()
  model.no_truncation()

  # Whether the family adds BOS is what its post-processor does to a text.
  plain = model.encode('a', add_special_tokens=False).ids
  special = model.encode('a').ids
  bos_id = special[0] if special[:1] != plain[:1] else None
  if facts.adds_bos() is not None:
    bos_id = (
        facts.special_id('bos', model.token_to_id, bos_id)
        if facts.adds_bos()
        else None
    )
  eos_id = facts.special_id('eos', model.token_to_id, None)
  vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
  facts.check(bos_id, eos_id, vocab_size)
  return Tokenizer(
      lambda texts: [
          encoding.ids
          for encoding in model.encode_batch_fast(
              list(texts), add_special_tokens=False
          )
      ],
      lambda ids: model.decode(ids, skip_special_tokens=False),
      vocab_size=vocab_size,
      bos_id=bos_id,
      eos_id=eos_id,
      digest=_digest(path),
  )


_KINDS = {'tokenizer.model': _sentencepiece, 'tokenizer.json': _tokenizers}


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise _unreadable(path, error) from None
  if not isinstance(value, dict):
    raise _unreadable(path, 'expected a JSON object')
  return value


def _unreadable(path: pathlib.Path, error: object) -> UserError:
  reason = ' '.join(str(error).split())
  return UserError(
      f'{path} cannot be read ({reason}); copy the file again from its source'
  )


def _digest(path: pathlib.Path) -> str:
  return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
