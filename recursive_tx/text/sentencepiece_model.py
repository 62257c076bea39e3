"""`tokenizer.model`, read by SentencePiece, with added tokens on top."""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import pathlib
import re

from recursive_tx.text.special import Added, Files, unreadable

# In no vocabulary: text beside it is encoded as in the middle of a text.
_MIDDLE = '\ue000'


class SentencePieceModel:
  """Text to ids and back.

  Plain text is what SentencePiece makes of it, but for added tokens that are
  not special. With special tokens, the text between two of them is encoded as
  in the middle of a text: no space is put before it. Where
  tokenizer_config.json has `legacy`: true, as texts of their own.

  Attributes:
    vocab_size: one more than the largest id.
    holes: ids below it that stand for nothing.
    own: {'bos_token': piece, ...} of the model itself.
    opens: whether a document opens with BOS.
    plain: added tokens that are recognised in any text.
  """

  def __init__(self, path: pathlib.Path, files: Files):
    """Raises UserError where the file is no SentencePiece model."""
    import sentencepiece

    try:
      self._model = sentencepiece.SentencePieceProcessor(
          model_file=str(path))
    except (OSError, RuntimeError) as error:
      raise unreadable(path, error) from None
    self._size = self._model.vocab_size()
    self._files = files
    self._ids = {token.content: id for id, token in files.added.items()}
    # What pieces of the model are called is not theirs to decode.
    self._texts = {id: token.content for id, token in files.added.items()
                   if id >= self._size or self._model.id_to_piece(id)
                   != token.content}
    self.vocab_size = max([self._size - 1, *files.added]) + 1
    self.holes = frozenset(range(self._size, self.vocab_size)) - set(
        files.added)
    # SentencePiece writes -1 where it has no such piece.
    self.own = {
        f'{name}_token': self._model.id_to_piece(id) for name, id in (
            ('bos', self._model.bos_id()), ('eos', self._model.eos_id()),
            ('unk', self._model.unk_id()), ('pad', self._model.pad_id()))
        if id >= 0}
    self.opens = ('bos_token' in self.own if files.adds_bos() is None
                  else files.adds_bos())
    self.plain = [token for id, token in files.added.items()
                  if not token.special and id in self._texts]

  def to_id(self, piece: str) -> int | None:
    """The id of a piece or an added token, None where there is none."""
    if piece in self._ids:
      return self._ids[piece]
    id = self._model.piece_to_id(piece)
    return id if self._model.id_to_piece(id) == piece else None

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of plain texts."""
    if not self.plain:
      return self._model.encode(list(texts))
    return [self._encode(text, self._plain) for text in texts]

  def encode_special(self, text: str) -> list[int]:
    """Ids of a text in which special tokens stand for themselves."""
    return self._encode(text, self._special)

  def encode_ends(
      self, text: str, *, special: bool
  ) -> tuple[list[int], list[int]]:
    """Ids of a text, and the place, in characters, where each of them ends."""
    ids, ends, start = [], [], 0
    pattern = self._special if special else self._plain
    for part, id, first, last in self._parts(text, pattern):
      if id is not None:
        found = [(id, len(part))]
      else:
        found = self._encode_part(part, first, last, self._pairs)
      ids += [id for id, _ in found]
      ends += [start + end for end in _ends([size for _, size in found])]
      start += len(part)
    return ids, ends

  def decode(self, ids: list[int]) -> str:
    """Text of known ids; control tokens of the model have none."""
    if not any(id in self._texts for id in ids):
      return self._model.decode(ids)
    text, run = '', []
    for id in [*ids, None]:
      if id is not None and id not in self._texts:
        run.append(id)
        continue
      if run:
        text += self._decode_run(run, first=not text)
      text += self._texts.get(id, '')
      run = []
    return text

  def token_bytes(self, id: int) -> bytes:
    """What a known token adds to a text, UTF-8 or a part of it."""
    if id in self._texts:
      return self._texts[id].encode()
    piece = self._model.id_to_piece(id)
    if self._model.is_byte(id):
      return bytes([int(piece[1:-1], 16)])
    if self._model.is_control(id) or self._model.is_unknown(id):
      return self._model.decode([id]).encode()
    return piece.replace('▁', ' ').encode()

  @functools.cached_property
  def _plain(self) -> re.Pattern:
    return _pattern(self.plain)

  @functools.cached_property
  def _special(self) -> re.Pattern:
    contents = {*self.own.values(), *self._files.named.values(),
                *self._files.extra, *(
        self._model.id_to_piece(id) for id in range(self._size)
        if self._model.is_control(id))} - self._ids.keys()
    return _pattern([*self._files.added.values(), *(
        Added(content, special=True) for content in contents
        if self.to_id(content) is not None)])

  def _encode(self, text: str, pattern: re.Pattern) -> list[int]:
    ids = []
    for part, id, first, last in self._parts(text, pattern):
      if id is not None:
        ids.append(id)
      else:
        ids += self._encode_part(part, first, last, self._model.encode)
    return ids

  def _parts(
      self, text: str, pattern: re.Pattern
  ) -> Iterator[tuple[str, int | None, bool, bool]]:
    """A text cut at added or special tokens.

    Yields:
      The text of a part; its id where it is such a token, else None; whether
      it is the first; the last.
    """
    parts, end = [], 0
    for match in pattern.finditer(text):
      parts += [(text[end:match.start()], None),
                (match[0], self.to_id(match[match.lastgroup]))]
      end = match.end()
    parts.append((text[end:], None))
    for i, (part, id) in enumerate(parts):
      if part:
        yield part, id, i == 0, i == len(parts) - 1

  def _encode_part(
      self, text: str, first: bool, last: bool, encode: Callable[[str], list]
  ) -> list:
    """What `encode` makes of the text between two added or special tokens."""
    if self._files.settings.get('legacy') is True:
      return encode(text)
    before, after = self._around
    found = encode(
        ('' if first else _MIDDLE) + text + ('' if last else _MIDDLE))
    return found[0 if first else before:len(found) - (0 if last else after)]

  def _pairs(self, text: str) -> list[tuple[int, int]]:
    """Ids of a text, each with the characters of the text that it stands for.

    Of a character in several bytes, the last has it.
    """
    pieces = self._model.encode_as_proto(text).pieces
    return [(piece.id, len(piece.surface)) for piece in pieces]

  @functools.cached_property
  def _around(self) -> tuple[int, int]:
    """Ids of _MIDDLE before a text, where a space may open it, and after."""
    return (len(self._model.encode(_MIDDLE)),
            len(self._model.encode('a' + _MIDDLE))
            - len(self._model.encode('a')))

  def _decode_run(self, ids: list[int], first: bool) -> str:
    """Text of ids between two added tokens; one that is not first keeps its
    leading space."""
    if first or self._files.settings.get('legacy') is True:
      return self._model.decode(ids)
    opening = self._model.encode('a')
    return self._model.decode(opening + ids)[
        len(self._model.decode(opening)):]


def _ends(sizes: list[int]) -> list[int]:
  """Where tokens of some sizes end; one without a size, where the next does."""
  ends = list(itertools.accumulate(sizes))
  for i in reversed(range(len(sizes) - 1)):
    if not sizes[i]:
      ends[i] = ends[i + 1]
  return ends


def _pattern(tokens: list[Added]) -> re.Pattern:
  """Any of some tokens, the longest first; one group each, for its text."""
  longest = sorted(tokens, key=lambda token: -len(token.content))
  return re.compile('|'.join(
      (r'\s*' if token.lstrip else '')
      + f'(?P<t{i}>{re.escape(token.content)})'
      + (r'\s*' if token.rstrip else '')
      for i, token in enumerate(longest)) or '(?!)')
