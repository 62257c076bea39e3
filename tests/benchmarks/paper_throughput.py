"""The paper's throughput of static, sequence-wise and depth-wise batching.

  python tests/benchmarks/throughput.py --simulate [--json=FILE]

Puts the paper's printed block times through schedulers.py and sets
the tokens/s of its Tables K.2 (setting 1) and K.4 (setting 2) beside ours. As
there, only blocks cost time, exits are known beforehand, and every text waits
from the start. What the paper does not print is fitted to single figures of
Table K.2, marked '=', all else is predicted; '~' is a quotient with a fitted
figure in it. What is assumed beyond the paper:

- A step with n slots in use takes as long as one with a single slot or n times
  the time per token of full slots, whichever is longer: the two are printed.
- Lengths are exponential, cut at the longest. Books of PG19, of which its test
  set has 100, all reach it.
- Each loop lets the same share of the tokens that reach it leave, on every set
  and at every rank.

`theory` is (loops + f) / (depth + f) with f = 0, since nothing but blocks
counts here: what exits alone bring. The rest of `to csb` is what a pass of the
whole vanilla model costs over that of all loops.
"""

import dataclasses
import functools
import statistics

import numpy as np
import schedulers

# The longest text has the 2048 tokens of setting 1. That many matter where few
# texts end together; elsewhere shorter ones give the same rates sooner. The
# 20,000 texts are the paper's.
SLIMPAJAMA, REDPAJAMA, PG19 = SETS = ('SlimPajama', 'RedPajama', 'PG19')
LONGEST = {SLIMPAJAMA: 256, REDPAJAMA: 512, PG19: 2048}
TEXTS = {SLIMPAJAMA: 20_000, PG19: 100}

# Tables K.1 and K.3. Of a model, its loops and its rank: milliseconds of one
# loop of a single token, of one loop per token of full slots, and how many
# slots fit, in setting 1 (40 GB) and 2 (16 GB).
TIMES = '''
Gemma     1   -  21.344 0.616  43  20.937 0.188  111
Gemma     2   0  11.059 0.265  43  10.819 0.091  123
Gemma     2  64  13.096 0.323  41  12.675 0.112  117
Gemma     2 128  12.969 0.324  41  12.899 0.113  115
Gemma     2 256  12.721 0.372  39  12.639 0.115  111
Gemma     2 512  12.775 0.422  39  12.692 0.127  103
Gemma     3   0   7.394 0.182  43   7.411 0.058  131
Gemma     3  64   8.724 0.182  43   8.855 0.075  123
Gemma     3 128   8.649 0.221  43   8.787 0.074  121
Gemma     3 256   8.848 0.226  41   8.654 0.076  117
Gemma     3 512   8.932 0.237  39   8.856 0.090  107
TinyLlama 1   -  21.010 0.815 329  22.909 0.129 1049
TinyLlama 2   0  10.370 0.413 233  11.846 0.064 1121
TinyLlama 2  64  12.908 0.421 211  12.627 0.068 1105
TinyLlama 2 128  13.118 0.421 209  12.778 0.069 1089
TinyLlama 2 256  12.908 0.423 209  12.659 0.071 1065
TinyLlama 2 512  13.062 0.428 209  12.950 0.075 1017
Pythia    1   -  12.286 1.206  53  12.326 0.171  229
Pythia    2   0   6.378 0.606  61   6.303 0.086  241
Pythia    2  64   8.519 0.626  63   8.353 0.097  233
Pythia    2 128   8.196 0.642  59   8.378 0.101  221
Pythia    2 256   8.402 0.662  59   8.471 0.115  205
Pythia    2 512  10.311 0.702  53   9.241 0.139  165
'''

