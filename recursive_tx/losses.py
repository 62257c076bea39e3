"""Losses: what the output of every loop is asked to predict.

A term compares a loop's logits with something: `next_token` with the token
that follows, `distill` with a teacher, `self_distill` with the model's own
final loop. Each term has one weight per loop, and the loss is the weighted sum
of the terms' means over the batch's tokens.

Logits are the largest arrays there are, so they are made for a few positions
at a time, and their gradient at once: none is kept for the backward pass.

Knows hidden states, targets and a head to turn the ones into logits. Does not
know models, meshes or optimizers: whoever calls runs the model.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from recursive_tx.config import one_of

TERMS = ('next_token', 'distill', 'self_distill')
DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd', 'tvd')


class Head(NamedTuple):
  """What turns hidden states into logits.

  Attributes:
    params: the arrays it reads, which alone get a gradient.
    logits: (params, hidden states [..., D]) -> logits [..., V], float32.
  """

  params: Any
  logits: Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How much each term counts at each loop.

  A term's weights are aligned to the right: the last one is for the final
  loop, and the loops a shorter tuple does not reach weigh 0. A loop of weight
  0 is left out of the computation, not multiplied by 0.

  Attributes:
    next_token: weights of the cross-entropy with the next token.
    distill: weights of the divergence from the teacher; its gradient reaches
      the student only.
    self_distill: weights of the divergence of an earlier loop from the final
      one, whose logits get no gradient from it; the final loop's weight is 0.
    divergence: of distillation, between the teacher's p and the student's q
      (the paper's section 3.6, no temperature): 'forward_kl' KL(p || q),
      'reverse_kl' KL(q || p), 'jsd' the mean of both to their mixture, 'tvd'
      half the sum of |p - q|.
  """

  next_token: tuple[float, ...] = (1.0,)
  distill: tuple[float, ...] = ()
  self_distill: tuple[float, ...] = ()
  divergence: str = 'forward_kl'

  def __post_init__(self):
    one_of('losses.divergence', self.divergence, DIVERGENCES)
    for term in TERMS:
      if any(weight < 0 for weight in getattr(self, term)):
        raise ValueError(
            f'losses.{term} is {getattr(self, term)}; weights are 0 or more.'
        )
    if any(self.self_distill[-1:]):
      raise ValueError(
          f'losses.self_distill is {self.self_distill}; its last weight is the'
          ' final loop\'s, which is what the others learn from: make it 0.'
      )

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
    chunk: int = 0,
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
    chunk: positions of every sequence whose logits exist at one time, a
      divisor of T; 0 is all. Changes memory and time, not the loss.

  Returns:
    The loss, a float32 scalar in nats per token, and the same for every term
    and loop with a weight above 0, unweighted: 'next_token/loop2', ...
  """
  weights = config.weights(h_LBTD.shape[0])
  if uses_teacher(config) and teacher is None:
    raise ValueError('losses.distill has a weight above 0 but no teacher.')
  T = batch['target_BT'].shape[1]
  if T % (chunk or T):
    raise ValueError(
        f'A chunk of {chunk} does not divide the {T} positions of a sequence.'
    )
  # Arrays with T as their second dimension, and what gets no gradient.
  fixed = {key: batch[key] for key in ('target_BT', 'weight_BT')}
  teacher_head = None
  if uses_teacher(config):
    fixed['teacher_h_BTD'], teacher_head = teacher
  constants = (norm, teacher_head and teacher_head.params)

  def nats(params, h_LBTD, fixed, constants):
    norm, teacher_params = constants
    if teacher_head is not None:
      fixed = {**fixed, 'teacher_BTV': teacher_head.logits(
          teacher_params, fixed['teacher_h_BTD'])}
    return _nats(
        config, weights, h_LBTD, fixed,
        lambda h: head.logits(params, h), norm,
    )

  return _in_chunks(nats, chunk or T)(head.params, h_LBTD, fixed, constants)


def next_token_nats(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
  """Cross-entropy with the target, -log q(target), float32 nats [B, T]."""
  log_q_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  # A comparison rather than a gather: it stays local where V is sharded, and
  # its gradient is not a scatter.
  hit_BTV = target_BT[..., None] == jnp.arange(log_q_BTV.shape[-1])
  return -jnp.sum(jnp.where(hit_BTV, log_q_BTV, 0.0), axis=-1)


def divergence(
    kind: str, logits_BTV: jax.Array, teacher_BTV: jax.Array
) -> jax.Array:
  """One of DIVERGENCES, nats [B, T] in float32 ('tvd': a probability).

  No gradient reaches the teacher.
  """
  teacher_BTV = lax.stop_gradient(teacher_BTV.astype(jnp.float32))
  log_p_BTV = jax.nn.log_softmax(teacher_BTV)
  log_q_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  p_BTV, q_BTV = jnp.exp(log_p_BTV), jnp.exp(log_q_BTV)
  if kind == 'forward_kl':
    each = p_BTV * (log_p_BTV - log_q_BTV)
  elif kind == 'reverse_kl':
    each = q_BTV * (log_q_BTV - log_p_BTV)
  elif kind == 'jsd':
    log_m_BTV = jnp.logaddexp(log_p_BTV, log_q_BTV) - jnp.log(2.0)
    each = 0.5 * p_BTV * (log_p_BTV - log_m_BTV)
    each += 0.5 * q_BTV * (log_q_BTV - log_m_BTV)
  else:
    each = 0.5 * jnp.abs(p_BTV - q_BTV)
  return jnp.sum(each, axis=-1)


def _nats(
    config: LossConfig,
    weights: Mapping[str, tuple[float, ...]],
    h_LBTD: jax.Array,
    fixed: Mapping[str, jax.Array],
    head: Callable[[jax.Array], jax.Array],
    norm: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted sum, and each term's, of some positions; all over `norm`."""
  last = h_LBTD.shape[0] - 1
  final_BTV = None
  if any(weights['self_distill']):
    final_BTV = head(h_LBTD[last])
  loss, terms = jnp.float32(0), {}
  for loop in range(last + 1):
    wanted = [term for term in TERMS if weights[term][loop]]
    if not wanted:
      continue
    logits_BTV = final_BTV
    if loop < last or final_BTV is None:
      logits_BTV = head(h_LBTD[loop])
    for term in wanted:
      if term == 'next_token':
        nats_BT = next_token_nats(logits_BTV, fixed['target_BT'])
      else:
        teacher_BTV = fixed['teacher_BTV'] if term == 'distill' else final_BTV
        nats_BT = divergence(config.divergence, logits_BTV, teacher_BTV)
      mean = jnp.sum(nats_BT * fixed['weight_BT']) / norm
      terms[f'{term}/loop{loop + 1}'] = mean
      loss += weights[term][loop] * mean
  return loss, terms


