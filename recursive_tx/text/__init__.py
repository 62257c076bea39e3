"""Text and token ids: tokenizers, and decoding as tokens come."""

from recursive_tx.text.stream import TextStream as TextStream
from recursive_tx.text.tokenizer import Tokenizer as Tokenizer
