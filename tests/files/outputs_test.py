"""Outputs are checked before the work, and are there whole or not at all."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest
import tiny

from recursive_tx import files

ROOT = os.getuid() == 0


def _contents(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def _make(path, **how):
  with files.new_directory(path, **how) as new:
    (new / 'a').write_text('new')


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  _make('~/x')
  with files.new_file('~/y.json') as new:
    files.write_json(new, {'b': 1})
  assert files.check_workdir('~/z') == f'{tmp_path}/z'
  assert _contents(tmp_path) == ['x', 'y.json']


def test_a_symlink_stays_and_what_it_names_is_made(tmp_path):
  (tmp_path / 'real').mkdir()
  for name, there in (('one', True), ('two', False)):
    link, real = tmp_path / name, tmp_path / 'real' / name
    real.mkdir() if there else None
    link.symlink_to(real)
    _make(link)
    assert link.is_symlink() and (real / 'a').read_text() == 'new'
  _make(tmp_path / 'one', overwrite=True)
  assert (tmp_path / 'one').is_symlink()


def test_parents_are_made_and_go_again_where_the_work_fails(tmp_path):
  _make(tmp_path / 'a/b/c')
  with pytest.raises(KeyboardInterrupt):
    with files.new_directory(tmp_path / 'd/e/f'):
      raise KeyboardInterrupt
  with files.new_file(tmp_path / 'g/h.json') as new:
    files.write_json(new, {})
  assert _contents(tmp_path) == ['a', 'g']


def test_what_is_there_survives_a_failure(tmp_path):
  _make(tmp_path / 'a')
  (tmp_path / 'b').write_text('old')
  with pytest.raises(KeyboardInterrupt):
    with files.new_directory(tmp_path / 'a', overwrite=True) as new:
      (new / 'b').write_text('half')
      raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    with files.new_file(tmp_path / 'b') as new:
      new.write_text('half')
      raise KeyboardInterrupt
  assert _contents(tmp_path) == ['a', 'b']
  assert _contents(tmp_path / 'a') == ['a']
  assert (tmp_path / 'b').read_text() == 'old'


def test_a_place_that_cannot_be_replaced_is_refused_at_once(
    tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in ('.', '/proc', '..'):
    with tiny.refused(path, 'name a new directory inside it'):
      files.check_directory(path, overwrite=True)
  with tiny.refused('.', 'inside it'):
    files.check_directory('.')  # Empty, and still not to be replaced.
  with tiny.refused('gs://bucket/x', 'not on disk'):
    files.check_directory('gs://bucket/x')
  assert files.check_workdir('gs://bucket/x') == 'gs://bucket/x'
  (tmp_path / 'file').touch()
  for check in (files.check_directory, files.check_file, files.check_workdir):
    with tiny.refused('file/x', 'not a directory'):
      check('file/x')
  with tiny.refused('is a directory'):
    files.check_file(tmp_path)
  with tiny.refused('GiB free', 'make room'):
    files.check_directory('x', size=1 << 62)
  with tiny.refused('cannot be written'):
    files.check_directory('x' * 300)
  assert _contents(tmp_path) == ['file']


def test_a_place_that_is_read_only_is_refused_at_once(tmp_path):
  folder = pathlib.Path('/sys/kernel') if ROOT else tmp_path / 'locked'
  if not ROOT:
    folder.mkdir(mode=0o500)
  for make in (files.new_directory, files.new_file):
    with tiny.refused('cannot be written'):
      with make(folder / 'x'):
        raise AssertionError('the work began')


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
  former = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    # The kernel's answer is an OSError, as that of a full disk is.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    for make, at in ((files.new_directory, 'a'), (files.new_file, '')):
      with tiny.refused('x cannot be written', 'roomy'):
        with make(tmp_path / 'x') as new:
          (new / at).write_bytes(bytes(2000))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
  assert not _contents(tmp_path)
  with tiny.refused('/dev/full cannot be written'):
    with files.new_file('/dev/full') as new:
      files.write_json(new, {})
  assert pathlib.Path('/dev/full').is_char_device()


def test_a_pipe_is_written_to():
  script = ("from recursive_tx import files\n"
            "with files.new_file('/dev/stdout') as new:\n"
            "  files.write_json(new, {'a': 1})")
  done = subprocess.run([sys.executable, '-c', script], cwd=tiny.ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == {'a': 1}
