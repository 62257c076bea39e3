"""How near a model is to its original, and how well it answers.

Functions that several benchmarks share: perplexity and divergence on texts cut
into pieces, and multiple-choice tasks read from JSON lines.
"""

from collections.abc import Iterable
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import losses, model
from recursive_tx.evaluate.shared_rows import Request


def pieces(tokenizer: Any, text: str, length: int, most: int) -> np.ndarray:
  """A text's whole pieces of so many tokens, at most `most` tokens in all."""
  ids = np.asarray(tokenizer.encode(text), np.int32)[:most]
  return ids[:len(ids) // length * length].reshape(-1, length)


class Compared:
  """Compares models with their original on one text, which it reads once."""

  def __init__(self, cfg, variables, token_QT: np.ndarray, rows: int = 1):
    """`rows`: pieces that are run at once."""
    self._cfg, self._variables = cfg, jax.device_put(variables)
    self._token_QT, self._rows = token_QT, rows
    self._h_NTD = [self._hidden(cfg, self._variables, token_BT)
                   for token_BT in self._batches()]

  def __call__(self, cfg, variables) -> dict[str, float]:
    """`perplexity` of the tokens but each piece's first, and `kl`, the mean
    KL(original || model) in nats a token."""
    variables = jax.device_put(variables)
    sums = [_sums(self._cfg, cfg, self._variables, variables, h_BTD,
                  self._hidden(cfg, variables, token_BT), token_BT)
            for h_BTD, token_BT in zip(
                self._h_NTD, self._batches(), strict=True)]
    nats, kl = np.sum(sums, axis=0) / self._token_QT[:, 1:].size
    return {'perplexity': float(np.exp(nats)), 'kl': float(kl)}

  def _batches(self):
    return [self._token_QT[i:i + self._rows]
            for i in range(0, len(self._token_QT), self._rows)]

  def _hidden(self, cfg, variables, token_BT):
    return _hidden(cfg, variables, token_BT[:, :-1])


@functools.partial(jax.jit, static_argnums=0)
def _hidden(cfg, variables, token_BT):
  return model.Decoder(cfg).apply(variables, token_BT, method='hidden')[-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(cfg, mine, exact, variables, h_BTD, x_BTD, token_BT) -> jax.Array:
  """Sums over tokens of -log p(next), and of KL(original || model)."""
  def of_row(row):
    h_TD, x_TD, target_T = row
    one, other = (jax.nn.log_softmax(model.Decoder(c).apply(
        v, y_TD[None], c.loops - 1, method='logits')[0])
        for c, v, y_TD in ((cfg, exact, h_TD), (mine, variables, x_TD)))
    return jnp.stack([losses.next_token_nats(other, target_T).sum(),
                      (jnp.exp(one) * (one - other)).sum()])
  return jax.lax.map(of_row, (h_BTD, x_BTD, token_BT[:, 1:])).sum(axis=0)


def requests(
    tokenizer: Any, path: pathlib.Path, documents: int
) -> tuple[list[Request], list[tuple[list[int], int | None]]]:
  """A task's requests, and of each question (characters of each answer, the
  right one); None where the one answer must be what the model would say."""
  found, questions = [], []
  for line in path.read_text('utf-8').splitlines()[:documents]:
    row = json.loads(line)
    if 'context' in row:  # LAMBADA: the last word, which must be the best.
      context, answers, gold = row['context'], [row['continuation']], None
    else:
      context, answers, gold = row['query'].rstrip(), row['choices'], row[
          'gold']
      if context.startswith('Question:'):
        context += '\nAnswer:'
    ids = tokenizer.encode(context)
    for answer in answers:
      whole = tokenizer.encode(f'{context} {answer}')
      found.append(Request(whole[:len(ids)], whole[len(ids):]))
    questions.append(([len(answer) for answer in answers], gold))
  return found, questions


def accuracies(
    scores: Iterable[tuple[float, bool]],
    questions: list[tuple[list[int], int | None]],
) -> dict[str, float]:
  """acc, its standard error, acc_norm (by characters) and perplexity.

  Args:
    scores: of each request: log p of the answer, and whether it is greedy.
    questions: of `requests`.
  """
  scores, right, by_length, nats = iter(scores), [], [], []
  for lengths, gold in questions:
    answers = [next(scores) for _ in lengths]
    if gold is None:
      right.append(answers[0][1])
      nats.append(-answers[0][0])
      continue
    right.append(np.argmax([log_p for log_p, _ in answers]) == gold)
    by_length.append(np.argmax([
        log_p / length for (log_p, _), length in zip(
            answers, lengths, strict=True)]) == gold)
  row = {'acc': float(np.mean(right)), 'stderr': float(
      np.std(right, ddof=1) / math.sqrt(len(right)))}
  if by_length:
    row['acc_norm'] = float(np.mean(by_length))
  if nats:
    row['perplexity'] = float(np.exp(np.mean(nats)))
  return row
