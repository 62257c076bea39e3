"""Laws of sampling: what is kept, and how often it is drawn."""

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.engine import sampling
from recursive_tx.engine.sampling import Sampler

PROBABILITY_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


@tiny.jit
def _jitted(samplers, logits_BV, position_B):
  return sampling.sample(rtx.Run(), samplers, logits_BV, position_B)


def _sample(samplers, logits_BV, position_B):
  return np.asarray(_jitted(sampling.stack(samplers), logits_BV, position_B))


def _frequencies(sampler, draws=20_000):
  logits_BV = np.log(np.tile(PROBABILITY_V, (draws, 1))).astype(np.float32)
  token_B = _sample([sampler] * draws, logits_BV, np.arange(draws))
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


def test_every_row_is_drawn_by_its_own_sampler_whatever_the_others():
  rng = np.random.default_rng(0)
  samplers = [
      Sampler(), Sampler(temperature=1.0, seed=3),
      Sampler(temperature=2.0, top_k=5, seed=2**40 - 1),
      Sampler(temperature=0.5, top_p=0.8), Sampler(temperature=1.5, top_k=3,
                                                   top_p=0.6, seed=-7)]
  logits_BV = rng.normal(size=(len(samplers), 50)).astype(np.float32)
  position_B = np.array([4, 0, 7, 7, 1])
  together = _sample(samplers, logits_BV, position_B)
  assert together[0] == logits_BV[0].argmax()
  for i, sampler in enumerate(samplers):
    alone = _sample([sampler], logits_BV[i:i + 1], position_B[i:i + 1])
    assert alone == together[i]


def test_draws_differ_by_seed_and_by_position():
  logits_BV = np.zeros((2, 1 << 16), np.float32)
  hot = [Sampler(temperature=1.0, seed=seed) for seed in (0, 0, 1)]
  assert len(set(_sample(hot[:2], logits_BV, np.array([5, 5])))) == 1
  assert len(set(_sample(hot[:2], logits_BV, np.array([5, 6])))) == 2
  assert len(set(_sample(hot[1:], logits_BV, np.array([5, 5])))) == 2


@pytest.mark.parametrize('sampler', [
    *(Sampler(temperature=x) for x in (5e-324, 1e-45, 1e-39, 3e-38, 1e-20)),
    *(Sampler(temperature=1.0, top_p=x) for x in (5e-324, 1e-45, 1e-38)),
    Sampler(temperature=1e-38, top_p=1e-38, top_k=3)])
def test_the_smallest_values_are_greedy(sampler):
  logits_BV = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
  logits_BV[:, 7] = -np.inf
  found = _sample([sampler] * 64, 9 * logits_BV, np.arange(64))
  assert found.tolist() == logits_BV.argmax(axis=1).tolist()


@pytest.mark.parametrize('temperature', [1e20, 3e38, 1e300])
def test_the_largest_temperatures_draw_all_tokens_alike(temperature):
  logits_BV = np.tile([0, 5, -np.inf, 9], (4000, 1)).astype(np.float32)
  found = _sample([Sampler(temperature=temperature)] * 4000, logits_BV,
                  np.arange(4000))
  share = np.bincount(found, minlength=4) / 4000
  # Five standard deviations of 4,000 draws.
  assert not share[2] and abs(share[[0, 1, 3]] - 1 / 3).max() < 0.04


NAN = float('nan')


@pytest.mark.parametrize('arguments', [
    dict(temperature=-1.0), dict(temperature=NAN),
    dict(temperature=float('inf')), dict(temperature='1'),
    dict(temperature=True), dict(top_k=-1), dict(top_k=1.5), dict(top_k=2**31),
    dict(top_k=NAN), dict(top_p=0.0), dict(top_p=1.1), dict(top_p=NAN),
    dict(top_p=-1e-9), dict(seed=0.5), dict(seed=NAN)])
def test_a_bad_sampler_is_refused(arguments):
  with tiny.refused(f'{next(iter(arguments))} is', 'expected a'):
    Sampler(**arguments)
