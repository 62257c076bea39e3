"""What the method is worth before any uptraining, beside what a user would
otherwise do to make a model smaller.

  python tests/benchmarks/worth.py --source=DIR --calibration=FILE \\
    --texts FILE [FILE ...] --output=FILE [--rows NAME ...]

DIR is a vanilla model with its tokenizer. All rows but one have about as many
unique parameters outside of embedding and head as a relaxed model at --rank:

  reduced    so many of the layers, evenly spaced, unlooped
  influence  the same number, without those that change their input least
             (ShortGPT; Men et al., 2024)
  low-rank   every kernel of every layer as a product of two, by its input's
             second moment (SVD-LLM; Wang et al., 2024): adapters of zeros
  recursive  tied layers without adapters, fitted (fewer parameters)
  average    relaxed, the averaged block, factors by SVD (the paper's)
  fit        relaxed, fitted to the calibration tokens

Perplexity and KL(original || model), in nats a token, are of each text's first
30,000 tokens in pieces of 1,024; none may be part of --calibration, a text file
or JSON lines with a `text` (.jsonl, .jsonl.xz). A row is written to --output
when it is done, and those that are there are not run again. With --save, each
model is a saved directory there, ROW, for tests/benchmarks/gpu.py to train.
"""

import argparse
import dataclasses
import itertools
import json
import lzma
import pathlib
import tempfile
import time

import jax
import numpy as np
import quality
import scipy.linalg

import recursive_tx as rtx
from recursive_tx.files import paths
from recursive_tx.store import native
from recursive_tx.tying import fit, kernels
from recursive_tx.tying.fit import layers

ROWS = ('reduced', 'influence', 'low-rank', 'recursive', 'average', 'fit')
LENGTH, SCORED = 1024, 30_000
_DAMPING = 1e-4  # Of a second moment, as a share of its mean diagonal.


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--source', required=True)
  parser.add_argument('--calibration', required=True, type=pathlib.Path)
  parser.add_argument('--tokens', type=int, default=16_384,
                      help='to calibrate on')
  parser.add_argument('--texts', required=True, nargs='+', type=pathlib.Path)
  parser.add_argument('--loops', type=int, default=2)
  parser.add_argument('--rank', default='96')
  parser.add_argument('--rows', nargs='+', choices=ROWS, default=ROWS)
  parser.add_argument('--output', required=True, type=pathlib.Path)
  parser.add_argument('--save', type=pathlib.Path, help='where models go')
  args = parser.parse_args()
  if args.calibration in args.texts:
    parser.error('--calibration is one of --texts')
  opened = rtx.open(args.source)
  token_QT = calibration(opened.tokenizer, args.calibration, args.tokens)
  texts = {path.stem: quality.Compared(
      opened.config, opened.variables, quality.pieces(
          opened.tokenizer, path.read_text('utf-8'), LENGTH, SCORED))
      for path in args.texts}
  maker = Maker(opened, args.loops, args.rank, token_QT)
  rows = json.loads(args.output.read_text()) if args.output.exists() else []
  done = {(row['row'], row['loops'], row['rank']) for row in rows}
  for name in ('original', *args.rows):
    if (name, args.loops, args.rank) in done:
      continue
    begin, cpu = time.perf_counter(), time.process_time()
    cfg, variables, parameters = maker(name)
    if args.save and name != 'original':
      native.save(args.save / name, cfg, variables, companions=args.source,
                  overwrite=True)
    row = {'row': name, 'loops': args.loops, 'rank': args.rank,
           'parameters': parameters,
           'seconds': round(time.perf_counter() - begin, 1),
           'cpu_seconds': round(time.process_time() - cpu, 1)}
    for text, compared in texts.items():
      row |= {f'{text} {metric}': float(f'{value:.5g}') for metric, value
              in compared(cfg, variables).items()}
    print(row, flush=True)
    rows.append(row)
    args.output.write_text(json.dumps(rows, indent=2) + '\n')


