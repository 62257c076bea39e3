"""The exit gate: what it computes, where it goes, and trained alone."""

import dataclasses

from exit_training import logits_of, random_batch, run, stepped
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import model, train, tying
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.losses.terms import LossConfig
from recursive_tx.model import adapters
from recursive_tx.store import opening
from recursive_tx.train import optim

CFG = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=4, layers_per_loop=1, loops=3, coda=1,
    rank='q2', exit_gate=5)
PLAIN = dataclasses.replace(CFG, exit_gate=0)
GATE_ALONE = (('adapters/exit/.*', 1.0, 0.0), ('.*', 0.0, 0.0))

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def batch():
  return random_batch()


def without_gate(values):
  params = values['params']
  return {'params': {**params, 'adapters': {
      k: v for k, v in params['adapters'].items() if k != 'exit'}}}


def gate_by_hand(values, h_D, loop):
  """A gate's logit of one hidden state, in float64."""
  leaves = {name: leaf[loop].astype(np.float64)
            for name, leaf in values['params']['adapters']['exit'].items()}
  x_E = np.asarray(h_D, np.float64) @ leaves['a'] + leaves['a_bias']
  gelu_E = x_E / 2 * (
      1 + np.tanh(np.sqrt(2 / np.pi) * (x_E + 0.044715 * x_E**3)))
  return gelu_E @ leaves['b'] + leaves['b_bias']


def test_a_small_mlp_for_every_loop_but_the_final_one():
  shapes = model.flat_shapes(CFG)
  assert {path: shape for path, shape in shapes.items()
          if path not in model.flat_shapes(PLAIN)} == {
      'adapters/exit/a': (2, 16, 5), 'adapters/exit/a_bias': (2, 5),
      'adapters/exit/b': (2, 5), 'adapters/exit/b_bias': (2,)}
  boxed = model.abstract_params(CFG)['adapters']['exit']
  assert {name: box.names for name, box in boxed.items()} == {
      'a': ('loops', 'D', 'W'), 'a_bias': ('loops', 'W'),
      'b': ('loops', 'W'), 'b_bias': ('loops',)}
  with tiny.refused('model.exit_gate=5', 'loops=1'):
    dataclasses.replace(CFG, loops=1)
  with tiny.refused('model.exit_gate is -1', 'at least 0'):
    dataclasses.replace(CFG, exit_gate=-1)


def test_it_is_computed_as_by_hand_for_rows_at_any_loops():
  values = tiny.variables(CFG)
  h_BTD = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
  gate = tiny.decoder(CFG, method='gate')
  loop_BT = np.array([[0, 1, 0], [1, 1, 0]], np.int32)
  mixed_BT = gate(values, h_BTD, loop_BT)
  assert mixed_BT.dtype == jnp.float32
  for b, t in np.ndindex(2, 3):
    expected = gate_by_hand(values, h_BTD[b, t], loop_BT[b, t])
    assert float(mixed_BT[b, t]) == pytest.approx(expected, abs=1e-5)
  for loop in (0, 1):
    alone_BT = rtx.Decoder(CFG).apply(values, h_BTD, loop, method='gate')
    for b, t in np.ndindex(2, 3):
      expected = gate_by_hand(values, h_BTD[b, t], loop)
      assert float(alone_BT[b, t]) == pytest.approx(expected, abs=1e-5)
  # A row that is at the final loop has none, and spoils nothing.
  loop_BT[0, 1] = 2
  assert np.isfinite(gate(values, h_BTD, loop_BT)).all()


def test_it_changes_no_logits_and_reads_what_the_coda_has_not_seen(batch):
  values, token_BT = tiny.variables(CFG), batch['token_BT']
  plain = without_gate(values)
  np.testing.assert_array_equal(
      tiny.decoder(CFG)(values, token_BT), tiny.decoder(PLAIN)(plain, token_BT))
  h_LBTD, gate_EBT = tiny.decoder(CFG, method='hidden_and_gates')(
      values, token_BT)
  np.testing.assert_array_equal(
      h_LBTD, tiny.decoder(PLAIN, method='hidden')(plain, token_BT))
  # Without its coda a model's hidden states are those before the coda.
  bare = dataclasses.replace(PLAIN, coda=0)
  params = {k: v for k, v in plain['params'].items() if k != 'coda'}
  before_LBTD = tiny.decoder(bare, method='hidden')({'params': params},
                                                    token_BT)
  assert gate_EBT.shape == (2, *token_BT.shape)
  for loop, b, t in ((0, 0, 0), (1, 2, 3), (0, 3, 5)):
    assert float(gate_EBT[loop, b, t]) == pytest.approx(
        gate_by_hand(values, before_LBTD[loop, b, t], loop), abs=1e-5)


