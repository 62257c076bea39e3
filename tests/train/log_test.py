"""Rows say what happened, once, however often the run was stopped."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_tx.errors import UserError
from recursive_tx.train import log as log_lib

LOG = log_lib.LogConfig(every=2, progress=False, tensorboard=False)
TOKENS = 600


class Clock:
  """Time that passes when a test says so."""

  def __init__(self):
    self.now = 1e9

  def __call__(self):
    return self.now


class Late:
  """A number that takes the device some time; reading it waits."""

  def __init__(self, value, clock, seconds, read=()):
    self.value, self.clock, self.seconds, self.read = (
        value, clock, seconds, read)

  def __array__(self, dtype=None, copy=None):
    self.clock.now += self.seconds
    for callback in self.read:
      callback()
    return np.float32(self.value)


@pytest.fixture
def clock():
  return Clock()


def opened(workdir, clock, *, start=0, steps=100, log=LOG, **arguments):
  return log_lib.History(
      log, str(workdir), start=start, steps=steps, tokens=TOKENS,
      settings={'seed': 0}, clock=clock, **arguments)


def run(workdir, clock, *, start=0, stop=100, seconds=1.0, losses=None,
        save=(), **arguments):
  """A session: the loop's calls for steps start + 1 to stop.

  Args:
    workdir, clock, start, **arguments: of `opened`.
    stop: the last step; the session ends without a further word.
    seconds: of every step, or of each by a dictionary.
    losses: by step, where they are not 1.0; NaN is a skipped step.
    save: steps after which a checkpoint is written, in 5 seconds.
  """
  with opened(workdir, clock, start=start, **arguments) as log:
    for step in range(start + 1, stop + 1):
      loss = (losses or {}).get(step, 1.0)
      took = seconds[step] if isinstance(seconds, dict) else seconds
      log.update(step, {
          'loss': Late(loss, clock, took), 'lr': jnp.float32(step),
          'skipped': jnp.float32(math.isnan(loss))})
      if step in save:
        log.pause()
        clock.now += 5
        log.pause()
  return log_lib.read_metrics(workdir)


# Rows.


def test_a_row_is_the_mean_of_its_steps(tmp_path, clock):
  rows = run(tmp_path, clock, steps=5, stop=5,
             losses={1: 4.0, 2: 2.0, 3: 1.0, 4: 2.0, 5: 7.0})
  assert [row['step'] for row in rows] == [2, 4, 5]
  assert [row['train/loss'] for row in rows] == [3.0, 1.5, 7.0]
  assert [row['train/lr'] for row in rows] == [2.0, 4.0, 5.0]


def test_speed_is_of_the_steps_alone(tmp_path, clock):
  # The first step compiles; steps 3 and 5 wait for a checkpoint.
  rows = run(
      tmp_path, clock, steps=6, stop=6, save=(2, 4), flops=6e12, peak=4e12,
      seconds={1: 60.0, 2: 2.0, 3: 8.0, 4: 3.0, 5: 8.0, 6: 4.0})
  speeds = [row['train/tokens_per_second'] for row in rows]
  assert speeds == pytest.approx([300.0, 200.0, 150.0])
  assert jax.device_count() == 1
  assert [row['train/mfu'] for row in rows] == pytest.approx(
      [0.75, 0.5, 0.375])


def test_speed_is_shared_by_the_chips(tmp_path, clock, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  row, = run(tmp_path, clock, steps=2, stop=2, flops=1e12, peak=1e12)
  assert row['train/tokens_per_second'] == pytest.approx(600)
  assert row['train/tokens_per_second_per_chip'] == pytest.approx(150)
  assert row['train/mfu'] == pytest.approx(0.25)


def test_mfu_is_left_out_where_the_chip_is_not_known(tmp_path, clock):
  row, = run(tmp_path, clock, steps=2, stop=2, flops=1e12, peak=None)
  assert 'train/mfu' not in row
  assert 'train/tokens_per_second' in row


def test_times_are_left_out_where_none_is_known(tmp_path, clock):
  row, = run(tmp_path, clock, steps=1, stop=1)
  assert row['train/loss'] == 1.0
  assert not [key for key in row if 'step_seconds' in key or 'tokens' in key]


def test_percentiles_of_step_times(tmp_path, clock):
  log = log_lib.LogConfig(every=101, progress=False, tensorboard=False)
  seconds = {step: float(step) for step in range(1, 102)}
  row, = run(tmp_path, clock, steps=101, stop=101, log=log, seconds=seconds)
  # Of 2 to 101: the first step's is not known.
  for percent in (50, 90, 99):
    assert row[f'train/step_seconds/p{percent}'] == pytest.approx(
        2 + 0.99 * percent)


def test_waiting_for_data_belongs_to_the_step_that_got_it(tmp_path, clock):
  with opened(tmp_path, clock, steps=4) as log:
    for step, wait in enumerate((3.0, 1.0, 0.5, 0.1), 1):
      with log.waiting():
        clock.now += wait
      log.update(step, {'loss': 1.0, 'lr': 1.0})
  rows = log_lib.read_metrics(tmp_path)
  assert [row['train/input_wait_seconds'] for row in rows] == pytest.approx(
      [2.0, 0.3])


def test_only_the_step_before_is_waited_for(tmp_path, clock):
  read = []
  with opened(tmp_path, clock, steps=4) as log:
    for step in range(1, 5):
      log.update(step, {
          'loss': Late(1.0, clock, 1.0, [lambda s=step: read.append(s)]),
          'lr': 1.0})
      # The last one has none after it.
      assert read == list(range(1, step if step < 4 else 5))


def test_notes_are_in_every_row_after_them(tmp_path, clock):
  with opened(tmp_path, clock, steps=6) as log:
    for step in range(1, 7):
      log.note({'data/bad_utf8': 3} if step == 4 else {})
      log.update(step, {'loss': 1.0, 'lr': 1.0})
  found = [row.get('data/bad_utf8') for row in log_lib.read_metrics(tmp_path)]
  assert found == [None, 3, 3]


def test_evaluations_of_loops_and_teacher(tmp_path, clock):
  def score(*losses):
    return {'tokens': 9, 'loops': [
        {'loop': i, 'loss': loss} for i, loss in enumerate(losses, 1)]}

  with opened(tmp_path, clock, steps=2) as log:
    log.evaluation(0, score(3.0, 2.0), teacher=score(9.0, 1.0))
    log.evaluation(0, score(4.0))
  assert log_lib.read_metrics(tmp_path) == [
      {'step': 0, 'eval/loop1/loss': 3.0, 'eval/loop2/loss': 2.0,
       'eval/teacher/loss': 1.0},
      {'step': 0, 'eval/loop1/loss': 4.0}]


def test_a_row_that_a_crash_cut_off_is_dropped(tmp_path, clock):
  rows = run(tmp_path, clock, steps=6, stop=5)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 6, "train/lo')
  assert log_lib.read_metrics(tmp_path) == rows
  assert [row['step'] for row in rows] == [2, 4]
  assert run(tmp_path, clock, steps=6, start=4, stop=6)[:2] == rows
  path.write_text('{"step"\n' + path.read_text())
  with pytest.raises(UserError, match=r'metrics.jsonl is damaged.*remove'):
    log_lib.read_metrics(tmp_path)


@pytest.mark.parametrize('field', ['every', 'profile_steps'])
def test_less_than_a_step_is_refused(field):
  with pytest.raises(UserError, match=rf'log.{field} is 0.*at least 1'):
    log_lib.LogConfig(**{field: 0})


# Steps that changed nothing.


def test_skipped_steps_are_counted_and_left_out(tmp_path, clock):
  nan = float('nan')
  rows = run(tmp_path, clock, steps=6, stop=6,
             losses={1: nan, 2: 3.0, 3: nan, 4: nan})
  assert [row['train/skipped'] for row in rows] == [1, 2, 0]
  assert [row['train/skipped_total'] for row in rows] == [1, 3, 3]
  assert [row.get('train/loss') for row in rows] == [3.0, None, 1.0]
  # What is written is JSON, which has no NaN.
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  # Of six steps three were useful, of which the last two and the second are
  # timed.
  assert rows[-1]['train/goodput'] == pytest.approx(3 / 6)


def test_skipped_steps_that_are_repeated_count_once(tmp_path, clock):
  nan = float('nan')
  losses = {3: nan, 5: nan}
  run(tmp_path, clock, stop=6, losses=losses, save=(3,))
  rows = run(tmp_path, clock, start=3, steps=6, stop=6, losses=losses)
  assert rows[-1]['train/skipped_total'] == 2


# Goodput.


def test_goodput_counts_neither_starting_nor_saving(tmp_path, clock):
  began = clock()
  clock.now += 10  # Until the first step starts.
  rows = run(tmp_path, clock, steps=4, stop=4, seconds=2.0, save=(2,),
             began=began)
  # Step 1 compiles and step 3 follows a checkpoint: their own times are not
  # known.
  assert rows[0]['train/goodput'] == pytest.approx(2 / 14)
  assert rows[1]['train/goodput'] == pytest.approx(4 / 23)


def test_goodput_counts_a_repeated_step_once(tmp_path, clock):
  # The step that is cut off takes no time here: 8 s, and 5 s of saving.
  run(tmp_path, clock, stop=9, save=(4,))
  clock.now += 100  # The machine is away.
  rows = run(tmp_path, clock, start=4, stop=9, save=(6,))  # 4 s and 5 s.
  # Useful: 2 to 4; 6 and, after a checkpoint, 8 of the second session.
  assert rows[-1]['step'] == 8
  assert rows[-1]['train/goodput'] == pytest.approx(5 / (13 + 100 + 9))
  clock.now += 50
  last = run(tmp_path, clock, steps=10, start=6, stop=10)[-1]
  # 2 to 4; 6; 8 to 10 of the third.
  assert last['train/goodput'] == pytest.approx(7 / (13 + 100 + 9 + 50 + 4))


def test_goodput_of_a_step_between_marks_is_in_proportion(tmp_path, clock):
  log = log_lib.LogConfig(every=4, progress=False, tensorboard=False)
  run(tmp_path, clock, stop=9, log=log)  # Marks at 4 (3 s) and 8 (7 s).
  last = run(tmp_path, clock, start=6, steps=8, stop=8, log=log)[-1]
  # 5 s of the first six steps, and the last one.
  assert last['train/goodput'] == pytest.approx((5 + 1) / (8 + 2))


def test_goodput_takes_nothing_from_what_was_repeated(tmp_path, clock):
  run(tmp_path, clock, stop=9)  # 8 s; marks at 2, 4, 6 and 8.
  run(tmp_path, clock, start=4, stop=8)  # 3 s; a mark at 6.
  last = run(tmp_path, clock, start=7, steps=9, stop=9)[-1]
  # 2 to 4, 6 of the second session, and 9; no mark tells of its step 7.
  assert last['train/goodput'] == pytest.approx((3 + 1 + 1) / (8 + 3 + 2))


def test_a_session_that_never_got_to_a_step_still_took_time(tmp_path, clock):
  with opened(tmp_path, clock):
    clock.now += 90
  rows = run(tmp_path, clock, steps=2, stop=2, seconds=5.0)
  assert rows[-1]['train/goodput'] == pytest.approx(5 / 100)


def test_sessions_survive_a_cut_line(tmp_path, clock):
  run(tmp_path, clock, stop=4, save=(4,))
  path = tmp_path / 'sessions.jsonl'
  lines = path.read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [0, 2, 4, 4, 4]
  path.write_text('\n'.join(lines) + '\n{"ti')
  rows = run(tmp_path, clock, start=4, steps=6, stop=6)
  assert rows[-1]['train/goodput'] == pytest.approx((3 + 1) / (9 + 2))


# The progress line.


def test_the_line_tells_loss_speed_mfu_and_the_time_left(
    tmp_path, clock, capsys):
  log = log_lib.LogConfig(every=2, tensorboard=False)
  run(tmp_path, clock, steps=3600, stop=62, seconds=2.0, flops=1e12, peak=1e12,
      log=log)
  told = capsys.readouterr().err
  # 61 steps are done when the last one is cut off, at 2 s a step.
  assert '61/3600' in told
  line = told.split('\r')[-1]
  assert 'loss 1.000, 300 tokens/s, MFU 50.0%, ETA 1:57:58' in line


def test_the_time_left_includes_what_is_not_training(
    tmp_path, clock, capsys):
  log = log_lib.LogConfig(every=2, tensorboard=False)
  run(tmp_path, clock, steps=24, stop=12, save=(2, 4, 6, 8, 10), log=log)
  # From step 1 to 11 it took 10 s and five times 5 s; 13 are left.
  line = capsys.readouterr().err.split('\r')[-1]
  assert '11/24' in line and 'ETA 00:45' in line


def test_other_processes_say_and_write_nothing(
    tmp_path, clock, capsys, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  log = log_lib.LogConfig(every=1, profile_step=1)
  with opened(tmp_path / 'run', clock, log=log) as other:
    other.parameters({'x': np.zeros(3)})
    for step in (1, 2):
      with other.waiting():
        clock.now += 1
      other.update(step, {'loss': 1.0, 'lr': 1.0})
      other.evaluation(step, {'loops': []})
      other.samples(step, {'a': 'b'})
      other.pause()
  assert not (tmp_path / 'run').exists()
  assert not capsys.readouterr().err


# TensorBoard.


@pytest.fixture(scope='module')
def board(tmp_path_factory):
  """The event files of a short run, read back."""
  from tensorboard.backend.event_processing import event_accumulator

  workdir, clock = tmp_path_factory.mktemp('board'), Clock()
  log = log_lib.LogConfig(every=1, progress=False)
  settings = {'model': {'V': 7, 'rank': '2'}, 'losses': {'next': (0.1, 1.0)},
              'table': (('.*', 1.0),), 'teacher': '', 'none': None}
  with log_lib.History(
      log, str(workdir), start=0, steps=2, tokens=TOKENS, settings=settings,
      flops=1e12, peak=1e12, clock=clock) as run:
    run.parameters({'block': {'q': jnp.zeros((2, 3))}, 'norm': jnp.ones(5)})
    for step in (1, 2):
      run.update(step, {
          'loss': Late(3.0 - step, clock, 2.0), 'lr': 0.1,
          'next_token/loop1': 2.5})
    run.evaluation(2, {'loops': [{'loop': 1, 'bits_per_byte': 1.5}]})
    run.samples(2, {'def f(': 'x):\n  pass', 'b': 'c'})
  events = event_accumulator.EventAccumulator(str(workdir))
  events.Reload()
  return log_lib.read_metrics(workdir), events


def test_scalars_are_the_rows(board):
  rows, events = board
  found = {}
  for tag in events.PluginTagToContent('scalars'):
    for event in events.Tensors(tag):
      value, = event.tensor_proto.float_val or np.frombuffer(
          event.tensor_proto.tensor_content, np.float32)
      found[tag, event.step] = value
  expected = {(key, row['step']): value for row in rows
              for key, value in row.items() if key != 'step'}
  assert found == pytest.approx(expected)
  assert found['train/mfu', 2] == pytest.approx(0.5)
  assert ('train/next_token/loop1', 1) in found
  assert ('eval/loop1/bits_per_byte', 2) in found


def test_hyperparameters_are_the_settings(board):
  from tensorboard.plugins.hparams import metadata

  content = board[1].PluginTagToContent('hparams')[
      metadata.SESSION_START_INFO_TAG]
  found = metadata.parse_session_start_info_plugin_data(content).hparams
  assert found['model.V'].number_value == 7
  assert found['model.rank'].string_value == '2'
  assert found['losses.next.1'].number_value == 1.0
  assert found['table.0.0'].string_value == '.*'


def text(events, tag):
  event, = events.Tensors(tag)
  return event.step, event.tensor_proto.string_val[0].decode()


def test_parameters_and_samples_are_texts(board):
  _, events = board
  step, table = text(events, 'parameters')
  assert step == 0
  # Five columns of a table that Markdown leaves alone.
  assert re.search(r'^    \| block/q +\| \(2, 3\) +\| float32', table, re.M)
  assert 'Total: 11 -- 44 bytes' in table
  assert text(events, 'samples/1') == (
      2, '    def f(\n\n---\n\n    x):\n      pass')
  assert text(events, 'samples/2')[1].startswith('    b')


# Profiles.


@pytest.fixture
def traced(monkeypatch):
  """Lists of when the profiler was started and stopped, and a log of steps."""
  events = []
  monkeypatch.setattr(
      jax.profiler, 'start_trace', lambda folder: events.append('start'))
  monkeypatch.setattr(
      jax.profiler, 'stop_trace', lambda: events.append('stop'))
  return events


def steps_with_events(workdir, clock, events, *, stop, log, ask=0):
  """Events in order; 2 is the start of step 2 and -2 the end of it."""
  with opened(workdir, clock, steps=stop, log=log) as run:
    for step in range(1, stop + 1):
      if step == ask:
        (workdir / 'profile').touch()
      events.append(step)
      run.update(step, {
          'loss': Late(1.0, clock, 1.0, [lambda s=step: events.append(-s)]),
          'lr': 1.0})
  return events


def test_a_planned_profile_holds_its_steps(tmp_path, clock, traced):
  log = log_lib.LogConfig(
      every=9, progress=False, tensorboard=False, profile_step=3,
      profile_steps=2)
  assert steps_with_events(tmp_path, clock, traced, stop=6, log=log) == [
      1, 2, -1, 'start', 3, -2, 4, -3, 5, -4, 'stop', 6, -5, -6]


def test_a_profile_of_the_first_step_sees_it_compile(tmp_path, clock, traced):
  log = log_lib.LogConfig(
      every=9, progress=False, tensorboard=False, profile_step=1,
      profile_steps=1)
  assert steps_with_events(tmp_path, clock, traced, stop=2, log=log) == [
      'start', 1, 2, -1, 'stop', -2]


def test_a_profile_is_taken_when_it_is_asked_for(tmp_path, clock, traced):
  log = log_lib.LogConfig(
      every=2, progress=False, tensorboard=False, profile_steps=1)
  assert steps_with_events(
      tmp_path, clock, traced, stop=6, log=log, ask=1) == [
          1, 2, -1, 3, -2, 'start', 4, -3, 5, -4, 'stop', 6, -5, -6]
  assert not (tmp_path / 'profile').exists()


def test_a_profile_ends_with_the_run(tmp_path, clock, traced):
  log = log_lib.LogConfig(
      every=2, progress=False, tensorboard=False, profile_step=2,
      profile_steps=50)
  assert steps_with_events(tmp_path, clock, traced, stop=2, log=log) == [
      1, 'start', 2, -1, -2, 'stop']


def test_a_profile_is_where_tensorboard_looks(tmp_path, clock):
  log = log_lib.LogConfig(
      every=2, progress=False, tensorboard=False, profile_step=2,
      profile_steps=1)
  double = jax.jit(lambda x: x * 2)
  with opened(tmp_path, clock, steps=4, log=log) as run:
    x = jnp.float32(1)
    for step in range(1, 5):
      x = double(x)
      run.update(step, {'loss': x, 'lr': x})
  found = list((tmp_path / 'plugins' / 'profile').glob('*/*.xplane.pb'))
  assert len(found) == 1 and found[0].stat().st_size > 1000


def test_another_profiler_does_not_end_the_run(tmp_path, clock):
  log = log_lib.LogConfig(
      every=2, progress=False, tensorboard=False, profile_step=2)
  with jax.profiler.trace(str(tmp_path / 'other')):
    rows = run(tmp_path, clock, steps=4, stop=4, log=log)
  assert [row['step'] for row in rows] == [2, 4]
