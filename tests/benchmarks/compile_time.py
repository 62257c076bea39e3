"""Compile time of a training step against the number of layers.

  python tests/benchmarks/compile_time.py [--output=FILE]

Layers and loops are scanned, so that a deeper model has no larger program.
Each depth is compiled in a process of its own, in turn, for a few rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

LAYERS = (12, 48)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--output')
  parser.add_argument('--layers', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.layers:
    print(json.dumps(measure(args.layers)))
    return
  times = {layers: [] for layers in LAYERS}
  for _ in range(args.rounds):
    for layers in LAYERS:
      done = subprocess.run(
          [sys.executable, __file__, f'--layers={layers}'], text=True,
          capture_output=True, check=True,
          env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
      times[layers].append(json.loads(done.stdout.splitlines()[-1]))
  medians = {layers: statistics.median(each) for layers, each in times.items()}
  print('layers  seconds to trace, lower and compile')
  for layers, median in medians.items():
    print(f'{layers:6}{median:9.1f}')
  print(f'ratio {medians[LAYERS[-1]] / medians[LAYERS[0]]:.2f}')
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(times, indent=2) + '\n')


def measure(layers: int) -> float:
  """Seconds for one depth, the framework's start left out."""
  import jax

  import recursive_tx as rtx
  from recursive_tx import losses, machine, plan, train
  from recursive_tx.data import DataConfig, Task
  from recursive_tx.train import optim
  config = train.Config(
      model=rtx.ModelConfig(
          V=4096, D=256, F=512, N=4, K=2, H=64, layers_per_loop=layers // 2,
          loops=2, rank='16'),
      data=DataConfig((Task('t', 'text', ('x',)),), seq_len=256, batch=8),
      optim=optim.OptimConfig(steps=1, lr=1e-4),
      losses=losses.LossConfig((0.1, 1.0)), run=rtx.Run(remat='full'))
  mesh = machine.make_mesh(config.mesh)
  start = time.perf_counter()
  tx, state = train.abstract_state(config, mesh)
  with jax.set_mesh(mesh):
    train.jit_step(config, mesh, tx, state).lower(
        state, plan.batch_of(config, mesh), None).compile()
  return time.perf_counter() - start


if __name__ == '__main__':
  main()
