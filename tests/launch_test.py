"""Launch scripts: what --dry-run prints is what would run."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / 'launch').glob('*.sh'))


def _dry_run(script, *words):
  return subprocess.run(
      ['bash', f'launch/{script}', '--dry-run', *words], cwd=ROOT,
      capture_output=True, text=True)


@pytest.mark.parametrize('script', SCRIPTS)
def test_dry_run_prints_commands_and_runs_none(script):
  before = sorted(ROOT.iterdir())
  done = _dry_run(script)
  assert done.returncode == 0, done.stderr
  assert all(line.startswith('+ ') for line in done.stdout.splitlines())
  assert sorted(ROOT.iterdir()) == before


def test_quickstart_passes_flags_on():
  lines = _dry_run('quickstart.sh', '--config.optim.steps=7').stdout
  assert '-m recursive_tx compare --config=configs/quickstart.py' in lines
  assert '--config.optim.steps=7' in lines


def test_all_takes_the_slow_marker_away():
  assert '-m not slow' in _dry_run('test.sh').stdout
  assert '-m not slow' not in _dry_run('test.sh', '--all').stdout


def test_readme_and_ci_give_the_same_commands():
  readme = (ROOT / 'README.md').read_text()
  assert 'bash launch/quickstart.sh' in readme
  assert 'bash launch/test.sh' in readme
  assert 'bash launch/test.sh\n' in (ROOT / '.ci' / 'run').read_text()
