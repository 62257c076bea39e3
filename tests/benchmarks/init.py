"""How near a recursive model starts to its original, by init, loops and rank.

  python tests/benchmarks/init.py --calibration=FILE --text=FILE \\
    --other=FILE [--document='<|endoftext|>'] [--loops 2 3] [--prelude=N] \\
    [--coda=N] [--ranks 0 32 64] [--seeds 0 1 2] [--json=FILE] \\
    [--steps 50 200 1000 --workdir=DIR] MODEL [MODEL ...]

MODEL is a directory with a model and its tokenizer. `fit` is fitted to
--calibration, from which each seed draws its own sequences, and `sampled` to
text that the model samples; both, and the paper's inits, keep norms per loop.
The KL divergence to the original, in nats a token, is on --text; bits per byte
are on --text and on --other, of another kind. The texts are different files,
with nothing in common. With --json each cell is appended as a line when it is
done, and those that the file holds are not run again.

With --steps every model is uptrained on --calibration by distillation from the
original, once for each number of steps, with a schedule of its own, and
measured: held-out nats a token, KL divergence, bits per byte of --other, and
the tokens that the longest run took to come within 0.05 nats of the original.
Seeds order the training text too.
"""

import argparse
import functools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from uptraining import NEAR, Plan, tokens_to, uptrain

import recursive_tx as rtx
from recursive_tx import data
from recursive_tx.store import convert
from recursive_tx.text import tokenizer
from recursive_tx.tying import fit

INITS = ('average', 'stepwise', 'lower', 'fit', 'sampled')
SHAPE = ('model', 'loops', 'prelude', 'coda', 'rank')
KEYS = (*SHAPE, 'init', 'seed')
COLUMNS = (('model', 14), ('loops', 6), ('prelude', 8), ('coda', 5),
           ('rank', 13), ('init', 9), ('seed', 5), ('parameters', 12),
           ('kl', 8), ('to average', 11), ('bits', 8), ('other bits', 11),
           ('seconds', 8))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('models', nargs='+')
  for name in ('calibration', 'text', 'other'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--document', default='')
  parser.add_argument('--loops', type=int, nargs='+', default=[2, 3])
  for name in ('prelude', 'coda'):
    parser.add_argument(f'--{name}', type=int, default=0,
                        help='Layers left out of the loops.')
  parser.add_argument('--ranks', nargs='+', default=['0', '32', '64'])
  parser.add_argument('--inits', nargs='+', default=INITS, choices=INITS)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0])
  parser.add_argument('--tokens', type=int, default=16384,
                      help='To fit to, for each seed.')
  parser.add_argument('--heldout', type=int, default=16384,
                      help='Tokens of each text to measure on.')
  parser.add_argument('--json')
  parser.add_argument('--steps', type=int, nargs='+', default=[])
  parser.add_argument('--lr', type=float, default=5e-4)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--workdir', help='Interrupted uptraining continues.')
  args = parser.parse_args()
  if bool(args.steps) != bool(args.workdir):
    parser.error('--steps and --workdir go together')
  if len({args.calibration, args.text, args.other}) < 3:
    parser.error('--calibration, --text and --other must be different files')
  lines = pathlib.Path(args.json) if args.json else None
  rows = [json.loads(line) for line in lines.read_text().splitlines()
          ] if lines and lines.exists() else []
  for model in args.models:
    for row in cells(args, model, rows):
      rows.append(row)
      print({key: row[key] for key in (*KEYS, 'kl', 'seconds')}, flush=True)
      if lines:
        with lines.open('a') as file:
          file.write(json.dumps(row) + '\n')
  print(table(rows))
  if args.steps:
    print(uptrained(rows, sorted(args.steps)))


def cells(args, model: str, done: list[dict]):
  """Yields a row for each cell that is not done."""
  cfg, variables, *_ = rtx.open(model)
  ids, name = tokenizer.load(model), pathlib.Path(model).name
  texts = {key: heldout(getattr(args, key), ids, args)
           for key in ('text', 'other')}
  known = {tuple(row[key] for key in KEYS) for row in done}
  original = (name, 1, 0, 0, '0', 'original', 0)
  if original not in known:
    yield row_of(original, cfg, measure((cfg, variables), (cfg, variables),
                                        texts), 0.0)
  for loops in args.loops:
    for rank in args.ranks:
      for init in args.inits:
        # The paper's inits draw nothing, but uptraining does.
        for seed in args.seeds if (
            init in ('fit', 'sampled') or args.steps) else [0]:
          key = (name, loops, args.prelude, args.coda, rank, init, seed)
          if key in known:
            continue
          began = time.monotonic()
          new = relax(args, cfg, variables, ids, key)
          seconds = time.monotonic() - began
          score = functools.partial(measure, (cfg, variables), texts=texts)
          row = row_of(key, new[0], score(new), seconds)
          if args.steps:
            row |= uptrain(
                plan(args, model), new, pathlib.Path(
                    args.workdir, '-'.join(map(str, key))), seed, score)
          yield row


