"""Calibration tokens: those given, checked, or those a model samples."""

from collections.abc import Iterable
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import engine
from recursive_tx.engine import sampling
from recursive_tx.errors import UserError
from recursive_tx.text.tokenizer import Tokenizer

_SEQUENCES, _LENGTH = 96, 128  # Of sampled tokens.
_TEXT_LENGTH = 256


def checked(cfg: config_lib.ModelConfig, calibration: Any) -> np.ndarray:
  """token_QT, int32, of an array [Q, T] or of an iterable of batches.

  Raises:
    UserError: not integers, not two-dimensional, ids outside the
      vocabulary, or too few tokens to estimate anything.
  """
  if not hasattr(calibration, 'shape') and isinstance(calibration, Iterable):
    rows = [np.asarray(batch) for batch in calibration]
    widths = sorted({row.shape[1:] for row in rows})
    if len(widths) > 1:
      raise UserError(f'the batches of calibration have shapes {widths} '
                       f'after the first dimension; give them one length')
    calibration = np.concatenate(rows) if rows else np.zeros((0, 0), int)
  token_QT = np.asarray(calibration)
  if token_QT.dtype.kind not in 'iu':
    raise UserError(f'calibration has dtype {token_QT.dtype}; expected '
                     f'integer token ids: tokenize the text first')
  if token_QT.ndim != 2:
    raise UserError(f'calibration has shape {token_QT.shape}; expected '
                     f'[sequences, tokens]')
  if token_QT.size and not (
      0 <= token_QT.min() and token_QT.max() < cfg.V):
    raise UserError(
        f'calibration has token ids from {token_QT.min()} to '
        f'{token_QT.max()}; the model embeds 0 to {cfg.V - 1}: use its own '
        f'tokenizer')
  if len(token_QT) < 2 or token_QT.size < cfg.D:
    raise UserError(
        f'calibration has {len(token_QT)} sequences of {token_QT.size} tokens '
        f'in all; expected 2 sequences and {cfg.D} tokens (the width of the '
        f'model) at least, better 16 times as many: give more text')
  return token_QT.astype(np.int32)


def sample(
    cfg: config_lib.ModelConfig, variables: dict, *, seed: int
) -> np.ndarray:
  """Sequences sampled from a model, [96, 128], int32.

  The first token of each is drawn uniformly, since a config does not know what
  begins a document (as LLM-QAT does; Liu et al., 2023).
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
  """The first tokens of a text file, [Q, 256], int32.

  Args:
    path: UTF-8 text.
    tokenizer: the model's.
    tokens: how many at most.
    document: what stands between two documents; empty: the file is one.

  Raises:
    UserError: there is no such text, or less than a sequence of it.
  """
  try:
    text = pathlib.Path(path).read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} is no text that can be read ({error}); name a '
                     f'UTF-8 file') from None
  opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  texts = text.split(document) if document else [text]
  stream = itertools.chain.from_iterable(
      (*opening, *tokenizer.encode(text.strip()), tokenizer.eos_id)
      for text in texts if text.strip())
  ids = np.fromiter(itertools.islice(stream, tokens), np.int32)
  rows = len(ids) // _TEXT_LENGTH
  if not rows:
    raise UserError(f'{path} has {len(ids)} tokens to fit to; expected '
                     f'{_TEXT_LENGTH} at least: give more text')
  return ids[:rows * _TEXT_LENGTH].reshape(rows, _TEXT_LENGTH)
