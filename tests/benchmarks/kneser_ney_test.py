"""The n-gram yardstick is Kneser-Ney: sums, a hand count and a slow twin."""

import collections
import itertools
import math

from benchmarks import kneser_ney
import numpy as np
import pytest

UNK, BOS, EOS, A, B = range(5)


def _random_documents(seed: int, *, vocab_size: int, count: int = 40):
  """Documents of common and rare phrases, and an empty one."""
  rng = np.random.default_rng(seed)
  phrases = [
    rng.integers(3, vocab_size, rng.integers(1, 7)).tolist()
    for _ in range(2 * vocab_size)
  ]
  weight_P = 1 / np.arange(1, len(phrases) + 1)
  weight_P /= weight_P.sum()
  documents = []
  for _ in range(count):
    chosen = rng.choice(len(phrases), rng.integers(1, 12), p=weight_P)
    documents.append([token for i in chosen for token in phrases[i]])
  return [*documents, []]


def _model(documents, *, order: int, vocab_size: int, modified: bool):
  return kneser_ney.KneserNey(
    documents,
    order=order,
    vocab_size=vocab_size,
    bos_id=BOS,
    eos_id=EOS,
    modified=modified,
  )


class Textbook:
  """Interpolated Kneser-Ney as Chen and Goodman write it, over dictionaries."""

  def __init__(self, documents, *, order, vocab_size, modified):
    self.order, self.vocab_size = order, vocab_size
    self.seen = {k: collections.Counter() for k in range(1, order + 1)}
    for ids in documents:
      padded = [BOS] * (order - 1) + list(ids) + [EOS]
      for i in range(order - 1, len(padded)):
        for k in self.seen:
          self.seen[k][tuple(padded[i - k + 1 : i + 1])] += 1
    self.counts = {k: self._counts(k) for k in self.seen}
    self.discounts = {k: self._discounts(k, modified) for k in self.seen}

  def _counts(self, k):
    if k == self.order:
      return dict(self.seen[k])
    left = collections.defaultdict(set)
    for longer in self.seen[k + 1]:
      left[longer[1:]].add(longer[0])
    return {ngram: len(tokens) for ngram, tokens in left.items()}

  def _discounts(self, k, modified):
    n1, n2, n3, n4 = (
      sum(count == j for count in self.counts[k].values()) for j in range(1, 5)
    )
    y = n1 / (n1 + 2 * n2)
    if not modified:
      return y, y, y
    return 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3

  def prob(self, ngram):
    if not ngram:
      return 1 / self.vocab_size
    k, context = len(ngram), ngram[:-1]
    after = {g: c for g, c in self.counts[k].items() if g[:-1] == context}
    lower = self.prob(ngram[1:])
    if not after:
      return lower
    taken = {g: self.discounts[k][min(c, 3) - 1] for g, c in after.items()}
    own = after.get(ngram, 0) - taken.get(ngram, 0)
    return (own + sum(taken.values()) * lower) / sum(after.values())


@pytest.mark.parametrize('modified', [False, True])
@pytest.mark.parametrize('order', [1, 2, 3, 5])
def test_probabilities_sum_to_one_in_any_context(order, modified):
  vocab_size = 13
  documents = _random_documents(order, vocab_size=vocab_size)
  model = _model(
    documents, order=order, vocab_size=vocab_size, modified=modified
  )
  seen = [tuple(g[:-1]) for ids in documents for g in model.ngrams(ids)]
  rng = np.random.default_rng(0)
  random = [
    tuple(rng.integers(0, vocab_size, order - 1)) for _ in range(100)
  ]  # Most of these occur nowhere.
  for context in seen[::10] + random:
    ngram_VO = np.array([(*context, token) for token in range(vocab_size)])
    prob_V = model.prob(ngram_VO)
    assert prob_V.min() > 0
    np.testing.assert_allclose(prob_V.sum(), 1, rtol=1e-12)


