"""No work is lost: killed, told to stop, moved to other machines, or NaN."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
from etils import epath
import jax
import numpy as np
import processes
import pytest
import tiny

from recursive_tx import machine, train
from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint
from recursive_tx.store.checkpoint import CheckpointConfig
from recursive_tx.train import log as log_lib
from recursive_tx.train import loop
from recursive_tx.train.skips import Skips

ROOT = tiny.ROOT
LAST = processes.STEPS
# Quick to compile.
ONE_LOOP = dict(model=dict(loops=1, rank='0'), losses=dict(next_token=(1.0,)))


pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('files')
  processes.write_files(folder)
  return folder


# In this process.


@pytest.fixture(scope='module')
def short(files):
  return processes.config(
      files, **ONE_LOOP, optim=dict(steps=4), eval=dict(every=2),
      checkpoint=dict(every=0, best='eval/loop1/loss'))


@pytest.fixture(scope='module')
def short_whole(short, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train.train(short, str(workdir))


def scores(workdir):
  return {row['step']: row['eval/loop1/loss']
          for row in log_lib.read_metrics(str(workdir))
          if 'eval/loop1/loss' in row}


def test_told_to_stop_it_saves_and_goes_on(
    short, short_whole, tmp_path, monkeypatch, capsys
):
  workdir, expected = short_whole
  place, count = machine.place_rows, iter(range(1, 9))

  def place_and_be_told(batch, mesh):
    if next(count) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)
    return place(batch, mesh)

  monkeypatch.setattr(machine, 'place_rows', place_and_be_told)
  former = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stopped:
    train.train(short, str(tmp_path))
  assert stopped.value.code == 0
  assert signal.getsignal(signal.SIGTERM) == former
  assert capsys.readouterr().out == (
      f'Stopped by SIGTERM: saved step 2 to {tmp_path}/checkpoints/2. Run'
      ' the same command to resume.\n')
  assert checkpoint.latest_step(str(tmp_path)) == 2
  state = train.train(short, str(tmp_path))
  chex.assert_trees_all_equal(state, expected)
  # The evaluation for which there was no time has been made up for.
  assert scores(tmp_path) == scores(workdir)
  assert list(scores(workdir)) == [0, 2, 4]


def test_the_best_evaluation_is_saved(short, short_whole):
  workdir, _ = short_whole
  with checkpoint.Checkpoints(str(workdir), short.checkpoint) as checkpoints:
    step, score = checkpoints.best
  assert scores(workdir)[0] > 3
  assert (step, score) == min(
      list(scores(workdir).items())[1:], key=lambda item: item[1])
  # Nothing else asked for step 2 to be saved.
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == [
      '2', '4']


def test_a_best_of_a_loop_that_is_not_there_is_refused():
  config = CheckpointConfig(best='eval/loop3/loss')
  with pytest.raises(UserError, match='the model has 2 loops'):
    config.best_of({'loops': [{'loop': 1}, {'loop': 2}]})


def test_a_run_that_only_skips_stops_and_says_where(
    short, short_whole, files, tmp_path
):
  source, workdir = str(short_whole[0]), str(tmp_path)
  state, positions = checkpoint.restore(source, 2, abstract(short))
  spoilt = state.replace(params=jax.tree.map(lambda x: x * np.nan,
                                             state.params))
  # However often it is to be saved, it is not while it skips.
  config = processes.config(
      files, **ONE_LOOP, checkpoint=dict(every=1),
      optim=dict(steps=4, max_skips=2))
  with checkpoint.Checkpoints(workdir, config.checkpoint) as checkpoints:
    checkpoints.save(2, state=spoilt, position=positions[0],
                     settings=dataclasses.asdict(config))
  with pytest.raises(UserError) as error:
    train.train(config, workdir)
  said = str(error.value)
  assert 'Step 4 was skipped (2 in a row): loss nan' in said
  assert f'checkpoint is {workdir}/checkpoints/2' in said and '\n' not in said
  assert re.search(r"rows that begin '<bos>[a-z]", said)
  assert checkpoint.latest_step(workdir) == 2


def abstract(config):
  mesh = machine.make_mesh(machine.MeshConfig())
  with jax.set_mesh(mesh):
    return train.abstract_state(config, mesh)[1]


# The parts that decide.


class Lazy:
  """A metric that says when it is waited for."""

  def __init__(self, value):
    self.value, self.waited = value, False

  def __float__(self):
    self.waited = True
    return self.value


def told(skipped):
  nan = float('nan')
  return {'skipped': Lazy(skipped), 'loss': Lazy(nan), 'grad_norm': Lazy(nan)}


BATCH = {'token_BT': np.arange(60).reshape(6, 10)}


def test_skips_wait_for_no_step_that_runs(tmp_path):
  skips = Skips(2, str, str(tmp_path))
  first, second = told(0.0), told(0.0)
  skips.update(1, first, BATCH)
  assert not first['skipped'].waited
  skips.update(2, second, BATCH)
  assert first['skipped'].waited and not second['skipped'].waited


def test_only_skips_in_a_row_end_a_run(tmp_path, caplog):
  skips = Skips(3, lambda ids: f'text{ids[0]}', str(tmp_path))
  for step, skipped in enumerate([1, 1, 0, 1, 1, 0, 1, 1, 1], 1):
    skips.update(step, told(float(skipped)), BATCH)
  with pytest.raises(UserError, match=(
      r'Step 9 was skipped \(3 in a row\): loss nan.*rows that begin '
      r"'text0', 'text10', 'text20', 'text30' and 2 more.*no checkpoint yet")):
    skips.in_row()
  assert caplog.text.count('was skipped') == 7
  never = Skips(0, str, str(tmp_path))
  for step in range(99):
    never.update(step, told(1.0), BATCH)
  assert never.in_row() == 99


# In processes of their own.


def loaded(workdir, files, step=LAST):
  config = processes.config(files)
  return checkpoint.restore(str(workdir), step, abstract(config))[0]


def losses(workdir):
  return {row['step']: row['train/loss']
          for row in log_lib.read_metrics(str(workdir)) if 'train/loss' in row}


@pytest.fixture(scope='module')
def whole(files, tmp_path_factory):
  """{(processes, devices): workdir of a run that nothing interrupts}."""
  made = {}

  def make(count=1, devices=1):
    if (count, devices) not in made:
      workdir = tmp_path_factory.mktemp(f'whole_{count}_{devices}')
      processes.run(workdir, files, processes=count, devices=devices)
      made[count, devices] = workdir
    return made[count, devices]

  return make


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2])
def test_killed_at_any_step_it_ends_the_same(whole, files, tmp_path, count):
  rng = np.random.default_rng(count)
  for step in sorted(rng.choice(np.arange(1, LAST), 3, replace=False)):
    started = processes.start(tmp_path, files, processes=count)
    processes.until(started[0], int(step))
    processes.kill(started)
  processes.run(tmp_path, files, processes=count)
  expected = whole(count)
  chex.assert_trees_all_equal(loaded(tmp_path, files), loaded(expected, files))
  seen = processes.examples(tmp_path)
  assert seen == processes.examples(expected)
  assert sorted(seen) == list(range(1, LAST + 1))
  # Each time it went back to a checkpoint, not to the beginning: to the last
  # one, or the one before if that was being written.
  steps = [json.loads(line)[0]
           for line in (tmp_path / 'examples_0').read_text().splitlines()]
  assert np.diff(steps).min() >= -4
  assert losses(tmp_path) == losses(expected)


MOVES = {
    'one process to two': (dict(), dict(processes=2)),
    'two processes to one': (dict(processes=2), dict()),
    'a mesh of 8x1 to 4x2': (
        dict(devices=8, mesh=dict(fsdp=8)),
        dict(devices=8, mesh=dict(fsdp=4, tensor=2))),
    'two processes of 4 to one of 2': (
        dict(processes=2, devices=4), dict(devices=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize('move', MOVES)
def test_on_other_machines_it_goes_on_with_the_same(
    whole, files, tmp_path, move
):
  before, after = MOVES[move]
  started = processes.start(tmp_path, files, **before)
  processes.until(started[0], 6)
  processes.kill(started)
  reached = checkpoint.latest_step(str(tmp_path))
  assert reached in (2, 4)
  processes.run(tmp_path, files, **after)
  # Examples are those of an uninterrupted run in one process, row by row.
  assert processes.examples(tmp_path) == processes.examples(whole())
  found, expected = losses(tmp_path), losses(whole())
  assert found.keys() == expected.keys()
  for step in found:
    assert found[step] == pytest.approx(expected[step], rel=2e-4), step


@pytest.mark.slow
def test_two_processes_of_4_devices_equal_one_of_8(whole):
  found, expected = losses(whole(2, 4)), losses(whole(1, 8))
  assert found.keys() == expected.keys()
  for step in found:
    assert found[step] == pytest.approx(expected[step], rel=2e-5), step
  assert processes.examples(whole(2, 4)) == processes.examples(whole(1, 8))


@pytest.mark.slow
def test_machines_that_cannot_keep_the_batch_are_refused(
    whole, files, tmp_path
):
  shutil.copytree(whole(), tmp_path, dirs_exist_ok=True)
  (process,) = processes.start(tmp_path, files, devices=3)
  _, errors = process.communicate()
  assert process.returncode == 1
  line = errors.strip().splitlines()[-1]
  assert 'a run of 8 sequences at once, which 3 devices' in line
  assert '[1, 2, 4, 8]' in line


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2])
def test_the_command_line_told_to_stop(files, tmp_path, count):
  config = tmp_path / 'config.py'
  config.write_text(f'''
from recursive_tx.configs import common

def get_config(arg=None):
  config = common.base(dict(V=32, D=16, F=32, N=4, K=2, H=4,
                            layers_per_loop=1, loops=2, rank='2'))
  config.data.tasks.letters = dict(
      kind='jsonl', train='{files}/train.jsonl',
      heldout='{files}/heldout.jsonl')
  config.data.update(seq_len=24, batch=8, shards=4, shuffle=16)
  config.optim.update(steps=100000, lr=1e-3)
  config.tokenizer = '{files}'
  config.log.update(every=1, tensorboard=False, progress=False)
  config.checkpoint.every = 0
  return config
''')
  workdir = tmp_path / 'w'
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  words = [sys.executable, '-m', 'recursive_tx', 'train',
           f'--config={config}', f'--workdir={workdir}']

  def told_at(rows):
    started = [
        subprocess.Popen(
            [*words, *([] if count == 1 else [
                '--coordinator=127.0.0.1:23457', f'--processes={count}',
                f'--process={i}'])],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True)
        for i in range(count)]
    while len(log_lib.read_metrics(str(workdir))) < rows:
      assert all(p.poll() is None for p in started)
      time.sleep(0.2)
    # The last one only; again, and again while it saves. The handler of
    # several processes is the runtime's, and goes with it.
    for _ in range(3000 if count == 1 else 3):
      started[-1].send_signal(signal.SIGTERM)
      time.sleep(0.1)
      if started[-1].poll() is not None:
        break
    said = processes.finish(started)
    (line,) = [x for x in said[0].splitlines() if x.startswith(
        'Stopped by')]
    assert all('Stopped by' not in other for other in said[1:])
    return line

  line = told_at(4)
  step = checkpoint.latest_step(str(workdir))
  assert line == (
      f'Stopped by SIGTERM: saved step {step} to {workdir}/checkpoints/'
      f'{step}. Run the same command to resume.')
  told_at(step + 3)
  assert checkpoint.latest_step(str(workdir)) > step
  steps = list(losses(workdir))
  assert steps == list(range(1, len(steps) + 1))


def test_the_helper_notices_another_example(tmp_path):
  (tmp_path / 'examples_0').write_text('[1, {"0": "a"}]\n[1, {"0": "b"}]\n')
  with pytest.raises(AssertionError):
    processes.examples(tmp_path)
  (tmp_path / 'examples_0').write_text(json.dumps([1, {'0': 'a'}]))
  assert processes.examples(tmp_path) == {1: {'0': 'a'}}


# Runs that learn nothing.


def test_parameters_that_are_not_finite_are_not_saved(short, files, tmp_path):
  # Each step's loss and gradient are finite; what the update leads to is not.
  workdir = str(tmp_path)
  config = processes.config(
      files, **ONE_LOOP, checkpoint=dict(every=1),
      optim=dict(steps=2, lr=3e38, warmup=0, table=(('.*', 9.0, 0.0),)))
  with pytest.raises(UserError) as error:
    train.train(config, workdir)
  said = str(error.value)
  assert re.search(r"After step 1 parameter '\S+' is not finite", said)
  assert 'Lower optim.lr' in said and '\n' not in said
  assert checkpoint.latest_step(workdir) is None
  assert not (tmp_path / 'model').exists()


@pytest.mark.slow
def test_a_run_of_skipped_steps_only_is_an_error(files, tmp_path):
  # 3e38 times any loss is infinite.
  config = processes.config(
      files, model=ONE_LOOP['model'], losses=dict(next_token=(3e38,)),
      checkpoint=dict(every=1), optim=dict(steps=2, warmup=0))
  with pytest.raises(UserError, match='All 2 steps were skipped') as error:
    train.train(config, str(tmp_path))
  assert '\n' not in str(error.value)
  assert checkpoint.latest_step(str(tmp_path)) is None
  assert not (tmp_path / 'model').exists()


def test_a_published_model_is_the_one_on_disk(tmp_path):
  for name in ('config.json', 'model.safetensors', 'templates/tool.jinja'):
    path = tmp_path / 'local' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
  loop.publish(tmp_path / 'local', epath.Path(tmp_path / 'there'))
  copies = [path for path in (tmp_path / 'there').rglob('*') if path.is_file()]
  assert len(copies) == 3
  for path in copies:
    name = str(path.relative_to(tmp_path / 'there'))
    assert path.read_bytes() == name.encode()
  # By config.json a directory is known as a model.
  assert max(copies, key=lambda path: path.stat().st_ctime_ns).name == (
      'config.json')
