"""calibrate: thresholds of early exits that keep to the full depth's tokens.

  python -m recursive_tx calibrate --checkpoint=DIR --text='held_out/*.txt'

Writes exit.json beside the weights, which then go with that checkpoint. The
promise, agreement of at least 1 - delta with the confidence stated, is of next
tokens on text like the one given, read token by token; sequences count as
independent draws, so give many documents rather than one long one.
"""

import pathlib

from absl import flags
from tqdm import tqdm

from recursive_tx import config as config_lib
from recursive_tx import exits, files
from recursive_tx.cli import arguments, heldout
from recursive_tx.errors import UserError
from recursive_tx.exits import calibrate, report
from recursive_tx.store import native, opening

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
  # exit.json goes with these weights, and with saved ones only.
  directory = pathlib.Path(opening.weights(_CHECKPOINT.value))
  native.read_config(directory)
  files.check_file(directory / 'exit.json')
  with arguments.enough_memory():
    result = calibrate.calibrate(
        model.config, model.variables, _HELDOUT(model.tokenizer),
        rule=_RULE.value, delta=_DELTA.value,
        confidence=_CONFIDENCE.value, run=run,
        progress=lambda items, phase: tqdm(items, desc=phase, delay=0.5))
  print(report.table(result))
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
