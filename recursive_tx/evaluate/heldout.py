"""Held-out loss, perplexity and bits per byte of every loop's output.

Bits per byte compares models whatever their tokenizers: the summed nats of
all predicted tokens, end-of-document tokens included, over ln 2 and over the
UTF-8 bytes of the documents.

Knows a model and batches. Does not know where either comes from.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import math
import re
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from recursive_tx import losses, machine
from recursive_tx.config import ModelConfig, Run
from recursive_tx.errors import UserError
from recursive_tx.evaluate.loglikelihood import Request, Scorer
from recursive_tx.model import Decoder, adapters
from recursive_tx.text import Tokenizer

_RUN = Run()


def evaluate(
    cfg: ModelConfig,
    variables: Any,
    heldout: Any,
    *,
    run: Run = _RUN,
    mesh: Mesh | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[str, Any]:
  """Scores every loop's output on a fixed set of documents.

  Args:
    cfg: the model.
    variables: {'params': ...}, on the mesh if there is one.
    heldout: `batches` (dictionaries of `token_BT`, `target_BT`, `weight_BT`,
      `segment_BT`, `position_BT`), `num_bytes` and `num_documents`.
    run: how to execute the model.
    mesh: where to put the batches; None is the default device.
    progress: is given the batches and iterates over them, as `tqdm` does.

  Returns:
    `documents`, `bytes`, `tokens` (predicted ones), and in `loops` a row for
    every loop: `loop` from 1, `loss` in nats per token, `perplexity` (at most
    e^700), `bits_per_byte`. All are finite.

  Raises:
    UserError: nothing to predict, or a loss that is not finite.
  """
  nats_fn = _nats_fn(cfg, run, mesh)
  nats_L, tokens = np.zeros(cfg.loops, np.float64), 0.0
  for batch in progress(heldout.batches):
    tokens += batch['weight_BT'].sum(dtype=np.float64)
    if mesh is not None:
      batch = machine.place(batch, machine.rows(mesh))
    # Summed on the host: float32 loses digits over millions of tokens.
    nats_LBT = np.asarray(nats_fn(variables, batch))
    nats_L += nats_LBT.sum(axis=(1, 2), dtype=np.float64)
  return _result(nats_L, tokens, heldout, run)


def evaluate_strided(
    cfg: ModelConfig,
    variables: Any,
    heldout: Any,
    *,
    seq_len: int,
    stride: int,
    run: Run = _RUN,
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[str, Any]:
  """As `evaluate`, with the context of earlier pieces of a document.

  The first `seq_len` tokens of a document are predicted at once, as `evaluate`
  does; after them, `stride` tokens at a time, with as many tokens before them
  as make `seq_len`.

  Args:
    cfg, variables, run, progress: as for `evaluate`.
    heldout: with `documents`, the token ids of each.
    seq_len: most tokens that the model reads at once.
    stride: in [1, seq_len]. Less takes longer and gives more context.

  Raises:
    UserError: as `evaluate`.
  """
  requests = [window for ids in heldout.documents
              for window in _windows(ids, seq_len, stride)]
  scorer = Scorer(cfg, variables, run=run, max_length=seq_len, exits=True)
  log_p_LQ = scorer(requests, progress=progress).log_p_LQ
  tokens = sum(len(request.continuation) for request in requests)
  return _result(-log_p_LQ.sum(axis=1), tokens, heldout, run)


def add_words(
    result: dict[str, Any], heldout: Any, tokenizer: Tokenizer
) -> None:
  """Adds perplexities per word and per byte to a result.

  `words` and every loop's `word_perplexity` and `byte_perplexity`, as
  lm-evaluation-harness defines them: e to the power of the summed nats over
  the number of words, which white space separates, or of bytes. At most e^700.

  Args:
    result: of `evaluate` or `evaluate_strided`.
    heldout: what it is of, with `documents`.
    tokenizer: that made the documents' ids.
  """
  start = len(tokenizer.opening)
  result['words'] = words = sum(
      len(re.split(r'\s+', tokenizer.decode(ids[start:].tolist()[
          :-1 if ids[-1] == tokenizer.eos_id else None])))
      for ids in heldout.documents)
  for row in result['loops']:
    nats = row['loss'] * result['tokens']
    for unit, count in (('word', words), ('byte', result['bytes'])):
      row[f'{unit}_perplexity'] = math.exp(min(nats / count, 700.0))


def _windows(ids: np.ndarray, length: int, stride: int) -> Iterator[Request]:
  """Every id but the first once as a continuation, in order."""
  ids = ids.tolist()
  stop = 1
  while stop < len(ids):
    start, stop = stop, min(
        len(ids), stop + (length if stop == 1 else stride))
    yield Request(ids[max(0, stop - 1 - length):start], ids[start:stop])


def _result(
    nats_L: np.ndarray, tokens: float, heldout: Any, run: Run
) -> dict[str, Any]:
  """What `evaluate` returns, of the summed nats of every loop."""
  if not tokens or not heldout.num_bytes:
    raise UserError('The held-out set is empty: no token to predict.')
  for loop, nats in enumerate(nats_L.tolist(), 1):
    if not math.isfinite(nats):
      raise UserError(
          f'the held-out loss of loop {loop} is {nats}, expected a finite'
          f' number: parameters are not finite, or overflow in {run.dtype};'
          ' take an earlier checkpoint, or dtype float32')
  return {
      'documents': heldout.num_documents,
      'bytes': heldout.num_bytes,
      'tokens': int(tokens),
      'loops': [
          {
              'loop': loop + 1,
              'loss': nats / tokens,
              'perplexity': math.exp(min(nats / tokens, 700.0)),
              'bits_per_byte': nats / math.log(2) / heldout.num_bytes,
          }
          for loop, nats in enumerate(nats_L.tolist())
      ],
  }


@functools.cache
def _nats_fn(cfg: ModelConfig, run: Run, mesh: Mesh | None):
  """Weighted nats of each target, (variables, batch) -> nats_LBT float32.

  Kept between calls, so that a model is compiled for evaluation once.
  """
  def nats(variables, batch):
    decoder = Decoder(
        cfg.opened_for(batch['token_BT'].shape[1]), run=run)
    h_LBTD = decoder.apply(
        variables, batch['token_BT'], batch['segment_BT'],
        batch['position_BT'], method='hidden',
    )

    B, T = batch['token_BT'].shape
    devices = mesh.size if mesh is not None else 1
    chunk = run.chunk(T, 4 * B * cfg.V / devices)

    def of_loop(loop, h_BTD):
      def of_chunk(start):
        h_BCD, target_BC = (
            lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
            for x in (h_BTD, batch['target_BT']))
        logits_BCV = decoder.apply(variables, h_BCD, loop, method='logits')
        return losses.next_token_nats(logits_BCV, target_BC)

      nats_CBC = lax.map(of_chunk, jnp.arange(0, T, chunk))
      return jnp.moveaxis(nats_CBC, 0, 1).reshape(B, T)

    # Loops whose heads are the same are compiled once.
    loops = range(cfg.loops if adapters.head_rank(cfg) else 1)
    heads = [functools.partial(of_loop, loop) for loop in loops]
    # One loop after the other: logits are the largest arrays there are. A
    # number beyond the heads' takes the last of them.
    return lax.map(
        lambda x: lax.switch(x[0], heads, x[1]),
        (jnp.arange(cfg.loops), h_LBTD),
    ) * batch['weight_BT']

  # Whole on every process, each of which adds them up.
  return jax.jit(nats, out_shardings=mesh and machine.replicated(mesh))
