"""What the library does on one GPU: kernels, uptraining, scores, decoding.

  python tests/benchmarks/gpu.py STEP ... --data=DIR --output=DIR

Steps, in this order:
  peak       bf16 matrix products and copies: the ceilings of this card
  attention  the fused attention against the plain one, forward and backward
  speed      tokens/s and MFU of training steps
  profile    which kernels their time goes to
  tokens     the corpus, tokenised
  rows       500,000 tokens of uptraining of every model of worth.py --save,
             with the original as its teacher
  train      the same of the fit alone, with --million tokens
  score      perplexity, divergence and tasks of all models that are there
  decode     tokens/s of the engine at several numbers of slots

DIR of --data holds model/ (a Hugging Face directory), corpus.jsonl.xz (one
{"text": ...} a line), texts/*.txt and eval/*.jsonl; `launch/gpu.sh` makes it,
and the starting points in --models, which `rows` waits for. Every step writes
DIR/STEP.json of --output as soon as it has a figure; `rows` and `score` skip
what is there. Needs neither TensorFlow nor a network. `--small` is a rehearsal
on a CPU.
"""

import argparse
import collections
import dataclasses
import functools
import gzip
import itertools
import json
import lzma
import math
import pathlib
import re
import statistics
import tempfile
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import quality
from training import TABLE, Trainer, random_batch, random_variables

import recursive_tx as rtx
from recursive_tx import engine, files
from recursive_tx.data import packing
from recursive_tx.evaluate.loglikelihood import Scorer
from recursive_tx.machine import chips
from recursive_tx.model import attention as attention_lib
from recursive_tx.store import native

LOOPS, RANK = 2, 58  # Two thirds of the parameters outside of the embedding.
TAUGHT = 'relaxed, with its teacher'
# Of `rows`: (model, rate, seeds), the first ones first.
RUNS = (('reduced', 1e-3, 1), ('fit', 1e-3, 3), ('average', 1e-3, 3),
        ('low-rank', 1e-3, 1), ('recursive', 1e-3, 1),
        *((start, rate, 1) for rate in (3e-3, 3e-4) for start in (
            'fit', 'average', 'low-rank', 'reduced', 'recursive')))


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything; `small` is a rehearsal."""
  batch: int = 32
  seq_len: int = 1024
  slots: tuple[int, ...] = (1, 32, 256)
  new: int = 128
  rank: int = RANK
  row: tuple[int, int, int] = (244, 4, 512)  # Steps, batch, length of `rows`.
  scored: int = 30_000  # Tokens of each text that perplexity is taken on.
  documents: int = 1 << 30  # Of each task.
  timed: int = 10
  square: int = 8192
  lengths: tuple[int, ...] = (1024, 2048, 4096)


SMALL = Sizes(batch=4, seq_len=128, slots=(1, 4), new=8, rank=8,
              row=(4, 2, 128), scored=2_000, documents=20, timed=2, square=256,
              lengths=(128,))


class Report:
  """A step's figures, written whenever there is a new one."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.rows = json.loads(path.read_text()) if path.exists() else []

  def add(self, **row):
    """Adds a row, and prints it."""
    row = {key: float(f'{value:.6g}') if isinstance(value, float) else value
           for key, value in row.items()}
    print(f'{self._path.stem}:', *(f'{key}={value}' for key, value in
                                   row.items()), flush=True)
    self.rows.append(row)
    files.write_json(self._path, self.rows)