# Tables K.2 and K.4. Of a model, its loops, its rank and its batching (for
# depth-wise batching the weight of early losses in exit training): tokens/s on
# SETS and their mean over that of static and of csb, in setting 1 and 2. The
# rates that Table K.4 prints for exits are those of K.2 again and left out.
RATES = '''
Gemma     1   - static  655 1228 1357 1.00 0.71 1740 3059 4796 1.00 0.63
Gemma     1   - csb    1622 1604 1357 1.41 1.00 5287 5060 4796 1.58 1.00
Gemma     2   0 0.1    3159 3050 2421 2.66 1.88    -    -    - 2.50 1.59
Gemma     2  64 0.1    2357 2255 1858 2.00 1.41    -    -    - 1.87 1.19
Gemma     2 128 0.1    2355 2250 1844 1.99 1.41    -    -    - 1.87 1.19
Gemma     2 256 0.1    2047 1976 1740 1.78 1.26    -    -    - 1.86 1.18
Gemma     2 512 0.1    1806 1754 1598 1.59 1.13    -    -    - 1.73 1.10
Gemma     2  64 0.3    2454 2357 1929 2.08 1.47    -    -    - 1.95 1.24
Gemma     2 128 0.3    2445 2346 1926 2.07 1.47    -    -    - 1.95 1.24
Gemma     2 256 0.3    2123 2056 1804 1.85 1.31    -    -    - 1.93 1.22
Gemma     2 512 0.3    1870 1819 1655 1.65 1.17    -    -    - 1.79 1.14
Gemma     3   0 0.1    3120 3041 2729 2.74 1.94    -    -    - 2.62 1.66
Gemma     3  64 0.1    2334 2274 2059 2.06 1.45    -    -    - 1.87 1.19
Gemma     3 128 0.1    2290 2230 2007 2.02 1.42    -    -    - 1.90 1.20
Gemma     3 256 0.1    2281 2219 1984 2.00 1.41    -    -    - 1.86 1.18
Gemma     3 512 0.1    2181 2122 1900 1.91 1.35    -    -    - 1.62 1.03
Gemma     3  64 0.3    2427 2372 2143 2.14 1.51    -    -    - 1.94 1.23
Gemma     3 128 0.3    2376 2321 2084 2.09 1.48    -    -    - 1.97 1.25
Gemma     3 256 0.3    2359 2300 2039 2.07 1.46    -    -    - 1.92 1.22
Gemma     3 512 0.3    2251 2191 1975 1.98 1.40    -    -    - 1.67 1.06
TinyLlama 1   - static 1205 1220 1194 1.00 0.99 6856 7481 4090 1.00 0.96
TinyLlama 1   - csb    1227 1225 1194 1.01 1.00 7709 7481 4090 1.05 1.00
TinyLlama 2   0 0.1    2038 2023 1933 1.66 1.64    -    -    - 1.70 1.62
TinyLlama 2  64 0.1    1733 1719 1617 1.40 1.39    -    -    - 1.38 1.32
TinyLlama 2 128 0.1    1733 1717 1609 1.40 1.39    -    -    - 1.36 1.30
TinyLlama 2 256 0.1    1728 1714 1606 1.39 1.38    -    -    - 1.34 1.28
TinyLlama 2 512 0.1    1716 1702 1581 1.38 1.37    -    -    - 1.28 1.23
TinyLlama 2  64 0.3    1810 1796 1688 1.46 1.45    -    -    - 1.45 1.38
TinyLlama 2 128 0.3    1802 1787 1668 1.45 1.44    -    -    - 1.41 1.35
TinyLlama 2 256 0.3    1793 1779 1668 1.45 1.44    -    -    - 1.39 1.33
TinyLlama 2 512 0.3    1778 1763 1637 1.43 1.42    -    -    - 1.33 1.27
Pythia    1   - static  702  785  822 1.00 0.93 4273 5346 5149 1.00 0.89
Pythia    1   - csb     829  827  822 1.07 1.00 5813 5724 5149 1.13 1.00
Pythia    2   0 0.1    1339 1333 1281 1.71 1.60    -    -    - 1.77 1.57
Pythia    2  64 0.1    1205 1203 1140 1.54 1.43    -    -    - 1.44 1.28
Pythia    2 128 0.1    1156 1180 1108 1.49 1.39    -    -    - 1.32 1.17
Pythia    2 256 0.1    1138 1139 1071 1.45 1.35    -    -    - 1.22 1.08
Pythia    2 512 0.1    1051 1077 1021 1.36 1.27    -    -    - 0.98 0.87
Pythia    2  64 0.3    1254 1252 1190 1.60 1.49    -    -    - 1.50 1.33
Pythia    2 128 0.3    1200 1226 1153 1.55 1.45    -    -    - 1.37 1.22
Pythia    2 256 0.3    1180 1180 1112 1.50 1.40    -    -    - 1.27 1.12
Pythia    2 512 0.3    1088 1114 1058 1.41 1.32    -    -    - 1.02 0.90
'''