def _in_chunks(function, chunk: int):
  """function(params, h_LBTD, fixed, constants), summed over chunks of T.

  Where a gradient is wanted, each chunk's is computed along with its value,
  so that its logits are made once and not kept. It is that of the function's
  first result, a scalar; the others get none.
  """

  @jax.custom_vjp
  def total(params, h_LBTD, fixed, constants):
    def value(start):
      return function(params, *_cut(h_LBTD, fixed, start, chunk), constants)

    def add(sums, start):
      return jax.tree.map(jnp.add, sums, value(start)), None

    return lax.scan(add, _zeros(value), _starts(h_LBTD, chunk))[0]

  def forward(params, h_LBTD, fixed, constants):
    def value_and_grad(start):
      found, (d_params, d_h) = jax.value_and_grad(
          function, argnums=(0, 1), has_aux=True
      )(params, *_cut(h_LBTD, fixed, start, chunk), constants)
      return (found, d_params), d_h

    def add(carry, start):
      sums, d_h_LBTD = carry
      found, d_h = value_and_grad(start)
      # Written in place: stacked chunks would have to be transposed.
      d_h_LBTD = lax.dynamic_update_slice_in_dim(d_h_LBTD, d_h, start, axis=2)
      return (jax.tree.map(jnp.add, sums, found), d_h_LBTD), None

    zeros = _zeros(value_and_grad)[0], jnp.zeros_like(h_LBTD)
    (found, d_params), d_h_LBTD = lax.scan(
        add, zeros, _starts(h_LBTD, chunk))[0]
    return found, (d_params, d_h_LBTD)

  def backward(gradients, cotangent):
    scaled = jax.tree.map(
        lambda g: (g * cotangent[0]).astype(g.dtype), gradients)
    return *scaled, None, None

  total.defvjp(forward, backward)
  return total


def _starts(h_LBTD: jax.Array, chunk: int) -> jax.Array:
  return jnp.arange(0, h_LBTD.shape[2], chunk)


def _zeros(function: Callable[[jax.Array], Any]) -> Any:
  """Zeros like the result for a chunk."""
  return jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(function, jnp.int32(0)))


def _cut(h_LBTD, fixed, start, chunk):
  """A chunk of every array. The batch stays whole, since it is sharded."""
  def cut(x, axis):
    return lax.dynamic_slice_in_dim(x, start, chunk, axis)

  return cut(h_LBTD, 2), {key: cut(x, 1) for key, x in fixed.items()}
