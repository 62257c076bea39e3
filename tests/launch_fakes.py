"""Stands in for gcloud, xpk, kubectl, scontrol and a host's Python.

Run as `launch_fakes.py NAME ARG ...` by the scripts that launch_test.py puts
on PATH. Everything is kept in the directory $FAKE: `calls` (one JSON list a
line), `state` (a TPU's; none without the file), `queue` (the states that a
queued resource goes through; the last stays), `plan` (what each start of the
command does), `drops` (the next connection to a log breaks) and `home0`,
`home1`, the hosts. What is run "there" is really run by bash, in a host's home.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

FAKE = pathlib.Path(os.environ['FAKE'])
STATE = FAKE / 'state'
QUEUE = FAKE / 'queue'
HOMES = [FAKE / 'home0', FAKE / 'home1']


def bash(command, home):
  env = {'HOME': str(home), 'FAKE': str(FAKE), 'PATH': os.environ['PATH']}
  return subprocess.run(['bash', '-c', command], cwd=home, env=env).returncode


def gcloud(words):
  group, verb, *rest = words[2:]
  flags = dict(word.split('=', 1) for word in rest if '=' in word)
  if (FAKE / 'broken').exists():
    sys.exit('ERROR: (gcloud) You do not have an active account')
  if verb == 'describe':
    return _describe(group)
  if verb == 'create':
    for home in HOMES:
      shutil.rmtree(home, ignore_errors=True)
      home.mkdir()
    STATE.write_text('READY')
    if group == 'queued-resources':
      QUEUE.write_text('WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  elif verb == 'delete':
    STATE.unlink()
    QUEUE.unlink(missing_ok=True)
  elif STATE.read_text() != 'READY':
    return 255
  else:
    worker = flags['--worker']
    homes = HOMES if worker == 'all' else [HOMES[int(worker)]]
    if verb == 'scp':
      for home in homes:
        shutil.copy(rest[0], home / rest[1].split(':')[1])
      return 0
    assert verb == 'ssh'
    command = flags['--command']
    if ' follow ' in command and (FAKE / 'drops').exists():
      (FAKE / 'drops').unlink()
      command += ' | head -n 1'
    return next(filter(None, [bash(command, home) for home in homes]), 0)
  return 0


def _describe(group):
  path = QUEUE if group == 'queued-resources' else STATE
  if not path.exists():
    print('ERROR: (gcloud) NOT_FOUND: Resource was not found', file=sys.stderr)
    return 1
  first, *later = path.read_text().split()
  if later:
    path.write_text(' '.join(later))
  print(first)
  return 0


def xpk(words):
  group, verb, *rest = words
  flags = dict(word.split('=', 1) for word in rest if '=' in word)
  if verb == 'delete':
    STATE.unlink(missing_ok=True)
  if verb == 'list':
    if not STATE.exists():
      return 1
    first, *later = STATE.read_text().split()
    STATE.write_text(' '.join(later) or first)
    return int(first)
  if (group, verb) == ('workload', 'create'):
    # A JobSet and the shell that xpk writes into its pods. Kubernetes
    # replaces what it knows of $(NAME), and $$.
    command = flags['--command'].replace('$(HOME)', 'replaced')
    command = command.replace('$$', '$')
    assert '\n' not in command
    pod = FAKE / 'pod'
    for _ in range(int(flags['--max-restarts']) + 1):
      shutil.rmtree(pod, ignore_errors=True)
      shutil.copytree(flags['--script-dir'], pod)
      status = bash(
          f'({command}) > {FAKE}/log 2>&1 & PID=$!; echo $PID > pid;'
          ' wait $PID', pod)
      if status != int(flags['--restart-on-exit-codes']):
        break
    STATE.write_text(f'124 {0 if status == 0 else 125}')
  return 0


def kubectl(words):
  print((FAKE / 'log').read_text())
  return 0


def scontrol(words):
  print('host7\nhost8')
  return 0


def python(words):
  """The interpreter of a host, and that of the .venv it makes."""
  home = pathlib.Path(os.environ['HOME'])
  if words[0] == '-c':
    return 0
  if words[1] == 'venv':
    target = pathlib.Path(words[2]) / 'bin'
    target.mkdir(parents=True)
    (target / 'python').symlink_to(shutil.which('python3.11'))
    return 0
  if words[1] == 'pip':
    with (FAKE / 'installs').open('a') as file:
      file.write(f'{home.name} {words[-1]}\n')
    return 0
  assert words[:3] == ['-m', 'recursive_tx', 'train']
  return _train(home, words[3:])


def _train(home, words):
  host = home.name
  start = len(list(FAKE.glob(f'trained-{host}-*')))
  plan = (FAKE / 'plan').read_text().split()[start]
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Saves, and ends.
  print(f'step of start {start}', flush=True)
  record = FAKE / f'trained-{host}-{start}'
  new = FAKE / f'new-{host}'  # The hosts run at the same time.
  new.write_text(json.dumps(words))
  new.rename(record)
  if plan == 'preempted':
    STATE.write_text('PREEMPTED')
    # A host tells all its processes; xpk's shell only the one it started.
    told = home / 'pid'
    pid = int(told.read_text()) if told.exists() else os.getppid()
    os.kill(pid, signal.SIGTERM)
  if plan in ('preempted', 'waits'):
    while True:
      signal.pause()
  print(f'end of start {start}')
  return int(plan)


if __name__ == '__main__':
  name, *arguments = sys.argv[1:]
  if name != 'python':
    with (FAKE / 'calls').open('a') as calls:
      calls.write(json.dumps([name, *arguments]) + '\n')
  sys.exit(globals()[name](arguments))