class Bench:
  """The models and texts of --data, and where figures go."""

  def __init__(self, args):
    self.data = pathlib.Path(args.data)
    self.output = pathlib.Path(args.output)
    self.models = pathlib.Path(args.models or args.output)
    self.output.mkdir(parents=True, exist_ok=True)
    self.models.mkdir(parents=True, exist_ok=True)
    self.sizes = SMALL if args.small else Sizes()
    self.million, self.lr = args.million, args.lr
    self.minutes, self.attention = args.minutes, args.attention

  def report(self, name):
    return Report(self.output / f'{name}.json')

  @functools.cached_property
  def original(self) -> rtx.store.Opened:
    """The vanilla model."""
    return rtx.open(self.data / 'model')

  @functools.cached_property
  def documents(self) -> list[np.ndarray]:
    """Ids of each document of the corpus; tokenised once, and kept."""
    path = self.data / 'tokens.npz'
    if not path.exists():
      begin = time.perf_counter()
      tokenizer = self.original.tokenizer
      first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
      with lzma.open(self.data / 'corpus.jsonl.xz', 'rt') as lines:
        texts = [json.loads(line)['text'] for line in lines]
      rows = [[*first, *row, tokenizer.eos_id]
              for row in tokenizer.encode_batch(texts)]
      np.savez(path, ids=np.concatenate(rows).astype(np.int32),
               ends=np.cumsum([len(row) for row in rows]))
      print(f'{sum(map(len, rows)):,} tokens of {len(rows):,} documents in '
            f'{time.perf_counter() - begin:.0f} s', flush=True)
    held = np.load(path)
    return np.split(held['ids'], held['ends'][:-1])

  def batches(self, batch: int, seq_len: int, steps: int, seed: int = 0):
    """So many batches of the corpus, shuffled and packed as in a run."""
    packer = packing.Packer(seq_len)
    for i in np.random.default_rng(seed).permutation(len(self.documents)):
      for piece in packing.split(self.documents[i], seq_len):
        packer.add(piece)
      if len(packer.ready) >= batch * steps:
        break
    rows = list(packer.ready)
    return [packing.batch(rows[i:i + batch], seq_len)
            for i in range(0, len(rows) - batch + 1, batch)][:steps]

  def trainer(self, cfg, with_teacher, attention, *, steps, lr, batch=0,
              seq_len=0, fixed='') -> Trainer:
    """Of a model, in bf16, perhaps with the original as its teacher.

    Parameters that match `fixed` stay as they are.
    """
    table = ((fixed, 0.0, 0.0), *TABLE) if fixed else TABLE
    return Trainer(
        cfg, rtx.Run(dtype='bfloat16', attention=attention, logits_mib=2048),
        batch=batch or self.sizes.batch, seq_len=seq_len or self.sizes.seq_len,
        steps=steps, lr=lr, table=table,
        teacher=self.original[:2] if with_teacher else None)

  def models_there(self) -> dict[str, Any]:
    """(cfg, variables) of every model to score, opened when it is its turn."""
    def opened(directory):
      return lambda: rtx.open(directory)[:2]

    def random():
      return self.original.config, random_variables(self.original.config)

    made = sorted((path for path in self.models.iterdir()
                   if (path / 'config.json').exists()),
                  key=lambda path: path.stat().st_mtime)
    return {'original': opened(self.data / 'model'), 'random': random} | {
        path.name: opened(path) for path in made}


def peak(bench: Bench):
  """What the card does at most: TFLOP/s in bf16, GB/s read and written."""
  n, report = bench.sizes.square, bench.report('peak')
  x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16)
          for i in range(2))
  seconds = timed(jax.jit(jnp.matmul), x, y)
  report.add(device=jax.devices()[0].device_kind, jax=jax.__version__,
             tflops=2 * n**3 / seconds / 1e12)
  z = jnp.tile(x, (4, 1))
  seconds = timed(jax.jit(lambda z: z + jnp.bfloat16(1)), z)
  report.add(gb_per_second=2 * z.nbytes / seconds / 1e9)


