"""Throughput of static, sequence-wise and depth-wise batching, by the clock.

  python tests/benchmarks/throughput.py --checkpoint=DIR --text=FILE
  python tests/benchmarks/throughput.py --simulate [--json=FILE]

Serves the same requests with the same model by every schedule and exit, in
turns, and by csb just before each: ratios are of such neighbours in time, so
that the row of csb says how far they are to be believed. Prompts are openings
of sentences of stories that were held out of the training on FILE by
configs/exits.py, lengths are exponential, cut at both ends. Everything is
inside the clock: reading the prompts, embedding, blocks, head, the keys of
skipped loops, scheduling, and the text of what came out. DIR is a model with
exits (configs/exits.py), whose exit.json has the calibrated thresholds; with
`oracle`, every token leaves at the first loop that agrees with the last, known
beforehand, and is the full-depth run's.

`theory` is (loops + f) / (depth + f), where f is what a token costs whatever
its depth, in loops: measured as the time per token left over when every token
leaves after the first loop, or after the second, ...

--simulate is the paper's own simulation, see paper_throughput.py.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import resource
import statistics
import time

import numpy as np

# Points of a curve: the nearest to these agreements that were calibrated.
AGREEMENTS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--checkpoint', help='a saved model with exits')
  parser.add_argument('--text', help='stories between lines <|endoftext|>')
  parser.add_argument('--requests', type=int, default=256)
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--prompt', type=_numbers(2), default=(4, 16),
                      metavar='LEAST,MOST', help='tokens of a prompt')
  parser.add_argument('--new', type=_numbers(3), default=(16, 96, 256),
                      metavar='LEAST,MEAN,MOST', help='tokens that follow')
  parser.add_argument('--write', metavar='JSONL', help='only write the texts '
                      'of other such requests, to calibrate with')
  parser.add_argument('--simulate', action='store_true',
                      help="the paper's tables from its block times")
  parser.add_argument('--json', help='file for the rows')
  parser.add_argument('--curve', action='append', default=[], metavar='FILE',
                      help="also points of an exit.json's curve; repeatable")
  parser.add_argument('--plot', help="PNG of the curves' agreement and speed")
  args = parser.parse_args()
  if args.simulate:
    import paper_throughput
    found = paper_throughput.simulate()
  elif args.checkpoint and args.text and args.write:
    write(args)
    return
  elif args.checkpoint and args.text:
    found = measure(args)
  else:
    parser.error('give --checkpoint and --text, or --simulate')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + '\n')


@dataclasses.dataclass
class Served:
  """One run of all requests by one engine.

  Attributes:
    seconds: from the first request to the last text.
    tokens, depths: of every request.
    first: seconds to each request's first token.
    gaps: seconds between tokens of a request.
  """
  seconds: float
  tokens: list[list[int]]
  depths: list[list[int]]
  first: list[float]
  gaps: list[float]

  @property
  def rate(self) -> float:
    return sum(map(len, self.tokens)) / self.seconds

  @property
  def depth(self) -> float:
    return float(np.mean(np.concatenate(self.depths)))


def requests(tokenizer, args, seed: int = 0):
  """Prompts and lengths, a function of the seed."""
  from recursive_tx.configs import exits as recipe
  from recursive_tx.data import Task
  from recursive_tx.data.documents import Documents
  data = recipe.get_config(f'text={args.text}').data
  documents = Documents(
      Task('stories', **data.tasks.stories.to_dict()), 'heldout',
      fraction=data.heldout_fraction)
  stories = [text.decode() for number in range(documents.num_units)
             for block in documents.blocks(number) for text in block.texts]
  rng = np.random.default_rng(seed)
  prompts = []
  while len(prompts) < args.requests:
    story = stories[len(prompts) % len(stories)]
    sentences = re.split(r'(?<=[.!?])\s+', story.strip())
    tokens = tokenizer.encode(
        ' '.join(sentences[int(rng.integers(len(sentences))):]))
    size = int(rng.integers(*args.prompt, endpoint=True))
    prompts.append((tokenizer.opening + tokens)[:size])
  least, mean, most = args.new
  lengths = rng.exponential(mean, args.requests).clip(least, most).astype(int)
  return prompts, lengths.tolist()


def serve(engine, tokenizer, prompts, lengths) -> Served:
  """Submits all at once and collects everything."""
  import recursive_tx as rtx
  begin = time.perf_counter()
  # The seed, of no effect at temperature 0, is the number of the request.
  index = {engine.submit(rtx.Request(
      prompt, length, rtx.Sampler(seed=i), ignore_eos=True)): i
           for i, (prompt, length) in enumerate(
               zip(prompts, lengths, strict=True))}
  tokens, depths = ([[] for _ in prompts] for _ in range(2))
  last, first, gaps = {}, [], []
  while engine.pending:
    events = engine.poll()
    now = time.perf_counter()
    for event in events:
      i = index[event.id]
      tokens[i].append(event.token)
      depths[i].append(event.depth)
      if event.finish:
        tokenizer.decode(tokens[i])
    # Tokens of one burst come together: the wait is shared among them.
    came = {}
    for event in events:
      came[event.id] = came.get(event.id, 0) + 1
    for id, count in came.items():
      if id in last:
        gaps += [(now - last[id]) / count] * count
      else:
        first.append(now - begin)
      last[id] = now
  return Served(time.perf_counter() - begin, tokens, depths, first, gaps)


def write(args) -> None:
  """Texts that the model writes at full depth, a document a line."""
  import recursive_tx as rtx
  from recursive_tx.text import tokenizer as tokenizer_lib
  cfg, variables, *_ = rtx.open(pathlib.Path(args.checkpoint))
  tokenizer = tokenizer_lib.load(pathlib.Path(args.checkpoint))
  prompts, lengths = requests(tokenizer, args, seed=1)
  engine = rtx.Engine(cfg, variables, slots=args.slots,
                      max_len=args.prompt[1] + args.new[2])
  served = serve(engine, tokenizer, prompts, lengths)
  opening = len(tokenizer.opening)
  pathlib.Path(args.write).write_text(''.join(
      json.dumps({'text': tokenizer.decode(prompt[opening:] + tokens)}) + '\n'
      for prompt, tokens in zip(prompts, served.tokens, strict=True)))


class Judge:
  """What the model says at full depth of texts that are given to it."""

  def __init__(self, cfg, variables, width: int, batch: int = 16):
    import jax
    import jax.numpy as jnp

    import recursive_tx as rtx
    decoder = rtx.Decoder(cfg)

    @jax.jit
    def look(variables, token_BT):
      h_LBTD = decoder.apply(variables, token_BT, method='hidden')
      def of_loop(h_BTD):
        logits_BTV = decoder.apply(variables, h_BTD, method='logits')
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        best_BT = jnp.argmax(logits_BTV, axis=-1)
        next_BT = jnp.roll(token_BT, -1, axis=1)
        return best_BT, jnp.take_along_axis(
            log_p_BTV, next_BT[..., None], -1)[..., 0]
      return jax.lax.map(of_loop, h_LBTD)

    self._look = functools.partial(look, jax.device_put(variables))
    self._width, self._batch = width, batch

  def __call__(self, prompts, tokens):
    """For every text: each loop's likeliest tokens [L, n], the last's nats."""
    best, nats = [], []
    for start in range(0, len(prompts), self._batch):
      texts = [p + t for p, t in zip(
          prompts[start:start + self._batch],
          tokens[start:start + self._batch], strict=True)]
      token_BT = np.zeros((self._batch, self._width), np.int32)
      for row, text in zip(token_BT, texts, strict=False):
        row[:len(text)] = text
      best_LBT, log_p_LBT = map(np.asarray, self._look(token_BT))
      for i, text in enumerate(texts):
        span = slice(len(prompts[start + i]) - 1, len(text) - 1)
        best.append(best_LBT[:, i, span])
        nats.append(-float(log_p_LBT[-1, i, span].sum()))
    return best, nats


def measure(args) -> dict:
  """Prints the table, and returns its rows."""
  import recursive_tx as rtx
  from recursive_tx import exits
  from recursive_tx.text import tokenizer as tokenizer_lib
  cfg, variables, *_ = rtx.open(pathlib.Path(args.checkpoint))
  tokenizer = tokenizer_lib.load(pathlib.Path(args.checkpoint))
  prompts, lengths = requests(tokenizer, args)
  width = -(-(args.prompt[1] + args.new[2]) // 64) * 64
  judge = Judge(cfg, variables, width)

  def engine(**kwargs):
    return rtx.Engine(cfg, variables, slots=args.slots, max_len=width, **kwargs)

  engines = {
      'static': engine(schedule='static'), 'csb': engine(schedule='csb'),
      'cdb': engine()}
  full = serve(engines['csb'], tokenizer, prompts, lengths)
  best, _ = judge(prompts, full.tokens)
  # The full-depth run decides what the tokens are.
  scripts = [(tokens, 1 + np.argmax(best_LT == np.array(tokens), axis=0))
             for tokens, best_LT in zip(full.tokens, best, strict=True)]
  for loop in range(1, cfg.loops):
    engines[f'cdb, all at {loop}'] = engine(exit=exits.static(loop, cfg.loops))
  engines['cdb, oracle'] = scripted(
      engine(exit=exits.static(1, cfg.loops), steps=18), tokenizer, prompts,
      lengths, scripts)
  calibrated = exits.load(args.checkpoint)
  if calibrated:
    engines[f'cdb, {calibrated.rule}'] = engine(exit=calibrated)
  if calibrated and cfg.loop_keys:  # Else there is nothing to fill.
    engines[f'cdb, {calibrated.rule}, complete'] = engine(
        exit=calibrated, fill='complete')
    engines[f'cdb, {calibrated.rule}, share'] = shared(
        engine(exit=calibrated, steps=17), tokenizer, prompts, lengths)
  for file in args.curve:
    for name, exit in curve(file):
      engines[name] = engine(exit=exit)

  def run(name):
    return serve(engines[name], tokenizer, prompts, lengths)

  for name in engines:  # Compiles.
    run(name)
  runs, rates = {}, {name: [] for name in engines}
  for i in range(args.rounds):
    for name in engines:
      beside = run('csb')
      runs[name] = run(name)
      rates[name].append((runs[name].rate, beside.rate))
    print(f'round {i + 1} of {args.rounds}: {resident():.2f} GiB', flush=True)
  found = report(args, cfg, tokenizer, prompts, runs, rates, judge)
  if args.plot:
    plot(args.plot, args.curve, found['rows'])
  return found


def curve(file: str):
  """Names and exits of some points that were calibrated."""
  from recursive_tx import exits
  found = json.loads(pathlib.Path(file).read_text())
  # The same point may be the nearest to several.
  nearest = {
      tuple(min(found['curve'], key=lambda p: abs(p['agreement'] - goal))[
          'thresholds']): goal for goal in AGREEMENTS}
  for thresholds, goal in nearest.items():
    yield f'cdb, {found["rule"]} {goal:g}', exits.Exit(
        found['rule'], thresholds)


def scripted(engine, tokenizer, prompts, lengths, scripts):
  """The engine, made to give tokens and depths that are known beforehand.

  Its bursts, of a number of steps that no other engine has, are compiled with
  what `step` does otherwise.

  Args:
    engine: its exit is static, after loop 1.
    scripts: of every request, its tokens and how many loops each takes.
  """
  import jax.numpy as jnp

  from recursive_tx.engine import sampling, step
  token_PS, depth_PS = np.zeros((2, len(prompts), engine.max_len), np.int32)
  for i, (prompt, script) in enumerate(zip(prompts, scripts, strict=True)):
    span = slice(len(prompt) - 1, len(prompt) - 1 + len(script[0]))
    token_PS[i, span], depth_PS[i, span] = script
  made = step._decide, sampling.sample

  def decide(plan, weights, slots, rows, busy_B, cache, place):
    request_B = rows.samplers.seed.at[slots.row].get(mode='clip')
    depth_B = jnp.array(depth_PS)[request_B, place.position_BT[:, 0]]
    return made[0](plan, weights, slots, rows,
                   busy_B & (slots.loop + 1 >= depth_B), cache, place)

  def sample(run, samplers, logits_BV, position_B):
    return jnp.array(token_PS)[samplers.seed, position_B]

  step._decide, sampling.sample = decide, sample
  serve(engine, tokenizer, prompts, lengths)
  step._decide, sampling.sample = made
  return engine


def shared(engine, tokenizer, prompts, lengths):
  """The engine, made to reuse the exit's keys in the loops that are skipped.

  Its bursts, of a number of steps that no other engine has, are compiled with
  what `step` does otherwise.
  """
  from recursive_tx.engine import step
  made, step._propagate = step._propagate, _share
  serve(engine, tokenizer, prompts, lengths)
  step._propagate = made
  return engine


def _share(plan, weights, slots, early_B, cache, place):
  import jax.numpy as jnp
  cfg, R = plan.cfg, cache.k.shape[1]
  loop_B1, layer_N = slots.loop[:, None], jnp.arange(cfg.layers_per_loop)
  position_B1 = place.position_BT
  def copy(leaf):
    first = cfg.prelude + layer_N
    own_BNKH = leaf.at[first + loop_B1 * len(layer_N), place.row_BT, :,
                       position_B1].get(mode='clip')
    for loop in range(1, cfg.loops):
      skipped_B1 = early_B[:, None] & (loop > loop_B1)
      leaf = leaf.at[
          first + loop * len(layer_N), jnp.where(skipped_B1, place.row_BT, R),
          :, position_B1].set(own_BNKH, mode='drop')
    return leaf
  return type(cache)(*map(copy, cache))


def resident() -> float:
  """GiB of memory that this process holds."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 2**30


