"""What is saved comes back, and a run goes on only as itself."""

import os
import re
import shutil
import subprocess
import sys

import chex
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint
from recursive_tx.store.checkpoint import CheckpointConfig

SETTINGS = {
    'model': {'D': 4, 'rank': '0', 'rope_scaling': ()},
    'data': {'tasks': ({'name': 'a', 'weight': 1.0},), 'seq_len': 8},
    'optim': {'lr': 0.1, 'table': (('.*', 1.0, 1.0),)},
    'losses': {'next_token': (1.0,)},
    'seed': 0,
    'init_from': '',
    'mesh': {'data': 1},
    'checkpoint': {'every': 5},
    'log': {'every': 1},
    'eval': {'every': 1},
    'run': {'dtype': 'float32'},
}


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple


def state_at(step: int) -> State:
  rng = np.random.default_rng(step)

  def leaf(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {'block': {'kernel': leaf(2, 3)}, 'norm': {'scale': leaf(3)}}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return State(jnp.int32(step), params, ({'m': half}, None, ()))


def abstract():
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state_at(0),
  )


def save(workdir, *steps, scores=None, **config):
  config = CheckpointConfig(**config)
  with checkpoint.Checkpoints(str(workdir), config) as checkpoints:
    for step in steps:
      checkpoints.save(
          step, state=state_at(step), position=f'\0after {step}'.encode(),
          settings=SETTINGS, score=(scores or {}).get(step),
      )


def steps_in(workdir, folder='checkpoints'):
  return sorted(path.name for path in (workdir / folder).iterdir())


def changed(section, **values):
  return {**SETTINGS, section: {**SETTINGS[section], **values}}


def test_the_latest_state_and_position_come_back(tmp_path):
  save(tmp_path, 3, 7)
  assert checkpoint.latest_step(str(tmp_path)) == 7
  state, positions = checkpoint.restore(str(tmp_path), 7, abstract())
  assert positions == (b'\0after 7',)
  chex.assert_trees_all_equal(state, state_at(7), strict=True)


def test_arrays_may_be_donated_right_after_saving(tmp_path):
  # The save goes on in the background while the next step overwrites.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros(1 << 21)
  with checkpoint.Checkpoints(
      str(tmp_path), CheckpointConfig()) as checkpoints:
    checkpoints.save(
        1, state={'params': {'x': x}}, position=b'', settings={})
    for _ in range(20):
      x = add(x)
    x.block_until_ready()
  params = checkpoint.Latest(str(tmp_path)).params()
  np.testing.assert_array_equal(params['x'], 0)


def test_only_the_latest_are_kept(tmp_path):
  save(tmp_path / 'two', 1, 2, 3, 4, keep=2)
  save(tmp_path / 'all', 1, 2, 3, 4, keep=0)
  assert steps_in(tmp_path / 'two') == ['3', '4']
  assert steps_in(tmp_path / 'all') == ['1', '2', '3', '4']


def test_the_best_is_kept_beside_the_latest(tmp_path):
  best = 'eval/loop2/loss'
  save(tmp_path, 1, 2, 3, 4, scores={1: 3.0, 2: 2.5}, keep=1, best=best)
  assert steps_in(tmp_path) == ['2', '4']
  # Which one it was is not forgotten, until another is better.
  save(tmp_path, 5, keep=1, best=best)
  assert steps_in(tmp_path) == ['2', '5']
  with checkpoint.Checkpoints(
      str(tmp_path), CheckpointConfig(best=best)) as checkpoints:
    assert checkpoints.best == (2, 2.5)
  save(tmp_path, 6, 7, scores={6: 2.0}, keep=1, best=best)
  assert steps_in(tmp_path) == ['6', '7']
  # A best by another figure is none.
  other = CheckpointConfig(best='eval/loop1/loss')
  with checkpoint.Checkpoints(str(tmp_path), other) as checkpoints:
    assert checkpoints.best is None


def test_only_a_lower_score_is_a_best(tmp_path):
  with checkpoint.Checkpoints(
      str(tmp_path), CheckpointConfig(best='eval/loop1/loss')) as checkpoints:
    for score, is_best in (
        (np.nan, False), (3.0, True), (3.5, False), (np.nan, False),
        (2.0, True), (2.0, False)):
      found = checkpoints.score_of({'loops': [{'loop': 1, 'loss': score}]})
      assert found == (score if is_best else None)
      checkpoints.mark_best(1, found)
  with checkpoint.Checkpoints(
      str(tmp_path), CheckpointConfig()) as checkpoints:
    assert checkpoints.score_of({'loops': []}) is None


