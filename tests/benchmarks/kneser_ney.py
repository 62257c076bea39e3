"""Held-out bits per byte of Kneser-Ney n-grams, the demo model's yardstick.

  python tests/benchmarks/kneser_ney.py --output=kneser_ney.json

trains interpolated Kneser-Ney models of order 1 to 5 on the demo corpus, cut
by the demo model's own tokenizer, and prints what they need for the held-out
modules. Every n-gram is kept: nothing is pruned, hashed or approximated. Both
ways to discount are shown, one discount per order (Kneser and Ney 1995, as in
Chen and Goodman 1998, section 2.7) and three (modified, section 3); the better
of the two at the highest order is the baseline.

A document is order - 1 times BOS, its tokens, EOS. Tokens and EOS are
predicted, BOS never is, and no n-gram crosses documents. Bits per byte are the
summed nats of all predicted tokens / ln 2 / UTF-8 bytes of the documents, as
in `recursive_tx.evaluate`. One thread; this knows nothing of neural models.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import time

import numpy as np
import sentencepiece

from recursive_tx.demo import corpus

_DEMO = pathlib.Path(corpus.__file__).parent


@dataclasses.dataclass(frozen=True)
class Level:
  """What one order knows; an n-gram's key has its last token lowest.

  Attributes:
    key_G: uint64, sorted, the n-grams seen.
    count_G: int64, how often each was seen (highest order), or after how many
      different tokens (all lower orders).
    context_C: uint64, sorted, the n-grams without their last token.
    total_C: int64, summed counts of each context's n-grams.
    left_C: float64, the share of each context's mass that discounting took and
      the next lower order spreads.
    discount_D: float64 [4], what a count of 0, 1, 2 and 3 or more loses.
  """

  key_G: np.ndarray
  count_G: np.ndarray
  context_C: np.ndarray
  total_C: np.ndarray
  left_C: np.ndarray
  discount_D: np.ndarray


class KneserNey:
  """An interpolated Kneser-Ney model over token ids below `vocab_size`."""

  def __init__(
    self,
    documents: Sequence[Sequence[int]],
    *,
    order: int,
    vocab_size: int,
    bos_id: int,
    eos_id: int,
    modified: bool = True,
  ):
    """Counts `documents`, token ids without BOS and EOS.

    Raises:
      ValueError: no documents, or keys of `order` tokens exceed 64 bits.
    """
    self.order, self.vocab_size = order, vocab_size
    self.bos_id, self.eos_id = bos_id, eos_id
    self.bits = (vocab_size - 1).bit_length()
    if order * self.bits > 64:
      raise ValueError(
        f'order {order} of a vocabulary of {vocab_size} does not fit 64 bits: '
        f'expected at most order {64 // self.bits}; lower --order'
      )
    if not documents:
      raise ValueError('no documents: expected at least one to count')
    ngram_MO = np.concatenate([self.ngrams(ids) for ids in documents])
    key_G, count_G = np.unique(self._keys(ngram_MO), return_counts=True)
    levels = [_level(key_G, count_G, self.bits, modified)]
    for k in range(order - 1, 0, -1):
      # Each longer n-gram is one different left neighbour of its suffix.
      suffix = key_G & np.uint64((1 << k * self.bits) - 1)
      key_G, count_G = np.unique(suffix, return_counts=True)
      levels.append(_level(key_G, count_G, self.bits, modified))
    self.levels = tuple(reversed(levels))

  def ngrams(self, ids: Sequence[int]) -> np.ndarray:
    """int64 [tokens + 1, order]: each token and EOS behind its context."""
    padded = np.array([self.bos_id] * (self.order - 1) + [*ids, self.eos_id])
    assert 0 <= padded.min() and padded.max() < self.vocab_size
    return np.lib.stride_tricks.sliding_window_view(padded, self.order)

  def prob(self, ngram_MO: np.ndarray) -> np.ndarray:
    """float64 [M]: probability of each row's last token after the others."""
    prob_M = np.full(len(ngram_MO), 1 / self.vocab_size)
    for k, level in enumerate(self.levels, start=1):
      key_M = self._keys(ngram_MO[:, self.order - k :])
      count_M = _look_up(level.key_G, level.count_G, key_M)
      context_M = key_M >> np.uint64(self.bits)
      total_M = _look_up(level.context_C, level.total_C, context_M)
      left_M = _look_up(level.context_C, level.left_C, context_M)
      discount_M = level.discount_D[np.minimum(count_M, 3)]
      # A context never seen says nothing: the lower order stands.
      prob_M = np.where(
        total_M > 0,
        (count_M - discount_M) / np.maximum(total_M, 1) + left_M * prob_M,
        prob_M,
      )
    return prob_M

  def nats(self, documents: Sequence[Sequence[int]]) -> float:
    """Summed -ln p of every token and EOS of `documents`."""
    return sum(
      float(-np.log(self.prob(self.ngrams(ids))).sum()) for ids in documents
    )

  def _keys(self, ngram_MK: np.ndarray) -> np.ndarray:
    key_M = np.zeros(len(ngram_MK), np.uint64)
    for column in ngram_MK.T:
      key_M = key_M << np.uint64(self.bits) | column.astype(np.uint64)
    return key_M


