"""Speed of a training step on this CPU, side by side in one run.

  python tests/benchmarks/train_step.py [--sizes '3 M' ...] [--output=FILE]

Vanilla against `transformers` (Llama, sdpa, AdamW) on the same shapes, and
recursive against vanilla; 'taught' is the relaxed one with a vanilla teacher in
the step. 135 M are the shapes of SmolLM2. Every kind of step lives in a process
of its own, since threads of one framework slow the other, and each round runs
each kind in turn, so that a ratio is of neighbours in time: once untimed, since
a system may take memory from an idle process, then a few times. The table gives
medians over the rounds, of the clock and of the processor's time (both cores
added up), which is steadier where a machine is shared. All processes get large
pages for large arrays, as launch/ sets.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

SHAPES = {
    '3 M': dict(V=4096, D=192, F=512, N=6, K=2, H=32, layers_per_loop=6),
    '15 M': dict(V=4096, D=384, F=1024, N=6, K=2, H=64, layers_per_loop=8),
    '135 M': dict(V=49152, D=576, F=1536, N=9, K=3, H=64, layers_per_loop=30),
}
RANKS = {'3 M': '32', '15 M': '32', '135 M': '96'}
BATCH = {'3 M': (8, 256), '15 M': (8, 256), '135 M': (4, 512)}
STEPS = ('transformers', 'vanilla', 'recursive, 2 loops', 'relaxed', 'taught')
THREADS = 2
REPEATS = 3
_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
    'OMP_NUM_THREADS': str(THREADS)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--sizes', nargs='+', choices=SHAPES,
                      default=['3 M', '15 M'])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--output')
  parser.add_argument('--serve', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(*args.serve)
    return
  rows = []
  print(f'fp32, {THREADS} threads, {args.rounds} rounds\n'
        + ' ' * 25 + 'clock, over transformers, vanilla; processor, likewise')
  for size in args.sizes:
    rows += measure(size, args.rounds)
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + '\n')


def measure(size: str, rounds: int) -> list[dict]:
  """Rows of the table for one size."""
  servers = {name: subprocess.Popen(
      [sys.executable, __file__, '--serve', size, name], text=True,
      env={**os.environ, **_ENVIRONMENT}, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for name in STEPS}
  for server in servers.values():
    assert server.stdout.readline() == 'ready\n'
  times = {name: [] for name in STEPS}
  for _ in range(rounds):
    for name, server in servers.items():
      # Idle threads of the step before spin for a while.
      time.sleep(0.3)
      print(file=server.stdin, flush=True)
      times[name].append(json.loads(server.stdout.readline()))
  for server in servers.values():
    server.stdin.close()
    server.wait()
  return [_row(size, name, times) for name in STEPS]


def _row(size, name, times) -> dict:
  row = {'size': size, 'step': name, 'times': times[name]}
  text = f'{size:5}{name:20}'
  for kind, clock in enumerate(('seconds', 'cpu_seconds')):
    mine = [pair[kind] for pair in times[name]]
    row[clock] = statistics.median(mine)
    text += f'{row[clock] * 1e3:9.0f} ms'
    for other in ('transformers', 'vanilla'):
      ratio = statistics.median(
          a / b[kind] for a, b in zip(mine, times[other], strict=True))
      row[f'{clock}_over_{other}'] = ratio
      text += f'{ratio:7.2f}'
  B, T = BATCH[size]
  row['tokens_per_second'] = B * T / row['seconds']
  print(text, flush=True)
  return row


def serve(size: str, name: str) -> None:
  """Runs steps for every line of stdin, and prints one's two durations."""
  shape, batch = SHAPES[size], BATCH[size]
  looped = dict(shape, layers_per_loop=shape['layers_per_loop'] // 2, loops=2)
  relaxed = dict(looped, rank=RANKS[size])
  run = {
      'transformers': lambda: torch_step(shape, *batch),
      'vanilla': lambda: step(shape, *batch),
      'recursive, 2 loops': lambda: step(looped, *batch),
      'relaxed': lambda: step(relaxed, *batch),
      'taught': lambda: step(relaxed, *batch, teacher=shape),
  }[name]()
  print('ready', flush=True)
  for _ in sys.stdin:
    run()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(REPEATS):
      run()
    print([(time.perf_counter() - clock) / REPEATS,
           (time.process_time() - processor) / REPEATS], flush=True)


def step(shape: dict, B: int, T: int, teacher: dict | None = None):
  """One update of the library, all of it compiled once."""
  from training import Trainer, random_batch, random_variables

  import recursive_tx as rtx
  cfg, taught = rtx.ModelConfig(**shape), None
  if teacher:
    vanilla = rtx.ModelConfig(**teacher)
    taught = vanilla, random_variables(vanilla)
  trainer = Trainer(
      cfg, rtx.Run(unroll=True), batch=B, seq_len=T, steps=1000, lr=1e-4,
      teacher=taught)
  trainer.start(random_variables(cfg))
  batch = random_batch(cfg.V, B, T)

  def run():
    return float(trainer.update(batch)['loss'])

  run()
  return run


def torch_step(shape: dict, B: int, T: int):
  """One update of `transformers`, same shapes, same optimizer."""
  import torch
  import transformers
  torch.set_num_threads(THREADS)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=shape['V'], hidden_size=shape['D'],
      intermediate_size=shape['F'], num_attention_heads=shape['N'],
      num_hidden_layers=shape['layers_per_loop'],
      num_key_value_heads=shape['K'], head_dim=shape['H'],
      tie_word_embeddings=True, attn_implementation='sdpa', use_cache=False))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
  token_BT = torch.tensor(_tokens(shape['V'], B, T)).long()

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits = model(token_BT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, shape['V']), token_BT[:, 1:].reshape(-1))
    loss.backward()
    optimizer.step()
    return loss.item()

  run()
  return run


def _tokens(V: int, B: int, T: int):
  import numpy as np
  return np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)


if __name__ == '__main__':
  main()