def attention(bench: Bench):
  """Milliseconds of one layer's attention, forward and with its gradient."""
  cfg, report = bench.original.config, bench.report('attention')
  for T in bench.sizes.lengths:
    B = max(1, 8 * 1024 // T)
    q, k, v = (jax.random.normal(
        jax.random.key(i), (B, T, heads, cfg.H), jnp.bfloat16)
        for i, heads in enumerate((cfg.N, cfg.K, cfg.K)))
    segment_BT = jnp.arange(T)[None] * 3 // T + jnp.zeros((B, 1), jnp.int32)
    ways = {name: functools.partial(attended, segment_BT, name)
            for name in ('plain', 'blocks', 'pallas')}
    # No segments there: a lead on what else there is, not a way of ours.
    ways['cudnn, without segments'] = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation='cudnn')
    exact = None
    for name, way in ways.items():
      def total(q, k, v, way=way):
        return jnp.sum(way(q, k, v).astype(jnp.float32) ** 2)

      try:
        out = np.asarray(jax.jit(way)(q, k, v), np.float32)
        exact = out if exact is None else exact
        report.add(
            way=name, B=B, T=T, forward_ms=1e3 * timed(jax.jit(way), q, k, v),
            both_ms=1e3 * timed(jax.jit(jax.grad(total, (0, 1, 2))), q, k, v),
            error=float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
      except Exception as error:  # A figure that failed is a figure.
        report.add(way=name, B=B, T=T, failed=str(error).split('\n')[0][:200])


def attended(segment_BT, implementation, q, k, v):
  """Attention within segments, as a layer calls it."""
  place_1T = jnp.arange(q.shape[1])[None]
  return attention_lib.attend(
      q, k, v, mask_BTS=attention_lib.visible(
          place_1T, place_1T, window=0, segment_BT=segment_BT),
      segment_BT=segment_BT, window=0, scale=q.shape[-1]**-0.5,
      implementation=implementation)


def decode(bench: Bench):
  """Tokens/s of the engine, prompts of 16 tokens, all slots full."""
  report = bench.report('decode')
  there = bench.models_there()
  for slots, name in itertools.product(
      sorted(bench.sizes.slots, reverse=True), ('fit', 'original')):
    if name in there:
      cfg, variables = there[name]()
      run = rtx.Run(dtype='bfloat16')
      eng = engine.Engine(cfg, variables, slots=slots, max_len=256, run=run)
      prompts = np.random.default_rng(0).integers(0, cfg.V, (slots, 16))

      def once(eng=eng, prompts=prompts):
        for prompt in prompts:
          eng.submit(engine.Request(
              prompt.tolist(), bench.sizes.new, ignore_eos=True))
        count = 0
        while eng.pending:
          count += len(eng.poll())
        return count

      compiling = time.perf_counter()
      once()
      compiling = time.perf_counter() - compiling
      rates = []
      for _ in range(3):
        begin = time.perf_counter()
        count = once()
        rates.append(count / (time.perf_counter() - begin))
      report.add(model=name, loops=cfg.loops, slots=slots, dtype=run.dtype,
                 tokens_per_second=statistics.median(rates),
                 compile_seconds=compiling)


def speed(bench: Bench):
  """Training steps: what a token costs, and which part of the peak it is."""
  report, cfg, relaxed = bench.report('speed'), *both(bench)
  batch = random_batch(cfg.V, bench.sizes.batch, bench.sizes.seq_len)
  for name, student, with_teacher, way in (
      (TAUGHT, relaxed, True, bench.attention),
      ('relaxed', relaxed, False, bench.attention),
      ('vanilla', cfg, False, bench.attention),
      (TAUGHT, relaxed, True, 'blocks')):
    try:
      trainer = bench.trainer(
          student, with_teacher, way, steps=1000, lr=bench.lr)
      trainer.start(random_variables(student))
      seconds = trainer.timed(batch, bench.sizes.timed)
      report.add(step=name, attention=way, batch=bench.sizes.batch,
                 seq_len=bench.sizes.seq_len, ms=1e3 * seconds,
                 tokens_per_second=trainer.tokens / seconds,
                 tflops=trainer.flops / seconds / 1e12,
                 mfu=trainer.flops / seconds / chip_flops(),
                 compile_seconds=trainer.compile_seconds)
    except Exception as error:
      report.add(step=name, attention=way,
                 failed=str(error).split('\n')[0][:300])


def profile(bench: Bench):
  """Milliseconds of a training step by kind of kernel."""
  report, cfg, relaxed = bench.report('profile'), *both(bench)
  batch = random_batch(cfg.V, bench.sizes.batch, bench.sizes.seq_len)
  for name, student in (('relaxed', relaxed), ('vanilla', cfg)):
    trainer = bench.trainer(
        student, False, bench.attention, steps=1000, lr=bench.lr)
    trainer.start(random_variables(student))
    trainer.timed(batch, 1)
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder, create_perfetto_trace=True):
        jax.block_until_ready(trainer.update(batch))
      path, = pathlib.Path(folder).rglob('perfetto_trace.json.gz')
      events = json.loads(gzip.decompress(path.read_bytes()))
    for kind, ms in kernels(events.get('traceEvents', [])):
      report.add(step=name, kernel=kind, ms=ms)