def bits_per_byte(nats: float, num_bytes: int) -> float:
  return nats / math.log(2) / num_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--order', type=int, default=5, help='highest order')
  parser.add_argument(
    '--tokenizer', default=_DEMO / 'tokenizer.model', help='SentencePiece model'
  )
  parser.add_argument('--output', help='JSON file for the figures')
  args = parser.parse_args()
  tokenizer = sentencepiece.SentencePieceProcessor(
    model_file=str(args.tokenizer)
  )
  splits = {
    'train': _split(tokenizer, corpus.train_files()),
    'heldout': _split(tokenizer, corpus.heldout_files()),
  }
  result = {'vocab_size': tokenizer.vocab_size()}
  for name, (documents, num_bytes) in splits.items():
    # EOS is a predicted token too.
    num_tokens = sum(len(ids) + 1 for ids in documents)
    result[name] = {
      'documents': len(documents), 'bytes': num_bytes, 'tokens': num_tokens,
    }  # fmt: skip
    print(
      f'{name:8s} {len(documents):4d} documents {num_bytes:9,d} bytes '
      f'{num_tokens:9,d} tokens'
    )
  result['rows'] = _measure(splits, tokenizer, args.order)
  last = [row for row in result['rows'] if row['order'] == args.order]
  result['baseline'] = min(last, key=lambda row: row['bits_per_byte'])
  print(
    f'baseline: order {args.order}, {result["baseline"]["discounts"]}, '
    f'{result["baseline"]["bits_per_byte"]:.4f} bits per byte'
  )
  if args.output is not None:
    text = json.dumps(result, indent=2) + '\n'
    pathlib.Path(args.output).write_text(text, encoding='utf-8')


def _split(tokenizer, files) -> tuple[list[list[int]], int]:
  """(token ids of each document, UTF-8 bytes of all)."""
  texts = [text for _, text in corpus.documents(files)]
  num_bytes = sum(len(text.encode('utf-8')) for text in texts)
  return [tokenizer.encode(text) for text in texts], num_bytes


def _measure(splits, tokenizer, highest: int) -> list[dict]:
  """One row per order and way to discount, printed as they come."""
  train, _ = splits['train']
  heldout, num_bytes = splits['heldout']
  num_tokens = sum(len(ids) + 1 for ids in heldout)
  print('order  discounts     n-grams  nats/token  bits/byte  seconds')
  rows = []
  for order in range(1, highest + 1):
    for modified in (False, True):
      start = time.perf_counter()
      model = KneserNey(
        train,
        order=order,
        vocab_size=tokenizer.vocab_size(),
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        modified=modified,
      )
      nats = model.nats(heldout)
      row = {
        'order': order,
        'discounts': 'modified' if modified else 'single',
        'ngrams': sum(len(level.key_G) for level in model.levels),
        'nats_per_token': nats / num_tokens,
        'bits_per_byte': bits_per_byte(nats, num_bytes),
        'seconds': time.perf_counter() - start,
      }
      rows.append(row)
      print(
        f'{order:5d}  {row["discounts"]:9s} {row["ngrams"]:11,d} '
        f'{row["nats_per_token"]:11.4f} {row["bits_per_byte"]:10.4f} '
        f'{row["seconds"]:8.1f}'
      )
  return rows


def _level(key_G, count_G, bits: int, modified: bool) -> Level:
  discount_D = _discounts(count_G, modified)
  # The keys are sorted and their contexts are their upper bits.
  context_C, start_C = np.unique(key_G >> np.uint64(bits), return_index=True)
  total_C = np.add.reduceat(count_G, start_C)
  taken_C = np.add.reduceat(discount_D[np.minimum(count_G, 3)], start_C)
  return Level(
    key_G=key_G,
    count_G=count_G,
    context_C=context_C,
    total_C=total_C,
    left_C=taken_C / total_C,
    discount_D=discount_D,
  )


def _discounts(count_G: np.ndarray, modified: bool) -> np.ndarray:
  """Discounts of counts 0, 1, 2, 3+ from n_j, how many n-grams count j.

  Single: Y = n_1 / (n_1 + 2 n_2). Modified: j - (j + 1) Y n_(j+1) / n_j, for
  which Y stands in wherever too few n-grams make it fall outside (0, j]; and
  1/2 for Y where no n-gram counts 1, so that some mass is always left.
  """
  n = np.bincount(np.minimum(count_G, 5), minlength=6)
  single = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
  discounts = [0.0, single, single, single]
  if modified:
    for j in (1, 2, 3):
      discount = j - (j + 1) * single * n[j + 1] / n[j] if n[j] else 0.0
      if 0 < discount <= j:
        discounts[j] = discount
  return np.array(discounts)


def _look_up(sorted_G, value_G, key_M) -> np.ndarray:
  """The value of each key, 0 of those that are not in `sorted_G`."""
  at_M = np.minimum(np.searchsorted(sorted_G, key_M), len(sorted_G) - 1)
  return np.where(sorted_G[at_M] == key_M, value_G[at_M], 0)


if __name__ == '__main__':
  main()
