"""The optimizer: a schedule and one table of rules -> one optax chain.

The table is an ordered list of rows `(pattern, lr, decay)`. A parameter takes
the first row whose pattern matches the whole of its name, such as
'block/mlp/gate/kernel'. `lr` multiplies the learning rate, `decay` the weight
decay, and `lr` 0 freezes: no update, no optimizer state, no part in the
gradient's norm. Every parameter must have a row.

Knows names and arrays. Does not know models.
"""

from collections.abc import Callable
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
          f' {self.steps}.'
      )
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
  step = jnp.asarray(step, jnp.float32)
  warmup = jnp.minimum(1.0, (step + 1) / max(1, config.warmup))
  if config.schedule == 'constant':
    return config.lr * warmup
  length = max(1, config.steps - config.warmup)
  progress = jnp.clip((step + 1 - config.warmup) / length, 0.0, 1.0)
  cosine = 0.5 * (1 + jnp.cos(math.pi * progress))
  return config.lr * warmup * (
      config.min_ratio + (1 - config.min_ratio) * cosine
  )


def make(config: OptimConfig, params: Any) -> optax.GradientTransformation:
  """AdamW by the table, for a tree of these parameters.

  Args:
    config: see there.
    params: arrays or shapes; only their names are read.

  Raises:
    UserError: a parameter without a row, or nothing left to train.
  """
  lr, decay = _rows(config, params)
  trained = jax.tree.map(bool, lr)
  if not any(jax.tree.leaves(trained)):
    raise UserError('optim.table freezes every parameter.')
  rules = optax.chain(
      optax.clip_by_global_norm(config.clip or math.inf),
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      _add_decay(config.weight_decay, decay),
      _scale_by(lr),
      optax.scale_by_learning_rate(lambda step: learning_rate(config, step)),
  )
  frozen = jax.tree.map(lambda is_trained: not is_trained, trained)
  return optax.chain(
      optax.masked(optax.set_to_zero(), frozen),
      optax.masked(rules, trained),
  )


def gradient_norm(config: OptimConfig, grads: Any) -> jax.Array:
  """Global norm, before clipping, over the parameters that are trained."""
  lr, _ = _rows(config, grads)
  trained = jax.tree.map(lambda x, grad: grad if x else None, lr, grads)
  return optax.tree.norm(trained)


def _rows(config: OptimConfig, params: Any) -> tuple[Any, Any]:
  """Trees of the two multipliers, one number for each parameter."""

  def row(name):
    for pattern, lr, decay in config.table:
      if re.fullmatch(pattern, name):
        return float(lr), float(decay)
    patterns = ', '.join(repr(pattern) for pattern, *_ in config.table)
    raise UserError(
        f'Parameter {name!r} matches no row of optim.table ({patterns}); add'
        ' one, such as (".*", 1.0, 1.0) at its end.'
    )

  rows = jax.tree.map(row, _names(params))
  lr, decay = (
      jax.tree.map(lambda x, column=column: x[column], rows,
                   is_leaf=lambda x: isinstance(x, tuple))
      for column in (0, 1)
  )
  return lr, decay


def _names(tree: Any) -> Any:
  """The same tree with each leaf's name, such as 'norm/scale', for a leaf."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'),
      tree,
  )


def _add_decay(rate: float, decay: Any) -> optax.GradientTransformation:
  """Adds `rate` x the row's decay x the parameter."""
  return _stateless(
      lambda update, factor, param: update + rate * factor * param
      if rate * factor else update,
      decay,
  )


def _scale_by(factors: Any) -> optax.GradientTransformation:
  """Multiplies each update by its own factor."""
  return _stateless(lambda update, factor, _: update * factor, factors)


def _stateless(
    function: Callable[..., jax.Array], factors: Any
) -> optax.GradientTransformation:
  """`function(update, factor, param)` of each parameter that is trained."""

  def update(updates, params):
    # Frozen parameters are MaskedNodes in the first tree: no leaves there.
    return jax.tree.map(
        lambda u, f, p: u if isinstance(u, optax.MaskedNode)
        else function(u, f, p),
        updates, factors, params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )

  return optax.stateless(update)
