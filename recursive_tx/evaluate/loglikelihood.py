"""Log-likelihoods of continuations, as multiple-choice tasks ask for them.

Requests are sorted by length and packed into rows of few lengths, each of
which is compiled once (`shared_rows`). A context that several continuations
share is read once. The head is applied to the predicted positions only, some
at a time, so that logits of whole sequences never exist.

Knows token ids; nothing of text or tasks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from recursive_tx.config import ModelConfig, Run
from recursive_tx.evaluate import shared_rows
from recursive_tx.evaluate.shared_rows import Request
from recursive_tx.model import Decoder, attention, cpu

_RUN = Run()
# Tokens of a batch, and predicted positions whose logits exist at one time:
# on CPUs as few as run at full speed, elsewhere enough to fill a device.
_TOKENS = {'cpu': 2048}
_POSITIONS = {'cpu': 128}
_OTHER_TOKENS, _OTHER_POSITIONS = 32768, 2048
# Most bytes of a batch's activations.
_BYTES = 2 << 30


class Scores(NamedTuple):
  """Of Q requests, by loop.

  Attributes:
    log_p_LQ: float64, natural logarithm of each continuation's probability
      given its context: the sum over its tokens.
    greedy_LQ: bool, whether every token of the continuation is the likeliest
      one: greedy decoding would generate it.
  """
  log_p_LQ: np.ndarray
  greedy_LQ: np.ndarray


class Scorer:
  """Scores continuations with one model.

  Example, of two continuations that share a context of three tokens:

    scorer = Scorer(cfg, variables)
    scores = scorer([Request([1, 5, 6], [7, 8]), Request([1, 5, 6], [9])])
    best = scores.log_p_LQ[-1].argmax()

  Attributes:
    loops: L of the results: that of the model with `exits`, else 1.
    max_length: most tokens that the model reads.
  """

  def __init__(
      self, cfg: ModelConfig, variables: Any, *, run: Run = _RUN,
      max_length: int = 2048, tokens: int = 0, exits: bool = False,
  ):
    """Moves the parameters to the device.

    Args:
      cfg, variables: any model of this library.
      run: how to execute it; `attention` is chosen here.
      max_length: most tokens of a context and its continuation, but for the
        continuation's last, which is not read. Longer requests lose the first
        tokens of their context.
      tokens: of a batch, at most, unless a single row has more; 0 is what
        suits the device and keeps activations below 2 GiB.
      exits: score the output of every loop; otherwise only of the last.
    """
    self.loops = cfg.loops if exits else 1
    self.max_length = max_length
    self._tokens = tokens or _batch_tokens(cfg)
    self._variables = jax.device_put(variables)
    self._score_fn = lambda longest: _score_fn(
        cfg.opened_for(longest), run, exits)

  def __call__(
      self, requests: Sequence[Request], *,
      progress: Callable[[Sequence], Iterable] = iter,
  ) -> Scores:
    """Scores requests.

    Args:
      requests: Q (context, continuation) pairs of token ids. Those that share
        a context are scored together wherever they stand.
      progress: is given the batches and iterates over them, as `tqdm` does.

    Returns:
      Results in the order of the requests.

    Raises:
      UserError: an empty context or continuation, or a continuation of more
        than `max_length` tokens.
    """
    Q = len(requests)
    log_p_LQ = np.zeros((self.loops, Q))
    greedy_LQ = np.zeros((self.loops, Q), bool)
    for numbers, scores in self.stream(requests, progress=progress):
      log_p_LQ[:, numbers], greedy_LQ[:, numbers] = scores
    return Scores(log_p_LQ, greedy_LQ)

  def stream(
      self, requests: Sequence[Request], *,
      progress: Callable[[Sequence], Iterable] = iter,
  ) -> Iterator[tuple[np.ndarray, Scores]]:
    """As calling, but yields the results of a batch as soon as it is done.

    Yields:
      The numbers of some requests, int [n], and their scores.
    """
    # Arrays are made, and results summed, while the device works on a batch.
    before = None
    score = self._score_fn(min(self.max_length, max(
        (len(context) + len(continuation) - 1
         for context, continuation in requests), default=1)))
    for batch in progress(shared_rows.batches(
        requests, max_length=self.max_length, tokens=self._tokens)):
      arrays = shared_rows.arrays(batch)
      results = score(self._variables, arrays._replace(owner_A=None))
      if before is not None:
        yield _summed(*before)
      before = arrays, results
    if before is not None:
      yield _summed(*before)


def _batch_tokens(cfg: ModelConfig) -> int:
  """Tokens of a batch that suit the device and a bound of memory."""
  wide = 3 * cfg.F + (cfg.N + 2 * cfg.K) * cfg.H + (cfg.loops + 6) * cfg.D
  # Attention holds the scores of a block of 64 queries, and its weights.
  most = _BYTES // (4 * (wide + 2 * 64 * cfg.N))
  return max(1, min(_TOKENS.get(jax.default_backend(), _OTHER_TOKENS), most))


def _summed(arrays, results) -> tuple[np.ndarray, Scores]:
  """Adds up tokens by request, on the host in float64."""
  log_p_LA, hit_LA = (
      np.asarray(x)[:, :arrays.count] for x in results)
  # The tokens of a request are neighbours.
  owner_A = arrays.owner_A[:arrays.count]
  first_Q = np.flatnonzero(np.diff(owner_A, prepend=-1))
  return owner_A[first_Q], Scores(
      np.add.reduceat(log_p_LA, first_Q, axis=1, dtype=np.float64),
      np.logical_and.reduceat(hit_LA, first_Q, axis=1))


@functools.cache
def _score_fn(cfg: ModelConfig, run: Run, exits: bool):
  """(variables, arrays) -> log_p_LA, float32, and whether it is likeliest.

  Kept between calls, so that a model is compiled for each shape once.
  """
  # No kernel reads a mask; blocks take a window for one of places in the row.
  run = Run(dtype=run.dtype, unroll=run.unroll, logits_mib=run.logits_mib,
            attention='plain' if cfg.window else 'blocks')
  decoder = Decoder(cfg, run=run)
  loops = range(0 if exits else cfg.loops - 1, cfg.loops)
  chunk = min(_POSITIONS.get(jax.default_backend(), _OTHER_POSITIONS),
              max(1, (run.logits_mib << 20) // (4 * cfg.V)))

  def score(variables, arrays):
    h_LBTD = decoder.apply(
        variables, arrays.token_BT, None, arrays.position_BT, None,
        _mask(cfg, arrays), method='hidden')
    h_LPD = h_LBTD.reshape(cfg.loops, -1, cfg.D)
    A = len(arrays.at_A)
    C = min(chunk, A)
    at_A, target_A = (
        jnp.pad(x_A, (0, -A % C)) for x_A in (arrays.at_A, arrays.target_A))

    def of_chunk(i, found):
      at_C, target_C = (
          lax.dynamic_slice_in_dim(x_A, i * C, C) for x_A in (at_A, target_A))
      rows = [_of_positions(decoder, variables, h_LPD[loop, at_C], target_C,
                            loop) for loop in loops]
      return [lax.dynamic_update_slice_in_dim(
          x_LA, jnp.stack(x_LC), i * C, axis=1)
              for x_LA, x_LC in zip(found, zip(*rows, strict=True),
                                    strict=True)]

    shape = len(loops), len(at_A)
    return lax.fori_loop(
        0, -(-arrays.count // C), of_chunk,
        [jnp.zeros(shape), jnp.zeros(shape, bool)])

  return jax.jit(score)


def _of_positions(decoder, variables, h_CD, target_C, loop):
  """log_p_C of the targets in fp32, and whether they are the likeliest."""
  logits_CV = decoder.apply(variables, h_CD, loop, method='logits')
  # From the largest, so that those of likely tokens keep their digits.
  logits_CV -= logits_CV.max(axis=1, keepdims=True)
  target_C1 = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)
  return (target_C1[:, 0] - jnp.log(jnp.exp(logits_CV).sum(axis=1)),
          cpu.argmax(decoder.run, logits_CV) == target_C)


def _mask(cfg: ModelConfig, arrays) -> jax.Array:
  """What each token sees: its context, and what is before it in its branch."""
  place_1T = jnp.arange(arrays.token_BT.shape[1])[None]
  mask_BTS = attention.visible(
      place_1T, place_1T, window=0, segment_BT=arrays.tree_BT)
  own_BTS = arrays.branch_BT[:, :, None] == arrays.branch_BT[:, None, :]
  mask_BTS &= own_BTS | (arrays.branch_BT[:, None, :] == 0)
  if cfg.window and not cfg.mixed_kinds:
    position_BT = arrays.position_BT
    mask_BTS &= attention.visible(
        position_BT, position_BT, window=cfg.window)
  return mask_BTS