NOTES = (
    'Table K.4 prints the rates of Table K.2 once more for all rows with '
    'exits (copy); only its quotients are of setting 2, and compared here.',
    "Table K.1's 0.182 ms for Gemma of 3 loops and rank 64 (!) are those of "
    'the row without adapters; the neighbours take 0.22, and so must it.',
)
DOUBTFUL = ('Gemma', 3, '64', 1)  # The last is the setting.


@dataclasses.dataclass(frozen=True)
class Block:
  """What a loop costs: ms of a single token, ms per token of full slots."""
  alone: float
  full: float
  slots: int


@dataclasses.dataclass(frozen=True)
class Printed:
  """A row of the paper's tables; per setting what it prints, or None."""
  model: str
  loops: int
  rank: str
  batching: str
  rates: tuple[tuple[float | None, ...], ...]
  quotients: tuple[tuple[float, ...], ...]

  @property
  def kind(self) -> tuple[str, int, bool, str]:
    """Rows that are taken to leave equally early, whatever their rank."""
    return self.model, self.loops, self.rank == '0', self.batching


def simulate() -> dict:
  """Prints both settings' tables, and returns them with what was fitted."""
  blocks, rows = read()
  fit, fitted = fit_all(blocks, rows)
  print('fitted, to Table K.2:')
  for each in fitted:
    print(f'  {each["what"]:46}{each["value"]:8.4g}  from {each["from"]}')
  found = []
  for setting in (1, 2):
    settled = [row_of(row, setting, blocks, fit) for row in rows]
    set_quotients(settled, rows)
    show(setting, settled)
    found += settled
  print('', *NOTES, sep='\n')
  return {'fitted': fitted, 'notes': NOTES, 'rows': found}


def read() -> tuple[dict, list[Printed]]:
  """(a pair of Blocks by model, loops and rank; the rows of rates)."""
  blocks = {}
  for line in TIMES.strip().splitlines():
    model, loops, rank, *rest = line.split()
    blocks[model, int(loops), rank] = tuple(
        Block(float(alone), float(full), int(slots))
        for alone, full, slots in (rest[:3], rest[3:]))
  rows = []
  for line in RATES.strip().splitlines():
    model, loops, rank, batching, *rest = line.split()
    numbers = tuple(None if each == '-' else float(each) for each in rest)
    rows.append(Printed(
        model, int(loops), rank, batching, (numbers[:3], numbers[5:8]),
        (numbers[3:5], numbers[8:])))
  return blocks, rows


# Rates.


