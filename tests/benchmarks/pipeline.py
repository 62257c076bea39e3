"""Speed of the data stream alone, and how full its rows are.

  python tests/benchmarks/pipeline.py [--text=GLOB --document=LINE] [--output=F]

Reads the standard library's text with the demo's tokenizer, or `--text`,
through the very Stream that training reads: 16 rows of 2048 from 8 shards,
from a cache and tokenising on the fly, on two cores. What fills up at the
start, shuffle buffers, open rows and tf.data's own prefetching, is left out of
the time: some millions of tokens are drawn first. Tokens are non-padding ones.
Each measurement is a process of its own, since threads of one stream would
slow the other.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

CORES = 2
BARS = {'cached': 300_000, 'on the fly': 200_000}
BAR_USED = 0.97
_WARM, _TIMED = 6_000_000, 12_000_000
_TOKENIZER = str(pathlib.Path(__file__).parents[2] / 'recursive_tx' / 'demo')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--text', help='files to read, a glob')
  parser.add_argument('--document', default='file', help='as data tasks have')
  parser.add_argument('--tokenizer', default=_TOKENIZER)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--output', help='JSON file for the rows')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure is not None:
    print(json.dumps(measure(args)))
    return
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  with tempfile.TemporaryDirectory() as directory:
    rows = compare(args, pathlib.Path(directory))
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + '\n')


def compare(args, folder: pathlib.Path) -> list[dict]:
  """Prints the table, the best of the rounds of each kind."""
  from recursive_tx.data import cache_writer
  from recursive_tx.demo import corpus

  if not args.text:
    corpus.write(folder)
    args.text = str(folder / 'train.jsonl')
  start = time.monotonic()
  config = data_config(args, '')
  (made, *_) = cache_writer.write(
      config, args.tokenizer, str(folder / 'cache'), processes=CORES)
  seconds = time.monotonic() - start
  print(f'{args.text}: {made["documents"]:,} documents, {made["tokens"]:,} '
        f'tokens; cached in {seconds:.0f} s\n\n'
        '                tokens/s       bar  processor s/s   slots used   bar')
  rows = []
  for kind, cache in (('cached', str(folder / 'cache')), ('on the fly', '')):
    command = [
        sys.executable, __file__, f'--measure={cache}', f'--text={args.text}',
        f'--document={args.document}', f'--tokenizer={args.tokenizer}']
    runs = [
        json.loads(subprocess.run(
            command, check=True, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL).stdout.splitlines()[-1])
        for _ in range(args.rounds)
    ]
    row = max(runs, key=lambda run: run['tokens_per_second'])
    rows.append({'kind': kind, **row, 'rounds': runs})
    print(f'{kind:12}{row["tokens_per_second"]:12,.0f}{BARS[kind]:10,}'
          f'{row["processor"]:15.2f}{row["used"]:13.2%}{BAR_USED:6.0%}',
          flush=True)
  return rows


def data_config(args, cache: str):
  from recursive_tx import data

  kind = 'jsonl' if args.text.endswith('.jsonl') else 'text'
  document = '' if kind == 'jsonl' else args.document
  task = data.Task('text', kind, (args.text,), document=document)
  return data.DataConfig((task,), seq_len=2048, batch=16, cache=cache)


def measure(args) -> dict:
  """One stream's speed."""
  from recursive_tx import data
  from recursive_tx.text import tokenizer

  stream = data.Stream(
      data_config(args, args.measure), tokenizer.load(args.tokenizer))
  draw(stream, _WARM)
  clock, processor = time.monotonic(), time.process_time()
  tokens, slots = draw(stream, _TIMED)
  seconds = time.monotonic() - clock
  return {
      'tokens_per_second': tokens / seconds,
      'processor': (time.process_time() - processor) / seconds,
      'used': tokens / slots,
  }


def draw(stream, least: int) -> tuple[int, int]:
  """Tokens and slots of batches that hold so many tokens."""
  tokens = slots = 0
  while tokens < least:
    weight_BT = next(stream)['weight_BT']
    tokens += int(weight_BT.sum())
    slots += weight_BT.size
  return tokens, slots


if __name__ == '__main__':
  main()