def plan(args, model: str) -> Plan:
  """How a converted model is uptrained."""
  return Plan(
      teacher=model, budgets=tuple(sorted(args.steps)), heldout=args.heldout,
      lr=args.lr, batch=args.batch, seq_len=256, task=data.Task(
          'text', 'text', train=(args.calibration,), heldout=(args.text,),
          document=args.document))


def relax(args, cfg, variables, ids, key):
  """The model of one cell."""
  _, loops, prelude, coda, rank, init, seed = key
  calibration = None
  if init == 'fit':
    rows_NT = fit.read(args.calibration, ids, tokens=1 << 24,
                       document=args.document)
    count = max(2, args.tokens // rows_NT.shape[1])
    calibration = np.random.default_rng(seed).permutation(rows_NT)[:count]
  return rtx.relax(
      cfg, variables, loops=loops, prelude=prelude, coda=coda, rank=rank,
      calibration=calibration, init='fit' if init == 'sampled' else init,
      seed=seed)


def heldout(path: str, ids, args):
  """Held-out batches of a text."""
  task = data.Task('text', 'text', train=(path,), heldout=(path,),
                   document=args.document)
  return data.heldout(
      data.DataConfig((task,), seq_len=256, batch=8, shards=1), ids,
      max_tokens=args.heldout)


def measure(original, new, texts) -> dict:
  """KL on 'text', and bits per byte on both."""
  # The paper's inits may lead far off, but all models have the same tokens.
  apply = [jax.jit(rtx.Decoder(cfg).apply) for cfg, _ in (original, new)]

  @jax.jit
  def nats(one, other, batch):
    one, other = jax.nn.log_softmax(one), jax.nn.log_softmax(other)
    kl_BT = jnp.sum(jnp.exp(one) * (one - other), axis=-1)
    loss_BT = -jnp.take_along_axis(
        other, batch['target_BT'][..., None], -1)[..., 0]
    return [jnp.sum(x * batch['weight_BT']) for x in (kl_BT, loss_BT)]

  found = {}
  for key, text in texts.items():
    sums = np.zeros(3)
    for batch in text.batches:
      logits = [f(v, batch['token_BT'], batch['segment_BT'],
                  batch['position_BT'])
                for f, (_, v) in zip(apply, (original, new), strict=True)]
      sums += [*map(float, nats(*logits, batch)), batch['weight_BT'].sum()]
    kl, loss, tokens = sums.tolist()
    found[key] = {'kl': kl / tokens, 'tokens': tokens,
                  'bits_per_byte': loss / math.log(2) / text.num_bytes}
  return found


def row_of(key, cfg, found, seconds) -> dict:
  """One line of the results."""
  return {**dict(zip(KEYS, key, strict=True)),
          'parameters': convert.parameters(cfg)['total'],
          'kl': found['text']['kl'], 'other_kl': found['other']['kl'],
          'bits': found['text']['bits_per_byte'],
          'other_bits': found['other']['bits_per_byte'], 'seconds': seconds}


def table(rows: list[dict]) -> str:
  """The rows as text, with the KL as a share of average's."""
  base = {tuple(row[key] for key in SHAPE): row['kl'] for row in rows
          if row['init'] == 'average'}
  lines = [''.join(name.rjust(width) for name, width in COLUMNS)]
  for row in sorted(rows, key=lambda row: (
      row['model'], row['loops'], len(row['rank']), row['rank'])):
    share = base.get(tuple(row[key] for key in SHAPE))
    cells = (
        *(row[key] for key in KEYS), f'{row["parameters"]:,}',
        f'{row["kl"]:.4f}',
        f'{row["kl"] / share:.4f}' if share else '', f'{row["bits"]:.4f}',
        f'{row["other_bits"]:.4f}', f'{row["seconds"]:.1f}')
    lines.append(''.join(str(cell).rjust(width) for cell, (_, width)
                         in zip(cells, COLUMNS, strict=True)))
  return '\n'.join(lines)


def uptrained(rows: list[dict], budgets: list[int]) -> str:
  """What uptraining made of the starts, as text."""
  columns = (*COLUMNS[:len(KEYS)], *(
      (f'{name} {steps}', 12) for name in ('nats', 'kl', 'other')
      for steps in (0, *budgets)), (f'to {NEAR} nats', 14))
  lines = [''.join(name.rjust(width) for name, width in columns)]
  for row in sorted(
      (row for row in rows if 'curves' in row), key=lambda row: [
          row[key] for key in (*SHAPE, 'seed', 'init')]):
    curves, after = row['curves'].values(), row['after'].values()
    *_, longest = curves
    near = tokens_to(longest, row['original'] + NEAR)
    figures = (
        longest[0][1], *(curve[-1][1] for curve in curves),
        row['kl'], *(found['text']['kl'] for found in after),
        row['other_bits'], *(
            found['other']['bits_per_byte'] for found in after))
    cells = (*(row[key] for key in KEYS), *(f'{x:.4f}' for x in figures),
             'not reached' if near is None else f'{near:,.0f}')
    lines.append(''.join(str(cell).rjust(width) for cell, (_, width)
                         in zip(cells, columns, strict=True)))
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
