"""Exits are judged as they will happen, and the promise about them is kept."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_tokenizers

import recursive_tx as rtx
from recursive_tx import data, exits
from recursive_tx.exits import calibrate, forward, report, thresholds
from recursive_tx.model import kv_cache

CFG = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=4, layers_per_loop=2, loops=3, prelude=1,
    coda=1, rank='q2', exit_gate=5)
BARE = dataclasses.replace(
    CFG, layers_per_loop=1, prelude=0, coda=0, loop_norms=False,
    rank='v2+head3')
SHARED = dataclasses.replace(BARE, loop_keys=False)
T = 10

pytestmark = pytest.mark.usefixtures('quick_compiler')


def batch_of(cfg, B=1, T=T, seed=0):
  return {'token_BT': tiny.tokens(cfg, B, T, seed),
          'segment_BT': np.ones((B, T), np.int32),
          'position_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
          'weight_BT': np.ones((B, T), np.float32)}


# A parallel pass in which tokens leave early.


def one_by_one(cfg, variables, token_T, rule, thresholds):
  """Best tokens and depths of one row, as when it is generated."""
  decoder, variables = rtx.Decoder(cfg), jax.tree.map(jnp.asarray, variables)
  enter, finish = (
      jax.jit(lambda x, keys, method=method: decoder.apply(
          variables, x, None, keys, method=method))
      for method in ('enter', 'finish'))
  steps, fills, heads, gates = (
      [jax.jit(lambda *args, loop=loop, make=make: make(loop, *args))
       for loop in range(cfg.loops)]
      for make in (
          lambda loop, x, keys: decoder.apply(
              variables, x, loop, None, keys, method='loop'),
          lambda loop, x, keys: decoder.apply(
              variables, x, loop, None, keys, 'fill', method='loop'),
          lambda loop, h: decoder.apply(variables, h, loop, method='logits'),
          lambda loop, h: decoder.apply(variables, h, loop, method='gate')))
  # Without its coda a decoder finishes with the norm alone.
  plain = dataclasses.replace(cfg, coda=0)
  norm = jax.jit(lambda x: rtx.Decoder(plain).apply(
      variables, x, method='finish')[0])
  cache, best_T, depth_T = kv_cache.init(cfg, 1, len(token_T)), [], []
  for t, token in enumerate(token_T):
    place = kv_cache.Place(*jnp.array([0, t, 0])[:, None, None])
    x_11D, keys = enter(np.full((1, 1), token), kv_cache.Cached(cache, place))
    for loop in range(cfg.loops):
      x_11D, keys = steps[loop](x_11D, keys)
      if loop == cfg.loops - 1:
        break
      if rule == 'gate':
        score = exits.score(rule, gate=gates[loop](norm(x_11D)))
      else:
        logits_11V = heads[loop](norm(x_11D))
        score = exits.score(rule, logits=logits_11V)
      if float(score[0, 0]) >= thresholds[loop]:
        break
    for later in range(loop + 1, cfg.loops if cfg.loop_keys else 0):
      _, keys = fills[later](x_11D, keys)
    h_11D, (cache, _) = finish(x_11D, keys)
    best_T.append(int(heads[loop](h_11D).argmax()))
    depth_T.append(loop + 1)
  return best_T, depth_T


@pytest.mark.parametrize('cfg, rule, tried', [
    (CFG, 'gate', (0.45, 0.5)),
    (BARE, 'top', (0.25, 0.2)),
    (SHARED, 'top', (0.25, 0.2)),
    pytest.param(BARE, 'margin', (0.1, 0.1), marks=pytest.mark.slow)])
def test_leaving_in_parallel_is_leaving_token_by_token(cfg, rule, tried):
  values, batch = tiny.variables(cfg), batch_of(cfg)
  passed = forward.forward(cfg, rtx.Run(), rule)(
      values, batch, np.array(tried))
  best_T, depth_T = one_by_one(
      cfg, values, batch['token_BT'][0], rule, tried)
  assert len(set(depth_T)) > 1
  assert passed.depth_BT[0].tolist() == depth_T
  assert passed.best_BT[0].tolist() == best_T


def test_nobody_leaving_is_full_depth_and_everybody_the_first_exit():
  values, batch = tiny.variables(CFG), batch_of(CFG, 2)
  run = forward.forward(CFG, rtx.Run(), 'gate', every=True)
  args = [batch[name] for name in ('token_BT', 'segment_BT', 'position_BT')]
  h_LBTD, gate_EBT = tiny.decoder(CFG, method='hidden_and_gates')(
      values, *args)
  best_LBT = np.stack([
      rtx.Decoder(CFG).apply(values, h_BTD, loop, method='logits').argmax(-1)
      for loop, h_BTD in enumerate(h_LBTD)])
  full = run(values, batch, np.full(2, np.inf))
  np.testing.assert_array_equal(full.best_BT, best_LBT[-1])
  np.testing.assert_array_equal(full.best_EBT, best_LBT[:-1])
  np.testing.assert_allclose(
      full.score_EBT, jax.nn.sigmoid(gate_EBT), atol=1e-5)
  assert (full.depth_BT == 3).all()
  # The first exit's keys, where others read them, are those of the loop they
  # left; only the coda reads them here, as in a model of one loop.
  first = run(values, batch, np.zeros(2))
  np.testing.assert_array_equal(first.best_BT, best_LBT[0])
  assert (first.depth_BT == 1).all()


def test_packed_documents_leave_as_separate_ones():
  values = tiny.variables(BARE)
  run = forward.forward(BARE, rtx.Run(), 'margin')
  batch = batch_of(BARE, 1)
  batch['segment_BT'][:, 6:] = 2
  batch['position_BT'][:, 6:] -= 6
  packed = run(values, batch, np.full(2, 0.05))
  tail = np.zeros_like(batch['token_BT'])
  tail[:, :4] = batch['token_BT'][:, 6:]
  alone = run(values, {**batch_of(BARE, 1), 'token_BT': tail},
                  np.full(2, 0.05))
  for one, other in ((packed.best_BT, alone.best_BT),
                     (packed.depth_BT, alone.depth_BT)):
    np.testing.assert_array_equal(one[:, 6:], other[:, :4])
  assert len(set(packed.depth_BT[0].tolist())) > 1


class _Pieces(rtx.Run):
  """A run whose logits are made for a few positions at a time."""

  def chunk(self, T, size):
    del size
    return T // 5


def test_chunks_of_logits_do_not_matter():
  values, batch = tiny.variables(BARE), batch_of(BARE, 2)
  whole, pieces = (
      forward.forward(BARE, run, 'top', every=True)(
          values, batch, np.full(2, 0.2))
      for run in (rtx.Run(), _Pieces()))
  for one, other in zip(whole, pieces, strict=True):
    np.testing.assert_array_equal(one, other)


# The test of thresholds.


def test_a_p_value_is_the_inverse_of_a_gamblers_greatest_wealth():
  """By hand, in fractions of what was seen before."""
  shares, delta, level = [0.0, 0.5, 0.0, 0.0], 0.25, 0.1
  wealths, seen, moved = [1.0], [0.5], [0.25]
  for share in shares:
    stake = math.sqrt(2 * math.log(10) / (4 * sum(moved) / len(moved)))
    stake = min(stake, 0.9 / 0.75)
    wealths.append(wealths[-1] * (1 + stake * (delta - share)))
    seen.append(share)
    moved.append((share - sum(seen) / len(seen)) ** 2)
  assert wealths[2] < 1 < wealths[4]
  assert calibrate.p_value(np.array(shares), delta, level) == pytest.approx(
      1 / max(wealths))
  assert calibrate.p_value(np.ones(50), delta, level) == 1
  # All that is known of shares that are all 0 is their number.
  assert calibrate.p_value(np.zeros(50), delta, level) >= (1 - delta) ** 50


@pytest.mark.parametrize('delta, tokens', [(0.1, 1), (0.05, 20), (0.01, 64)])
def test_a_p_value_is_seldom_small_where_the_mean_is_delta(delta, tokens):
  rng, draws = np.random.default_rng(0), 400
  for level in (0.05, 0.2):
    small = sum(
        calibrate.p_value(
            rng.binomial(tokens, delta, 150) / tokens, delta, level) <= level
        for _ in range(draws))
    # Three standard deviations of the draws above it.
    assert small / draws <= level + 3 * math.sqrt(level * (1 - level) / draws)


def test_a_p_value_sees_that_shares_differ_little():
  share_U = np.tile([0.0, 1 / 64], 200)
  even = calibrate.p_value(share_U, 0.02, 0.05)
  assert even < 0.05
  # The same mean by a few sequences that are all wrong tells less.
  lumps_U = np.zeros(400)
  lumps_U[50::100] = 200 / 64 / 4
  assert lumps_U.mean() == share_U.mean()
  assert calibrate.p_value(lumps_U, 0.02, 0.05) > 2 * even


def test_the_last_before_the_first_that_fails():
  for p_values, expected in (
      ([], None), ([0.2, 0.01], None), ([0.01], 0), ([0.01, 0.05, 0.06], 1),
      ([0.01, 0.02, 0.2, 0.01], 1)):
    assert calibrate.last_passed(p_values, 0.05) == expected


def test_the_guarantee_holds():
  """Over draws of sequences whose true means are known."""
  rng, delta, confidence, n = np.random.default_rng(0), 0.05, 0.9, 200
  risks = np.linspace(0.005, 0.15, 30)
  wrong = found = 0
  for _ in range(300):
    # Sequences differ in how hard they are; shares are of 20 tokens.
    hard_U = rng.choice([0.2, 1.8], n)
    shares = [rng.binomial(20, risk * hard_U) / 20 for risk in risks]
    last = calibrate.last_passed(
        [calibrate.p_value(share_U, delta, 1 - confidence)
         for share_U in shares], 1 - confidence)
    if last is not None:
      found += 1
      wrong += risks[last] > delta
  assert found > 250
  # Three standard deviations of 300 draws above 0.1.
  assert wrong / 300 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 300)


def test_area_and_oracle_against_brute_force():
  rng = np.random.default_rng(0)
  score_T, same_T = rng.integers(0, 6, 50) / 6, rng.random(50) < 0.6
  pairs = [(x > y) + 0.5 * (x == y)
           for x in score_T[same_T] for y in score_T[~same_T]]
  assert calibrate.area(score_T, same_T) == pytest.approx(np.mean(pairs))
  assert math.isnan(calibrate.area(score_T, same_T | True))
  same_ET = np.array([[1, 0, 0, 1], [0, 1, 0, 1]], bool)
  assert calibrate.oracle_depth(same_ET).tolist() == [1, 2, 3, 1]


# All of it.


def heldout_of(cfg, batches):
  return data.Heldout([batch_of(cfg, 4, 6, seed) for seed in range(batches)],
                      num_bytes=1, num_documents=1)


@pytest.mark.parametrize('cfg', [BARE, SHARED])
def test_the_chosen_thresholds_keep_to_delta(cfg):
  values, heldout = tiny.variables(cfg), heldout_of(cfg, 4)
  # A row without anything to predict is no sequence; a place without is none
  # of its tokens.
  heldout.batches[0]['weight_BT'][0] = 0
  heldout.batches[1]['weight_BT'][2, 3:] = 0
  result = calibrate.calibrate(
      cfg, values, heldout, rule='margin', delta=0.4, confidence=0.6)
  # Every fourth sequence, from the first on, is to choose by.
  assert (result.units, result.tokens) == (11, 15 * 6 - 3)
  curve = result.points
  assert curve[0].agreement > curve[-1].agreement < 0.9
  depths = [point.depth for point in curve]
  assert depths == sorted(depths, reverse=True)
  assert result.chosen.p_value <= 0.4
  assert result.chosen.agreement >= 0.6
  # One point of the curve by itself.
  point, run = curve[-1], forward.forward(cfg, rtx.Run(), 'margin')
  shares, depths, seen = [], [], 0
  for batch in heldout.batches:
    full, cut = (run(values, batch, np.array(x))
                 for x in ((2.0, 2.0), point.thresholds))
    for row, weight_T in enumerate(batch['weight_BT'] > 0):
      seen += weight_T.any()
      if weight_T.any() and seen % 4 != 1:
        shares.append((full.best_BT[row] == cut.best_BT[row])[weight_T].mean())
        depths.append(cut.depth_BT[row][weight_T].mean())
  assert point.agreement == pytest.approx(np.mean(shares))
  assert point.depth == pytest.approx(np.mean(depths))
  assert 1 <= result.oracle_depth <= 3
  assert result.oracle_depth <= 3 - sum(result.agreement_E[:1])
  assert all(0 <= area <= 1 for area in result.area_E)
  assert 'chosen' in report.table(result)


def test_progress_sees_every_phase():
  """And changes nothing."""
  seen = []

  def progress(items, phase):
    for item in items:
      yield item
      seen.append(phase)

  with_it, without = (calibrate.calibrate(
      BARE, tiny.variables(BARE), heldout_of(BARE, 4), rule='margin', delta=0.4,
      confidence=0.6, **given) for given in (dict(progress=progress), {}))
  assert with_it == without
  assert seen.count('full depth') == 4
  assert seen.count('search') == len(thresholds._PRICES)
  # The one at which it ended is not reported as done.
  assert seen.count('thresholds') in (
      len(without.points), len(without.points) - 1)
  assert seen == sorted(seen, key=['full depth', 'search', 'thresholds'].index)


def test_a_tables_columns_stay_apart():
  points = tuple(calibrate.Point((1e-9, tried), 1.0, 3.0, 1e-300)
                 for tried in (0.123456789, 2.0))
  text = report.table(calibrate.Result(
      'top', 0.01, 0.95, 10, 12_345, points, points[1], 1.5, (0.5, 0.75),
      (0.25, math.nan)))
  assert [line.split() for line in text.splitlines()[-3:]] == [
      ['thresholds', 'agreement', 'mean', 'depth', 'p-value'],
      ['0.000000', '0.123457', '1.0000', '3.0000', '1e-300'],
      ['0.000000', '2.000000', '1.0000', '3.0000', '1e-300', '<-', 'chosen']]


@pytest.mark.parametrize('cfg, change, parts', [
    (CFG, dict(rule='top'), ("'top'", 'coda', "'gate'")),
    (BARE, dict(rule='static'), ("'static'", 'expected one of top')),
    (BARE, dict(rule='margn'), ("'margin'",)),
    (BARE, dict(delta=0.0), ('delta is 0.0',)),
    (BARE, dict(confidence=1.0), ('confidence is 1.0',)),
    *((BARE, {name: value}, (f'{name} is {value}', 'above 0 and below 1'))
      for name in ('delta', 'confidence')
      for value in (math.nan, math.inf, -0.1, 1.5)),
    (BARE, dict(), ('6 sequences', '337', '--text')),
    (dataclasses.replace(BARE, exit_gate=0), {}, ('model.exit_gate=0',)),
    (dataclasses.replace(BARE, exit_gate=0, loops=1, rank='0'), {},
     ('model.loops=1', 'several')),
])
def test_what_cannot_be_is_refused(cfg, change, parts):
  with tiny.refused(*parts):
    calibrate.calibrate(cfg, tiny.variables(cfg), heldout_of(cfg, 2),
                        **{'rule': 'gate', **change})


@pytest.mark.slow
def test_the_command_line(tmp_path):
  model = tmp_path / 'model'
  rtx.save(model, CFG, tiny.variables(CFG))
  tiny_tokenizers.letters(model, ['a', '<bos>', '<eos>', 'b', 'c'])
  (tmp_path / 'text.txt').write_text('abcabbac' * 40)

  def ran(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'recursive_tx', 'calibrate',
         f'--checkpoint={model}', f'--text={tmp_path}/*.txt', '--seq_len=8',
         *flags], cwd=tiny.ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True, text=True, check=False)

  done = ran('--delta=0.01')
  assert done.returncode == 1 and 'too few' in done.stderr.splitlines()[-1]
  assert exits.load(model) is None
  done = ran('--delta=0.2', '--confidence=0.9', '--rule=gate')
  assert done.returncode == 0, done.stderr
  found = json.loads((model / 'exit.json').read_text())
  exit = exits.load(model)
  exit.check(CFG)
  assert exit.thresholds == tuple(found['thresholds'])
  assert found['delta'] == 0.2 and found['confidence'] == 0.9
  assert found['units'] >= 30 and found['p_value'] <= 0.1
  assert 0.8 <= found['agreement'] <= 1 and 1 <= found['mean_depth'] <= 3
  assert '<- chosen' in done.stdout and 'oracle' in done.stdout
  # No exit of a gate that is always sure passes.
  values = tiny.variables(CFG)
  values['params']['adapters']['exit']['b_bias'] += 100
  rtx.save(model, CFG, values, companions=model, overwrite=True)
  done = ran('--delta=0.05', '--confidence=0.5', '--rule=gate')
  assert done.returncode == 1
  assert 'nothing was written' in done.stderr.splitlines()[-1]
  assert 'threshold' in done.stdout and exits.load(model) is None
