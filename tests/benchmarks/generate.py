"""Full-depth generation against `transformers`, side by side in one run.

  python tests/benchmarks/generate.py --checkpoint=DIR [--json=FILE]

The engine continues prompts of 16 random tokens by 128, as many at once as it
has slots; `transformers.generate` (greedy, with its cache) does the same on
the unrolled export. Both live in processes of their own, on the same cores,
and run in turns; ratios are of neighbours in time, medians over the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

BATCHES, PROMPT, NEW, THREADS = (1, 8, 32), 16, 128, 2
# At least so many times the tokens/s of transformers.
BARS = {1: 10.0, 8: 3.0, 32: 1.5}
KINDS = ('engine', 'transformers')
_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
    'OMP_NUM_THREADS': str(THREADS)}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--checkpoint', required=True,
                      help='a saved model directory, or a Hugging Face one')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--replicas', type=int, default=1,
                      help='of the engine, where it has as many slots')
  parser.add_argument('--json', help='file for the rows')
  parser.add_argument('--serve', choices=KINDS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.checkpoint, args.replicas)
    return
  rows = []
  print(f'prompts of {PROMPT} tokens, {NEW} new ones, fp32, {THREADS} threads, '
        f'{args.rounds} rounds\nbatch  engine tok/s  transformers  ratio  bar')
  with tempfile.TemporaryDirectory() as folder:
    servers = start(args.checkpoint, pathlib.Path(folder), args.replicas)
    try:
      for batch in BATCHES:
        rows.append(measure(servers, batch, args.rounds))
    finally:
      for server in servers.values():
        server.stdin.close()
        server.wait()
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')


def start(checkpoint: str, folder: pathlib.Path, replicas: int) -> dict:
  """A process for each kind, waiting for batch sizes on stdin."""
  import recursive_tx as rtx
  from recursive_tx.store import hf
  cfg, variables, *_ = rtx.open(pathlib.Path(checkpoint))
  export = folder / 'export'
  hf.save_hf(export, cfg, variables)
  sources = {'engine': checkpoint, 'transformers': str(export)}
  return {kind: subprocess.Popen(
      [sys.executable, __file__, '--serve', kind, '--checkpoint', source,
       f'--replicas={replicas}'],
      env={**os.environ, **_ENVIRONMENT, 'JAX_NUM_CPU_DEVICES': str(replicas)},
      text=True, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
      for kind, source in sources.items()}


def measure(servers: dict, batch: int, rounds: int) -> dict:
  """A row of the table."""
  rates = {kind: [] for kind in KINDS}
  for i in range(rounds + 1):
    for kind, server in servers.items():
      server.stdin.write(f'{batch}\n')
      server.stdin.flush()
      seconds = float(server.stdout.readline())
      if i:  # The first compiles.
        rates[kind].append(batch * NEW / seconds)
  ratio = statistics.median(
      one / other for one, other in zip(*rates.values(), strict=True))
  medians = {kind: statistics.median(values) for kind, values in rates.items()}
  print(f'{batch:5} {medians["engine"]:13.0f} {medians["transformers"]:13.0f}'
        f' {ratio:6.2f} {BARS[batch]:4.1f}', flush=True)
  return {'batch': batch, 'ratio': ratio, 'bar': BARS[batch],
          'tokens_per_second': medians, 'rounds': rates}


def serve(kind: str, checkpoint: str, replicas: int) -> None:
  """Answers each batch size on stdin with seconds on stdout."""
  run = (_engine(checkpoint, replicas) if kind == 'engine'
         else _transformers(checkpoint))
  for line in sys.stdin:
    batch = int(line)
    prompts = np.random.default_rng(0).integers(5, 500, (batch, PROMPT))
    print(run(prompts), flush=True)


def _engine(checkpoint: str, replicas: int):
  import recursive_tx as rtx
  from recursive_tx.cli import replicas as replicas_lib
  cfg, variables, *_ = rtx.open(pathlib.Path(checkpoint))
  engines = {}

  def build(slots: int, device):
    return rtx.Engine(cfg, variables, slots=slots, max_len=256, device=device)

  def run(prompts) -> float:
    if len(prompts) not in engines:
      count = replicas if len(prompts) % replicas == 0 else 1
      engines[len(prompts)] = replicas_lib.make(count, len(prompts), build)
    served = engines[len(prompts)]
    begin = time.perf_counter()
    for prompt in prompts.tolist():
      served.submit(rtx.Request(prompt, NEW, ignore_eos=True))
    told = 0
    while served.pending:
      told += len(served.poll())
    assert told == prompts.shape[0] * NEW, told
    return time.perf_counter() - begin

  return run


def _transformers(checkpoint: str):
  import torch
  import transformers
  torch.set_num_threads(THREADS)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      checkpoint, dtype=torch.float32).eval()

  def run(prompts) -> float:
    token_BT = torch.tensor(prompts)
    begin = time.perf_counter()
    with torch.no_grad():
      out = model.generate(
          token_BT, attention_mask=torch.ones_like(token_BT), do_sample=False,
          max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    assert out.shape[1] == PROMPT + NEW, out.shape
    return time.perf_counter() - begin

  return run


if __name__ == '__main__':
  main()
