"""Chats as documents: the text of their template, the assistant's part marked.
"""

import datetime
import json
from typing import Any

import numpy as np

from recursive_tx.errors import optional
from recursive_tx.text import Chat, Tokenizer

# For templates that write the date: a stream must not depend on the day on
# which it is read. It is the one that Llama's templates have for none.
_DAY = datetime.datetime(2024, 7, 26)


class Chats:
  """Messages to text, and that to ids, by the template of a tokenizer."""

  def __init__(self, tokenizer: Tokenizer):
    """Raises UserError where templates cannot be rendered here."""
    optional('jinja2', extra='data', what='a data task of chats')
    self._tokenizer = tokenizer
    self._chat = Chat(tokenizer.directory, tokenizer, now=_DAY)

  @property
  def digest(self) -> str:
    """That of the template; raises UserError as `Chat.digest`."""
    return self._chat.digest

  def render(self, messages: list[dict[str, Any]]) -> bytes:
    """Two lines of JSON: the messages, and the text with the spans to learn.

    Raises:
      UserError: as `Chat.render_spans`.
    """
    text, spans = self._chat.render_spans(messages)
    text.encode('utf-8')  # Raises here, where the record is known.
    return b'\n'.join(json.dumps(part).encode() for part in (
        messages, [text, spans]))

  def encode(self, rendered: bytes) -> tuple[np.ndarray, int]:
    """The ids of a chat, as `packing` has them, and the bytes of text to learn.

    The ids are those of the text, tokenised once. With a template nothing is
    added to it; lines without one open and end as documents do. A token is
    learnt where it ends in what the assistant wrote.
    """
    text, spans = json.loads(rendered.split(b'\n')[1])
    ids, ends = self._tokenizer.encode_ends(
        text, special=self._chat.has_template)
    is_learnt = np.zeros(len(text) + 1, bool)
    num_bytes = 0
    for start, end in spans:
      is_learnt[start + 1 : end + 1] = True
      num_bytes += len(text[start:end].encode())
    ids = np.array(ids, np.int32)
    ids = np.where(is_learnt[np.array(ends, np.int64)], ids, ~ids)
    if not self._chat.has_template:
      opening = ~np.array(self._tokenizer.opening, np.int32)
      ids = np.concatenate([opening, ids, [self._tokenizer.eos_id]])
    return ids.astype(np.int32), num_bytes


def messages_of(rendered: bytes) -> bytes:
  """The messages of what `Chats.render` gave, whatever the template."""
  return rendered.split(b'\n')[0]
