"""Losses: what the output of every loop is asked to predict.

A term compares a loop's logits with something: `next_token` with the token
that follows, `distill` with a teacher. Each term has one weight per loop, and
the loss is the weighted sum of the terms' means over the batch's tokens.

Knows hidden states, targets and a head to turn the ones into logits. Does not
know models, meshes or optimizers: whoever calls runs the model.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

# Hidden states [..., D] in the compute dtype -> logits [..., V] in float32.
Head = Callable[[jax.Array], jax.Array]

TERMS = ('next_token', 'distill')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How much each term counts at each loop.

  A term's weights are aligned to the right: the last one is for the final
  loop, and the loops a shorter tuple does not reach weigh 0. A loop of weight
  0 is left out of the computation, not multiplied by 0.

  Attributes:
    next_token: weights of the cross-entropy with the next token.
    distill: weights of KL(teacher || student), the paper's forward KL
      (section 3.6), without a temperature. The gradient reaches the student
      only.
    chunk: positions of every sequence whose logits exist at one time; the
      backward pass computes them again. 0: all of them, nothing computed
      twice. Changes memory and time, not the loss.
  """

  next_token: tuple[float, ...] = (1.0,)
  distill: tuple[float, ...] = ()
  chunk: int = 0

  def __post_init__(self):
    for term in TERMS:
      if any(weight < 0 for weight in getattr(self, term)):
        raise ValueError(
            f'losses.{term} is {getattr(self, term)}; weights are 0 or more.'
        )
    if self.chunk < 0:
      raise ValueError(f'losses.chunk is {self.chunk}; expected 0 or more.')

  def weights(self, loops: int) -> dict[str, tuple[float, ...]]:
    """The weight of every term at every loop, first loop first.

    Raises:
      ValueError: a term has more weights than there are loops, or all of them
        are 0.
    """
    table = {}
    for term in TERMS:
      given = tuple(getattr(self, term))
      if len(given) > loops:
        raise ValueError(
            f'losses.{term} has {len(given)} weights {given}, but the model'
            f' has {loops} loop{"s" * (loops > 1)}: give at most {loops}, the'
            ' last of them for the final loop.'
        )
      table[term] = (0.0,) * (loops - len(given)) + given
    if not any(any(weights) for weights in table.values()):
      raise ValueError(
          f'Every weight in losses is 0; give one of {", ".join(TERMS)} a'
          ' positive weight.'
      )
    return table


def uses_teacher(config: LossConfig) -> bool:
  """Whether a term with a weight above 0 asks for a teacher."""
  return any(config.distill)


def total(
    config: LossConfig,
    h_LBTD: jax.Array,
    batch: Mapping[str, jax.Array],
    head: Head,
    *,
    norm: jax.Array,
    teacher: tuple[jax.Array, Head] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a batch and the terms it is made of.

  Args:
    config: the weights.
    h_LBTD: the hidden states that the head multiplies, of every loop.
    batch: `target_BT` integers and `weight_BT` floats, 0 where there is
      nothing to predict.
    head: the student's.
    norm: what sums over tokens are divided by: the sum of `weight_BT` over the
      global batch, of which this batch may be a part.
    teacher: the hidden states [B, T, D'] of the teacher's last loop and its
      head; needed where a weight of `distill` is above 0.

  Returns:
    The loss, a float32 scalar in nats per token, and the same for every term
    and loop with a weight above 0, unweighted: 'next_token/loop2', ...
  """
  weights = config.weights(h_LBTD.shape[0])
  teacher_h_BTD, teacher_head = teacher or (None, None)
  if uses_teacher(config) and teacher is None:
    raise ValueError('losses.distill has a weight above 0 but no teacher.')
  tokens = dict(
      h_LBTD=h_LBTD,
      target_BT=batch['target_BT'],
      weight_BT=batch['weight_BT'],
      teacher_h_BTD=teacher_h_BTD if uses_teacher(config) else None,
  )

  def sums(tokens):
    return _sums(weights, head=head, teacher_head=teacher_head, **tokens)

  if config.chunk:
    chunks = _split_time(tokens, config.chunk)
    sums_of_chunks = lax.map(jax.checkpoint(sums), chunks)
    nats = jax.tree.map(lambda sums_C: sums_C.sum(), sums_of_chunks)
  else:
    nats = sums(tokens)
  metrics = {key: value / norm for key, value in nats.items()}
  loss = sum(
      weights[term][loop] * metrics[_key(term, loop)]
      for term in weights
      for loop in range(len(weights[term]))
      if weights[term][loop]
  )
  return loss, metrics


def next_token_nats(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
  """Cross-entropy with the target, -log q(target), float32 nats [B, T]."""
  log_q_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  # A comparison rather than a gather: it stays local where V is sharded, and
  # its gradient is not a scatter.
  hit_BTV = target_BT[..., None] == jnp.arange(log_q_BTV.shape[-1])
  return -jnp.sum(jnp.where(hit_BTV, log_q_BTV, 0.0), axis=-1)


def distill_nats(logits_BTV: jax.Array, teacher_BTV: jax.Array) -> jax.Array:
  """KL(teacher || student), float32 nats [B, T]; no gradient to the teacher."""
  teacher_BTV = lax.stop_gradient(teacher_BTV.astype(jnp.float32))
  log_p_BTV = jax.nn.log_softmax(teacher_BTV)
  log_q_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)


def _sums(
    weights: Mapping[str, tuple[float, ...]],
    *,
    h_LBTD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    teacher_h_BTD: jax.Array | None,
    head: Head,
    teacher_head: Head | None,
) -> dict[str, jax.Array]:
  """Sums over tokens of every term at every loop that has a weight."""
  teacher_BTV = None
  if teacher_h_BTD is not None:
    teacher_BTV = teacher_head(teacher_h_BTD)
  sums = {}
  for loop in range(h_LBTD.shape[0]):
    terms = [term for term in weights if weights[term][loop]]
    if not terms:
      continue
    logits_BTV = head(h_LBTD[loop])
    for term in terms:
      if term == 'next_token':
        nats_BT = next_token_nats(logits_BTV, target_BT)
      else:
        nats_BT = distill_nats(logits_BTV, teacher_BTV)
      sums[_key(term, loop)] = jnp.sum(nats_BT * weight_BT)
  return sums


def _split_time(tokens, chunk: int):
  """[..., T, ...] -> [T / chunk, ..., chunk, ...], in every array.

  Time is cut rather than the batch, because the batch is what is sharded.
  """
  time = tokens['target_BT'].shape[1]
  if time % chunk:
    raise ValueError(
        f'losses.chunk is {chunk}, which does not divide the {time} positions'
        ' of a sequence.'
    )

  def split(x, axis):
    shape = x.shape[:axis] + (time // chunk, chunk) + x.shape[axis + 1 :]
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  return {
      name: None if x is None else split(x, 2 if name == 'h_LBTD' else 1)
      for name, x in tokens.items()
  }


def _key(term: str, loop: int) -> str:
  return f'{term}/loop{loop + 1}'