def test_a_fresh_one_is_undecided():
  made = jax.jit(rtx.Decoder(CFG).init)(
      jax.random.key(0), np.zeros((1, 2), np.int32))
  leaves = jax.tree.map(
      lambda x: np.asarray(x.value), made['params']['adapters']['exit'],
      is_leaf=lambda x: hasattr(x, 'names'))
  fresh = {path.removeprefix('exit/'): value
           for path, value in adapters.fresh_exits(CFG, 0).items()}
  for found in (leaves, fresh):
    assert {k: v.shape for k, v in found.items()} == {
        'a': (2, 16, 5), 'a_bias': (2, 5), 'b': (2, 5), 'b_bias': (2,)}
    assert abs(found['a'].std() * 4 - 1) < 0.3
    assert (found['a'][0] != found['a'][1]).all()
    assert not any(found[name].any() for name in ('a_bias', 'b', 'b_bias'))


# What is made of it, and from it.


def as_read(parts, cfg):
  """The tree that parts fill."""
  found = {}
  for path, shape in model.flat_shapes(cfg).items():
    paths.put(found, path, np.full(shape, np.nan, np.float32))
  for path, at, value in parts:
    paths.get(found, path)[at] = value
  return found


def test_relaxing_and_continuing_start_it_fresh(tmp_path):
  source = dataclasses.replace(
      PLAIN, loops=1, layers_per_loop=4, coda=0, rank='0')
  rtx.save(tmp_path / 'vanilla', source, tiny.variables(source))
  fresh = {'adapters': {'exit': {
      path.removeprefix('exit/'): value
      for path, value in adapters.fresh_exits(CFG, 0).items()}}}

  def taken(name, wanted):
    return as_read(opening.parts_as(
        opening.source(str(tmp_path / name)), wanted, init='average',
        lora='svd', seed=0), wanted)

  for name, values in (('vanilla', None), ('plain', tiny.variables(PLAIN))):
    if values is None:
      values = {'params': taken('vanilla', PLAIN)}
    else:
      rtx.save(tmp_path / 'plain', PLAIN, values)
    found = taken(name, CFG)
    exit = found['adapters'].pop('exit')
    tiny.assert_same_tree(found, values['params'])
    tiny.assert_same_tree(exit, fresh['adapters']['exit'])
  # What is there already stays; another width is another model.
  values = tiny.variables(CFG)
  rtx.save(tmp_path / 'gated', CFG, values)
  found = taken('gated', dataclasses.replace(CFG, rank='q2+head3'))
  head = found['adapters'].pop('head')
  assert head['a'].any() and not head['b'].any()
  tiny.assert_same_tree(found, values['params'])
  for other in (dict(exit_gate=6), dict(exit_gate=0), dict(rank='q3')):
    with pytest.raises(UserError, match='already has loops|another model'):
      taken('gated', dataclasses.replace(CFG, **other))


def test_saved_it_is_kept_merged_and_exported_it_is_dropped(tmp_path, caplog):
  values = tiny.variables(CFG)
  rtx.save(tmp_path / 'saved', CFG, values)
  cfg, found = rtx.restore(tmp_path / 'saved')
  assert cfg == CFG
  tiny.assert_same_tree(found['params'], values['params'])
  with caplog.at_level('WARNING'):
    mcfg, merged = tying.merge(CFG, values)
    rtx.save_hf(tmp_path / 'ours', CFG, values)
  said = [row.getMessage() for row in caplog.records]
  assert len(said) == 2 and all('exit gate' in line for line in said)
  ecfg, expected = tying.merge(PLAIN, without_gate(values))
  assert mcfg == ecfg and not mcfg.exit_gate
  tiny.assert_same_tree(merged['params'], expected['params'])


# Trained.


def agreement(values, batch):
  """[2, B, T]: whether an exit's best token is the final loop's."""
  best = [np.asarray(logits_of(CFG, loop)(values, batch['token_BT'])).argmax(-1)
          for loop in range(3)]
  return np.stack([best[0] == best[2], best[1] == best[2]])


def area(score, positive):
  """Under the ROC curve: how often a positive scores above a negative."""
  above = score[positive][:, None] - score[~positive][None]
  return ((above > 0) + 0.5 * (above == 0)).mean()


