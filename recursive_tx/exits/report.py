"""What `calibrate` found, as a person reads it."""

from recursive_tx.exits.calibrate import Result
from recursive_tx.text.columns import columns


def table(result: Result) -> str:
  """The result as text."""
  lines = [f'{result.units} sequences, {result.tokens:,} tokens; the oracle'
           f' exits after {result.oracle_depth:.3f} loops']
  for loop, (agreement, area) in enumerate(
      zip(result.agreement_E, result.area_E, strict=True), 1):
    lines.append(f'loop {loop} agrees on {agreement:.4f} of them; {result.rule}'
                 f' predicts which: area under the ROC curve {area:.4f}')
  rows = [('thresholds', 'agreement', 'mean depth', 'p-value', '')]
  for point in result.points:
    rows.append((
        ' '.join(f'{value:.6f}' for value in point.thresholds),
        f'{point.agreement:.4f}', f'{point.depth:.4f}', f'{point.p_value:.2g}',
        '<- chosen' if point == result.chosen else ''))
  return '\n'.join([*lines, columns(rows)])