def calibration(tokenizer, path: pathlib.Path, tokens: int) -> np.ndarray:
  """The first tokens of a file's documents, [N, 256] int32."""
  ids = []
  opened = lzma.open if path.suffix == '.xz' else open
  with opened(path, 'rt', encoding='utf-8') as lines:
    texts = (json.loads(line)['text'] for line in lines) if (
        '.jsonl' in path.suffixes) else [lines.read()]
    for text in texts:
      ids += [*tokenizer.encode(text), tokenizer.eos_id]
      if len(ids) >= tokens:
        break
  return np.asarray(ids[:tokens // 256 * 256], np.int32).reshape(-1, 256)


class Maker:
  """Makes the smaller models, each (cfg, variables, unique parameters outside
  of embedding and head)."""

  def __init__(self, opened, loops, rank, token_QT):
    self.cfg, self.variables = opened.config, opened.variables
    self.loops, self.rank, self.token_QT = loops, rank, token_QT
    rcfg = dataclasses.replace(
        self.cfg, loops=loops, rank=rank,
        layers_per_loop=self.cfg.layers_per_loop // loops)
    self.budget = _parameters(rcfg)

  def __call__(self, name):
    if name == 'original':
      return self.cfg, self.variables, _parameters(self.cfg)
    if name in ('reduced', 'influence'):
      return self._subset(name)
    if name == 'low-rank':
      return self._low_rank()
    rank, init = {'recursive': ('0', 'fit'), 'average': (self.rank, 'average'),
                  'fit': (self.rank, 'fit')}[name]
    cfg, variables = rtx.relax(
        self.cfg, self.variables, loops=self.loops, rank=rank, init=init,
        calibration=self.token_QT if init == 'fit' else None)
    return cfg, variables, _parameters(cfg)

  def _subset(self, name):
    depth = self.cfg.layers_per_loop
    one = _parameters(dataclasses.replace(self.cfg, layers_per_loop=1))
    count = round(self.budget / one)
    kept = np.round(np.linspace(0, depth - 1, count)).astype(int)
    if name == 'influence':
      kept = np.sort(np.argsort(self._influence())[depth - count:])
    params = dict(self.variables['params'])
    params['block'] = jax.tree.map(lambda x: x[kept], params['block'])
    cfg = dataclasses.replace(self.cfg, layers_per_loop=count)
    return cfg, {'params': params}, _parameters(cfg)

  def _influence(self):
    """1 less the cosine of each layer's input and output, the mean."""
    stream = list(layers.stream(
        self.cfg, self._read, layers.ends(self.cfg, self._read),
        self.token_QT[:16]))
    return [1 - np.mean(np.sum(x * y, -1) / (
        np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)))
            for x, y in zip(stream, stream[1:], strict=False)]

  def _low_rank(self):
    cfg = self.cfg
    sizes = {name: cfg.in_out(name) for name in cfg.kernels}
    dense = sum(rows * columns for rows, columns in sizes.values())
    rest = _parameters(cfg) - cfg.layers_per_loop * dense  # Norms and biases.
    share = (self.budget - rest) / (cfg.layers_per_loop * dense)
    ranks = {name: int(share * rows * columns / (rows + columns))
             for name, (rows, columns) in sizes.items()}
    # As many loops as layers, of nothing but what each adds to zeros.
    depth = cfg.layers_per_loop
    made, variables = rtx.relax(cfg, self.variables, loops=depth)
    made = dataclasses.replace(
        made, rank='+'.join(f'{name}{rank}' for name, rank in ranks.items()))
    shapes = rtx.model.flat_shapes(made)
    params = variables['params']
    for path, leaf in paths.items(params):
      if path.endswith('/kernel'):
        paths.put(params, path, np.zeros_like(leaf))
    for name, factor in itertools.product(ranks, 'ab'):
      path = f'adapters/{name}/{factor}'
      paths.put(params, path, np.zeros(shapes[path], np.float32))
    with tempfile.TemporaryDirectory() as folder:
      moments = fit.measure(
          cfg, self._read, self.token_QT, pathlib.Path(folder), seed=0)
      for layer in range(depth):
        for name, rank in ranks.items():
          for factor, value in zip('ab', truncated(
              kernels.matrix(cfg, self._read, name, layer),
              moments.input(name, layer), rank), strict=True):
            leaf = params['adapters'][name][factor]
            leaf[layer] = value.reshape(leaf[layer].shape)
    return made, variables, _parameters(made) - dense

  def _read(self, path, layer):
    leaf = paths.get(self.variables['params'], path)
    return np.asarray(leaf if layer is None else leaf[layer])


def truncated(kernel, moment, rank) -> tuple[np.ndarray, np.ndarray]:
  """The two factors whose product has the least error of the kernel's output,
  in equal parts."""
  moment = moment.astype(np.float64)
  moment += _DAMPING * np.trace(moment) / len(moment) * np.eye(len(moment))
  root = np.linalg.cholesky(moment)
  U, S, Vt = scipy.linalg.svd(root.T @ kernel, full_matrices=False)
  half = np.sqrt(S[:rank])
  return (scipy.linalg.solve_triangular(root.T, U[:, :rank] * half),
          half[:, None] * Vt[:rank])


def _parameters(cfg) -> int:
  """Unique ones outside of embedding and head."""
  return sum(int(np.prod(shape)) for path, shape in rtx.model.flat_shapes(
      cfg).items() if path.split('/')[0] not in ('embed', 'head'))


if __name__ == '__main__':
  main()