@pytest.mark.parametrize(
    ('values', 'said'),
    [
        (dict(best='loss'), "best is 'loss'.*'eval/loop1/bits_per_byte'"),
        (dict(best='eval/loop1/accuracy'), 'perplexity'),
        (dict(every=-1), 'every is -1'),
    ],
)
def test_a_config_that_means_nothing_is_refused(values, said):
  with pytest.raises(UserError, match=said):
    CheckpointConfig(**values)


def truncate(step):
  path = max((p for p in step.rglob('*') if p.is_file()),
             key=lambda p: p.stat().st_size)
  os.truncate(path, path.stat().st_size - 1)


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


FAULTS = {
    'truncated': (truncate, 'bytes of'),
    'without its state': (lambda s: shutil.rmtree(s / 'state'), 'is missing'),
    'without a file': (
        lambda s: next((s / 'state').rglob('manifest.ocdbt')).unlink(),
        'state/.*manifest.ocdbt is missing'),
    'without the position': (
        lambda s: (s / 'data' / 'process_0_of_1').unlink(), 'data/process_0'),
    'empty': (empty, 'files/sizes.json is missing'),
    'half listed': (
        lambda s: os.truncate(s / 'files' / 'sizes.json', 20), 'is truncated'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_the_one_before_a_broken_checkpoint_is_used(tmp_path, caplog, fault):
  save(tmp_path, 3, 7)
  broken = tmp_path / 'checkpoints' / '7'
  spoil, said = FAULTS[fault]
  spoil(broken)
  left = sorted(broken.rglob('*'))
  assert checkpoint.latest_step(str(tmp_path)) == 3
  assert re.search(f'{broken} is broken: .*{said}.* step 3 inst', caplog.text)
  chex.assert_trees_all_equal(
      checkpoint.Latest(str(tmp_path)).params(), state_at(3).params)
  # Whoever only reads changes nothing; the run moves it out of its way.
  assert sorted(broken.rglob('*')) == left
  checkpoint.set_aside_broken(str(tmp_path))
  assert steps_in(tmp_path) == ['3']
  assert steps_in(tmp_path, 'broken') == ['7']
  assert 'broken/7' in caplog.text
  save(tmp_path, 7)
  assert checkpoint.latest_step(str(tmp_path)) == 7


def test_nothing_broken_is_thrown_away(tmp_path):
  for _ in range(2):
    save(tmp_path, *({3, 7} - set(map(int, steps_in(tmp_path)))
                     if (tmp_path / 'checkpoints').exists() else {3, 7}))
    empty(tmp_path / 'checkpoints' / '7')
    checkpoint.set_aside_broken(str(tmp_path))
  assert steps_in(tmp_path, 'broken') == ['7', '7-2']


def test_a_run_with_nothing_whole_is_not_begun_again(tmp_path):
  save(tmp_path, 3, 7)
  for step in ('3', '7'):
    truncate(tmp_path / 'checkpoints' / step)
  with pytest.raises(UserError, match='/7 is broken.*/3 is broken.*no other'):
    checkpoint.latest_step(str(tmp_path))
  assert steps_in(tmp_path) == ['3', '7']


def test_what_was_whole_but_cannot_be_read_is_named(tmp_path):
  save(tmp_path, 3)
  step = tmp_path / 'checkpoints' / '3'
  path = max((p for p in (step / 'state').rglob('*') if p.is_file()),
             key=lambda p: p.stat().st_size)
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(UserError, match=f'{step} cannot be read') as error:
    checkpoint.restore(str(tmp_path), 3, abstract())
  assert '\n' not in str(error.value)


SAVING = """
import sys
import jax.numpy as jnp
from recursive_tx.store import checkpoint
with checkpoint.Checkpoints(
    sys.argv[1], checkpoint.CheckpointConfig(keep=0)) as checkpoints:
  for step in range(1, 1000):
    state = {'params': {str(i): jnp.full(9999, step) for i in range(9)}}
    checkpoints.save(step, state=state, position=b'%d' % step, settings={})
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
  workdir = tmp_path / 'w'
  for kill_at in (2, 4):
    process = subprocess.Popen(
        [sys.executable, '-c', SAVING, str(workdir)], stdout=subprocess.PIPE,
        text=True)
    before = checkpoint.latest_step(str(workdir)) or 0
    for line in process.stdout:
      if int(line) == kill_at:
        break
    process.kill()
    process.wait()
    assert kill_at - 1 <= checkpoint.latest_step(str(workdir)) <= kill_at
    shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
    assert before == 0
    step = checkpoint.latest_step(str(workdir))
    params = checkpoint.Latest(str(workdir)).params()
    assert {x.min() for x in params.values()} == {step}
    # The next one to write clears away what was half done.
    shutil.copytree(workdir, tmp_path / 'copy')
    save(tmp_path / 'copy', 5000, keep=0)
    assert all(name.isdigit() for name in steps_in(tmp_path / 'copy'))
    shutil.rmtree(workdir)


FULL = """
import resource, sys
import jax.numpy as jnp
from recursive_tx.store import checkpoint
checkpoints = checkpoint.Checkpoints(
    sys.argv[1], checkpoint.CheckpointConfig())
def save(step, size):
  x = jnp.arange(size, dtype=jnp.float32)
  checkpoints.save(
      step, state={'params': {'x': x * 1.7}}, position=b'', settings={})
save(1, 100)
checkpoints.wait()
# No file may grow past this: the disk is full for the second.
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
  with checkpoints:
    save(2, 1 << 20)
    checkpoints.wait()
except ValueError as error:
  print(error)
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
  done = subprocess.run(
      [sys.executable, '-c', FULL, str(tmp_path)], capture_output=True,
      text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  (line,) = done.stdout.splitlines()
  assert f'{tmp_path}/checkpoints' in line and 'File too large' in line
  assert line.endswith(
      f'The last good checkpoint is {tmp_path}/checkpoints/1; when there is'
      ' room to write, the same command continues from there.')
  assert checkpoint.latest_step(str(tmp_path)) == 1


def test_a_workdir_is_tried_before_it_is_needed(tmp_path):
  checkpoint.check_writable(str(tmp_path / 'a' / 'b'), 1)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'w'):
    with pytest.raises(UserError, match='file.* cannot be written.*--workdir'):
      checkpoint.check_writable(str(workdir), 1)
  with pytest.raises(UserError, match=r'GiB free, and a checkpoint takes 9'):
    checkpoint.check_writable(str(tmp_path / 'a'), 9 << 60)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_same_settings_may_go_on(tmp_path):
  save(tmp_path, 1)
  checkpoint.check_same(str(tmp_path), 1, SETTINGS)


@pytest.mark.parametrize(
    'section', ['mesh', 'checkpoint', 'log', 'eval', 'run']
)
def test_how_it_is_run_may_change(tmp_path, section):
  save(tmp_path, 1)
  settings = {**SETTINGS, section: {'every': 1000, 'other': 'thing'}}
  checkpoint.check_same(str(tmp_path), 1, settings)
  skips = changed('optim', max_skips=3)
  checkpoint.check_same(str(tmp_path), 1, skips)


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        (changed('model', D=8), 'model.D 4 -> 8'),
        (changed('data', seq_len=16), 'data.seq_len 8 -> 16'),
        (changed('data', tasks=({'name': 'b', 'weight': 1.0},)), "'a'.*'b'"),
        (changed('optim', lr=0.2), 'optim.lr 0.1 -> 0.2'),
        (changed('losses', next_token=(1.0, 1.0)), r'\[1.0\] -> \[1.0, 1.0\]'),
        ({**SETTINGS, 'seed': 1}, 'seed 0 -> 1'),
        (changed('model', new=3), "model.new '.none.' -> 3"),
        ({k: v for k, v in SETTINGS.items() if k != 'seed'}, 'seed 0 -> '),
    ],
)
def test_what_is_computed_may_not_change(tmp_path, settings, said):
  save(tmp_path, 1)
  with pytest.raises(UserError, match=said) as error:
    checkpoint.check_same(str(tmp_path), 1, settings)
  assert f'--config.init_from={tmp_path}' in str(error.value)
  assert '\n' not in str(error.value)


def test_every_difference_is_shown(tmp_path):
  save(tmp_path, 1)
  settings = {**changed('model', D=8), 'seed': 1}
  with pytest.raises(UserError, match='model.D 4 -> 8; seed 0 -> 1'):
    checkpoint.check_same(str(tmp_path), 1, settings)


def test_parameters_are_read_without_knowing_the_rest(tmp_path):
  save(tmp_path, 3, 7)
  latest = checkpoint.Latest(str(tmp_path))
  params = latest.params()
  assert latest.settings['model']['D'] == 4
  chex.assert_trees_all_equal(params, state_at(7).params)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
  assert not checkpoint.is_workdir(str(tmp_path))
  (tmp_path / 'checkpoints').mkdir()
  assert checkpoint.is_workdir(str(tmp_path))
  with pytest.raises(UserError, match='no finished checkpoint'):
    checkpoint.Latest(str(tmp_path))