def kernels(events: list[dict]) -> list[tuple[str, float]]:
  """(name without numbers, milliseconds), the longest first."""
  processes = {event['pid'] for event in events
               if event.get('name') == 'process_name'
               and '/device:' in event['args']['name']}
  threads = {(event['pid'], event['tid']) for event in events
             if event.get('name') == 'thread_name' and event[
                 'pid'] in processes and 'Stream' in event['args']['name']}
  sums = collections.Counter()
  for event in events:
    if event.get('ph') == 'X' and (event['pid'], event['tid']) in threads:
      sums[re.sub(r'[._]?\d+', '', event['name'])[:60]] += event['dur'] / 1e3
  return sums.most_common(25)


def both(bench: Bench):
  """The vanilla model's config, and the relaxed one's."""
  cfg = bench.original.config
  return cfg, dataclasses.replace(
      cfg, loops=LOOPS, layers_per_loop=cfg.layers_per_loop // LOOPS,
      rank=str(bench.sizes.rank))


def tokens(bench: Bench):
  """Tokenises the corpus, which the next steps then read."""
  bench.report('tokens').add(
      documents=len(bench.documents), tokens=sum(map(len, bench.documents)))


def rows(bench: Bench):
  """Uptrains each starting point for a while; none begins after --minutes."""
  report, (steps, batch, seq_len) = bench.report('rows'), bench.sizes.row
  done = {row['model'] for row in report.rows}
  end = time.perf_counter() + 60 * bench.minutes
  waiting = list(RUNS)
  while waiting and time.perf_counter() < end:
    there = [run for run in waiting if (
        bench.models / run[0] / 'config.json').exists()]
    if not there:
      time.sleep(1)
      continue
    waiting.remove(there[0])
    start, lr, seeds = there[0]
    names = {f'{start}-{lr:g}-{seed}': seed for seed in range(seeds)}
    if done.issuperset(names):
      continue
    cfg, variables = rtx.open(bench.models / start)[:2]
    trainer = bench.trainer(
        cfg, True, bench.attention, steps=steps, lr=lr, batch=batch,
        seq_len=seq_len,
        # The adapters of zeros are the model.
        fixed='block/.*/kernel' if start == 'low-rank' else '')
    for name, seed in names.items():
      trainer.start(variables)
      begin, losses = time.perf_counter(), []
      for arrays in bench.batches(batch, seq_len, steps, seed):
        losses.append(trainer.update(arrays)['loss'])
      losses = [float(f'{loss:.4g}') for loss in losses]
      seconds = time.perf_counter() - begin
      keep(bench, name, cfg, trainer)
      report.add(model=name, start=start, lr=lr, seed=seed, steps=steps,
                 tokens=steps * trainer.tokens, seconds=seconds, losses=losses)


