"""Calibration tokens: those given, checked, or those a model says itself."""

from collections.abc import Iterable, Iterator
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import engine, sampling
from recursive_tx.tokenizer import Tokenizer

_LENGTH = 128
_SEQUENCES = 96  # Of what a model says.


def checked(cfg: config_lib.ModelConfig, calibration: Any) -> np.ndarray:
  """token_NT, int32, of an array [N, T] or of an iterable of batches.

  Raises:
    ValueError: not integers, not two-dimensional, ids outside the
      vocabulary, or too few tokens to tell anything.
  """
  if not hasattr(calibration, 'shape') and isinstance(calibration, Iterable):
    rows = [np.asarray(batch) for batch in calibration]
    widths = sorted({row.shape[1:] for row in rows})
    if len(widths) > 1:
      raise ValueError(f'the batches of calibration have shapes {widths} '
                       f'after the first dimension; give them one length')
    calibration = np.concatenate(rows) if rows else np.zeros((0, 0), int)
  token_NT = np.asarray(calibration)
  if token_NT.dtype.kind not in 'iu':
    raise ValueError(f'calibration has dtype {token_NT.dtype}; expected '
                     f'integer token ids: tokenize the text first')
  if token_NT.ndim != 2:
    raise ValueError(f'calibration has shape {token_NT.shape}; expected '
                     f'[sequences, tokens]')
  if token_NT.size and not (
      0 <= token_NT.min() and token_NT.max() < cfg.V):
    raise ValueError(
        f'calibration has token ids from {token_NT.min()} to '
        f'{token_NT.max()}; the model embeds 0 to {cfg.V - 1}: use its own '
        f'tokenizer')
  if len(token_NT) < 2 or token_NT.size < cfg.D:
    raise ValueError(
        f'calibration has {len(token_NT)} sequences of {token_NT.size} tokens '
        f'in all; expected 2 sequences and {cfg.D} tokens (the width of the '
        f'model) at least, better 16 times as many: give more text')
  return token_NT.astype(np.int32)


def sample(
    cfg: config_lib.ModelConfig, variables: dict, *, seed: int
) -> np.ndarray:
  """Sequences that a model says itself, [96, 128], int32.

  Each opens with a token drawn uniformly, since a config does not say what
  opens a document (as LLM-QAT does; Liu et al., 2023).
  """
  rng = np.random.default_rng(seed)
  first = rng.integers(0, cfg.V, (_SEQUENCES, 1))
  # Seeds of other runs with other numbers of sequences shall not overlap.
  sampler = sampling.Sampler(temperature=1.0, seed=int(rng.integers(1 << 31)))
  rest = engine.generate(
      cfg, variables, first.tolist(), max_new_tokens=_LENGTH - 1,
      sampler=sampler, slots=_SEQUENCES)
  return np.concatenate([first, np.array(rest)], axis=1).astype(np.int32)


def read(
    path: str | os.PathLike, tokenizer: Tokenizer, *, tokens: int,
    document: str = '',
) -> np.ndarray:
  """The first tokens of a text file, [N, 128], int32.

  Each row opens as a document does, since models see to that token a great
  deal; a document's rest that fills no row is left out.

  Args:
    path: UTF-8 text.
    tokenizer: the model's.
    tokens: how many at most.
    document: what stands between two documents; empty: the file is one.

  Raises:
    ValueError: there is no such text, or less than a row of it.
  """
  try:
    text = pathlib.Path(path).read_text('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is no text that can be read ({error}); name a '
                     f'UTF-8 file') from None
  rows = list(itertools.islice(
      _rows(text.split(document) if document else [text], tokenizer),
      tokens // _LENGTH))
  if not rows:
    raise ValueError(
        f'{path} has no document that fills a row of {_LENGTH} tokens, or '
        f'tokens={tokens} allows none: give more text')
  return np.array(rows, np.int32)


def _rows(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
  opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  piece = _LENGTH - len(opening)
  for text in texts:
    ids = [*tokenizer.encode(text.strip()), tokenizer.eos_id]
    for begin in range(0, len(ids) - piece + 1, piece):
      yield opening + ids[begin:begin + piece]