@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts to decode: how many, the longest, and the mean uncut length."""
  count: int
  longest: int
  scale: float  # Over the longest; infinite where all are cut.


@functools.lru_cache(maxsize=64)
def workload(texts: Texts, loops: int, depth: float) -> schedulers.Workload:
  """Texts that all wait from the start, and when each token leaves."""
  rng = np.random.default_rng(0)
  # Lengths are quantiles, so that a fit is not of noise.
  quantile_B = (np.arange(texts.count) + 0.5) / texts.count
  tokens_B = np.minimum(-texts.scale * np.log1p(-quantile_B), 1)
  tokens_B = np.maximum(1, np.rint(tokens_B * texts.longest)).astype(int)
  rng.shuffle(tokens_B)
  # The share of tokens that goes on after each loop.
  stay = _solve(lambda share: sum(share**loop for loop in range(loops)),
                depth, 0.0, 1.0)
  drawn_T = rng.random(tokens_B.sum(), np.float32)
  depth_T = np.ones(len(drawn_T), np.int8)
  for loop in range(1, loops):
    depth_T += drawn_T < stay**loop
  return schedulers.Workload(np.zeros(texts.count, int), tokens_B, depth_T)


def rate(
    texts: Texts, block: Block, rule: str, *, loops: int = 1, depth: float = 1
) -> float:
  """Tokens per second; a vanilla model is one loop."""
  work = workload(texts, loops, depth)
  plan = schedulers.schedule(work, rule, capacity=block.slots, loops=loops)
  ms = np.maximum(block.alone, block.full * plan.active).sum()
  return float(work.tokens_B.sum() / ms * 1000)


# What the paper does not print.


@dataclasses.dataclass(frozen=True)
class Fit:
  """Texts by set, mean depth by kind, and the cells they were fitted to."""
  texts: dict[str, Texts]
  depth: dict[tuple, float]
  cells: frozenset[tuple[Printed, str]]


def fit_all(blocks, rows) -> tuple[Fit, list[dict]]:
  """Fits to single cells of setting 1; also says what and to what."""
  (static, csb), block = rows[:2], blocks['Gemma', 1, '-'][0]
  texts = {PG19: Texts(TEXTS[PG19], LONGEST[PG19], np.inf)}
  texts[SLIMPAJAMA] = _fit_scale(
      TEXTS[SLIMPAJAMA], LONGEST[SLIMPAJAMA], block, static.rates[0][0])
  texts[REDPAJAMA] = _fit_count(
      LONGEST[REDPAJAMA], block, static.rates[0][1], csb.rates[0][1])
  cells = [(static, SLIMPAJAMA), (static, REDPAJAMA), (csb, REDPAJAMA)]
  fitted = [
      {'what': f'{name}, mean length over the longest',
       'value': float(np.mean(workload(texts[name], 1, 1).tokens_B)
                      / LONGEST[name]),
       'from': f'Gemma static {name}'} for name in (SLIMPAJAMA, REDPAJAMA)]
  fitted.append({'what': f'{REDPAJAMA}, texts',
                 'value': texts[REDPAJAMA].count,
                 'from': f'Gemma csb {REDPAJAMA}'})
  depth = {}
  for row in rows:
    if row.rank in ('0', '128'):
      ms = blocks[row.model, row.loops, row.rank][0].full
      # Slots are full but for the very end: 20,000 texts are many.
      depth[row.kind] = 1000 / (row.rates[0][0] * ms)
      cells.append((row, SLIMPAJAMA))
      ranks = 'rank 0' if row.rank == '0' else 'other ranks'
      fitted.append({
          'what': f'{row.model}, {row.loops} loops, {ranks}, {row.batching}, '
                  'mean depth',
          'value': depth[row.kind], 'from': f'rank {row.rank} {SLIMPAJAMA}'})
  return Fit(texts, depth, frozenset(cells)), fitted


def _fit_scale(count: int, longest: int, block: Block, target: float) -> Texts:
  """Texts at whose lengths static batching has the target's rate."""
  return Texts(count, longest, _solve(
      lambda scale: rate(Texts(count, longest, scale), block, 'static'),
      target, 0.05, 5.0))


def _fit_count(
    longest: int, block: Block, static: float, csb: float) -> Texts:
  """Texts of which there are so many that csb, too, has its rate."""
  def texts(count):
    return _fit_scale(int(count), longest, block, static)

  return texts(_solve(
      lambda count: rate(texts(count), block, 'csb'), csb, 100.0, 10_000.0))


def _solve(function, target: float, low: float, high: float) -> float:
  """Where a function that rises reaches the target."""
  for _ in range(16):
    middle = (low + high) / 2
    low, high = ((middle, high) if function(middle) < target
                 else (low, middle))
  return low