def train(bench: Bench):
  """Uptrains the fit, at most one pass of the corpus; keeps it on the way."""
  report = bench.report('train')
  cfg, variables = rtx.open(bench.models / 'fit')[:2]
  tokens = bench.sizes.batch * bench.sizes.seq_len
  batches = bench.batches(bench.sizes.batch, bench.sizes.seq_len,
                          int(bench.million * 1e6) // tokens)
  steps = len(batches)
  trainer = bench.trainer(
      cfg, True, bench.attention, steps=steps, lr=bench.lr)
  report.add(steps=steps, lr=bench.lr, tokens=steps * tokens)
  trainer.start(variables)
  kept = {max(1, round(million * 1e6 / tokens)): f'long-{million:g}'
          for million in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)}
  kept[steps] = 'uptrained'
  begin, weights = time.perf_counter(), 0.0
  for i, batch in enumerate(batches, 1):
    metrics = trainer.update(batch)
    weights += float(batch['weight_BT'].sum())
    if i % max(1, steps // 40) == 0 or i in (1, steps):
      found = {key: float(value) for key, value in metrics.items()}
      elapsed = time.perf_counter() - begin
      report.add(step=i, seconds=elapsed, predicted_tokens=weights,
                 tokens_per_second=i * trainer.tokens / elapsed, **found)
    if i in kept:
      keep(bench, kept[i], cfg, trainer)


def keep(bench: Bench, name: str, cfg, trainer: Trainer):
  """Saves a trainer's model."""
  native.save(bench.models / name, cfg,
              {'params': jax.tree.map(np.asarray, trainer.state.params)},
              companions=bench.data / 'model', overwrite=True)


def score(bench: Bench):
  """Perplexity, divergence from the original, and tasks, of every model.

  All are scored as the original's program: loops unrolled, adapters merged,
  layers that a model lacks of zeros, which add nothing. On a GPU in TF32.
  """
  report, sizes = bench.report('score'), bench.sizes
  cfg, exact, tokenizer = bench.original[:3]
  start = time.perf_counter()

  def told(what):
    print(f'score: {time.perf_counter() - start:.0f} s: {what}', flush=True)

  rows, texts = 4, {}
  for path in sorted((bench.data / 'texts').glob('*.txt')):
    token_QT = quality.pieces(
        tokenizer, path.read_text('utf-8'), sizes.seq_len, sizes.scored)
    # One shape, since each is compiled for a while.
    token_QT = token_QT[:len(token_QT) // rows * rows]
    texts[path.stem] = quality.Compared(cfg, exact, token_QT, rows)
    told(f'original read {path.stem}')
  tasks = {path.stem: quality.requests(tokenizer, path, sizes.documents)
           for path in sorted((bench.data / 'eval').glob('*.jsonl'))}
  done = {row['model'] for row in report.rows}
  for name, opened in bench.models_there().items():
    if name in done:
      continue
    begin = time.perf_counter()
    mine, variables = opened()
    row = {'model': name, 'loops': mine.loops, 'rank': mine.rank}
    variables = unlooped(mine, variables, cfg)
    for text, compared in texts.items():
      row |= {f'{text} {metric}': value for metric, value in compared(
          cfg, variables).items()}
      told(f'{name} read {text}')
    scorer = Scorer(cfg, variables)
    for task, (requests, questions) in tasks.items():
      found = scorer(requests)
      row |= {f'{task} {metric}': value for metric, value in quality.accuracies(
          zip(found.log_p_LQ[0], found.greedy_LQ[0], strict=True),
          questions).items()}
      told(f'{name} did {task}')
    report.add(**row, seconds=time.perf_counter() - begin)


def unlooped(mine, variables, cfg):
  """A model's variables as one of `cfg`, a vanilla one of as many layers or
  more."""
  made, variables = (mine, variables) if mine.loops == 1 else rtx.merge(
      mine, variables)
  missing = cfg.layers_per_loop - made.layers_per_loop
  params = jax.tree.map(lambda x: np.asarray(x, np.float32),
                        variables['params'])
  params['block'] = jax.tree.map(lambda x: np.concatenate(
      [x, np.zeros((missing, *x.shape[1:]), x.dtype)]), params['block'])
  return {'params': params}


def chip_flops() -> float:
  """The data sheet's bf16 FLOP/s; NaN where the device is not known."""
  chip = chips.find(jax.devices()[0])
  return chip.flops if chip else math.nan


def timed(call, *args, repeats: int = 10) -> float:
  """Median seconds of a jitted call."""
  jax.block_until_ready(call(*args))
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(call(*args))
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


STEPS = {f.__name__: f for f in (
    peak, attention, speed, profile, tokens, rows, train, score, decode)}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('steps', nargs='+', choices=STEPS, metavar='STEP')
  parser.add_argument('--data', required=True)
  parser.add_argument('--output', required=True, help='for the figures')
  parser.add_argument('--models', help='for models and tokens (--output)')
  parser.add_argument('--million', type=float, default=20,
                      help='tokens of `train`')
  parser.add_argument('--minutes', type=float, default=4, help='of `rows`')
  parser.add_argument('--lr', type=float, default=1e-3, help='the peak')
  parser.add_argument('--attention', default='auto', help='of training')
  parser.add_argument('--small', action='store_true')
  args = parser.parse_args()
  logging.set_verbosity(logging.INFO)
  bench = Bench(args)
  for name in args.steps:
    begin = time.perf_counter()
    STEPS[name](bench)
    print(f'{name}: {time.perf_counter() - begin:.0f} s', flush=True)


if __name__ == '__main__':
  main()
