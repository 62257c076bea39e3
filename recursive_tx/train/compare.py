"""One model made smaller in three ways, with the same uptraining, in a table.

The original; its stepwise layers once, without looping; looped; looped and
relaxed. This is the paper's question (tables 3 and I.2) in one command.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import Any

from recursive_tx import data, evaluate, files, train
from recursive_tx.errors import UserError
from recursive_tx.store import convert, native, opening
from recursive_tx.text.columns import columns
from recursive_tx.train import log as log_lib
from recursive_tx.tying.relax import reduce

NAMES = ('original', 'reduced', 'recursive', 'relaxed')
_HEADINGS = ('model', 'loops', 'unique parameters', 'bits/byte before', 'after',
             'seconds')


def compare(
    config: train.Config, workdir: str, *, report: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
  """Makes, uptrains and scores the models.

  Args:
    config: the run of the relaxed model; `init_from` names the original, a
      vanilla model, and the other runs differ in `model` and `init` only.
    workdir: gets a directory for each run, table.json and curves.png. Runs
      that it holds are resumed.
    report: called with a line before each model.

  Returns:
    A row for each of NAMES: 'model', 'loops', 'parameters' (unique),
    'before' and 'after' (bits per byte of the last loop on the held-out set),
    'seconds' (compilation included) and 'curve', rows of metrics.

  Raises:
    UserError: as `train`, an original that is not vanilla, or a workdir that
      is not on disk.
  """
  if '://' in workdir:
    raise UserError(f'--workdir={workdir} is not on disk; name a directory')
  folder = pathlib.Path(workdir)
  cfg, variables, *_ = opening.open(config.init_from)
  heldout = data.heldout(
      config.data, opening.load_tokenizer(config.tokenizer_from),
      max_tokens=config.eval.max_tokens or None)
  report(f'original: {config.init_from}')
  start = time.monotonic()
  score = evaluate.evaluate(cfg, variables, heldout, run=config.run)
  bits = score['loops'][-1]['bits_per_byte']
  rows = [_row('original', cfg, bits, bits, start, [])]
  for name, run in _runs(config, cfg, variables, folder).items():
    count = convert.parameters(run.model)['total']
    report(f'{name}: {run.model.loops} loops of {run.model.layers_per_loop} '
         f'layers, rank {run.model.rank}, {count:,} parameters')
    start = time.monotonic()
    train.train(run, str(folder / name))
    curve = log_lib.read_metrics(str(folder / name))
    key = f'eval/loop{run.model.loops}/bits_per_byte'
    scores = [point[key] for point in curve if key in point]
    rows.append(_row(name, run.model, scores[0], scores[-1], start, curve))
  files.write_json(folder / 'table.json', [
      {k: v for k, v in row.items() if k != 'curve'} for row in rows])
  draw(rows, folder / 'curves.png')
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as text."""
  return columns([_HEADINGS, *(
      (row['model'], str(row['loops']), f'{row["parameters"]:,}',
       f'{row["before"]:.4f}', f'{row["after"]:.4f}', f'{row["seconds"]:.0f}')
      for row in rows)])


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Training loss and held-out bits per byte over steps, as a PNG."""
  import matplotlib
  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(
      1, 2, figsize=(10, 4), layout='constrained')
  for row, color in zip(rows, ('black', 'C7', 'C0', 'C3'), strict=True):
    label = f'{row["model"]} ({row["parameters"] / 1e6:.2f} M)'
    if not row['curve']:
      right.axhline(row['after'], color=color, linestyle='--', label=label)
      continue
    for axes, key in ((left, 'train/loss'), (
        right, f'eval/loop{row["loops"]}/bits_per_byte')):
      points = [(p['step'], p[key]) for p in row['curve'] if key in p]
      axes.plot(*zip(*points, strict=True), color=color, label=label,
                marker='' if axes is left else 'o', markersize=3)
  left.set(title='Uptraining', xlabel='step', ylabel='loss, nats per token')
  right.set(title='Held-out text', xlabel='step', ylabel='bits per byte')
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
  right.legend(frameon=False, title='unique parameters')
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def _runs(config, cfg, variables, folder) -> dict[str, train.Config]:
  model = config.model
  recursive = dataclasses.replace(model, rank='0')
  smaller, smaller_variables = reduce(
      cfg, variables, loops=model.loops, prelude=model.prelude,
      coda=model.coda)
  source = folder / 'reduced-start'
  if not source.exists():
    native.save(source, smaller, smaller_variables,
               companions=opening.companions(config.init_from))
  replace = dataclasses.replace
  return {
      'reduced': replace(config, model=smaller, init_from=str(source)),
      'recursive': replace(config, model=recursive, init='stepwise'),
      'relaxed': config}


def _row(name, cfg, before, after, start, curve) -> dict[str, Any]:
  return {'model': name, 'loops': cfg.loops,
          'parameters': convert.parameters(cfg)['total'], 'before': before,
          'after': after, 'seconds': time.monotonic() - start,
          'curve': curve}