def test_trained_alone_it_foresees_agreement_and_nothing_else_moves(batch):
  values = tiny.variables(CFG)
  for path, value in adapters.fresh_exits(CFG, 0).items():
    paths.put(values['params']['adapters'], path, value)
  config = run(CFG, LossConfig((), gate=(1.0, 0.5, 0.0)), GATE_ALONE)
  after, rows = stepped(config, values, batch, 60)
  before = dict(paths.items(values['params']))
  for path, value in paths.items(after):
    if path.startswith('adapters/exit/'):
      assert (value != before[path]).any(), path
    else:
      np.testing.assert_array_equal(value, before[path], path)
  assert rows[0].keys() >= {'gate/loop1', 'gate/loop2'}
  assert 'gate/loop3' not in rows[0]
  # Undecided at first.
  assert rows[0]['gate/loop1'] == pytest.approx(np.log(2), rel=1e-5)
  assert rows[0]['loss'] == pytest.approx(1.5 * np.log(2), rel=1e-5)
  _, gate_EBT = tiny.decoder(CFG, method='hidden_and_gates')(
      {'params': after}, batch['token_BT'])
  counted = batch['weight_BT'] > 0
  for loop, same_BT in enumerate(agreement(values, batch)):
    assert 0 < same_BT[counted].mean() < 1
    assert area(np.asarray(gate_EBT[loop])[counted], same_BT[counted]) > 0.8
    assert rows[-1][f'gate/loop{loop + 1}'] < 0.9 * rows[0][
        f'gate/loop{loop + 1}']


@pytest.mark.slow
def test_the_loss_of_a_step_is_that_of_numpy(batch):
  """And its other terms, and their gradients, are as without it."""
  values = tiny.variables(CFG)
  with_gate, without = (
      run(CFG, LossConfig((0.1, 0.2, 1.0), (), (0.3, 0.0, 0.0), gate=gate),
          (('.*', 1.0, 0.0),)) for gate in ((0.7, 0.4, 0.0), ()))
  after, (row,) = stepped(with_gate, values, batch, 1)
  plain, (other,) = stepped(without, values, batch, 1)
  _, gate_EBT = tiny.decoder(CFG, method='hidden_and_gates')(
      values, batch['token_BT'])
  weight_BT, total = batch['weight_BT'], 0.0
  for loop, same_BT in enumerate(agreement(values, batch)):
    p_BT = 1 / (1 + np.exp(-np.asarray(gate_EBT[loop], np.float64)))
    nats_BT = -np.log(np.where(same_BT, p_BT, 1 - p_BT))
    mean = (nats_BT * weight_BT).sum() / weight_BT.sum()
    assert row[f'gate/loop{loop + 1}'] == pytest.approx(mean, rel=1e-4)
    total += (0.7, 0.4)[loop] * mean
  assert row['loss'] - other['loss'] == pytest.approx(total, rel=1e-3)
  for name in ('next_token/loop1', 'next_token/loop3', 'self_distill/loop1'):
    assert row[name] == pytest.approx(other[name], rel=1e-6)
  # AdamW's first step is its gradient's sign: clipping by the norm of all
  # gradients does not change it.
  for path, value in paths.items(after):
    if not path.startswith('adapters/exit/'):
      assert tiny.distance(value, paths.get(plain, path)) < 1e-3, path


def test_its_term_asks_for_a_gate():
  config = run(PLAIN, LossConfig(gate=(1.0, 0.0)))
  with tiny.refused('losses.gate', '--config.model.exit_gate=64'):
    train.config.check(config)
  train.config.check(dataclasses.replace(config, model=CFG))


def test_the_table_of_the_recipes_covers_it():
  from recursive_tx.cli import configs
  from recursive_tx.configs import common
  config = common.uptrain('gate=3,loops=2', dict(
      V=8, D=8, F=8, N=2, K=1, H=4, layers_per_loop=4))
  assert config.model.exit_gate == 3 and config.losses.gate == (1.0, 0.0)
  cfg = configs.typed(config).model
  params = {}
  for path, shape in model.flat_shapes(cfg).items():
    paths.put(params, path, jax.ShapeDtypeStruct(shape, np.float32))
  for table in (common.TABLE, common.PAPER_TABLE):
    optim.make(optim.OptimConfig(1, 1.0, table=table), params)
    # Not decayed, though its names are like those of what is.
    assert table[0] == ('adapters/exit/.*', 1.0, 0.0)