def report(args, cfg, tokenizer, prompts, runs, rates, judge) -> dict:
  """The table: the last runs, and medians of all rounds' rates and ratios."""
  to_csb = {name: statistics.median(rate / beside for rate, beside in pairs)
            for name, pairs in rates.items()}
  fixed = fixed_cost(runs, to_csb)
  least, mean, most = args.new
  print(f'{args.requests} requests of {args.prompt[0]} to {args.prompt[1]} '
        f'tokens, {least} to {most} new ones (exponential, {mean}), '
        f'{args.slots} slots, {args.rounds} rounds; f = {fixed:.2f} loops\n'
        f'{"":22}tok/s  static   csb theory depth agree  bits/B'
        '  first s  p50 ms  p99 ms')
  rows = []
  for name, run in runs.items():
    best, nats = judge(prompts, run.tokens)
    agree = np.mean(np.concatenate([
        best_LT[-1] == tokens
        for best_LT, tokens in zip(best, run.tokens, strict=True)]))
    size = sum(len(tokenizer.decode(tokens).encode()) for tokens in run.tokens)
    p50, p99 = np.percentile(run.gaps, [50, 99])
    row = {
        'row': name,
        'tokens_per_second': statistics.median(
            rate for rate, _ in rates[name]),
        'to_static': to_csb[name] / to_csb['static'], 'to_csb': to_csb[name],
        'theory': (cfg.loops + fixed) / (run.depth + fixed),
        'depth': run.depth, 'agreement': float(agree),
        'bits_per_byte': sum(nats) / math.log(2) / size,
        'first_token_s': statistics.median(run.first),
        'p50_ms': 1e3 * p50, 'p99_ms': 1e3 * p99}
    rows.append(row)
    print(f'{name:20}{row["tokens_per_second"]:7.0f}{row["to_static"]:8.2f}'
          f'{row["to_csb"]:6.2f}{row["theory"]:7.2f}{row["depth"]:6.2f}'
          f'{row["agreement"]:6.3f}{row["bits_per_byte"]:8.3f}'
          f'{row["first_token_s"]:9.2f}{row["p50_ms"]:8.1f}'
          f'{row["p99_ms"]:8.1f}', flush=True)
  return {'fixed_loops': fixed, 'rows': rows}