# Tables.


def row_of(row: Printed, setting: int, blocks, fit: Fit) -> dict:
  """Our rates beside the paper's, in one setting."""
  block = blocks[row.model, row.loops, row.rank][setting - 1]
  depth = fit.depth.get(row.kind, 1)
  rule = row.batching if row.loops == 1 else 'cdb'
  return {
      'setting': setting, 'model': row.model, 'loops': row.loops,
      'rank': row.rank, 'batching': row.batching, 'slots': block.slots,
      'doubtful': (row.model, row.loops, row.rank, setting) == DOUBTFUL,
      'mean_depth': depth,
      'theory': schedulers.expected_ratio(row.loops, depth, 0.0),
      'tokens_per_second': {
          name: {
              'ours': rate(fit.texts[name], block, rule, loops=row.loops,
                           depth=depth),
              'paper': printed,
              'fitted': setting == 1 and (row, name) in fit.cells,
          } for name, printed in zip(SETS, row.rates[setting - 1],
                                     strict=True)}}


def set_quotients(settled: list[dict], rows: list[Printed]) -> None:
  """Adds means over the sets, over those of static and csb."""
  def mean(row):
    return statistics.fmean(
        each['ours'] for each in row['tokens_per_second'].values())

  for row, printed in zip(settled, rows, strict=True):
    for at, batching in enumerate(('static', 'csb')):
      base = next(each for each in settled if each['model'] == row['model']
                  and each['batching'] == batching)
      row[f'to_{batching}'] = None if row is base else {
          'ours': mean(row) / mean(base),
          'paper': printed.quotients[row['setting'] - 1][at],
          'fitted': any(each['fitted'] for one in (row, base)
                        for each in one['tokens_per_second'].values())}


def show(setting: int, rows: list[dict]) -> None:
  """Prints rates, then quotients, then how far what was predicted is off."""
  name = 'model     loops rank batching'
  print(f'\nsetting {setting}: tokens/s, ours, the paper\'s, ours over it\n'
        f'{name}{"".join(f"{each:>19}" for each in SETS)}')
  for row in rows:
    print(_name(row) + ''.join(
        _show(cell, '{:6.0f}', '=')
        for cell in row['tokens_per_second'].values()))
  print(f'\nsetting {setting}: mean over that of static and of csb\n'
        f'{name}{"to static":>19}{"to csb":>19}  depth  theory')
  for row in rows:
    print(_name(row) + _show(row['to_static'], '{:6.2f}', '~')
          + _show(row['to_csb'], '{:6.2f}', '~')
          + f'{row["mean_depth"]:7.2f}{row["theory"]:8.2f}')
  for what, cells in (
      ('rates', [cell for row in rows if not row['doubtful']
                 for cell in row['tokens_per_second'].values()]),
      ('quotients', [row[key] for row in rows if not row['doubtful']
                     for key in ('to_static', 'to_csb') if row[key]])):
    off = [abs(cell['ours'] / cell['paper'] - 1) for cell in cells
           if cell['paper'] and not cell['fitted']]
    print(f'{len(off)} predicted {what}: off by {statistics.median(off):.1%} '
          f'in the median, {max(off):.1%} at most (without !)')


def _name(row: dict) -> str:
  batching = row['batching'] if row['loops'] == 1 else f'cdb {row["batching"]}'
  mark = '!' if row['doubtful'] else ' '
  return (f'{row["model"]:10}{row["loops"]:5}{row["rank"]:>5}{mark}'
          f'{batching:8}')


def _show(cell: dict | None, form: str, mark: str) -> str:
  """Ours, the paper's and the ratio of both, 19 wide."""
  if cell is None:
    return ' ' * 19
  ours = form.format(cell['ours'])
  if cell['paper'] is None:
    return f'{ours}  copy{"":7}'
  return (f'{ours}{form.format(cell["paper"])}'
          f'{cell["ours"] / cell["paper"]:6.2f}'
          f'{mark if cell["fitted"] else " "}')

