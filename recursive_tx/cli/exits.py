"""The flags of when tokens exit, for the verbs that generate."""

from collections.abc import Callable

from absl import flags

from recursive_tx import exits
from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError, one_of
from recursive_tx.store.opening import Opened

# Whoever calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()

_FORM = ("expected none, static=LOOP, or a rule and a threshold for every loop"
         " but the last, such as top=0.9,0.8")


def define() -> Callable[[Opened], tuple[exits.Exit, str]]:
  """Defines them. Returns what reads a model's exit and fill."""
  rule = flags.DEFINE_string(
      'exit', '', 'When a token exits the loops: none, after the last;'
      ' static=LOOP, after that loop, from 1; RULE=THRESHOLD,... with a'
      ' threshold for every loop but the last, RULE being top, margin or'
      " gate. Empty: the checkpoint's exit.json, else none.")
  fill = flags.DEFINE_string(
      'fill', 'propagate', 'Keys and values of the loops that a token skips:'
      ' propagate (computed from the state it exited with) or complete (the'
      ' slot runs those loops as well).')

  def read(model: Opened) -> tuple[exits.Exit, str]:
    found = (parse(rule.value, model.config) if rule.value else
             model.exit or exits.Exit())
    found.check(model.config)
    return found, fill.value

  return read


def parse(text: str, cfg: ModelConfig) -> exits.Exit:
  """An exit from what --exit says.

  Raises:
    UserError: not of that form, or not for this model.
  """
  if text == 'none':
    return exits.Exit()
  rule, _, values = text.partition('=')
  one_of('exit rule', rule,
         [x for x in exits.RULES if x != 'last'] + ['none'])
  try:
    numbers = [float(value) for value in values.split(',')]
  except ValueError:
    raise UserError(f'--exit={text}: {_FORM}') from None
  if rule == 'static':
    if len(numbers) > 1 or not numbers[0].is_integer():
      raise UserError(f'--exit={text}: {_FORM}')
    return exits.static(int(numbers[0]), cfg.loops)
  return exits.Exit(rule, tuple(numbers))
