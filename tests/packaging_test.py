"""A wheel is built, installed, and run from an empty directory."""

from email import message_from_string
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
import tiny

ROOT = tiny.ROOT
# A step of each command, on little text.
TINY = (
    '--config.optim.steps=2', '--config.optim.warmup=1',
    '--config.data.batch=2', '--config.data.seq_len=64',
    '--config.data.shards=1',
    '--config.eval.every=2', '--config.eval.max_tokens=128')


def checked(words, **how):
  """What a command prints, which must end well."""
  done = subprocess.run(
      [*map(str, words)], capture_output=True, text=True, timeout=300, **how)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done.stdout


def tracked(folder: pathlib.Path) -> None:
  """Copies what git tracks, as it is now: what a clean clone has."""
  tree = checked(
      ['bash', '-c', 'source launch/common.bash && tracked_files'], cwd=ROOT)
  with tarfile.open(folder / 'tree.tar', 'w') as tar:
    for name in filter(None, tree.split('\0')):
      tar.add(ROOT / name, name)
  with tarfile.open(folder / 'tree.tar') as tar:
    tar.extractall(folder / 'clone', filter='data')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built without a network, by the setuptools that is here."""
  folder = tmp_path_factory.mktemp('wheel')
  tracked(folder)
  checked([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index',
           '--no-build-isolation', f'--wheel-dir={folder}', folder / 'clone'])
  built, = folder.glob('*.whl')
  return built


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """bin/ of a new environment: the wheel, beside the packages tested here."""
  env = tmp_path_factory.mktemp('env')
  checked([sys.executable, '-m', 'venv', '--without-pip', env])
  python = env / 'bin' / 'python'
  checked([sys.executable, '-m', 'pip', f'--python={python}', 'install',
           '--no-deps', '--no-index', wheel])
  site = checked([python, '-c', 'import sysconfig\n'
                  "print(sysconfig.get_path('purelib'))"]).strip()
  # Folders that a .pth file names have no .pth files of their own: the
  # checkout, installed to be edited, stays out.
  tested = [path for path in sys.path if path.endswith('site-packages')]
  (pathlib.Path(site) / 'tested.pth').write_text('\n'.join(tested) + '\n')
  return env / 'bin'


@pytest.fixture
def empty(tmp_path, monkeypatch):
  """An empty working directory, where nothing points at the checkout."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  # Tiny programs take longer to optimise than to run.
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  monkeypatch.delenv('PYTHONPATH', raising=False)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_what_ships(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  code = ROOT / 'recursive_tx' / 'store' / 'compact'
  demo = ('config.json', 'model.safetensors', 'tokenizer.model',
          'tokenizer_config.json', 'README.md')
  there = {'recursive_tx/py.typed', 'recursive_tx/serve/page.html',
           *(f'recursive_tx/demo/{name}' for name in demo),
           *(path.relative_to(ROOT).as_posix() for path in code.iterdir())}
  # Every module, and every config as one of the package.
  there |= {path.relative_to(ROOT).as_posix()
            for path in (ROOT / 'recursive_tx').rglob('*.py')}
  there |= {f'recursive_tx/configs/{path.name}'
            for path in (ROOT / 'configs').glob('*.py')}
  assert there <= names
  rest = {name for name in names - there if '.dist-info/' not in name}
  assert not rest
  assert any(name.endswith('/LICENSE') for name in names)


def test_what_the_wheel_says_of_itself(wheel):
  with zipfile.ZipFile(wheel) as z:
    name, = (n for n in z.namelist() if n.endswith('.dist-info/METADATA'))
    said = message_from_string(z.read(name).decode())
  assert said['License'] == 'Apache-2.0'
  assert said['Requires-Python'] == '>=3.11'
  assert said['Version'] == '0.1.0'
  assert set(said.get_all('Provides-Extra')) == {
      'data', 'eval', 'gguf', 'gpu', 'tpu', 'serve', 'test'}


def test_the_code_that_runs_is_the_wheels(installed, empty):
  code = ('import recursive_tx, recursive_tx.configs as c, recursive_tx.demo as'
          ' d\nprint(recursive_tx.__file__, c.__file__, d.DIRECTORY)')
  for path in checked([installed / 'python', '-c', code]).split():
    assert pathlib.Path(path).is_relative_to(installed.parent), path


@pytest.mark.slow
def test_a_type_checker_reads_the_wheel(installed, empty):
  """By py.typed: without it every mistake in this file passes."""
  user = (ROOT / 'tests' / 'typing' / 'user.py').read_text()
  (empty / 'user.py').write_text(user)
  checked([sys.executable, '-m', 'mypy', '--ignore-missing-imports',
           '--warn-unused-ignores', f'--python-executable={installed}/python',
           'user.py'])


def test_both_commands_run_from_an_empty_directory(installed, empty):
  text = empty / 'runs' / 'text'
  text.mkdir(parents=True)
  for split in ('train', 'heldout'):
    (text / f'{split}.jsonl').write_text(
        json.dumps({'text': 'def read_(path):\n  return path\n' * 40}) + '\n')
  command = installed / 'recursive-tx'
  said = checked([command, 'train', '--config=quickstart', '--workdir=one',
                  *TINY])
  assert 'Traceback' not in said
  assert (empty / 'one' / 'model' / 'model.safetensors').is_file()
  said = checked([command, 'compare', '--config=quickstart', '--workdir=all',
                  *TINY])
  assert 'relaxed' in said and "continues 'def read_'" in said
  rows = json.loads((empty / 'all' / 'table.json').read_text())
  assert [row['model'] for row in rows] == [
      'original', 'reduced', 'recursive', 'relaxed']
  assert (empty / 'all' / 'curves.png').is_file()
  # Nothing but what was asked for.
  assert sorted(os.listdir(empty)) == ['all', 'one', 'runs']


def test_a_config_that_does_not_ship_is_refused(installed, empty):
  done = subprocess.run(
      [installed / 'recursive-tx', 'train', '--config=quickstrat',
       '--workdir=x'], capture_output=True, text=True)
  line, = done.stderr.splitlines()
  assert done.returncode == 1 and "did you mean 'quickstart'" in line