def plot(path: str, files: list[str], rows: list[dict]) -> None:
  """Agreement with full depth against tokens/s over csb's."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for i, file in enumerate(files):
    names = [name for name, _ in curve(file)]
    points = sorted((row for row in rows if row['row'] in names),
                    key=lambda row: row['agreement'])
    agreement = [row['agreement'] for row in points]
    rule = names[0].split()[1]
    axes.plot(agreement, [row['to_csb'] for row in points], f'C{i}o-',
              label=rule)
    axes.plot(agreement, [row['theory'] for row in points], f'C{i}:',
              label=f'{rule}: (loops + f) / (depth + f)')
  axes.set(xlabel='share of tokens as at full depth',
           ylabel='tokens/s over sequence-wise batching')
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=150)


def fixed_cost(runs, to_csb) -> float:
  """Time per token at no loop over time per loop, by a line through depths."""
  names = [name for name in runs
           if name == 'cdb' or name.startswith('cdb, all at')]
  slope, rest = np.polyfit([runs[name].depth for name in names],
                           [1 / to_csb[name] for name in names], 1)
  return max(0.0, rest / slope)


def _numbers(count: int):
  """Parses so many integers between commas."""
  def parse(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(','))
    if len(values) != count or list(values) != sorted(values):
      raise argparse.ArgumentTypeError(
          f'{text!r}; expected {count} rising integers between commas')
    return values
  return parse


if __name__ == '__main__':
  main()
