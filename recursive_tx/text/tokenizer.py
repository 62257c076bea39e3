"""A directory's tokenizer: text to token ids and back.

Where `tokenizer.json` is, the `tokenizers` library reads it; else
`tokenizer.model` is read by SentencePiece. Special tokens are those of the
files beside it. The two libraries differ in special tokens, unknown ids and
bytes; this thin layer makes them one, without `transformers` and its torch. It
knows nothing of documents or batches, and does not import TensorFlow.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import pathlib

import numpy as np

from recursive_tx.errors import UserError
from recursive_tx.text.sentencepiece_model import SentencePieceModel
from recursive_tx.text.special import Added, Files
from recursive_tx.text.tokenizers_file import TokenizersFile

# The first of these that a directory has is its tokenizer.
_KINDS = {'tokenizer.json': TokenizersFile,
          'tokenizer.model': SentencePieceModel}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to ids and back, the same whichever library is behind it.

  `decode(encode(text)) == text` wherever the tokenizer's own normalisation
  loses nothing (byte fallback or byte-level, identity normaliser).

  Attributes:
    model: what the library read.
    bos_id: the id that opens a document, None where the family adds none.
    eos_id: the id that ends a document.
    end_ids: the ids that end a generated text, `eos_token_id` of
      generation_config.json or else of config.json; often `eos_id` alone.
    pad_id: the id of `pad_token`, None where there is none.
    names: the text of special tokens by name: {'bos_token': '<s>', ...}.
    digest: hexadecimal digest of the tokenizer's file, and of added tokens
      that change the ids of plain text.
    directory: where it was read, a chat template perhaps beside it.
  """

  model: SentencePieceModel | TokenizersFile
  bos_id: int | None
  eos_id: int
  end_ids: tuple[int, ...]
  pad_id: int | None
  names: Mapping[str, str]
  digest: str
  directory: pathlib.Path

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return self.model.vocab_size

  @property
  def opening(self) -> list[int]:
    """The ids that open a document: `bos_id`, or none."""
    return [] if self.bos_id is None else [self.bos_id]

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """The ids of `text`; no special token is added.

    Args:
      text: any.
      special: special tokens in the text stand for themselves, as in a
        rendered chat. Otherwise they are plain text, but for those that
        tokenizer.json itself adds.
    """
    if special:
      return self.model.encode_special(text)
    return self.encode_batch([text])[0]

  def encode_ends(
      self, text: str, *, special: bool
  ) -> tuple[list[int], list[int]]:
    """As `encode`, and the place, in characters, where each id ends.

    Ids that share a character, as its bytes do, end together.
    """
    return self.model.encode_ends(text, special=special)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each plain text; no special token is added."""
    return self.model.encode_batch(texts)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; '' for those that the tokenizer does not know."""
    return self.model.decode([int(i) for i in ids if self._knows(i)])

  def token_bytes(self, id: int) -> bytes:
    """What a token adds to a text: UTF-8, or a part of a character's.

    A space that opens a word is included; b'' for an unknown id.
    """
    return self.model.token_bytes(int(id)) if self._knows(id) else b''

  def known(self, V: int) -> np.ndarray:
    """Whether the tokenizer knows an id, bool [V].

    Models have larger vocabularies than their tokenizers where they are padded
    to a round number.
    """
    known_V = np.arange(V) < self.vocab_size
    known_V[[id for id in self.model.holes if id < V]] = False
    return known_V

  def _knows(self, id: int) -> bool:
    return 0 <= id < self.vocab_size and id not in self.model.holes


def load(directory: str | pathlib.Path) -> Tokenizer:
  """The tokenizer of a Hugging Face directory or of one saved here.

  Raises:
    UserError: there is no tokenizer, it cannot be read, or a special id
      cannot be found or lies outside its vocabulary.
  """
  directory = pathlib.Path(directory)
  files = Files(directory)
  for name, kind in _KINDS.items():
    path = directory / name
    if path.is_file():
      return _made(path, kind(path, files), files)
  raise UserError(
      f'{directory} holds no tokenizer: expected tokenizer.json or '
      'tokenizer.model (SentencePiece); copy it there from the model '
      'the weights came with')


def has_tokenizer(directory: str | pathlib.Path) -> bool:
  """Whether `load` would find a tokenizer's file there."""
  return any((pathlib.Path(directory) / name).is_file() for name in _KINDS)


def check_vocab(tokenizer: Tokenizer, V: int) -> None:
  """Raises UserError where the tokenizer has ids that the model lacks.

  But for a padding token that was added last: nothing is padded with it here.
  """
  unused = tokenizer.pad_id == tokenizer.vocab_size - 1
  if tokenizer.vocab_size - unused > V:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids but the model embeds '
        f'only {V}: use the tokenizer that belongs to this model')


def _made(
    path: pathlib.Path, model: SentencePieceModel | TokenizersFile, files: Files
) -> Tokenizer:
  """A tokenizer of what a library read, with the ids of special tokens."""
  def own(name):
    piece = model.own.get(f'{name}_token')
    return None if piece is None else model.to_id(piece)

  bos_id = own('bos')
  if model.opens and not isinstance(model, TokenizersFile):
    bos_id = files.special_id('bos', model.to_id, bos_id)
    if bos_id is None and files.adds_bos():
      raise UserError(
          f'{files.directory}: tokenizer_config.json has add_bos_token but '
          'nothing names the token; add bos_token_id to config.json')
  bos_id = bos_id if model.opens else None
  eos_id = files.special_id('eos', model.to_id, own('eos'))
  files.check(bos_id, eos_id, model.vocab_size)
  names = {**model.own, **files.named}
  return Tokenizer(
      model, bos_id=bos_id, eos_id=eos_id,
      end_ids=files.end_ids(eos_id, model.to_id),
      pad_id=model.to_id(names.get('pad_token', '')), names=names,
      digest=_digest(path, model.plain), directory=files.directory)


def _digest(path: pathlib.Path, added: Sequence[Added]) -> str:
  digest = hashlib.blake2b(path.read_bytes(), digest_size=16)
  for token in added:
    digest.update(repr(token).encode())
  return digest.hexdigest()
