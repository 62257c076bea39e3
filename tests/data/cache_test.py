"""A cache gives the tokens that the texts would give, or is refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from tiny_data import make_tfds, pieces_of

from recursive_tx import data
from recursive_tx.data import cache_writer, units
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

ROOT = tiny.ROOT
DEMO = ROOT / 'recursive_tx' / 'demo'
T = 64


@pytest.fixture(scope='module')
def tok() -> tokenizer.Tokenizer:
  return tokenizer.load(DEMO)


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> tuple[data.DataConfig, list[dict]]:
  """Tasks with long documents and faults, cached by two processes."""
  folder = tmp_path_factory.mktemp('cached')
  rng = np.random.default_rng(0)
  texts = [f'{i} ' + 'word ' * int(rng.integers(1, 40)) for i in range(300)]
  for name, part in {'a': texts[:150], 'b': texts[150:]}.items():
    lines = [json.dumps({'text': text}).encode() for text in part]
    lines[7:7] = [b'{"text": "\xff"}', b'{"body": 1}', b'{"text": ""}']
    (folder / f'{name}.jsonl').write_bytes(b'\n'.join(lines))
  (folder / 'c.jsonl').write_bytes(b'')
  for i in range(5):
    (folder / f'{i}.txt').write_text(f'file {i} ' * 50)
  make_tfds(folder / 'tfds', 'mini')
  config = data.DataConfig(
      (
          data.Task('records', 'jsonl', (f'{folder}/*.jsonl',), weight=2.0),
          data.Task('files', 'text', (f'{folder}/[0-3].txt',),
                    heldout=(f'{folder}/4.txt',)),
          data.Task('tfds', 'tfds', 'train[:40]', 'train[40:]', key='body',
                    dataset='mini:1.0.0'),
      ),
      seq_len=T, batch=4, shards=2, shuffle=16, heldout_fraction=0.2)
  with pytest.MonkeyPatch.context() as patch:
    # For the processes; this one has been told.
    patch.setenv('TFDS_DATA_DIR', str(folder / 'tfds'))
    rows = cache_writer.write(
        config, str(DEMO), str(folder / 'cache'), processes=2)
  # Mostly read are the tasks of files.
  return dataclasses.replace(
      config, tasks=config.tasks[:2], cache=str(folder / 'cache')), rows


def uncached(config: data.DataConfig) -> data.DataConfig:
  return dataclasses.replace(config, cache='')


def assert_equal(batches, others):
  for one, other in zip(batches, others, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def take(stream, steps):
  return [next(stream) for _ in range(steps)]


# The same as without.


@pytest.mark.parametrize('changes', [
    pytest.param({}, marks=pytest.mark.slow), {'seq_len': 48, 'seed': 3}])
def test_a_cached_stream_gives_the_same_batches(tok, made, changes):
  """Whatever seq_len and seed, faults and epochs included."""
  config = dataclasses.replace(made[0], **changes)
  streams = [data.Stream(c, tok) for c in (uncached(config), config)]
  assert_equal(*(take(stream, 150) for stream in streams))
  assert streams[0].faults == streams[1].faults
  assert {'records/not_utf8', 'records/no_text', 'records/empty',
          'records/long'} <= streams[0].faults.keys()


def test_a_cached_heldout_set_is_the_same(tok, made):
  one, other = (data.heldout(c, tok) for c in (uncached(made[0]), made[0]))
  assert_equal(one.batches, other.batches)
  for mine, cached in zip(one.documents, other.documents, strict=True):
    np.testing.assert_array_equal(mine, cached)
  assert dataclasses.replace(one, batches=[], documents=[]) == (
      dataclasses.replace(other, batches=[], documents=[]))
  assert other.num_documents > 20


def test_a_cached_stream_resumes_exactly_and_in_halves(tok, made):
  config = made[0]
  stream = data.Stream(config, tok)
  take(stream, 9)
  position = stream.save()
  want = take(stream, 20)
  for rows in (None, [0, 2]):
    fresh = data.Stream(config, tok, rows=rows)
    fresh.restore(position)
    rows = rows or range(4)
    assert_equal(take(fresh, 20), [
        {k: v[list(rows)] for k, v in batch.items()} for batch in want])
  with pytest.raises(UserError, match='saved with data.cache='):
    data.Stream(uncached(config), tok).restore(position)


def test_seqio_reads_it(tok, made):
  """Its own cached reader, knowing nothing of the index, finds every one."""
  import seqio

  from recursive_tx.data import pipeline

  config, rows = made
  tasks, _ = pipeline.build_tasks(uncached(config), tok, 'heldout')
  seqio.add_global_cache_dirs([config.cache])
  for task, kind in zip(tasks, config.tasks, strict=True):
    found = [
        sorted(tuple(example['targets'].tolist()) for example in
               task.get_dataset({'targets': T + 1}, 'heldout', shuffle=False,
                                use_cached=use_cached).as_numpy_iterator()
               if len(example['targets']))
        for use_cached in (False, True)
    ]
    assert found[0] == found[1] and found[0]
    (row,) = (row for row in rows
              if (row['task'], row['split']) == (kind.name, 'heldout'))
    assert task.get_cached_stats('heldout')['examples'] == row['documents']


def test_what_was_written_is_reported(made):
  config, rows = made
  by = {(row['task'], row['split']): row for row in rows}
  records = by['records', 'train'], by['records', 'heldout']
  assert sum(row['documents'] for row in records) == 300
  # A fault has no text to tell its side by.
  assert records[0]['faults'] == {'not_utf8': 2, 'no_text': 2, 'empty': 3}
  assert records[1]['faults'] == {}
  assert by['files', 'train']['documents'] == 4
  assert by['files', 'train']['bytes'] == 4 * 50 * len('file 0 ')
  stats = json.loads(
      pathlib.Path(config.cache, 'files/stats.train.json').read_text())
  assert stats['targets_tokens'] == by['files', 'train']['tokens']


def test_tfds_is_cached_whole(tok, made):
  """In an order of its own; every document once an epoch, faults too."""
  config = dataclasses.replace(made[0], tasks=(
      data.Task('tfds', 'tfds', 'train[:40]', 'train[40:]', key='body',
                dataset='mini:1.0.0'),))
  one, other = (data.heldout(c, tok) for c in (uncached(config), config))
  assert one.num_documents == other.num_documents == 20
  assert one.num_bytes == other.num_bytes
  assert one.faults == other.faults == {'tfds/empty': 1, 'tfds/not_utf8': 1}
  stream = data.Stream(config, tok)
  pieces = pieces_of(take(stream, 60))
  texts = {tok.decode(piece[:-1]) for piece in pieces}
  assert texts == {f'0x{i}xaaa' for i in range(40)}
  position, want = stream.save(), take(stream, 10)
  stream.restore(position)
  assert_equal(take(stream, 10), want)


def test_texts_that_are_gone_are_not_missed(tok, made):
  """As long as all are gone; else they are compared."""
  config = dataclasses.replace(made[0], tasks=made[0].tasks[:1])
  want = take(data.Stream(config, tok), 5)
  paths = sorted(pathlib.Path(config.cache).parent.glob('*.jsonl'))
  hidden = [path.rename(path.with_suffix('.hidden')) for path in paths]
  try:
    assert_equal(take(data.Stream(config, tok), 5), want)
    hidden[0].rename(paths[0])
    with pytest.raises(UserError, match='records was made of other files'):
      data.Stream(config, tok)
    paths[0].rename(hidden[0])
  finally:
    for path, away in zip(paths, hidden, strict=True):
      away.rename(path)


# Refusals.


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'heldout_fraction': 0.3}, 'heldout_fraction=0.2, now it is 0.3'),
        ({'key': 'body'}, "with task=.*'key': 'text'.* now it is .*'body'"),
        ({'name': 'other'}, "holds no cache of task 'other'; make it again"),
        ({'tokenizer': 'other'}, "with tokenizer=.*, now it is .'other'"),
        ({'cache': '/nowhere'}, "data.cache='/nowhere' holds no cache"),
    ],
)
def test_a_cache_of_something_else_is_refused(tok, made, changes, said):
  config = made[0]
  task = config.tasks[0]
  if 'tokenizer' in changes:
    tok = dataclasses.replace(tok, digest=changes['tokenizer'])
  elif {'key', 'name'} & changes.keys():
    task = dataclasses.replace(task, **changes)
    config = dataclasses.replace(config, tasks=(task,))
  else:
    config = dataclasses.replace(config, **changes)
  for read in (data.Stream, data.heldout):
    with pytest.raises(UserError, match=said) as error:
      read(config, tok)
    assert '\n' not in str(error.value)


def test_a_cache_serves_other_weights_batches_and_shuffles(tok, made):
  task = dataclasses.replace(made[0].tasks[0], weight=1.0)
  config = dataclasses.replace(
      made[0], tasks=(task,), batch=2, shards=1, shuffle=3)
  take(data.Stream(config, tok), 1)


def shorten(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
    ('name', 'change', 'said'),
    [
        ('COMPLETED', pathlib.Path.unlink, "holds no cache of task 'files'"),
        ('train.tfrecord-00001-of-00004', pathlib.Path.unlink,
         'train.tfrecord-00001-of-00004 should have .* bytes and has none'),
        ('train.tfrecord-00001-of-00004', shorten, 'copy the cache again'),
        ('train.tfrecord-00001-of-00004', flip, 'is damaged at byte 0'),
    ],
)
def test_a_cache_that_is_not_whole_is_refused(
    tok, made, tmp_path, name, change, said
):
  copy = tmp_path / 'copy'
  shutil.copytree(made[0].cache, copy)
  change(copy / 'files' / name)
  config = dataclasses.replace(made[0], cache=str(copy))
  with pytest.raises(UserError, match=said) as error:
    take(data.Stream(config, tok), 30)
  assert '\n' not in str(error.value)


def test_what_cannot_be_written_is_refused_before_it_is_read(made, tmp_path):
  config = uncached(made[0])
  for output, said in (
      (str(tmp_path), 'exists; remove it'), ('gs://bucket/a', 'not on disk')):
    (tmp_path / 'something').touch()
    with pytest.raises(UserError, match=said):
      cache_writer.write(config, str(DEMO), output, processes=1)
  with pytest.raises(UserError, match='--processes is 0'):
    cache_writer.write(config, str(DEMO), str(tmp_path / 'a'), processes=0)


def test_a_cache_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
  """Parts are written, the end is not reached."""
  def run(config, tokenizer, folder, jobs, *_):
    for task, split, part, parts in jobs:
      path = folder / task.name / units.part_name(split, part, parts)
      path.write_bytes(b'part')
    raise UserError('the disk is full')

  monkeypatch.setattr(cache_writer, '_run', run)
  with pytest.raises(UserError, match='the disk is full'):
    cache_writer.write(
        uncached(made[0]), str(DEMO), str(tmp_path / 'out'), processes=1)
  assert list(tmp_path.iterdir()) == []


# The command.


def command(*words, **kwargs):
  return subprocess.Popen(
      [sys.executable, '-m', 'recursive_tx', *words], cwd=ROOT, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stderr=subprocess.PIPE,
      stdout=subprocess.PIPE, **kwargs)


def test_the_verb_refuses_in_one_line(tmp_path):
  done = command('cache', '--config=configs/demo.py', '--output=')
  _, said = done.communicate(timeout=120)
  assert done.returncode == 1 and '--output is missing' in said
  assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_verb_leaves_no_cache_and_no_process(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  line = json.dumps({'text': 'def f(): ' * 999}) + '\n'
  for split in ('train', 'heldout'):
    (folder / f'{split}.jsonl').write_text(line * 500)
  run = command(
      'cache', f'--config=configs/demo.py:text={folder}',
      f'--output={tmp_path}/cache', '--processes=1')
  until = time.monotonic() + 120
  while not list(tmp_path.glob('.cache.*/new/python/*tfrecord*')):
    assert run.poll() is None and time.monotonic() < until
    time.sleep(0.1)
  run.kill()
  # The workers hold its pipes open for as long as they live.
  run.communicate(timeout=60)
  assert not (tmp_path / 'cache').exists()


@pytest.mark.slow
def test_the_verb_writes_what_training_reads(tmp_path, tok):
  text = tmp_path / 'text'
  text.mkdir()
  for split in ('train', 'heldout'):
    lines = [json.dumps({'text': f'def f{i}(): ' * 9}) for i in range(30)]
    (text / f'{split}.jsonl').write_text('\n'.join(lines))
  config = f'--config=configs/demo.py:text={text},steps=2'
  output = tmp_path / 'cache'
  made = command('cache', config, f'--output={output}', '--processes=2')
  out, said = made.communicate(timeout=300)
  assert made.returncode == 0, said
  assert f'--config.data.cache={output}' in out
  small = ['--config.data.batch=8', '--config.data.seq_len=32',
           '--config.log.tensorboard=False']
  losses = []
  for name, more in (('a', []), ('b', [f'--config.data.cache={output}'])):
    run = command('train', config, f'--workdir={tmp_path / name}', *small,
                  *more)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
    losses.append([json.loads(line).get('train/loss') for line in lines])
  assert losses[0] == losses[1] and any(losses[0])
