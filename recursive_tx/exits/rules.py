"""When a token exits the loops: the rules and their thresholds.

After every loop but the last a rule gives a token a score, and where it
reaches that loop's threshold the token exits. `calibrate.py` chooses the
thresholds. Confidence by the largest probability and by the two largest is
CALM's (Schuster et al., arxiv.org/abs/2207.07061).

Knows logits; nothing of models, caches or schedules.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx import files
from recursive_tx.errors import UserError, one_of

# Rules by what must be computed to decide.
_NEEDS = {
    'last': 'nothing', 'static': 'nothing', 'top': 'logits',
    'margin': 'logits', 'gate': 'gate',
}
RULES = tuple(_NEEDS)
# A threshold that no score reaches.
NEVER = 2.0

_FILE = 'exit.json'


@dataclasses.dataclass(frozen=True)
class Exit:
  """When a token exits the loops.

  Attributes:
    rule: 'last': after the last loop; 'static': after the same loop always;
      by the loop's own logits 'top' or 'margin', see `score`; 'gate': by the
      learned gate.
    thresholds: one for every loop but the last, in [0, 2]; a token exits
      where its score, in [0, 1], is at least that. () for 'last', which has no
      score.

  Raises:
    UserError: an unknown rule, or a threshold out of range.
  """
  rule: str = 'last'
  thresholds: tuple[float, ...] = ()

  def __post_init__(self):
    one_of('exit rule', self.rule, RULES)
    try:
      thresholds = tuple(float(value) for value in self.thresholds)
    except (OverflowError, TypeError, ValueError):
      thresholds = (math.nan,)
    if not all(0 <= value <= NEVER for value in thresholds):
      raise UserError(
          f'exit thresholds {self.thresholds!r}: expected numbers from 0, where'
          f' every token exits, to 1, or {NEVER:g}, where none does')
    object.__setattr__(self, 'thresholds', thresholds)

  def check(self, cfg: config_lib.ModelConfig) -> None:
    """Raises UserError where a model has no such exits."""
    wanted = 0 if self.rule == 'last' else cfg.loops - 1
    if len(self.thresholds) != wanted:
      raise UserError(
          f'exit rule {self.rule!r} has {len(self.thresholds)} thresholds'
          f' {self.thresholds}; with model.loops={cfg.loops} give {wanted}')
    if self.rule == 'gate' and not cfg.exit_gate:
      raise UserError(
          "exit rule 'gate' needs a gate, but model.exit_gate=0; train one"
          " (config.model.exit_gate=64), or take 'top' or another rule")

  @property
  def needs(self) -> str:
    """What must be computed to decide: 'nothing', 'gate' or 'logits'."""
    return _NEEDS[self.rule]


def static(loop: int, loops: int) -> Exit:
  """Every token exits after the same loop.

  Args:
    loop: from 1, as users count.
    loops: of the model.
  """
  if not 1 <= loop <= loops:
    raise UserError(
        f'exit after loop {loop}: the model has {loops}; give 1 to {loops}')
  # The score is 0.
  return Exit('static', (1.0,) * (loop - 1) + (0.0,) * (loops - loop))


def score(
    rule: str, *, logits: jax.Array | None = None,
    gate: jax.Array | None = None,
) -> jax.Array:
  """How sure a loop's output is; larger is surer.

  Args:
    rule: 'top', the largest probability; 'margin', its distance from the
      second over their sum, which ranks as their logits' distance does;
      'gate', the probability the gate gives; 'static', 0.
    logits: the loop's, of any leading dimensions; where `Exit.needs` says.
    gate: the gate's logit, as `Decoder.gate` gives it.

  Returns:
    The score, fp32, in [0, 1]; a scalar for 'static'.
  """
  assert rule in RULES and rule != 'last', rule
  if rule == 'static':
    return jnp.float32(0)
  if rule == 'gate':
    return jax.nn.sigmoid(gate.astype(jnp.float32))
  if rule == 'margin':
    # Two maxima: CPUs sort for top_k.
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(
        jnp.arange(logits.shape[-1]) == best, -jnp.inf, logits)
    apart = logits.max(axis=-1) - others.max(axis=-1)
    return jnp.tanh(apart.astype(jnp.float32) / 2)
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.exp(log_p.max(axis=-1))


def save(
    directory: str | os.PathLike, exit: Exit, facts: dict[str, Any]
) -> None:
  """Writes exit.json beside the weights, whole or not at all.

  Args:
    directory: of a saved model.
    exit: the rule and its thresholds.
    facts: how they were found, for people to read.
  """
  path = pathlib.Path(directory) / _FILE
  beside = path.with_name(f'.{_FILE}.{os.getpid()}')
  try:
    files.write_json(beside, {**dataclasses.asdict(exit), **facts})
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def load(directory: str | os.PathLike) -> Exit | None:
  """What `save` wrote; None where nothing was.

  Raises:
    UserError: a file that is not of that form.
  """
  path = pathlib.Path(directory) / _FILE
  if not path.exists():
    return None
  found = files.read_json(path)
  rule, thresholds = found.get('rule'), found.get('thresholds')
  numbers = isinstance(thresholds, list) and all(
      isinstance(x, int | float) and not isinstance(x, bool)
      for x in thresholds)
  if not isinstance(rule, str) or not numbers:
    raise UserError(f"{path} lacks 'rule' or 'thresholds'; calibrate anew")
  return Exit(rule, tuple(thresholds))
