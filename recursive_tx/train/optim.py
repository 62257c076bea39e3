"""The optimizer: a schedule and one table of rules -> one optax chain.

The table is an ordered list of rows `(pattern, lr, decay)`. A parameter takes
the first row whose pattern matches the whole of its name, such as
'block/mlp/gate/kernel'. `lr` multiplies the learning rate, `decay` the weight
decay, and `lr` 0 freezes: no update, no optimizer state, no part in the
gradient's norm. Every parameter must have a row.

Knows names and arrays. Does not know models.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recursive_tx.errors import UserError, check_ranges, in_range, one_of


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW and its schedule.

  The paper (its appendix E) gives AdamW, the peak, the cosine and the warm-up;
  the betas, the decay, the clipping and the last rate are those of its
  authors' later code.

  Attributes:
    steps: updates in all, in [1, 2147483648).
    lr: the peak learning rate, in [0, inf).
    schedule: 'cosine', from the peak down to `min_ratio` of it at the last
      step, or 'constant'.
    warmup: steps in which the rate rises linearly to the peak, in [0, inf),
      at most `steps`.
    min_ratio: where the cosine ends, as a share of the peak, in [0, 1].
    b1: decay of AdamW's first moment, in [0, 0.999999]; float32 rounds what
      is nearer to 1 to 1.
    b2: decay of AdamW's second moment, in [0, 0.999999].
    eps: what AdamW adds to the root of the second moment, in [1e-37, inf);
      less is 0 to a device, and 0 / 0 where a gradient is 0.
    weight_decay: multiplied by a row's `decay` and the learning rate, in
      [0, inf).
    clip: largest global norm of the gradient, in [0, inf); 0 does not clip.
    accumulate: parts the batch is cut into, one after the other, in [1, inf).
    max_skips: updates skipped in a row, because the loss or the gradient was
      not finite, that end the run, in [0, inf); 0 never does.
    table: rows `(pattern, lr, decay)`, see the module; both factors are in
      [0, inf).
  """

  steps: int
  lr: float
  schedule: str = 'cosine'
  warmup: int = 0
  min_ratio: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0
  accumulate: int = 1
  max_skips: int = 10
  table: tuple[tuple[str, float, float], ...] = (('.*', 1.0, 1.0),)

  RANGES = dict(
      steps='[1, 2147483648)', lr='[0, inf)', warmup='[0, inf)',
      min_ratio='[0, 1]', b1='[0, 0.999999]', b2='[0, 0.999999]',
      eps='[1e-37, inf)', weight_decay='[0, inf)', clip='[0, inf)',
      accumulate='[1, inf)', max_skips='[0, inf)')

  def __post_init__(self):
    one_of('optim.schedule', self.schedule, ('cosine', 'constant'))
    check_ranges('optim', self)
    if self.warmup > self.steps:
      raise UserError(
          f'optim.warmup is {self.warmup}; expected 0 to optim.steps,'
          f' {self.steps}.')
    for row in self.table:
      _check_row(row)


def _check_row(row: Any) -> None:
  where = f'A row of optim.table is {row!r}'
  if not isinstance(row, tuple) or len(row) != 3:
    raise UserError(f'{where}; expected (pattern, lr, decay).')
  pattern, lr, decay = row
  try:
    re.compile(pattern)
  except (TypeError, re.error) as error:
    raise UserError(
        f'{where}; {pattern!r} is not a regular expression ({error}).'
    ) from None
  in_range(f'{where}; its lr', lr, '[0, inf)')
  in_range(f'{where}; its decay', decay, '[0, inf)')


def learning_rate(config: OptimConfig, step: Any) -> jax.Array:
  """The rate of the update that follows `step` updates; step 0 is not lost."""
  def warmup(count):  # optax.linear_schedule is an ulp off where this is exact.
    return config.lr * (count / max(1, config.warmup))

  after = optax.constant_schedule(config.lr)
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(
        config.lr, max(1, config.steps - config.warmup), config.min_ratio)
  return optax.join_schedules([warmup, after], [config.warmup])(
      jnp.asarray(step, jnp.float32) + 1)


def make(config: OptimConfig, params: Any) -> optax.GradientTransformation:
  """AdamW by the table, for a tree of these parameters.

  Args:
    config: see there.
    params: arrays or shapes; only their names are read.

  Raises:
    UserError: a parameter without a row, or nothing left to train.
  """
  rows, trained = _rows(config, params), _trained(config, params)
  if not any(jax.tree.leaves(trained)):
    raise UserError('optim.table freezes every parameter.')

  def by_row(make_one):
    each = optax.partition(
        {i: make_one(*row) for i, (_, *row) in enumerate(config.table)}, rows)
    # These keep nothing, and a checkpoint has nothing of them.
    return optax.stateless(lambda updates, params: each.update(
        updates, each.init(params), params)[0])

  rules = optax.chain(
      optax.clip_by_global_norm(config.clip or math.inf),
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      by_row(lambda lr, decay: optax.add_decayed_weights(
          config.weight_decay * decay)),
      by_row(lambda lr, decay: optax.scale(lr)),
      optax.scale_by_learning_rate(lambda step: learning_rate(config, step)))
  frozen = jax.tree.map(lambda is_trained: not is_trained, trained)
  return optax.chain(
      optax.masked(optax.set_to_zero(), frozen), optax.masked(rules, trained))


def gradient_norm(config: OptimConfig, grads: Any) -> jax.Array:
  """Global norm, before clipping, over the parameters that are trained."""
  return optax.tree.norm(jax.tree.map(
      lambda is_trained, grad: grad if is_trained else None,
      _trained(config, grads), grads))


def _trained(config: OptimConfig, params: Any) -> Any:
  """Whether each parameter is trained: its row's `lr` is not 0."""
  return jax.tree.map(
      lambda i: bool(config.table[i][1]), _rows(config, params))


def _rows(config: OptimConfig, params: Any) -> Any:
  """The number of each parameter's row in the table."""

  def row(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for i, (pattern, *_) in enumerate(config.table):
      if re.fullmatch(pattern, name):
        return i
    patterns = ', '.join(repr(pattern) for pattern, *_ in config.table)
    raise UserError(
        f'Parameter {name!r} matches no row of optim.table ({patterns}); add'
        ' one, such as (".*", 1.0, 1.0) at its end.')

  return jax.tree_util.tree_map_with_path(row, params)
