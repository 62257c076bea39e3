"""Laws of sampling: what is kept, and how often it is drawn."""

import jax
import numpy as np
import pytest
import tiny

from recursive_tx import sampling
from recursive_tx.sampling import Sampler

PROBABILITY_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def _frequencies(sampler, draws=20_000):
  logits_BV = np.log(np.tile(PROBABILITY_V, (draws, 1))).astype(np.float32)
  token_B = sampling.sample(sampler, logits_BV, jax.random.key(0))
  return np.bincount(token_B, minlength=5) / draws


@pytest.mark.parametrize('sampler, kept', [
    (Sampler(temperature=1.0), [0, 1, 2, 3, 4]),
    (Sampler(temperature=1.0, top_k=2), [0, 1]),
    (Sampler(temperature=1.0, top_k=99), [0, 1, 2, 3, 4]),
    (Sampler(temperature=1.0, top_p=0.69), [0, 1]),
    (Sampler(temperature=1.0, top_p=0.71), [0, 1, 2]),
    (Sampler(temperature=1.0, top_p=0.01), [0]),
    (Sampler(temperature=0.0), [0]),
])
def test_draws_the_kept_tokens_as_often_as_they_are_likely(sampler, kept):
  expected = np.zeros(5)
  expected[kept] = PROBABILITY_V[kept]
  expected /= expected.sum()
  found = _frequencies(sampler)
  assert not found[expected == 0].any()
  # Five standard deviations of 20,000 draws.
  assert abs(found - expected).max() < 5 * 0.5 / 20_000**0.5


def test_temperature_sharpens_as_a_power():
  expected = PROBABILITY_V**2 / (PROBABILITY_V**2).sum()
  found = _frequencies(Sampler(temperature=0.5))
  assert abs(found - expected).max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize('arguments', [
    dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)])
def test_a_bad_sampler_is_refused(arguments):
  with tiny.refused('is no sampler', next(iter(arguments))):
    Sampler(**arguments)
