"""Losses on the output of every loop.

A term compares a loop's logits with something: `next_token` with the token
that follows, `distill` with a teacher, `self_distill` with the model's own
final loop. `gate` compares the exit gate's logit with whether the loop's best
token is the final loop's. Each term has one weight per loop, and the loss is
the weighted sum of the terms' means over the batch's tokens.

The paper trains early exits (its section 3.7) by weights alone. For 3 loops,
weighted: (1/6, 2/6, 3/6), aggressive with 0.1: (0.1, 0.1, 1), of `next_token`;
what an exit learns from the final loop, `self_distill`, comes in addition.

Logits are the largest arrays, so they are computed for a few positions at a
time, together with their gradient: none is kept for the backward pass.

Knows hidden states, targets and a head that maps the first to logits. Does not
know models, meshes or optimizers: the caller runs the model.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from recursive_tx.errors import UserError, check_ranges, one_of
from recursive_tx.losses import chunks

TERMS = ('next_token', 'distill', 'self_distill', 'gate')
DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd', 'tvd')
# What a batch holds of a teacher that ran before: J ids of every position, and
# their log-probabilities.
SAVED = ('teacher_id_BTJ', 'teacher_log_p_BTJ')


class Head(NamedTuple):
  """The map from hidden states to logits.

  Attributes:
    params: the arrays it reads, which alone get a gradient.
    logits: (params, hidden states [..., D]) -> logits [..., V], float32.
    exit_logits: the same of an earlier loop's hidden states, with its number
      from 0 as a third argument; None where every loop has the same head.
  """

  params: Any
  logits: Callable[[Any, jax.Array], jax.Array]
  exit_logits: Callable[[Any, jax.Array, int], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How much each term counts at each loop.

  A term's weights are aligned to the right: the last one is for the final
  loop, and the loops a shorter tuple does not reach weigh 0. A loop of weight
  0 is left out of the computation, not multiplied by 0. Every weight is in
  [0, inf).

  Attributes:
    next_token: weights of the cross-entropy with the next token.
    distill: weights of the divergence from the teacher; its gradient reaches
      the student only.
    self_distill: weights of the divergence of an earlier loop from the final
      one, whose logits get no gradient from it; the final loop's weight is 0.
    divergence: of distillation, between the teacher's p and the student's q
      (the paper's section 3.6, no temperature): 'forward_kl' KL(p || q),
      'reverse_kl' KL(q || p), 'jsd' the mean of both to their mixture, 'tvd'
      half the sum of |p - q|. Where only the teacher's best ids are known, p
      and q are those of `top_divergence`.
    gate: weights of the cross-entropy of the exit gate with its label: 1
      where the loop's best token is the final loop's, else 0. Its gradient
      reaches the gate only; the final loop's weight is 0.
    early: share of the sequences, in [0, 1], whose tokens exit after loops
      drawn at random, so that those that continue learn to read the keys and
      values of tokens that exited. A token that exited has no final output to
      compare with: `self_distill` and `gate` skip it.
  """

  next_token: tuple[float, ...] = (1.0,)
  distill: tuple[float, ...] = ()
  self_distill: tuple[float, ...] = ()
  divergence: str = 'forward_kl'
  gate: tuple[float, ...] = ()
  early: float = 0.0

  RANGES = dict(dict.fromkeys(TERMS, '[0, inf)'), early='[0, 1]')

  def __post_init__(self):
    one_of('losses.divergence', self.divergence, DIVERGENCES)
    check_ranges('losses', self)
    if any(self.self_distill[-1:]):
      raise UserError(
          f'losses.self_distill is {self.self_distill}; its last weight is the'
          ' final loop\'s, which is what the others learn from: make it 0.')
    if any(self.gate[-1:]):
      raise UserError(
          f'losses.gate is {self.gate}; its last weight is the final loop\'s,'
          ' which has no gate: make it 0.')

  def weights(self, loops: int) -> dict[str, tuple[float, ...]]:
    """The weight of every term at every loop, first loop first.

    Raises:
      UserError: a term has more weights than there are loops, or all of them
        are 0.
    """
    table = {}
    for term in TERMS:
      given = tuple(getattr(self, term))
      if len(given) > loops:
        raise UserError(
            f'losses.{term} has {len(given)} weights {given}, but the model'
            f' has {loops} loop{"s" * (loops > 1)}: give at most {loops}, the'
            ' last of them for the final loop.')
      table[term] = (0.0,) * (loops - len(given)) + given
    if not any(any(weights) for weights in table.values()):
      raise UserError(
          f'Every weight in losses is 0; give one of {", ".join(TERMS)} a'
          ' positive weight.')
    return table


