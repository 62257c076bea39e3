"""A model in a directory: opened, converted, saved, exported."""

from recursive_tx.store.opening import Opened as Opened
from recursive_tx.store.opening import load_tokenizer as load_tokenizer
from recursive_tx.store.opening import open as open
