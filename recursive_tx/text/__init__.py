"""Text and token ids: tokenizers, chats, and decoding as tokens come."""

from recursive_tx.text.chat import Chat as Chat
from recursive_tx.text.stream import TextStream as TextStream
from recursive_tx.text.tokenizer import Tokenizer as Tokenizer
