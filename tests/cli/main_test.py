"""The command line, in real processes."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
import tiny

from recursive_tx import __main__ as cli
from recursive_tx.errors import UserError

ROOT = tiny.ROOT


def _run(*words, **environment):
  return subprocess.run(
      [sys.executable, '-m', 'recursive_tx', *map(str, words)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
      capture_output=True, text=True)


def _refused(*words) -> str:
  """The one line that a command which must fail says."""
  done = _run(*words)
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  return done.stderr.strip().splitlines()[-1]


def test_convert_export_and_back(tmp_path):
  tiny.make_ours(tmp_path / 'source', tiny.FAMILIES['gemma'])
  done = _run('convert', f'--source={tmp_path}/source',
              f'--output={tmp_path}/new', '--loops=3', '--rank=full',
              '--check')
  assert done.returncode == 0, done.stderr
  assert 'kl:' in done.stdout and 'loop 3' in done.stdout
  done = _run('export', f'--checkpoint={tmp_path}/new', '--check',
              f'--output={tmp_path}/out')
  assert done.returncode == 0, done.stderr
  assert 'kl:' in done.stdout
  assert (tmp_path / 'out' / 'model.safetensors').exists()


def test_errors_are_one_line_with_the_way_out(tmp_path):
  tiny.make_ours(tmp_path / 'source', tiny.FAMILIES['gemma'])
  source, output = f'--source={tmp_path}/source', f'--output={tmp_path}/new'
  assert "did you mean 'convert'" in _refused('covert')
  assert 'source' in _refused('convert', f'--sorce={tmp_path}', output)
  line = _refused('convert', source, output, '--loops=4')
  assert 'loops=4' in line and '[1, 2, 3, 6]' in line and 'prelude' in line
  assert 'q64+k32' in _refused('convert', source, output, '--rank=7x')
  assert '--output is missing' in _refused('convert', source)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


def test_output_that_nobody_reads_is_no_traceback():
  """As in `... | head`; the status is a shell's for SIGPIPE."""
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, 'w') as closed:
    done = subprocess.run(
        [sys.executable, '-m', 'recursive_tx', 'plan', '--help'], cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stdout=closed,
        stderr=subprocess.PIPE, text=True)
  assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.parametrize('number, status', [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)])
def test_a_verb_that_is_stopped_removes_what_it_made(
    number, status, tmp_path):
  tiny.make_ours(tmp_path / 'source', tiny.FAMILIES['llama'])
  before = sorted(tmp_path.iterdir())
  process = subprocess.Popen(
      [sys.executable, '-m', 'recursive_tx', 'convert', '--init=fit',
       '--rank=4', f'--source={tmp_path}/source',
       f'--output={tmp_path}/deep/new'], cwd=ROOT, stderr=subprocess.PIPE,
      # As under nohup, an ignored signal stays ignored.
      preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, text=True)
  while not list(tmp_path.glob('deep/.new.*/.fit.*')):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(number)
  process.send_signal(number)  # Whoever sends one may send another.
  error = process.communicate()[1]
  assert process.returncode == status, error
  assert error.strip().splitlines()[-1] == (
      f'convert: stopped by {number.name}')
  assert 'Traceback' not in error and '***' not in error
  assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path):
  for words in (
      ('convert', '--source=/nowhere', '--output=.'),
      ('export', '--checkpoint=/nowhere', '--output=/proc'),
      ('evaluate', '--checkpoint=/nowhere', f'--output={tmp_path}')):
    line = _refused(*words)
    assert line.startswith(f'{words[0]}: {words[2][9:]} is a '), line


def test_debug_shows_the_traceback():
  done = _run('convert', '--source=/nowhere', '--output=/nowhere/x', '--debug')
  assert done.returncode == 1 and 'Traceback' in done.stderr


@pytest.mark.parametrize('verb', cli.VERBS)
def test_help_is_complete_and_light(verb):
  done = _run(verb, '--help')
  assert done.returncode == 0, done.stderr
  assert f'{verb}:' in done.stdout and '--debug' in done.stdout
  for line in done.stdout.splitlines():
    # Every flag says what it is.
    if line.strip().startswith('--') and ':' in line:
      assert line.split(':', 1)[1].strip(), line


def test_only_what_a_person_can_mend_loses_its_traceback(monkeypatch, capsys):
  """A ValueError of JAX or of ours is a fault of the program."""
  def raises(error):
    def main(argv):
      raise error
    monkeypatch.setattr(cli.importlib, 'import_module',
                        lambda name: types.SimpleNamespace(main=main))
    return cli.main(['convert'])

  assert raises(UserError('loops=4 does not divide 6')) == 1
  assert capsys.readouterr().err == 'convert: loops=4 does not divide 6\n'
  with pytest.raises(ValueError, match='incompatible shapes'):
    raises(ValueError('incompatible shapes for broadcasting'))
