"""The head's adapter: what it adds, where it goes, and trained alone."""

import dataclasses

from exit_training import B, T, logits_of, random_batch, run, stepped
import jax
import numpy as np
import processes
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import evaluate, losses, machine, model, train, tying
from recursive_tx.data import Heldout
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.losses.terms import LossConfig
from recursive_tx.machine import flops
from recursive_tx.model import adapters
from recursive_tx.store import opening
from recursive_tx.train.optim import OptimConfig

CFG = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=4, layers_per_loop=1, loops=3,
    rank='q2+head4')
PLAIN = dataclasses.replace(CFG, rank='q2')
HEAD_ALONE = (('adapters/head/.*', 1.0, 0.0), ('.*', 0.0, 0.0))


pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def batch():
  return random_batch()


def test_only_a_rank_that_names_the_head_adapts_it():
  for rank in ('0', '8', 'full', 'attn2+mlp3'):
    cfg = dataclasses.replace(CFG, rank=rank)
    assert adapters.head_rank(cfg) == 0
    assert not any('adapters/head' in path for path in model.flat_shapes(cfg))
  found = {path: shape for path, shape in model.flat_shapes(CFG).items()
           if path not in model.flat_shapes(PLAIN)}
  # One for every loop but the final one.
  assert found == {
      'adapters/head/a': (2, 16, 4), 'adapters/head/b': (2, 4, 29)}
  assert CFG.ranks == PLAIN.ranks
  # Capped as the others are.
  assert adapters.head_rank(dataclasses.replace(CFG, rank='head99')) == 16
  with tiny.refused('head4', 'loops=1'):
    dataclasses.replace(CFG, loops=1)


