"""Results of tasks as a person reads them: a Markdown table, and a plot."""

from collections.abc import Iterator
import pathlib
from typing import Any


def table(result: dict[str, Any]) -> str:
  """What `harness.evaluate` returned, as Markdown.

  A row for each metric of each task: the score of every loop, with its
  standard error where the harness gives one, and that of random weights.
  """
  ours = result['recursive_tx']
  control = ours['control']
  names = [f'loop {loop}' for loop in _loops(ours)]
  if len(names) == 1:
    names = ['score']
  rows = [['task', 'shots', 'documents', 'metric', *names]]
  if control:
    rows[0].append('random weights')
  for task, metric in _metrics(ours['loops'][-1]):
    row = [task, str(result['n-shot'].get(task, '')),
           _documents(result, task), _name(result, task, metric)]
    row += [_value(loop[task], metric) for loop in ours['loops']]
    if control:
      most = _documents(control, task)
      note = f' (of {most})' if most != row[2] else ''
      row.append(_value(control['results'][task], metric) + note)
    rows.append(row)
  return _markdown(rows)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
  """The accuracies of every loop, one line a task, as a PNG.

  Dashed lines are those of random weights. Tasks without an accuracy are not
  drawn.
  """
  from matplotlib.figure import Figure

  ours = result['recursive_tx']
  loops = list(_loops(ours))
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  drawn = {task: metric for task, metric in reversed(
      list(_metrics(ours['loops'][-1]))) if metric.startswith('acc')}
  for task, metric in reversed(drawn.items()):
    values, errors = zip(*(
        _numbers(loop[task], metric) for loop in ours['loops']), strict=True)
    line = axes.errorbar(
        loops, values, [error or 0 for error in errors], marker='o', capsize=3,
        label=f'{task} ({metric.split(",")[0]})')[0]
    if ours['control']:
      axes.axhline(
          _numbers(ours['control']['results'][task], metric)[0],
          color=line.get_color(), linestyle='--', linewidth=0.8)
  axes.set(xlabel='loops', ylabel='accuracy', xticks=loops)
  if drawn:
    axes.legend()
  figure.savefig(path, format='png', dpi=120)


def _loops(ours: dict) -> range:
  """Numbers of the loops that were scored."""
  last = ours['model']['loops']
  return range(last - len(ours['loops']) + 1, last + 1)


def _metrics(results: dict) -> Iterator[tuple[str, str]]:
  """(task, 'acc,none') of every score."""
  for task, values in results.items():
    for metric, value in values.items():
      if isinstance(value, int | float) and ',' in metric and (
          '_stderr,' not in metric):
        yield task, metric


def _numbers(values: dict, metric: str) -> tuple[float, float | None]:
  """A score and its standard error."""
  name, suffix = metric.split(',', 1)
  error = values.get(f'{name}_stderr,{suffix}')
  return values[metric], error if isinstance(error, int | float) else None


def _value(values: dict, metric: str) -> str:
  value, error = _numbers(values, metric)
  shown = f'{value:.4f}' if abs(value) < 1e4 else f'{value:.3e}'
  return shown if error is None else f'{shown} ± {error:.4f}' if (
      error < 1e4) else f'{shown} ± {error:.3e}'


def _name(result: dict, task: str, metric: str) -> str:
  """The metric, with an arrow to where it is better."""
  name, suffix = metric.split(',', 1)
  better = result['higher_is_better'].get(task, {}).get(name)
  arrow = {True: ' ↑', False: ' ↓'}.get(better, '')
  return name + ('' if suffix == 'none' else f' ({suffix})') + arrow


def _documents(result: dict, task: str) -> str:
  found = result['n-samples'].get(task)
  return f'{found["effective"]}' if found else ''


def _markdown(rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ['| ' + ' | '.join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |'
           for row in rows]
  lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
  return '\n'.join(lines)
