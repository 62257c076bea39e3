"""What the library does on one GPU: kernels, decoding, a fit, uptraining.

  python tests/benchmarks/gpu.py STEP ... --data=DIR --output=DIR

Steps, in this order:
  peak       bf16 matrix products and copies: the ceilings of this card
  attention  the fused attention against the plain one, forward and backward
  speed      tokens/s and MFU of training steps
  tokens     the corpus, tokenised
  fit        the original's layers as loops, initialised from data
  train      uptraining of the fit with the original as its teacher
  score      perplexity, divergence and tasks of all models that are there
  decode     tokens/s of the engine at several numbers of slots

DIR of --data holds model/ (a Hugging Face directory), corpus.jsonl.xz (one
{"text": ...} a line), texts/*.txt and eval/*.jsonl; `launch/gpu.sh` makes it.
Every step writes DIR/STEP.json of --output as soon as it has a figure. Needs
neither TensorFlow nor a network. `--small` is a rehearsal on a CPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import lzma
import math
import pathlib
import statistics
import time
from typing import Any

from absl import logging
from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np

import recursive_tx as rtx
from recursive_tx import engine, files, losses, machine, model
from recursive_tx.data import DataConfig, Task, packing
from recursive_tx.evaluate.loglikelihood import Scorer
from recursive_tx.evaluate.shared_rows import Request
from recursive_tx.machine import chips, flops
from recursive_tx.model import attention as attention_lib
from recursive_tx.store import convert as convert_lib
from recursive_tx.store import native
from recursive_tx.train import optim, step
from recursive_tx.train.config import Config

LOOPS, RANK = 2, 96
TAUGHT = 'relaxed, with its teacher'
# As configs/common.py has it, which needs ml_collections.
TABLE = (('adapters/.*/[ab]', 1.0, 0.0), ('.*/(scale|bias)', 1.0, 0.0),
         ('embed/.*', 1.0, 0.0), ('.*/kernel', 1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything; `small` is a rehearsal."""
  batch: int = 32
  seq_len: int = 1024
  slots: tuple[int, ...] = (1, 32, 256)
  new: int = 128
  calibration: int = 65_536
  rank: int = RANK
  characters: int = 120_000  # Of each text that perplexity is taken on.
  documents: int = 1 << 30  # Of each task.
  timed: int = 10
  square: int = 8192
  lengths: tuple[int, ...] = (1024, 2048, 4096)


SMALL = Sizes(batch=4, seq_len=128, slots=(1, 4), new=8, calibration=4096,
              rank=8, characters=8_000, documents=20, timed=2, square=256,
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
    self.minutes, self.lr = args.minutes, args.lr
    self.attention = args.attention

  def report(self, name):
    return Report(self.output / f'{name}.json')

  @functools.cached_property
  def original(self) -> rtx.store.Opened:
    """The vanilla model."""
    return rtx.open(self.data / 'model')

  @functools.cached_property
  def documents(self) -> list[np.ndarray]:
    """Ids of each document of the corpus; tokenised once, and kept."""
    path = self.models / 'tokens.npz'
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

  @functools.cached_property
  def batches(self) -> list[dict[str, np.ndarray]]:
    """The corpus, shuffled and packed, as a training run reads it."""
    packer = packing.Packer(self.sizes.seq_len)
    for i in np.random.default_rng(0).permutation(len(self.documents)):
      for piece in packing.split(self.documents[i], self.sizes.seq_len):
        packer.add(piece)
    rows, B = list(packer.ready), self.sizes.batch
    return [packing.batch(rows[i:i + B], self.sizes.seq_len)
            for i in range(0, len(rows) - B + 1, B)]

  def models_there(self) -> dict[str, Any]:
    """(cfg, variables) of every model to score, opened when it is its turn."""
    def opened(directory):
      return lambda: rtx.open(directory)[:2]

    def random():
      return self.original.config, random_variables(self.original.config)

    found = {'original': opened(self.data / 'model'), 'random': random}
    for name in ('average', 'fit', 'uptrained'):
      if (self.models / name).is_dir():
        found[name] = opened(self.models / name)
    return found


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
      segment_BT=segment_BT, window=0, implementation=implementation)


def decode(bench: Bench):
  """Tokens/s of the engine, prompts of 16 tokens, all slots full."""
  report = bench.report('decode')
  there = bench.models_there()
  for slots, name in itertools.product(
      sorted(bench.sizes.slots, reverse=True), ('uptrained', 'original')):
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
  report = bench.report('speed')
  cfg = bench.original.config
  relaxed = dataclasses.replace(
      cfg, loops=LOOPS, layers_per_loop=cfg.layers_per_loop // LOOPS,
      rank=str(bench.sizes.rank))
  batch = random_batch(cfg, bench.sizes)
  for name, student, with_teacher, way in (
      (TAUGHT, relaxed, True, bench.attention),
      ('relaxed', relaxed, False, bench.attention),
      ('vanilla', cfg, False, bench.attention),
      (TAUGHT, relaxed, True, 'blocks')):
    try:
      trainer = Trainer(bench, student, with_teacher, way, steps=1000)
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


