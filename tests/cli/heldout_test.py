"""The flags of held-out text: ranges, at the door."""

import os
import subprocess
import sys

from absl import flags
import pytest
import tiny

from recursive_tx.cli import heldout


@pytest.fixture
def reader(monkeypatch):
  """What the flags of a verb read, by their values."""
  own = flags.FlagValues()
  for kind in ('multi_string', 'string', 'integer'):
    name = f'DEFINE_{kind}'
    define = getattr(flags, name)
    monkeypatch.setattr(
        flags, name, lambda *args, define=define, **how: define(
            *args, flag_values=own, **how))
  read = heldout.define('evaluate', 8, 'Tokens.')

  def with_flags(*words):
    own['text'].unparse()  # Or values would be added to those before.
    own(['evaluate', *words])
    return read(tiny_tokenizer())

  return with_flags


def tiny_tokenizer():
  from recursive_tx.demo import DIRECTORY
  from recursive_tx.store import opening
  return opening.load_tokenizer(DIRECTORY)


def test_no_file_counts_twice(reader, tmp_path):
  (tmp_path / 'a.txt').write_text('one two')
  (tmp_path / 'b.txt').write_text('three')
  (tmp_path / 'link.txt').symlink_to('a.txt')
  a, b = (f'--text={tmp_path}/{name}.txt' for name in 'ab')
  assert reader(a, b).num_bytes == 7 + 5
  for words in ((a, a), (a, f'--text={tmp_path}/[ab].txt'),
                (f'--text={tmp_path}/../{tmp_path.name}/a.txt', b, a),
                (a, f'--text={tmp_path}/link.txt')):
    with tiny.refused('would count twice', 'a.txt'):
      reader(*words)


def test_records_are_known_by_the_files_name(reader, tmp_path):
  for name in ('a.jsonl', 'B.JSONL'):
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    found = reader(f'--text={tmp_path}/{name}')
    assert (found.num_documents, found.num_bytes) == (2, 6)


@pytest.mark.parametrize('verb, flag, part', [
    ('evaluate', '--seq_len=0', '--seq_len=0'),
    ('evaluate', '--batch=-1', '--batch=-1'),
    ('evaluate', '--seq_len=1e9', '--seq_len=1e9'),
    ('evaluate', '--max_tokens=-1', '--max_tokens=-1'),
    ('calibrate', '--delta=nan', 'delta is nan'),
    ('calibrate', '--confidence=1', 'confidence is 1.0'),
    ('calibrate', '--rule=tpo', "did you mean 'top'"),
    ('calibrate', '--seq_len=9999999999', '--seq_len=9999999999')])
def test_numbers_are_checked_before_anything_is_read(verb, flag, part):
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', verb, '--checkpoint=/nowhere',
       '--text=/nowhere', flag], cwd=tiny.ROOT, capture_output=True, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 1
  assert part in done.stderr and '/nowhere' not in done.stderr
  assert 'Traceback' not in done.stderr
