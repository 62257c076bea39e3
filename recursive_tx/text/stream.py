"""Text from tokens as they come: whole characters, and nothing of a stop.

A token may hold a part of a character, and a tokenizer may drop the space
that opens a text, so text is decoded with some tokens before it, and its end
is held back while it may still change. Whoever answers at once and whoever
streams read the same text, because both read it from here.
"""

from collections.abc import Sequence
import os.path

from recursive_tx.text.tokenizer import Tokenizer

# What decoders write for bytes that are no character.
_BROKEN = '\ufffd'
# Bytes of a character that lacks its last; decoders write at most one
# _BROKEN for each.
_LONGEST = 3
# Tokens that decide how those after them decode, with much to spare.
_CONTEXT = 32
# Tokens for which a character is awaited, while none has any text.
_PATIENCE = 4 * _CONTEXT


class TextStream:
  """The text that follows a prompt, in pieces that never change again.

  The pieces of `push` and `finish` together are the decoded tokens, cut where
  the first stop string to be complete begins. Where bytes make no character,
  those before them are not decoded anew.

  Attributes:
    stopped: a stop string came; nothing will follow.
    length: characters given so far.
  """

  def __init__(
      self, tokenizer: Tokenizer, prompt: Sequence[int] = (),
      stops: Sequence[str] = ()):
    """Starts after a prompt.

    Args:
      tokenizer: of the tokens.
      prompt: its ids, without the one that opens a document.
      stops: none of them empty.
    """
    assert all(stops), stops
    self.stopped, self.length = False, 0
    self._tokenizer, self._stops = tokenizer, tuple(stops)
    context = list(prompt[-_CONTEXT:])
    # Nothing but what decodes to nothing: a tokenizer would take what comes
    # next for the beginning.
    self._context = context if tokenizer.decode(context) else list(prompt)
    self._before = tokenizer.decode(self._context)
    self._pending: list[int] = []  # Tokens whose text is not all given.
    self._sent = 0  # Characters of theirs that are.
    self._held = ''  # Decoded, but perhaps the beginning of a stop.

  def push(self, token: int) -> str:
    """What a token makes certain; '' once a stop string came."""
    if self.stopped:
      return ''
    self._pending.append(token)
    text, whole = self._decode()
    whole |= len(self._pending) >= _PATIENCE
    sure = text if whole else text[:len(text) - min(
        len(text) - len(text.rstrip(_BROKEN)), _LONGEST)]
    new, self._sent = sure[self._sent:], max(self._sent, len(sure))
    if whole:
      self._advance(text)
    elif len(self._pending) % _CONTEXT == 0:
      self._forget(text)
    return self._give(new)

  def finish(self) -> str:
    """What was held back; no token may follow."""
    if self.stopped:
      return ''
    given = self._give(self._decode()[0][self._sent:])
    if not self.stopped:
      self.length += len(self._held)
      given, self._held = given + self._held, ''
    return given

  def _decode(self) -> tuple[str, bool]:
    """Text of the pending tokens, and whether its end is a character's."""
    both = self._tokenizer.decode(self._context + self._pending)
    if both.startswith(self._before):
      text = both[len(self._before):]
    elif self._before.endswith(_BROKEN):
      # The prompt ends within a character, which is whole now.
      text = both[len(os.path.commonprefix([self._before, both])):]
    else:
      # Some decoders give up a run of bytes for one that is broken.
      text = self._tokenizer.decode(self._pending)
    return text, not both.endswith(_BROKEN)

  def _advance(self, text: str) -> None:
    """The pending tokens become what later ones are decoded with."""
    if text or not self._before:  # Others have no text, and change nothing.
      alone = self._tokenizer.decode(self._pending)
      # After what decodes to nothing a tokenizer takes the next for the first.
      self._context = (self._pending if alone else
                       (self._context + self._pending)[-2 * _CONTEXT:])
      self._before = alone or self._tokenizer.decode(self._context)
    self._pending, self._sent = [], 0

  def _forget(self, text: str) -> None:
    """Makes context of pending tokens whose text is given, in a long run of
    bytes that make no characters; else every token would cost more."""
    for cut in range(len(self._pending) - 1, 0, -1):
      old, rest = self._pending[:cut], self._pending[cut:]
      given = self._tokenizer.decode(self._context + old)[len(self._before):]
      if text.startswith(given) and len(given) <= self._sent:
        self._context, self._pending = old[-_CONTEXT:], rest
        self._before = self._tokenizer.decode(self._context)
        self._sent -= len(given)
        return

  def _give(self, new: str) -> str:
    """Lets go what is no part of a stop string, and never can be."""
    text = self._held + new
    found = [(i + len(stop), i) for stop in self._stops
             if (i := text.find(stop)) >= 0]
    if found:
      self.stopped, self._held = True, ''
      given = text[:min(found)[1]]
    else:
      keep = max((n for stop in self._stops for n in range(1, len(stop))
                  if text.endswith(stop[:n])), default=0)
      cut = len(text) - keep
      given, self._held = text[:cut], text[cut:]
    self.length += len(given)
    return given