def tokens(bench: Bench):
  """Tokenises the corpus, which the next steps then read."""
  bench.report('tokens').add(
      documents=len(bench.documents), tokens=sum(map(len, bench.documents)))


def fit(bench: Bench):
  """The starting points: average + SVD, and the fit to the corpus."""
  report = bench.report('fit')
  wanted = bench.sizes.calibration
  ids = np.concatenate(bench.documents[:wanted // 50])[:wanted]
  token_NT = ids[:len(ids) // 256 * 256].reshape(-1, 256)
  for init, calibration in (('average', None), ('fit', token_NT)):
    begin, cpu = time.perf_counter(), time.process_time()
    made = convert_lib.convert(
        bench.data / 'model', bench.models / init, loops=LOOPS,
        rank=bench.sizes.rank, init=init, calibration=calibration,
        overwrite=True)
    report.add(init=init, kept=made['kept'], rank=made['rank'],
               tokens=0 if calibration is None else token_NT.size,
               seconds=time.perf_counter() - begin,
               cpu_seconds=time.process_time() - cpu)


def train(bench: Bench):
  """Uptrains the fit for some minutes, at most one pass of the corpus."""
  report = bench.report('train')
  cfg, variables = rtx.open(bench.models / 'fit')[:2]
  # What `speed` saw of such a step.
  seconds = min(row['ms'] for row in bench.report('speed').rows
                if row['step'] == TAUGHT and 'ms' in row) / 1e3
  steps = min(len(bench.batches), int(bench.minutes * 60 / seconds))
  trainer = Trainer(bench, cfg, True, bench.attention, steps=steps)
  report.add(steps=steps, batches=len(bench.batches), lr=bench.lr,
             tokens=steps * trainer.tokens)
  trainer.start(variables)
  begin, weights = time.perf_counter(), 0.0
  for i, batch in enumerate(bench.batches[:steps], 1):
    metrics = trainer.update(batch)
    weights += float(batch['weight_BT'].sum())
    if i % max(1, steps // 40) == 0 or i in (1, steps):
      found = {key: float(value) for key, value in metrics.items()}
      elapsed = time.perf_counter() - begin
      report.add(step=i, seconds=elapsed, predicted_tokens=weights,
                 tokens_per_second=i * trainer.tokens / elapsed, **found)
  native.save(
      bench.models / 'uptrained', cfg,
      {'params': jax.tree.map(np.asarray, trainer.state.params)},
      companions=bench.models / 'fit', overwrite=True)


@jax.default_matmul_precision('highest')  # A GPU's default is TF32.
def score(bench: Bench):
  """Perplexity, divergence from the original, and tasks, of every model."""
  report = bench.report('score')
  cfg, exact, tokenizer = bench.original[:3]
  texts = {path.stem: pieces(
      tokenizer, path.read_text('utf-8')[:bench.sizes.characters], bench.sizes)
      for path in sorted((bench.data / 'texts').glob('*.txt'))}
  tasks = {path.stem: task_requests(
      tokenizer, path, bench.sizes.documents)
      for path in sorted((bench.data / 'eval').glob('*.jsonl'))}
  exact = jax.device_put(exact)
  for name, opened in bench.models_there().items():
    begin = time.perf_counter()
    mine, variables = opened()
    variables = jax.device_put(variables)
    row = {'model': name, 'loops': mine.loops, 'parameters': sum(
        x.size for x in jax.tree.leaves(variables))}
    both = jax.jit(functools.partial(nats_and_divergence, cfg, mine))
    for text, token_NT in texts.items():
      sums = [both(exact, variables, token_NT[i:i + 4])
              for i in range(0, len(token_NT), 4)]
      nats, kl = np.sum(sums, axis=0) / token_NT[:, 1:].size
      row |= {f'{text} perplexity': float(np.exp(nats)), f'{text} KL': float(
          kl)}
    scorer = Scorer(mine, variables)
    for task, (requests, questions) in tasks.items():
      found = scorer(requests)
      row |= {f'{task} {metric}': value for metric, value in accuracies(
          zip(found.log_p_LN[0], found.greedy_LN[0], strict=True),
          questions).items()}
    report.add(**row, seconds=time.perf_counter() - begin)


def pieces(tokenizer, text, sizes) -> np.ndarray:
  """A text's whole pieces of `seq_len` tokens, [N, T] int32."""
  ids = np.asarray(tokenizer.encode(text), np.int32)
  return ids[:len(ids) // sizes.seq_len * sizes.seq_len].reshape(
      -1, sizes.seq_len)


def nats_and_divergence(cfg, mine, exact, variables, token_BT) -> jax.Array:
  """Sums over tokens but the first of -log p, and of KL(original || model)."""
  one, other = (jax.nn.log_softmax(
      model.Decoder(c).apply(v, token_BT[:, :-1]).astype(jnp.float32))
      for c, v in ((cfg, exact), (mine, variables)))
  return jnp.stack([
      losses.next_token_nats(other, token_BT[:, 1:]).sum(),
      (jnp.exp(one) * (one - other)).sum()])


def task_requests(tokenizer, path, documents):
  """Requests (context, continuation) of a task's file, as the harness has
  them, and of each question its answers: (characters of each, the right one).
  """
  requests, questions = [], []
  for line in path.read_text('utf-8').splitlines()[:documents]:
    row = json.loads(line)
    if 'context' in row:  # LAMBADA: the last word, which must be the best.
      context, answers, gold = row['context'], [row['continuation']], None
    else:
      context, answers, gold = row['query'].rstrip(), row['choices'], row[
          'gold']
      if context.startswith('Question:'):
        context += '\nAnswer:'
    ids = tokenizer.encode(context)
    for answer in answers:
      whole = tokenizer.encode(f'{context} {answer}')
      requests.append(Request(whole[:len(ids)], whole[len(ids):]))
    questions.append(([len(answer) for answer in answers], gold))
  return requests, questions


def accuracies(found, questions) -> dict[str, float]:
  """acc, acc_norm (by characters) and the standard error of acc."""
  found, right, by_length, nats = iter(found), [], [], []
  for lengths, gold in questions:
    answers = [next(found) for _ in lengths]
    if gold is None:
      right.append(answers[0][1])
      nats.append(-answers[0][0])
      continue
    right.append(np.argmax([log_p for log_p, _ in answers]) == gold)
    by_length.append(np.argmax([
        log_p / length for (log_p, _), length in zip(
            answers, lengths, strict=True)]) == gold)
  row = {'acc': float(np.mean(right)), 'stderr': float(
      np.std(right, ddof=1) / math.sqrt(len(right)))}
  if by_length:
    row['acc_norm'] = float(np.mean(by_length))
  if nats:
    row['perplexity'] = float(np.exp(np.mean(nats)))
  return row


class Trainer:
  """A training step of the library, compiled for one device."""

  def __init__(self, bench, cfg, with_teacher, way, *, steps):
    sizes = bench.sizes
    self.config = Config(
        model=cfg,
        data=DataConfig(
            tasks=(Task(name='corpus', kind='jsonl', train=('-',)),),
            seq_len=sizes.seq_len, batch=sizes.batch, shards=1),
        optim=optim.OptimConfig(
            steps=steps, lr=bench.lr, warmup=-(-steps // 20), min_ratio=0.05,
            table=TABLE),
        losses=losses.LossConfig(distill=(1.0,) if with_teacher else ()),
        run=rtx.Run(dtype='bfloat16', attention=way, logits_mib=2048))
    self.mesh = machine.make_mesh(
        machine.MeshConfig(), devices=jax.devices()[:1])
    teacher = bench.original.config if with_teacher else None
    with jax.set_mesh(self.mesh):
      self._tx, abstract = step.abstract_state(self.config, self.mesh)
      self._step = step.jit_step(
          self.config, self.mesh, self._tx, abstract, teacher)
    self._teacher = None if teacher is None else jax.device_put(jax.tree.map(
        lambda x: np.asarray(x, jnp.bfloat16), bench.original.variables))
    self.tokens = sizes.batch * sizes.seq_len
    self.flops = flops.train_step(
        cfg, self.config.losses.weights(cfg.loops), teacher, sizes.batch,
        sizes.seq_len)['total']

  def start(self, variables):
    """Sets the first state; compiles nothing of the step."""
    with jax.set_mesh(self.mesh):
      params = jax.device_put(jax.tree.map(
          lambda x: jnp.asarray(x, jnp.float32), variables['params']),
          machine.replicated(self.mesh))
      self.state = step.TrainState(
          jnp.int32(0), params, jax.jit(self._tx.init)(params))

  def update(self, batch) -> dict:
    """One update; its metrics, on the device."""
    with jax.set_mesh(self.mesh):
      placed = machine.place(batch, machine.rows(self.mesh))
      self.state, metrics = self._step(self.state, placed, self._teacher)
    return metrics

  def timed(self, batch, repeats) -> float:
    """Seconds of an update, after one that compiles."""
    begin = time.perf_counter()
    jax.block_until_ready(self.update(batch))
    self.compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(self.update(batch))
    begin = time.perf_counter()
    for _ in range(repeats):
      metrics = self.update(batch)
    jax.block_until_ready((metrics, self.state))
    return (time.perf_counter() - begin) / repeats


def random_variables(cfg) -> dict:
  """Of a model as it is before any training."""
  return jax.jit(lambda key: meta.unbox(model.Decoder(cfg).init(
      key, jnp.zeros((1, 2), jnp.int32))))(jax.random.key(0))


def random_batch(cfg, sizes) -> dict[str, np.ndarray]:
  """Rows of one document of random tokens each."""
  ids = np.random.default_rng(0).integers(
      0, cfg.V, (sizes.batch, sizes.seq_len + 1)).astype(np.int32)
  return packing.batch([[row] for row in ids], sizes.seq_len)


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
    peak, attention, speed, tokens, fit, train, score, decode)}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('steps', nargs='+', choices=STEPS, metavar='STEP')
  parser.add_argument('--data', required=True)
  parser.add_argument('--output', required=True, help='for the figures')
  parser.add_argument('--models', help='for models and tokens (--output)')
  parser.add_argument('--minutes', type=float, default=5, help='of training')
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
