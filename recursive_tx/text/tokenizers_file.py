"""`tokenizer.json`, read by the `tokenizers` library."""

from collections.abc import Sequence
import functools
import json
import pathlib
import re

from recursive_tx.text.special import Files, unreadable

_BYTE = re.compile('<0x([0-9A-Fa-f]{2})>')


class TokenizersFile:
  """Text to ids and back.

  Plain text is what the library makes of it with this file: added tokens of
  the file stand for themselves, special ones too. With special tokens, those
  of the files beside it do as well, where they have an id.

  Attributes: as of SentencePieceModel.
  """

  def __init__(self, path: pathlib.Path, files: Files):
    """Raises UserError where the library cannot read the file."""
    import tokenizers

    def read(special):
      try:
        model = tokenizers.Tokenizer.from_file(str(path))
      except Exception as error:  # The library raises bare Exception.
        raise unreadable(path, error) from None
      model.no_padding()
      model.no_truncation()
      model.add_tokens([tokenizers.AddedToken(
          token.content, lstrip=token.lstrip, rstrip=token.rstrip,
          special=token.special, normalized=not token.special)
                        for token in beside if special or not token.special])
      return model

    beside = []
    self._plain = read(False)
    known = {token.content for token in
             self._plain.get_added_tokens_decoder().values()}
    beside = [token for token in files.added.values()
              if token.content not in known]
    self.plain = [token for token in beside if not token.special]
    named = [content for content in (*files.named.values(), *files.extra)
             if content not in known
             and self._plain.token_to_id(content) is not None]
    self._special = read(True) if beside or named else self._plain
    self._special.add_special_tokens(named)
    self._plain = read(False) if self.plain else self._plain
    ids = set(self._special.get_vocab(with_added_tokens=True).values())
    self.vocab_size = 1 + max(ids)
    self.holes = frozenset(range(self.vocab_size)) - ids
    # Whether the family adds BOS is what its post-processor does to a text,
    # whatever `add_bos_token` is: so do transformers since version 5.
    text = self._plain.encode('a', add_special_tokens=False).ids
    opened = self._plain.encode('a').ids
    self.opens = opened[:1] != text[:1]
    self.own = {'bos_token': self._plain.id_to_token(opened[0])
                } if self.opens else {}

  def to_id(self, piece: str) -> int | None:
    """The id of a token, None where there is none."""
    return self._special.token_to_id(piece)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of plain texts."""
    return [encoding.ids for encoding in self._plain.encode_batch_fast(
        list(texts), add_special_tokens=False)]

  def encode_special(self, text: str) -> list[int]:
    """Ids of a text in which special tokens stand for themselves."""
    return self._special.encode(text, add_special_tokens=False).ids

  def encode_ends(
      self, text: str, *, special: bool
  ) -> tuple[list[int], list[int]]:
    """Ids of a text, and the place, in characters, where each of them ends."""
    model = self._special if special else self._plain
    found = model.encode(text, add_special_tokens=False)
    return found.ids, [end for _, end in found.offsets]

  def decode(self, ids: list[int]) -> str:
    """Text of known ids, with that of special tokens."""
    return self._special.decode(ids, skip_special_tokens=False)

  def token_bytes(self, id: int) -> bytes:
    """What a known token adds to a text, UTF-8 or a part of it."""
    piece = self._special.id_to_token(id)
    if id in self._added:
      return piece.encode()
    kinds, spaces = self._decoder
    if 'ByteLevel' in kinds:
      return b''.join(_byte_level().get(c, c.encode()) for c in piece)
    if 'ByteFallback' in kinds and (match := _BYTE.fullmatch(piece)):
      return bytes([int(match[1], 16)])
    if spaces:
      for old, new in spaces:
        piece = piece.replace(old, new)
      return piece.encode()
    return self.decode([id]).encode()

  @functools.cached_property
  def _added(self) -> set[int]:
    return set(self._special.get_added_tokens_decoder())

  @functools.cached_property
  def _decoder(self) -> tuple[set[str], list[tuple[str, str]]]:
    """Kinds of the decoder's steps, and what they replace by what."""
    decoder = self._special.decoder
    if decoder is None:
      return set(), []
    steps = [json.loads(decoder.__getstate__())]
    kinds, spaces = set(), []
    while steps:
      step = steps.pop(0)
      kinds.add(step['type'])
      steps += step.get('decoders', [])
      if step['type'] == 'Metaspace':
        spaces.append((step['replacement'], ' '))
      elif step['type'] == 'Replace' and 'String' in step['pattern']:
        spaces.append((step['pattern']['String'], step['content']))
    return kinds, spaces


@functools.cache
def _byte_level() -> dict[str, bytes]:
  """Bytes by the characters that GPT-2's byte-level BPE writes for them:
  printable ones for themselves, the others from U+0100 on in their order."""
  printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): bytes([byte]) for byte in printable} | {
      chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