@pytest.mark.parametrize('tied', [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_is_added_to_the_head_of_each_exit(tied):
  cfg = dataclasses.replace(CFG, tied=tied)
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg, 2, 5)
  h_LBTD = np.asarray(tiny.decoder(cfg, method='hidden')(values, token_BT))
  params = values['params']
  table = (params['embed']['embedding'] if tied
           else params['head']['kernel']).T.astype(np.float64)
  head = params['adapters']['head']
  for loop in range(3):
    added = head['a'][loop] @ head['b'][loop] if loop < 2 else 0
    found = logits_of(cfg, loop)(values, token_BT)
    assert tiny.distance(found, h_LBTD[loop] @ (table + added)) < 1e-5
    if loop < 2:
      assert tiny.distance(found, h_LBTD[loop] @ table) > 0.05
  # The final loop's logits are, bit for bit, those of a model without.
  plain = {'params': {**params, 'adapters': {
      k: v for k, v in params['adapters'].items() if k != 'head'}}}
  for ours, theirs in (
      (tiny.decoder(cfg)(values, token_BT),
       tiny.decoder(dataclasses.replace(PLAIN, tied=tied))(plain, token_BT)),
      (logits_of(cfg, 2)(values, token_BT),
       logits_of(dataclasses.replace(PLAIN, tied=tied), 2)(plain, token_BT))):
    np.testing.assert_array_equal(ours, theirs)


def test_no_table_is_merged():
  cfg = dataclasses.replace(CFG, V=97)
  values = tiny.variables(cfg)
  text = str(jax.make_jaxpr(lambda h: rtx.Decoder(cfg).apply(
      values, h, 0, method='logits'))(np.zeros((2, 5, 16), np.float32)))
  made = [line for line in text.splitlines() if '= dot_general' in line]
  assert len(made) == 3
  assert not [line for line in made if '97,16]' in line.split('=')[0]
              or '16,97]' in line.split('=')[0]]


def test_a_fresh_one_changes_nothing_and_loops_differ():
  made = jax.jit(rtx.Decoder(CFG).init)(
      jax.random.key(0), np.zeros((1, 2), np.int32))
  head = jax.tree.map(np.asarray, jax.tree.map(
      lambda x: x.value, made['params']['adapters']['head'],
      is_leaf=lambda x: hasattr(x, 'names')))
  fresh = adapters.fresh_exits(CFG, 0)
  for found in (head, {leaf: fresh[f'head/{leaf}'] for leaf in 'ab'}):
    assert found['a'].shape == (2, 16, 4) and not found['b'].any()
    assert abs(found['a'].std() * 4 - 1) < 0.3
    assert (found['a'][0] != found['a'][1]).all()
  assert adapters.fresh_exits(PLAIN, 0) == {}


# What is made of it, and from it.


def test_relaxing_and_continuing_start_it_fresh(tmp_path):
  source = dataclasses.replace(
      CFG, loops=1, layers_per_loop=3, rank='0')
  made = tiny.variables(source)
  rcfg, rvars = rtx.relax(source, made, loops=3, rank='q2+head4')
  pcfg, pvars = rtx.relax(source, made, loops=3, rank='q2')
  head = rvars['params']['adapters'].pop('head')
  tiny.assert_same_tree(rvars['params'], pvars['params'])
  assert head['a'].any() and not head['b'].any()
  # From a model that lacks nothing else, and from no other.
  rtx.save(tmp_path / 'plain', pcfg, pvars)
  origin = opening.source(str(tmp_path / 'plain'))
  found = {}
  for path, at, value in opening.parts_as(
      origin, rcfg, init='average', lora='svd', seed=0):
    if not at:
      paths.put(found, path, value)
    else:
      shape = model.flat_shapes(rcfg)[path]
      if at == (0,):
        paths.put(found, path, np.empty(shape, value.dtype))
      paths.get(found, path)[at] = value
  tiny.assert_same_tree(found, {
      **pvars['params'],
      'adapters': {**pvars['params']['adapters'], 'head': head}})
  other = dataclasses.replace(rcfg, rank='q3+head4')
  with pytest.raises(UserError, match='rank=q2'):
    opening.parts_as(origin, other, init='average', lora='svd', seed=0)


def test_saved_it_is_kept_merged_and_exported_it_is_dropped(tmp_path, caplog):
  values = tiny.variables(CFG)
  rtx.save(tmp_path / 'saved', CFG, values)
  cfg, found = rtx.restore(tmp_path / 'saved')
  assert cfg == CFG
  tiny.assert_same_tree(found['params'], values['params'])
  head = values['params']['adapters']['head']
  plain = {'params': {**values['params'], 'adapters': {
      k: v for k, v in values['params']['adapters'].items() if k != 'head'}}}
  with caplog.at_level('WARNING'):
    mcfg, merged = tying.merge(CFG, values)
    rtx.save_hf(tmp_path / 'ours', CFG, values)
    said = [row.getMessage() for row in caplog.records]
    caplog.clear()
    ecfg, expected = tying.merge(PLAIN, plain)
    rtx.save_hf(tmp_path / 'theirs', PLAIN, plain)
  assert len(said) == 2 and all('adapter of the head' in x for x in said)
  assert not caplog.records and head['a'].any()
  assert mcfg == ecfg
  tiny.assert_same_tree(merged['params'], expected['params'])
  name = 'model.safetensors'
  assert (tmp_path / 'ours' / name).read_bytes() == (
      tmp_path / 'theirs' / name).read_bytes()


def test_evaluation_hears_each_exit_with_its_own_head(batch):
  values = tiny.variables(CFG)
  found = evaluate.evaluate(
      CFG, values, Heldout([batch], num_bytes=100, num_documents=1))
  for loop in range(3):
    nats_BT = losses.next_token_nats(
        logits_of(CFG, loop)(values, batch['token_BT']), batch['target_BT'])
    mean = (nats_BT * batch['weight_BT']).sum() / batch['weight_BT'].sum()
    assert found['loops'][loop]['loss'] == pytest.approx(float(mean), rel=1e-5)


def test_its_flops_are_those_of_two_thin_matmuls_an_exit():
  for exits, early in (((1, 2, 3), 2), ((3,), 0), ((1,), 1)):
    ours, theirs = (sum(flops.forward(cfg, B, T, exits=exits).values())
                    for cfg in (CFG, PLAIN))
    assert ours - theirs == 2 * B * T * early * 4 * (16 + 29)


# Trained alone, on a frozen model.


def test_nothing_but_the_head_adapter_moves(batch):
  values = tiny.variables(CFG)
  for path, value in adapters.fresh_exits(CFG, 0).items():
    paths.put(values['params']['adapters'], path, value)
  config = run(CFG, LossConfig((1.0, 1.0, 0.0)), HEAD_ALONE)
  after, rows = stepped(config, values, batch, 8)
  before = dict(paths.items(values['params']))
  for path, value in paths.items(after):
    if path.startswith('adapters/head/'):
      assert (value != before[path]).any(axis=(1, 2)).all(), path
    else:
      np.testing.assert_array_equal(value, before[path], path)
  for loop in (0, 1):
    assert rows[-1][f'next_token/loop{loop + 1}'] < (
        rows[0][f'next_token/loop{loop + 1}'] - 0.2)
  final = [np.asarray(logits_of(CFG, 2)({'params': params}, batch['token_BT']))
           for params in (values['params'], after)]
  np.testing.assert_array_equal(*final)


@pytest.mark.slow
def test_its_gradient_is_that_of_the_whole_model(batch):
  """What the loss's custom gradient is given is all that the head reads."""
  values = tiny.variables(CFG)
  loss = LossConfig((0.5, 0.2, 1.0), (), (0.3, 0.4, 0.0))

  def plain(params):
    logits = [logits_of(CFG, loop)({'params': params}, batch['token_BT'])
              for loop in range(3)]
    total = 0.0
    for loop in range(3):
      nats = loss.next_token[loop] * losses.next_token_nats(
          logits[loop], batch['target_BT'])
      if loop < 2:
        nats += loss.self_distill[loop] * losses.divergence(
            'forward_kl', logits[loop], logits[2])
      total += (nats * batch['weight_BT']).sum() / batch['weight_BT'].sum()
    return total

  config = run(CFG, loss)
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    hidden = train.step.forward(config, CFG, mesh)

    def ours(params):
      h_LBTD, _, head = hidden({'params': params}, batch)
      return losses.total(loss, h_LBTD, batch, head,
                          norm=batch['weight_BT'].sum(), chunk=2)[0]

    found = jax.jit(jax.grad(ours))(values['params'])
  expected = jax.jit(jax.grad(plain))(values['params'])
  assert np.abs(expected['adapters']['head']['b']).max() > 1e-3
  for path, value in paths.items(found):
    assert tiny.distance(value, paths.get(expected, path)) < 1e-5, path


@pytest.mark.slow
def test_a_finished_run_goes_on_with_the_head_alone(tmp_path):
  processes.write_files(tmp_path)
  first = processes.config(
      tmp_path, optim=dict(steps=2), losses=dict(next_token=(1.0,)))
  before = train.train(first, str(tmp_path / 'first')).params
  frozen = dataclasses.replace(
      first, init_from=str(tmp_path / 'first'), tokenizer='',
      model=dataclasses.replace(first.model, rank='attn2+mlp2+head4'),
      losses=LossConfig((1.0, 0.0), (), (1.0, 0.0)),
      optim=OptimConfig(steps=2, lr=0.02, table=HEAD_ALONE))
  after = train.train(frozen, str(tmp_path / 'second')).params
  found = dict(paths.items(after))
  assert np.abs(found.pop('adapters/head/b')).max() > 0
  found.pop('adapters/head/a')
  for path, value in paths.items(before):
    np.testing.assert_array_equal(found[path], value, path)