def uses_teacher(config: LossConfig) -> bool:
  """Whether a term with a weight above 0 needs a teacher."""
  return any(config.distill)


def uses_gate(config: LossConfig) -> bool:
  """Whether a term with a weight above 0 needs an exit gate."""
  return any(config.gate)


def total(
    config: LossConfig, h_LBTD: jax.Array, batch: Mapping[str, jax.Array],
    head: Head, *, norm: jax.Array,
    teacher: tuple[jax.Array, Head] | None = None,
    gate_EBT: jax.Array | None = None, chunk: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a batch and the terms it is made of.

  Args:
    config: the weights.
    h_LBTD: the hidden states that the head multiplies, of every loop.
    batch: `target_BT` integers and `weight_BT` floats, 0 where there is
      nothing to predict; where the teacher's top-k logits were saved, also
      `teacher_id_BTJ` and `teacher_log_p_BTJ`, see `top_divergence`; where
      tokens exit early, `depth_BT`, the loops that each went through.
    head: the student's.
    norm: what sums over tokens are divided by: the sum of `weight_BT` over the
      global batch, of which this batch may be a part.
    teacher: the hidden states [B, T, D'] of the teacher's last loop and its
      head; needed where a weight of `distill` is above 0, unless the batch has
      its top-k logits.
    gate_EBT: the exit gates' logits, of every loop but the final one, float32;
      needed where a weight of `gate` is above 0.
    chunk: positions of every sequence whose logits exist at one time, a
      divisor of T; 0 is all. Changes memory and time, not the loss.

  Returns:
    The loss, a float32 scalar in nats per token, and the same for every term
    and loop with a weight above 0, unweighted: 'next_token/loop2', ...

  Raises:
    UserError: weights that do not fit the loops, a teacher or a gate that is
      missing, or a chunk that does not divide T.

  Example: two loops, a vocabulary of two, three positions of which the last is
  padding. The hidden states are the logits here. Loop 1 gives both tokens the
  probability 1/2, loop 2 gives them 3/4 and 1/4.

    >>> h_LBTD = jnp.log(jnp.array([[[[1/2, 1/2]] * 3], [[[3/4, 1/4]] * 3]]))
    >>> batch = dict(target_BT=jnp.array([[0, 1, 0]]),
    ...              weight_BT=jnp.array([[1., 1., 0.]]))
    >>> loss, terms = total(
    ...     LossConfig(next_token=(0.1, 1.0), self_distill=(0.5, 0.0)), h_LBTD,
    ...     batch, Head(None, lambda _, h: h), norm=batch['weight_BT'].sum())
    >>> for name, nats in sorted(terms.items()):
    ...   print(f'{name:19}{nats:.4f}')
    next_token/loop1   0.6931
    next_token/loop2   0.8370
    self_distill/loop1 0.1308
    >>> print(f'{loss:.4f}')
    0.9717

  Loop 1's cross-entropy is ln 2; loop 2's is the mean of -ln 3/4 and -ln 1/4;
  the divergence of loop 1 from loop 2 is 3/4 ln (3/4 / 1/2) + 1/4 ln (1/4 /
  1/2). The loss is 0.1 x 0.6931 + 1.0 x 0.8370 + 0.5 x 0.1308.
  """
  weights = config.weights(h_LBTD.shape[0])
  saved = [key for key in SAVED if key in batch]
  if uses_teacher(config) and teacher is None and not saved:
    raise UserError('losses.distill has a weight above 0 but no teacher.')
  if uses_gate(config) and gate_EBT is None:
    raise UserError('losses.gate has a weight above 0 but there is no gate.')
  T = batch['target_BT'].shape[1]
  if T % (chunk or T):
    raise UserError(
        f'A chunk of {chunk} does not divide the {T} positions of a sequence.')
  # Arrays with T as their third dimension, which get a gradient; and as their
  # second, which get none.
  outputs = {'h_LBTD': h_LBTD}
  if uses_gate(config):
    outputs['gate_EBT'] = gate_EBT
  fixed = {key: batch[key] for key in ('target_BT', 'weight_BT', *saved)}
  fixed['final_BT'] = fixed['weight_BT']  # Of tokens with a final output.
  if 'depth_BT' in batch:
    fixed['final_BT'] *= batch['depth_BT'] == h_LBTD.shape[0]
  teacher_head = None
  if uses_teacher(config) and not saved:
    fixed['teacher_h_BTD'], teacher_head = teacher
  constants = (norm, teacher_head and teacher_head.params)

  def nats(params, outputs, fixed, constants):
    norm, teacher_params = constants
    if teacher_head is not None:
      fixed = {**fixed, 'teacher_BTV': teacher_head.logits(
          teacher_params, fixed['teacher_h_BTD'])}
    return _nats(config, weights, outputs, fixed, head, params, norm)

  return chunks.total(nats, chunk or T)(head.params, outputs, fixed, constants)


def next_token_nats(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
  """Cross-entropy with the target, -log q(target), float32 nats [B, T]."""
  log_q_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  # A comparison rather than a gather: it stays local where V is sharded, and
  # its gradient is not a scatter.
  hit_BTV = target_BT[..., None] == jnp.arange(log_q_BTV.shape[-1])
  return -jnp.sum(jnp.where(hit_BTV, log_q_BTV, 0.0), axis=-1)


def gate_nats(
    gate_BT: jax.Array, logits_BTV: jax.Array, final_BTV: jax.Array
) -> jax.Array:
  """Cross-entropy of a gate's logit with whether both agree, nats [B, T].

  They agree where the likeliest token is the same, so that no gradient
  reaches the logits.
  """
  same_BT = jnp.argmax(logits_BTV, axis=-1) == jnp.argmax(final_BTV, axis=-1)
  return jax.nn.softplus(jnp.where(same_BT, -gate_BT, gate_BT))


def divergence(
    kind: str, logits_BTV: jax.Array, teacher_BTV: jax.Array
) -> jax.Array:
  """One of DIVERGENCES, nats [B, T] in float32 ('tvd': a probability).

  No gradient reaches the teacher.
  """
  teacher_BTV = lax.stop_gradient(teacher_BTV.astype(jnp.float32))
  return _between(
      kind, jax.nn.log_softmax(teacher_BTV),
      jax.nn.log_softmax(logits_BTV.astype(jnp.float32)))


def top_divergence(
    kind: str, logits_BTV: jax.Array, id_BTJ: jax.Array, log_p_BTJ: jax.Array
) -> jax.Array:
  """`divergence` where only the teacher's J best ids are known.

  p and q are then of J + 1 outcomes, the ids and "another one", r:

    forward KL = sum_c p_c log(p_c / q_c) + p_r log(p_r / q_r)
    p_r = 1 - sum_c p_c,  q_r = 1 - sum_c q_c

  and the others alike. Each is at most that of all V outcomes, and equals it
  where J = V.

  Args:
    kind: one of DIVERGENCES.
    logits_BTV: the student's.
    id_BTJ: the ids, integers, those of a position distinct.
    log_p_BTJ: the teacher's log-probabilities of them, nats.
  """
  log_p_BTJ = lax.stop_gradient(log_p_BTJ.astype(jnp.float32))
  logits_BTJ, rest_BT = _split(logits_BTV.astype(jnp.float32), id_BTJ)
  if id_BTJ.shape[-1] == logits_BTV.shape[-1]:
    return _between(kind, log_p_BTJ, jax.nn.log_softmax(logits_BTJ))
  # At least the fp32 epsilon, since 'reverse_kl' takes its logarithm.
  rest_p_BT = jnp.maximum(
      1 - jnp.sum(jnp.exp(log_p_BTJ), axis=-1), jnp.finfo(jnp.float32).eps)
  log_p = jnp.concatenate([log_p_BTJ, jnp.log(rest_p_BT)[..., None]], -1)
  logits = jnp.concatenate([logits_BTJ, rest_BT[..., None]], -1)
  return _between(kind, log_p, jax.nn.log_softmax(logits))


def _between(kind: str, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """The divergence of log-probabilities over the last dimension."""
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  if kind == 'forward_kl':
    each = p * (log_p - log_q)
  elif kind == 'reverse_kl':
    each = q * (log_q - log_p)
  elif kind == 'jsd':
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    each = 0.5 * p * (log_p - log_m)
    each += 0.5 * q * (log_q - log_m)
  else:
    each = 0.5 * jnp.abs(p - q)
  return jnp.sum(each, axis=-1)


@jax.custom_vjp
def _split(logits_BTV, id_BTJ):
  """Logits of the ids, and the log of the summed exp of all others.

  Of the others themselves, rather than of what the ids leave: a student that
  is too sure of them has a rest that is 0 in fp32 after a subtraction.
  Its own rule makes one array of V gradients, not one for each result.
  """
  others_BTV = jnp.put_along_axis(
      logits_BTV, id_BTJ, -jnp.inf, axis=-1, inplace=False)
  return (jnp.take_along_axis(logits_BTV, id_BTJ, axis=-1),
          jax.nn.logsumexp(others_BTV, axis=-1))


def _split_forward(logits_BTV, id_BTJ):
  found = _split(logits_BTV, id_BTJ)
  return found, (logits_BTV, id_BTJ, found[1])


def _split_backward(saved, cotangent):
  logits_BTV, id_BTJ, rest_BT = saved
  d_BTJ, d_rest_BT = cotangent
  d_BTV = jnp.exp(logits_BTV - rest_BT[..., None]) * d_rest_BT[..., None]
  return jnp.put_along_axis(
      d_BTV, id_BTJ, d_BTJ, axis=-1, inplace=False), None


_split.defvjp(_split_forward, _split_backward)


def _nats(
    config: LossConfig, weights: Mapping[str, tuple[float, ...]],
    outputs: Mapping[str, jax.Array], fixed: Mapping[str, jax.Array],
    head: Head, params: Any, norm: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted sum, and each term's, of some positions; all over `norm`."""
  h_LBTD = outputs['h_LBTD']
  last = len(h_LBTD) - 1

  def logits(loop):
    if loop < last and head.exit_logits is not None:
      return head.exit_logits(params, h_LBTD[loop], loop)
    return head.logits(params, h_LBTD[loop])

  final_BTV = None
  if any(weights['self_distill']) or any(weights['gate']):
    final_BTV = logits(last)
  loss, terms = jnp.float32(0), {}
  for loop in range(last + 1):
    wanted = [term for term in TERMS if weights[term][loop]]
    if not wanted:
      continue
    logits_BTV = final_BTV
    if loop < last or final_BTV is None:
      logits_BTV = logits(loop)
    for term in wanted:
      if term == 'next_token':
        nats_BT = next_token_nats(logits_BTV, fixed['target_BT'])
      elif term == 'gate':
        nats_BT = gate_nats(outputs['gate_EBT'][loop], logits_BTV, final_BTV)
      elif term == 'distill' and SAVED[0] in fixed:
        nats_BT = top_divergence(
            config.divergence, logits_BTV, *(fixed[key] for key in SAVED))
      else:
        teacher_BTV = fixed['teacher_BTV'] if term == 'distill' else final_BTV
        nats_BT = divergence(config.divergence, logits_BTV, teacher_BTV)
      weight_BT = fixed[
          'final_BT' if term in ('gate', 'self_distill') else 'weight_BT']
      mean = jnp.sum(nats_BT * weight_BT) / norm
      terms[f'{term}/loop{loop + 1}'] = mean
      loss += weights[term][loop] * mean
  return loss, terms
