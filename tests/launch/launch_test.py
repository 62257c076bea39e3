"""Launch scripts: what --dry-run prints is what would run, and what runs.

The scripts for other machines run for real against `launch_fakes.py`, put on
PATH in place of gcloud, xpk, kubectl, scontrol and a host's Python.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny

ROOT = tiny.ROOT
SCRIPTS = sorted(path.name for path in (ROOT / 'launch').glob('*.sh'))
AFAR = ['gke.sh', 'gpu_node.sh', 'tpu_vm.sh']
# What shells, Kubernetes and Python's str.format would each like to change.
ODD = ['--config=a b', '', "it's", '"', 'two\nlines $$ $(HOME) `id`\t&',
       '$HOME $$ $(HOME)', '{x} \\n', '*', '--', 'é', '-n']


def _dry_run(script, *words):
  return subprocess.run(
      ['bash', f'launch/{script}', '--dry-run', *words], cwd=ROOT,
      capture_output=True, text=True)


@pytest.mark.parametrize('script', SCRIPTS)
def test_dry_run_prints_commands_and_runs_none(script):
  before = sorted(ROOT.iterdir())
  done = _dry_run(script)
  assert done.returncode == 0, done.stderr
  # Where .venv is as it should be, there is nothing to make.
  assert done.stdout or script == 'venv.sh'
  assert all(line.startswith('+ ') for line in done.stdout.splitlines())
  assert sorted(ROOT.iterdir()) == before


def test_quickstart_passes_flags_on():
  lines = _dry_run('quickstart.sh', '--config.optim.steps=7').stdout
  assert '-m recursive_tx compare --config=configs/quickstart.py' in lines
  assert '--config.optim.steps=7' in lines


def test_a_queued_tpu_is_made_and_deleted_through_the_queue():
  lines = _dry_run('tpu_vm.sh', '--queued', '--delete').stdout
  assert 'queued-resources delete recursive-tx --force' in lines
  lines = _dry_run('tpu_vm.sh', '--queued', '--', '--x').stdout
  assert 'tpus queued-resources create' in lines
  assert 'tpu-vm create' not in lines and 'delete' not in lines


def test_all_takes_the_slow_marker_away():
  assert '-m not slow' in _dry_run('test.sh').stdout
  assert '-m not slow' not in _dry_run('test.sh', '--all').stdout


def test_readme_and_ci_give_the_same_commands():
  readme = (ROOT / 'README.md').read_text()
  assert 'bash launch/quickstart.sh' in readme
  assert 'bash launch/test.sh' in readme
  assert 'bash launch/test.sh\n' in (ROOT / '.ci' / 'run').read_text()


class World:
  """A small checkout, and the machines that its scripts can reach."""

  def __init__(self, path):
    self.fake = path / 'fake'
    self.checkout = path / 'checkout'
    programs = path / 'bin'
    for directory in (self.fake, self.checkout, programs):
      directory.mkdir()
    for name in ('gcloud', 'xpk', 'kubectl', 'scontrol', 'python3.11'):
      program = programs / name
      program.write_text(
          f'#!/bin/sh\nexec {sys.executable} -SE {ROOT}/tests/launch_fakes.py'
          f' {name.rstrip("3.1")} "$@"\n')
      program.chmod(0o755)
    self.env = {
        'PATH': f'{programs}:/usr/bin:/bin', 'HOME': str(path),
        'FAKE': str(self.fake), 'TMPDIR': str(path), 'PYTHON': 'python3.11',
    }
    shutil.copytree(ROOT / 'launch', self.checkout / 'launch')
    for name in ('setup.py', 'constraints.txt'):
      shutil.copy(ROOT / name, self.checkout)
    (self.checkout / 'changed').write_text('before')
    for words in (['init', '-q'], ['add', '.']):
      subprocess.run(['git', *words], cwd=self.checkout, check=True)
    (self.checkout / 'changed').write_text('after')
    (self.checkout / '.env').write_text('SECRET=1')

  def popen(self, script, *words, plan='', **env):
    if plan:
      (self.fake / 'plan').write_text(plan)
    return subprocess.Popen(
        ['bash', f'launch/{script}', *words], cwd=self.checkout,
        env=self.env | env, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

  def run(self, script, *words, plan='', **env):
    """Returns the finished process, with stdout and stderr as text."""
    process = self.popen(script, *words, plan=plan, **env)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(
        process.args, process.returncode, stdout, stderr)

  def calls(self):
    """What the fakes were called with, from the last call to this on."""
    path = self.fake / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]

  def verbs(self):
    """The same in short, without what only looks and without the group."""
    verbs = [c[4] if c[0] == 'gcloud' else ' '.join(c[1:3])
             for c in self.calls()]
    return [v for v in verbs if v not in ('describe', 'ssh', 'scp')]

  def trained(self, host):
    return [json.loads(path.read_text())
            for path in sorted(self.fake.glob(f'trained-{host}-*'))]

  def wait_for(self, name):
    for _ in range(3000):
      if (self.fake / name).exists():
        return
      time.sleep(0.02)
    raise AssertionError(f'{name} never came')


@pytest.fixture
def world(tmp_path):
  world = World(tmp_path)
  yield world
  # What was left running, each in a session of its own.
  for path in world.fake.glob('home*/recursive_tx.run/pid'):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(path.read_text()), signal.SIGKILL)


def _tpu(*words):
  return ('tpu_vm.sh', '--poll=0', '--zone=z', *words)


def _gke(*words):
  return ('gke.sh', '--poll=0', *words)


def test_tpu_vm_creates_trains_everywhere_and_is_reused(world):
  (world.fake / 'drops').touch()
  done = world.run(*_tpu('--spot', '--', *ODD), plan='0 0')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-2:] == ['step of start 0', 'end of start 0']
  assert done.stdout.count('step of start 0') == 1
  assert world.trained('home0') == world.trained('home1') == [ODD]
  assert '.env' in done.stderr and 'SECRET' not in done.stderr + done.stdout
  calls = world.calls()
  assert (
      'gcloud compute tpus tpu-vm create recursive-tx --accelerator-type='
      'v5litepod-16 --spot --version=v2-alpha-tpuv5-lite --quiet --zone=z'
  ).split() in calls
  there = world.fake / 'home1' / 'recursive_tx'
  assert (there / 'changed').read_text() == 'after'
  assert not (there / '.env').exists() and not (there / '.git').exists()

  # Again: neither created nor installed, and what is gone here goes there.
  installs = (world.fake / 'installs').read_text()
  assert sorted(installs.split()) == ['.[tpu]', '.[tpu]', 'home0', 'home1']
  (there / 'runs').mkdir()
  (world.checkout / 'changed').unlink()
  done = world.run(*_tpu('--', '--again'))
  assert done.returncode == 0, done.stderr
  assert world.verbs() == []
  assert world.trained('home1')[1:] == [['--again']]
  assert (world.fake / 'installs').read_text() == installs
  assert not (there / 'changed').exists() and (there / 'runs').exists()


@pytest.mark.parametrize('flags', [
    (), pytest.param(('--queued',), marks=pytest.mark.slow)])
def test_tpu_vm_resumes_after_preemption(world, flags):
  # The command saves and exits 0 on SIGTERM: that is not the end of it.
  done = world.run(*_tpu(*flags, '--', '--x'), plan='preempted 0')
  assert done.returncode == 0, done.stderr
  assert world.verbs() == ['create', 'delete', 'create']
  assert world.trained('home0') == world.trained('home1') == [['--x']] * 2
  assert 'end of start 1' in done.stdout


@pytest.mark.slow
def test_tpu_vm_asks_the_queue_again_after_suspension(world):
  (world.fake / 'queue').write_text('ACCEPTED SUSPENDING SUSPENDED')
  (world.fake / 'state').write_text('PREEMPTED')
  done = world.run(*_tpu('--queued', '--', '--x'), plan='0')
  assert done.returncode == 0, done.stderr
  made = [' '.join(call[3:-2]) for call in world.calls()
          if call[4] in ('create', 'delete')]
  assert made == [
      'queued-resources delete recursive-tx --force',
      'queued-resources create recursive-tx --accelerator-type=v5litepod-16'
      ' --runtime-version=v2-alpha-tpuv5-lite --node-id=recursive-tx']


def test_tpu_vm_gives_up_on_a_command_that_fails_at_once(world):
  done = world.run(*_tpu('--failures=2', '--', '--tpyo'), plan='3 3 0')
  assert done.returncode == 3, done.stderr
  assert len(world.trained('home0')) == 2
  assert 'gave up after 2 failures' in done.stderr
  assert '--delete removes it' in done.stderr
  assert world.verbs() == ['create']
  # Told so, it deletes what it leaves, by name; and that only once.
  done = world.run(*_tpu('--failures=1', '--delete', '--', '-x'), plan='3 ' * 3)
  assert done.returncode == 3
  assert 'deleting TPU recursive-tx' in done.stderr
  assert world.verbs() == ['delete']
  assert 'no TPU recursive-tx' in world.run(*_tpu('--delete')).stderr
  assert world.verbs() == []


@pytest.mark.parametrize('seconds, given_up', [
    ([0, 0], True), ([0, 1800, 0], False), ([1800] * 9, False),
    ([0, 1800, 0, 0], True), ([1799, 1799], True)])
def test_only_failures_that_follow_each_other_quickly_count(seconds, given_up):
  # The status of the last: 1 is to give up.
  calls = ';'.join(f'count_failure 5 {s}' for s in seconds)
  done = subprocess.run(
      ['bash', '-c', f'source launch/common.bash; failures=2; {calls}'],
      cwd=ROOT, capture_output=True)
  assert done.returncode == given_up


def test_tpu_vm_command_outlives_the_script_until_it_is_told_to_stop(world):
  first = world.popen(*_tpu('--', '--long'), plan='waits 0')
  world.wait_for('trained-home1-0')
  other = world.run(*_tpu('--', '--other'))
  assert other.returncode == 1 and '--stop ends it' in other.stderr
  os.killpg(first.pid, signal.SIGINT)
  assert first.wait(60) == 130
  assert 'go on' in first.communicate()[1]

  # The same words follow the same command; a script that watches does not
  # take the end that somebody asked for as a failure.
  again = world.popen(*_tpu('--', '--long'))
  assert any('step of start 0' in line for line in again.stdout)
  assert world.run(*_tpu('--stop')).returncode == 0
  again.communicate(timeout=120)
  assert again.returncode == 75
  assert len(world.trained('home0')) == len(world.trained('home1')) == 1
  assert world.run(*_tpu('--', '--long')).returncode == 0
  assert world.verbs() == ['create']


def test_tpu_vm_says_what_is_wrong_before_anything_is_made(world):
  (world.fake / 'broken').touch()
  done = world.run(*_tpu('--', '--x'))
  assert done.returncode == 1 and 'active account' in done.stderr
  assert world.verbs() == []
  done = world.run(*_tpu())
  assert done.returncode == 1 and 'arguments of train after --' in done.stderr
  done = world.run(*_tpu('--type=v9-8', '--', '--x'))
  assert done.returncode == 1 and '--version' in done.stderr


def test_gke_trains_what_git_tracks_and_restarts_when_told_to_stop(world):
  done = world.run(
      *_gke('--create', '--slices=2', '--', *ODD), plan='preempted 0')
  assert done.returncode == 0, done.stderr
  assert world.trained('pod') == [ODD, ODD]
  assert 'step of start 1' in done.stdout
  calls = world.calls()
  assert calls[0] == [
      'xpk', 'cluster', 'create', '--tpu-type=v5litepod-16', '--num-slices=2',
      '--on-demand', '--cluster=recursive-tx']
  pod = world.fake / 'pod'
  assert (pod / 'changed').read_text() == 'after'
  assert not (pod / '.env').exists() and not (pod / '.git').exists()

  # The same name is the same workload, which has finished.
  done = world.run(*_gke('--', *ODD))
  assert done.returncode == 0 and 'already finished' in done.stderr
  assert world.verbs() == ['workload list']


def test_gke_failure_is_final_and_never_overwritten(world):
  done = world.run(*_gke('--', '--tpyo'), plan='1 1 0')
  assert done.returncode == 125, done.stderr
  assert len(world.trained('pod')) == 1
  done = world.run(*_gke('--', '--typo'))
  assert done.returncode == 1 and '--delete it' in done.stderr
  assert 'workload create' not in world.verbs()[3:]
  done = world.run(*_gke('--delete'))
  assert 'workload recursive-tx of cluster recursive-tx' in done.stderr
  # A failure of a run that had lasted, here for 0 seconds, is not final.
  done = world.run(*_gke('--quick=0', '--', '--x'), plan='1 1 0')
  assert done.returncode == 0, done.stderr
  done = world.run(*_gke('--delete-cluster', '--cluster=c'))
  assert 'deleting cluster c' in done.stderr
  assert world.calls()[-1] == [
      'xpk', 'cluster', 'delete', '--force', '--cluster=c']


def test_gpu_node_resumes_and_gives_up(world):
  env = {'HOME': str(world.fake / 'host')}
  gpu = ('gpu_node.sh', '--poll=0')
  done = world.run(
      *gpu, '--failures=1', '--quick=0', '--', *ODD, plan='1 1 0 5 5', **env)
  assert done.returncode == 0, done.stderr
  assert world.trained('host') == [ODD] * 3
  assert (world.fake / 'installs').read_text() == 'host .[gpu]\n'
  done = world.run(*gpu, '--failures=2', '--', '--tpyo', **env)
  assert done.returncode == 5 and 'gave up' in done.stderr
  assert len(world.trained('host')) == 5


def test_gpu_node_told_to_stop_lets_the_command_save_and_ends(world):
  process = world.popen(
      'gpu_node.sh', '--', '--x', plan='waits 0', HOME=str(world.fake / 'host'))
  world.wait_for('trained-host-0')
  process.terminate()
  process.communicate()
  assert process.returncode == 75
  assert len(world.trained('host')) == 1


def test_gpu_node_tells_the_hosts_of_each_other(world):
  env = {'HOME': str(world.fake / 'host')}
  gpu = ('gpu_node.sh', '--dry-run')
  last = ['--coordinator=host7:61447', '--processes=2', '--process=1']
  slurm = {'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '2',
           'SLURM_PROCID': '1', 'SLURM_STEP_NODELIST': 'host[7-8]',
           'SLURM_JOB_ID': '7'}
  for words, more in (last, {}), ([], slurm):
    done = world.run(*gpu, *words, '--', '--x', **env, **more)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[-4:] == ['--x', *last]
  assert ['scontrol', 'show', 'hostnames', 'host[7-8]'] in world.calls()
  for words, more in [
      (last[:2], {}), (['--process=2', *last[:2]], {}),
      ([], slurm | {'SLURM_NTASKS': '16'}), ([], {'SLURM_JOB_NUM_NODES': '2'})]:
    done = world.run(*gpu, *words, **env, **more)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_interop_names_what_fails_and_exits_with_1(world, tmp_path):
  """An interpreter whose environments cannot resolve [tpu]."""
  installer = tmp_path / 'pip'
  installer.write_text('#!/bin/sh\ncase "$*" in *"[tpu]"*) exit 1; esac\n')
  command = tmp_path / 'recursive-tx'
  command.write_text('#!/bin/sh\n')
  interpreter = tmp_path / 'other-python'
  interpreter.write_text(
      '#!/bin/sh\n'
      'case "$1 $2" in\n'
      f'"-m venv") mkdir -p $3/bin; cp {installer} {command} $3/bin\n'
      '  cp $0 $3/bin/python ;;\n'
      '"-c import platform"*) echo 3.11.99 ;;\n'
      'esac\n')
  for path in (installer, command, interpreter):
    path.chmod(0o755)
  done = world.run('interop.sh', str(interpreter))
  assert done.returncode == 1, done.stderr
  page = (world.checkout / 'docs' / 'results' / 'interop.md').read_text()
  assert '## Python 3.11.99' in page and str(tmp_path) not in page
  failed = [line for line in page.splitlines() if line.startswith('- FAIL')]
  assert failed == [
      '- FAIL: recursive_tx[tpu] resolves against constraints.txt']
  assert page.count('- OK: ') == 14
  # Without that fault.
  installer.write_text('#!/bin/sh\n')
  assert world.run('interop.sh', str(interpreter)).returncode == 0


@pytest.mark.parametrize('script', AFAR)
def test_every_option_is_in_the_help_and_a_typo_names_the_nearest(script):
  text = (ROOT / 'launch' / script).read_text()
  valued, flags = re.search(
      r"^read_options '([^']*)'\s[\\\s]*'([^']*)'", text, re.M).groups()
  usage = subprocess.check_output(
      ['bash', f'launch/{script}', '--help'], cwd=ROOT, text=True)
  assert usage.startswith('Trains on') and '#' not in usage
  for option in [*valued.split(), *flags.split(), 'dry-run']:
    assert re.search(fr'^  --{option}(?=[= ])', usage, re.M), option
  done = _dry_run(script, '--qick=1')
  assert done.returncode == 1
  assert 'the nearest is --quick' in done.stderr
  for words in (['--quick=soon'], ['--quick'], ['--dry-run=1'], ['train']):
    done = _dry_run(script, *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, words


def _words(line):
  """The words that bash reads in a line."""
  return subprocess.check_output(
      ['bash', '-c', f'printf "%s\\0" {line}'], text=True).split('\0')[:-1]


@pytest.mark.parametrize('script', AFAR)
def test_dry_run_prints_lines_to_paste(script):
  lines = _dry_run(script, '--', *ODD).stdout.splitlines()
  assert all(line.startswith('+ ') for line in lines)
  line, = [line for line in lines if 'two' in line]
  words = _words(line[2:])
  if script != 'gpu_node.sh':
    command, = [w for w in words if w.startswith('--command=')]
    words = _words(command.removeprefix('--command='))
  assert words[-len(ODD):] == ODD


@pytest.mark.parametrize('script, tool', [
    ('tpu_vm.sh', 'gcloud'), ('gke.sh', 'xpk')])
def test_a_missing_tool_is_one_line(world, tmp_path, script, tool):
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('basename', 'dirname', 'bash'):
    (tools / name).symlink_to(shutil.which(name))
  done = world.run(script, '--', '--x', PATH=str(tools))
  assert done.returncode == 1
  assert done.stderr.startswith(f'{script}: needs {tool}')
  assert len(done.stderr.splitlines()) == 1
