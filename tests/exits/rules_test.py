"""Rules against numpy, what is refused, and what lies beside the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import exits

V = 11
CFG = rtx.ModelConfig(
    V=V, D=8, F=8, N=2, K=1, H=4, layers_per_loop=1, loops=3)
GATED = dataclasses.replace(CFG, exit_gate=5)
BY_LOGITS = [rule for rule in exits.RULES
             if exits.Exit(rule).needs == 'logits']


@pytest.fixture
def logits_LBTV():
  return 3 * np.random.default_rng(0).normal(size=(2, 3, 4, V)).astype(
      np.float32)


def by_hand(rule, logits_V):
  """One token's score, in float64."""
  p_V = np.exp(logits_V.astype(np.float64))
  p_V /= p_V.sum()
  falling_V = np.sort(p_V)[::-1]
  return {
      'top': falling_V[0],
      'margin': (falling_V[0] - falling_V[1]) / falling_V[:2].sum()}[rule]


@pytest.mark.parametrize('rule', BY_LOGITS)
def test_scores_are_those_of_numpy(logits_LBTV, rule):
  """For any leading dimensions."""
  found_LBT = jax.jit(exits.score, static_argnums=0)(
      rule, logits=logits_LBTV)
  assert found_LBT.dtype == jnp.float32
  for at in np.ndindex(found_LBT.shape):
    expected = by_hand(rule, logits_LBTV[at])
    assert float(found_LBT[at]) == pytest.approx(expected, abs=1e-5)


def test_scores_are_bounds_where_a_loop_is_certain_or_knows_nothing():
  sure_V = jnp.where(jnp.arange(V) == 4, 0.0, -jnp.inf)
  for rule in ('top', 'margin'):
    assert exits.score(rule, logits=sure_V) == 1
  assert exits.score('margin', logits=jnp.zeros(V)) == 0
  assert exits.score('top', logits=jnp.zeros(V)) == pytest.approx(1 / V)


def test_the_gates_score_is_its_probability():
  gate_B = jnp.array([-100.0, 0.0, 1.0], jnp.bfloat16)
  np.testing.assert_allclose(
      exits.score('gate', gate=gate_B), [0, 0.5, 1 / (1 + np.exp(-1))],
      rtol=1e-6, atol=1e-30)


def test_what_a_rule_needs():
  assert {rule: exits.Exit(rule).needs for rule in exits.RULES} == {
      'last': 'nothing', 'static': 'nothing', 'gate': 'gate',
      'top': 'logits', 'margin': 'logits'}


@pytest.mark.parametrize('loop', [1, 2, 3])
def test_static_leaves_after_its_loop(loop):
  exit = exits.static(loop, 3)
  exit.check(CFG)
  leaves = [bool(exits.score('static') >= x) for x in exit.thresholds]
  assert [*leaves, True].index(True) + 1 == loop


@pytest.mark.parametrize('make, parts', [
    (lambda: exits.Exit('margn'), ("'margn'", "'margin'", 'static')),
    *((lambda value=value: exits.Exit('top', (0.5, value)),
       ('(0.5,', 'from 0', 'to 1, or 2')) for value in (
           float('nan'), float('inf'), -1e-9, 2.5, 95, 10**400, 'x', None)),
    (lambda: exits.Exit('top', 0.5), ('thresholds 0.5', 'to 1, or 2')),
    (lambda: exits.static(0, 3), ('loop 0', '1 to 3')),
    (lambda: exits.static(4, 3), ('loop 4', '1 to 3')),
    (lambda: exits.Exit('top').check(CFG), ('0 thresholds', 'give 2')),
    (lambda: exits.Exit('top', (0.5,) * 3).check(CFG), ('3 thr', 'give 2')),
    (lambda: exits.Exit('last', (0.5,)).check(CFG), ('1 thresholds', 'give 0')),
    (lambda: exits.static(1, 2).check(CFG), ('model.loops=3', 'give 2')),
    (lambda: exits.Exit('gate', (0.5, 0.5)).check(CFG),
     ('model.exit_gate=0', "'top'")),
])
def test_what_cannot_be_is_refused(make, parts):
  with tiny.refused(*parts):
    make()


def test_what_can_be_is_accepted():
  one = dataclasses.replace(CFG, loops=1)
  exits.Exit('gate', (0.5, 1.0)).check(GATED)
  exits.Exit().check(one)
  exits.Exit('top').check(one)
  # A value: it can be an argument of jit that is not traced.
  assert hash(exits.Exit('top', [0, 1])) == hash(exits.Exit('top', (0.0, 1.0)))


def test_saved_beside_the_weights_it_is_read_back(tmp_path):
  assert exits.load(tmp_path) is None
  exit = exits.Exit('gate', (0.25, 0.9000000000000001))
  exits.save(tmp_path, exits.Exit('top', (0.5, 0.5)), {})
  exits.save(tmp_path, exit, {'delta': 0.01})
  assert exits.load(tmp_path) == exit
  assert [path.name for path in tmp_path.iterdir()] == ['exit.json']
  assert json.loads((tmp_path / 'exit.json').read_text())['delta'] == 0.01
  with pytest.raises(TypeError):
    exits.save(tmp_path, exit, {'delta': object()})
  assert exits.load(tmp_path) == exit
  assert [path.name for path in tmp_path.iterdir()] == ['exit.json']


@pytest.mark.parametrize('text, part', [
    ('{', 'is not JSON'), ('[]', 'holds list'), ('{}', "lacks 'rule'"),
    ('{"rule": "top"}', 'calibrate anew'),
    ('{"rule": "top", "thresholds": ["1"]}', 'calibrate anew'),
    ('{"rule": "top", "thresholds": [1e400]}', 'to 1, or 2'),
    ('{"rule": "top", "thresholds": [NaN]}', 'to 1, or 2'),
    ('{"rule": "top", "thresholds": [1%s]}' % ('0' * 400), 'to 1, or 2'),
    ('{"rule": "tip", "thresholds": []}', "did you mean 'top'")])
def test_a_spoilt_file_is_refused(tmp_path, text, part):
  (tmp_path / 'exit.json').write_text(text)
  with tiny.refused(part):
    exits.load(tmp_path)


def test_a_saved_model_with_it_is_restored_as_without(tmp_path):
  values = tiny.variables(GATED)
  rtx.save(tmp_path / 'model', GATED, values)
  exits.save(tmp_path / 'model', exits.Exit('gate', (0.5, 0.5)), {})
  cfg, found = rtx.restore(tmp_path / 'model')
  assert cfg == GATED
  tiny.assert_same_tree(found['params'], values['params'])
