"""Training runs in processes of their own, to be killed, told and counted.

  python tests/processes.py '{"workdir": ..., "files": ..., ...}'

trains a tiny model and prints a line 'step N' when the N-th batch is placed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np

LETTERS = 'abcdefghijklmnopqrstuvwxyz '
STEPS = 8


def write_files(folder: pathlib.Path, train: int = 3000) -> None:
  """A tokenizer of one id a letter, and text in which letters follow suit.

  By default there is so much that every shard has a block of its own, and all
  rows differ.
  """
  import tiny_tokenizers

  tiny_tokenizers.letters(folder, [*LETTERS, '<bos>', '<eos>'])
  rng = np.random.default_rng(0)
  for split, count in (('train', train), ('heldout', 5)):
    with (folder / f'{split}.jsonl').open('w') as f:
      for _ in range(count):
        start, length = rng.integers(0, 26), rng.integers(5, 40)
        text = ''.join(LETTERS[(start + i) % 26] for i in range(length))
        f.write(json.dumps({'text': text}) + '\n')


def config(files: pathlib.Path | str, **changes: dict[str, Any]):
  """A tiny run; `changes` are fields of its sections."""
  from recursive_tx import train
  from recursive_tx.config import ModelConfig
  from recursive_tx.data import DataConfig, Task
  from recursive_tx.losses.terms import LossConfig
  from recursive_tx.store import checkpoint
  from recursive_tx.train import log as log_lib
  from recursive_tx.train.optim import OptimConfig

  task = Task('letters', 'jsonl', (f'{files}/train.jsonl',),
              heldout=(f'{files}/heldout.jsonl',))
  base = train.Config(
      model=ModelConfig(V=32, D=16, F=32, N=4, K=2, H=4, layers_per_loop=1,
                        loops=2, rank='2'),
      data=DataConfig((task,), seq_len=24, batch=8, shards=4, shuffle=16),
      optim=OptimConfig(steps=STEPS, lr=0.02, warmup=2),
      losses=LossConfig((0.3, 1.0)),
      tokenizer=str(files),
      checkpoint=checkpoint.CheckpointConfig(every=2, keep=0),
      log=log_lib.LogConfig(every=1, progress=False, tensorboard=False),
  )
  for section, values in changes.items():
    part = dataclasses.replace(getattr(base, section), **values)
    base = dataclasses.replace(base, **{section: part})
  return base


def start(
    workdir: pathlib.Path, files: pathlib.Path, *, processes: int = 1,
    devices: int = 1, **changes: Any,
) -> list[subprocess.Popen]:
  """Starts a run in so many processes of so many fake devices each."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  env = {
      **os.environ, 'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3',
      # Tiny programs take longer to optimise than to run.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  given = dict(workdir=str(workdir), files=str(files), changes=changes)
  if processes > 1:
    given |= dict(coordinator=f'127.0.0.1:{port}', processes=processes)
  return [
      subprocess.Popen(
          [sys.executable, __file__, json.dumps(given | dict(process=i))],
          env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(processes)
  ]


def until(process: subprocess.Popen, step: int) -> None:
  """Reads what a process prints until it is at a step."""
  for line in process.stdout:
    if line == f'step {step}\n':
      return
  raise AssertionError(f'it never came to step {step}:'
                       f' {process.stderr.read()[-3000:]}')


def kill(processes: list[subprocess.Popen]) -> None:
  """Ends them as a power cut would."""
  for process in processes:
    process.send_signal(signal.SIGKILL)
  for process in processes:
    process.communicate()


def finish(processes: list[subprocess.Popen]) -> list[str]:
  """Waits until all end well; what each printed."""
  said = [process.communicate(timeout=300) for process in processes]
  for process, (_, errors) in zip(processes, said, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [output for output, _ in said]


def run(workdir: pathlib.Path, files: pathlib.Path, **how: Any) -> list[str]:
  """A run from where it is to its end."""
  return finish(start(workdir, files, **how))


def examples(workdir: pathlib.Path) -> dict[int, dict[str, str]]:
  """{step: {row of the global batch: digest}}; where steps were repeated,
  they must have been given the same."""
  seen = {}
  for path in workdir.glob('examples_*'):
    for line in path.read_text().splitlines():
      step, rows = json.loads(line)
      for row, digest in rows.items():
        assert seen.setdefault(step, {}).setdefault(row, digest) == digest
  return seen


def _main(given: dict[str, Any]) -> None:
  from recursive_tx import machine, train
  from recursive_tx.store import checkpoint

  if 'coordinator' in given:
    machine.initialize(
        given['coordinator'], given['processes'], given['process'])
  workdir = pathlib.Path(given['workdir'])
  run_config = config(given['files'], **given['changes'])
  place = machine.place_rows
  state = {'step': None}

  def place_and_tell(batch, mesh):
    if state['step'] is None:
      # The first step of this process: the one after the checkpoint.
      state['step'] = checkpoint.latest_step(str(workdir)) or 0
    state['step'] += 1
    rows = {
        row: hashlib.sha256(
            b''.join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
        for i, row in enumerate(
            machine.local_rows(mesh, run_config.data.batch))
    }
    with (workdir / f'examples_{given["process"]}').open('a') as f:
      f.write(json.dumps([state['step'], rows]) + '\n')
    placed = place(batch, mesh)
    print('step', state['step'], flush=True)
    return placed

  machine.place_rows = place_and_tell
  train.train(run_config, str(workdir))


if __name__ == '__main__':
  try:
    _main(json.loads(sys.argv[1]))
  except ValueError as error:
    sys.exit(str(error))
