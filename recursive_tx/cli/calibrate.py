"""calibrate: thresholds of early exits that keep to the full depth's tokens.

  python -m recursive_tx calibrate --checkpoint=DIR --text='held_out/*.txt'

Writes exit.json beside the weights, which then go with that checkpoint. The
promise, agreement of at least 1 - delta with the confidence stated, is of next
tokens on text like the one given, read token by token; sequences count as
independent draws, so give many documents rather than one long one.
"""

from absl import flags
from tqdm import tqdm

from recursive_tx import config as config_lib
from recursive_tx import exits
from recursive_tx.cli import arguments, heldout
from recursive_tx.errors import UserError
from recursive_tx.exits import calibrate
from recursive_tx.store import native
from recursive_tx.text.columns import columns

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, or the workdir of a finished run.')
_HELDOUT = heldout.define(
    'calibrate', 512, 'Tokens of a sequence, the unit that is drawn.')
_RULE = flags.DEFINE_string(
    'rule', 'gate', f'One of {", ".join(calibrate.RULES)}.')
_DELTA = flags.DEFINE_float(
    'delta', 0.01,
    'Share of tokens that may differ from full depth, in (0, 1).')
_CONFIDENCE = flags.DEFINE_float(
    'confidence', 0.95, 'Probability that no more do, in (0, 1).')
_DTYPE = flags.DEFINE_string(
    'dtype', 'float32', 'Of the computation: float32 or bfloat16.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  calibrate.check(_RULE.value, _DELTA.value, _CONFIDENCE.value)
  run = config_lib.Run(dtype=_DTYPE.value)
  model = arguments.opened(_CHECKPOINT.value)
  directory = model.companions
  native.read_config(directory)  # exit.json goes with saved weights only.
  with arguments.enough_memory():
    result = calibrate.calibrate(
        model.config, model.variables, _HELDOUT(model.tokenizer),
        rule=_RULE.value, delta=_DELTA.value,
        confidence=_CONFIDENCE.value, run=run,
        progress=lambda items, phase: tqdm(items, desc=phase, delay=0.5))
  print(table(result))
  if result.chosen is None:
    raise UserError(
        f'no thresholds of {result.rule!r} keep to delta={result.delta:g};'
        ' nothing was written: give a larger --delta, another --rule or more'
        ' --text')
  chosen = result.chosen
  exits.save(directory, exits.Exit(result.rule, chosen.thresholds), {
      'agreement': chosen.agreement, 'mean_depth': chosen.depth,
      'p_value': chosen.p_value, 'delta': result.delta,
      'confidence': result.confidence, 'units': result.units,
      'tokens': result.tokens, 'seq_len': flags.FLAGS.seq_len,
      'curve': [{'thresholds': point.thresholds, 'agreement': point.agreement,
                 'mean_depth': point.depth} for point in result.points]})
  print(f'{directory / "exit.json"}: agreement of at least'
        f' {1 - result.delta:g} with full depth, {result.confidence:g} sure.')


def table(result: calibrate.Result) -> str:
  """The result as a person reads it."""
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
