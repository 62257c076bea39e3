"""Ranks by budget: never more parameters, and where they gain the most."""

import dataclasses

import numpy as np
import pytest
import tiny

from recursive_tx.tying.fit import ranks

LLAMA = dataclasses.replace(tiny.FAMILIES['llama'], layers_per_loop=3, loops=2)


def _cost(rcfg):
  return sum(rank * sum(rcfg.in_out(name))
             for name, rank in rcfg.ranks.items())


def _gains(seed):
  rng = np.random.default_rng(seed)
  return {name: np.sort(rng.exponential(size=min(LLAMA.in_out(name))))[::-1]
          * rng.exponential() for name in LLAMA.kernels}


@pytest.mark.parametrize('rank', [1, 2, 5, 11, 15])
def test_the_budget_is_used_and_never_exceeded(rank):
  uniform = dataclasses.replace(LLAMA, rank=rank)
  for seed in range(5):
    gains = _gains(seed)
    chosen = ranks.spread(uniform, gains)
    dearest = max(sum(LLAMA.in_out(name)) for name in LLAMA.kernels)
    assert 0 <= _cost(uniform) - _cost(chosen) < dearest
    def gained(rcfg, gains=gains):
      return sum(gains[n][:r].sum() for n, r in rcfg.ranks.items())
    # A dear rank that does not fit any more may cost the one.
    slack = max(falling[0] for falling in gains.values())
    assert gained(chosen) > gained(uniform) - slack
    assert dataclasses.replace(chosen, rank=uniform.rank) == uniform


def test_what_gains_nothing_gets_nothing():
  gains = {name: np.zeros(min(LLAMA.in_out(name))) for name in LLAMA.kernels}
  gains['down'] += 1.0
  chosen = ranks.spread(dataclasses.replace(LLAMA, rank=2), gains)
  assert chosen.ranks['down'] == 12  # 2 * 256 parameters at 40 a rank.


@pytest.mark.parametrize('rank, full, may', [
    ('0', False, False), ('3', False, True), ('q3+mlp3', False, False),
    ('full', True, False), ('16', True, False), ('12', False, True)])
def test_one_number_that_is_not_full_is_a_budget(rank, full, may):
  rcfg = dataclasses.replace(LLAMA, rank=rank)
  assert ranks.is_full(rcfg) == full and ranks.may_differ(rcfg) == may