def test_counted_by_hand():
  """<s> a b </s>, twice, and <s> a a </s>, with one discount per order.

  Bigrams: <s>a 3, ab 2, b</s> 2, aa 1, a</s> 1; n_1 = n_2 = 2, D_2 = 1/3.
  Different left neighbours: a 2, b 1, </s> 2; n_1 = 1, n_2 = 2, D_1 = 1/5.
  """
  model = _model(
    [[A, B], [A, B], [A, A]], order=2, vocab_size=5, modified=False
  )
  share = 3 / 25 / 5  # D_1 * 3 / 5 of the mass, over five tokens.
  low_V = np.array([0, 0, 9 / 25, 9 / 25, 4 / 25]) + share
  after_a_V = np.array([0, 0, 2 / 3, 2 / 3, 5 / 3]) / 4 + 1 / 4 * low_V
  after_b_V = np.array([0, 0, 5 / 3, 0, 0]) / 2 + 1 / 6 * low_V
  for context, expected_V in ((A, after_a_V), (B, after_b_V), (UNK, low_V)):
    ngram_VO = np.array([(context, token) for token in range(5)])
    np.testing.assert_allclose(model.prob(ngram_VO), expected_V, rtol=1e-12)
  bos_a = 8 / 9 + 1 / 9 * low_V[A]
  np.testing.assert_allclose(
    model.nats([[A, B]]),
    -math.log(bos_a * after_a_V[B] * after_b_V[EOS]),
    rtol=1e-12,
  )


@pytest.mark.parametrize('modified', [False, True])
@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_equals_the_textbook(order, modified):
  # Many rare tokens, so that every n_j the discounts divide by is positive.
  vocab_size = 300
  documents = _random_documents(7, vocab_size=vocab_size, count=120)
  train, heldout = documents[:100], documents[100:]
  sizes = {'order': order, 'vocab_size': vocab_size, 'modified': modified}
  model, slow = _model(train, **sizes), Textbook(train, **sizes)
  for k, level in enumerate(model.levels, start=1):
    np.testing.assert_allclose(
      level.discount_D[1:], slow.discounts[k], rtol=1e-12
    )
  ngrams = [
    tuple(g) for ids in heldout + train[:5] for g in model.ngrams(ids).tolist()
  ]
  np.testing.assert_allclose(
    model.prob(np.array(ngrams)),
    [slow.prob(ngram) for ngram in ngrams],
    rtol=1e-10,
  )


def test_documents_are_apart_and_eos_is_counted():
  documents = [[A, B, A], [B], []]
  model = _model(documents, order=3, vocab_size=5, modified=True)
  each = [model.nats([ids]) for ids in documents]
  np.testing.assert_allclose(sum(each), model.nats(documents), rtol=1e-12)
  assert model.ngrams([A, B]).tolist() == [
    [BOS, BOS, A], [BOS, A, B], [A, B, EOS],
  ]  # fmt: skip
  joined = list(itertools.chain(*documents))
  other = _model([joined], order=3, vocab_size=5, modified=True)
  assert not np.isclose(model.nats([[A]]), other.nats([[A]]))


def test_a_longer_context_pays_where_it_decides():
  """In a cycle a a b, a bigram cannot know what follows an a."""
  documents = [[A, A, B] * 30] * 3
  nats = [
    _model(documents, order=k, vocab_size=5, modified=True).nats(documents)
    for k in (1, 2, 3)
  ]
  assert nats[0] > 1.2 * nats[1] and nats[1] > 2 * nats[2]


def test_bits_per_byte():
  np.testing.assert_allclose(
    kneser_ney.bits_per_byte(6 * math.log(2), 3), 2, rtol=1e-12
  )


def test_keys_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='at most order 6'):
    _model([[A]], order=7, vocab_size=1024, modified=True)
  with pytest.raises(ValueError, match='no documents'):
    _model([], order=2, vocab_size=5, modified=True)
