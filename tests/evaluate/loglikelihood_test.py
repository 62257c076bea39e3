"""Shared contexts in packed rows against one forward pass for each request."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.evaluate import shared_rows
from recursive_tx.evaluate.loglikelihood import Request, Scorer

MODELS = {
    **tiny.FAMILIES,
    'mixed': tiny.MIXED,
    'three loops': rtx.ModelConfig(
        V=29, D=16, F=24, N=4, K=2, H=6, layers_per_loop=1, loops=3, coda=1,
        rank='q2+head3'),
    'shared keys': dataclasses.replace(tiny.MIXED, loop_keys=False),
}


def requests_of(V, seed=0, longest=9):
  """Contexts with one to four continuations, in any order."""
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(8):
    context = rng.integers(0, V, rng.integers(1, longest)).tolist()
    for _ in range(rng.integers(1, 5)):
      found.append(Request(
          context, rng.integers(0, V, rng.integers(1, longest)).tolist()))
  found += [Request([3], [token]) for token in range(V)]
  return [found[i] for i in rng.permutation(len(found))]


def by_hand(logits, requests, max_length=999):
  """Each alone, all its logits, in float64: sums of log p, and greediness."""
  T = max(len(context) + len(more) for context, more in requests)
  sums, greedy = [], []
  for context, continuation in requests:
    ids = [*context, *continuation][-max_length - 1:]
    token_BT = np.zeros((1, T), np.int32)
    token_BT[0, :len(ids) - 1] = ids[:-1]
    n = len(continuation)
    logits_NV = np.asarray(
        logits(token_BT)[0], np.float64)[len(ids) - 1 - n:len(ids) - 1]
    log_p_NV = logits_NV - np.log(np.exp(logits_NV).sum(-1, keepdims=True))
    sums.append(log_p_NV[np.arange(n), continuation].sum())
    greedy.append((logits_NV.argmax(-1) == continuation).all())
  return np.array(sums), np.array(greedy)


def of_loop(cfg, variables, loop):
  """token_BT -> logits of one loop's output."""
  hidden = tiny.decoder(cfg, method='hidden')
  head = jax.jit(lambda variables, h_BTD: rtx.Decoder(cfg).apply(
      variables, h_BTD, loop, method='logits'))
  return lambda token_BT: head(variables, hidden(variables, token_BT)[loop])


@pytest.mark.parametrize('name', MODELS)
def test_equals_each_request_alone(name):
  cfg = MODELS[name]
  variables = tiny.variables(cfg)
  requests = requests_of(cfg.V)
  scores = Scorer(cfg, variables)(requests)
  longest = max(len(context) + len(more) for context, more in requests) - 1
  opened = cfg.opened_for(longest)
  log_p_Q, greedy_Q = by_hand(
      lambda token_BT: tiny.decoder(opened)(variables, token_BT), requests)
  assert scores.log_p_LQ.shape == (1, len(requests))
  np.testing.assert_allclose(scores.log_p_LQ[0], log_p_Q, rtol=1e-5)
  assert np.array_equal(scores.greedy_LQ[0], greedy_Q)
  assert 0 < greedy_Q.sum() < len(requests)


def test_every_loop_is_scored_by_its_own_output_and_head():
  cfg = MODELS['three loops']
  variables = tiny.variables(cfg)
  requests = requests_of(cfg.V, seed=1)
  scores = Scorer(cfg, variables, exits=True)(requests)
  assert scores.log_p_LQ.shape == (3, len(requests))
  for loop in range(3):
    log_p_Q, greedy_Q = by_hand(of_loop(cfg, variables, loop), requests)
    np.testing.assert_allclose(scores.log_p_LQ[loop], log_p_Q, rtol=1e-5)
    assert np.array_equal(scores.greedy_LQ[loop], greedy_Q)
  assert abs(np.diff(scores.log_p_LQ, axis=0)).min(axis=1).max() > 1e-3


@pytest.mark.slow
def test_a_real_model_to_1e_5():
  directory = tiny.REAL / 'stories260K'
  if not directory.is_dir():
    pytest.skip(f'{directory} is not there')
  cfg, variables = rtx.load_hf(directory)
  requests = requests_of(cfg.V, longest=60)
  scores = Scorer(cfg, variables)(requests)
  apply = jax.jit(rtx.Decoder(cfg).apply)
  log_p_Q, greedy_Q = by_hand(
      lambda token_BT: apply(variables, token_BT), requests)
  np.testing.assert_allclose(scores.log_p_LQ[0], log_p_Q, rtol=1e-5)
  assert np.array_equal(scores.greedy_LQ[0], greedy_Q)


def test_long_requests_lose_the_first_tokens_of_their_context():
  cfg = tiny.FAMILIES['llama']
  variables = tiny.variables(cfg)
  requests = requests_of(cfg.V, longest=16)
  scores = Scorer(cfg, variables, max_length=17)(requests)
  log_p_Q, _ = by_hand(
      lambda token_BT: tiny.decoder(cfg)(variables, token_BT), requests, 17)
  np.testing.assert_allclose(scores.log_p_LQ[0], log_p_Q, rtol=1e-5)
  assert max(len(a) + len(b) for a, b in requests) > 18


def test_neither_order_nor_batches_matter():
  cfg = tiny.MIXED
  variables = tiny.variables(cfg)
  requests = requests_of(cfg.V, longest=200)
  whole = Scorer(cfg, variables)(requests)
  backwards = Scorer(cfg, variables, tokens=300)(requests[::-1])
  np.testing.assert_allclose(
      whole.log_p_LQ, backwards.log_p_LQ[:, ::-1], rtol=1e-5)


def test_logits_are_made_for_few_positions_at_a_time():
  """Of the predicted ones; with one at a time the scores are the same."""
  cfg = dataclasses.replace(tiny.FAMILIES['gemma'], V=1 << 17)
  variables = tiny.variables(cfg)
  requests = requests_of(29, longest=4)
  scorer = Scorer(cfg, variables)
  one = Scorer(cfg, variables, run=rtx.Run(logits_mib=1))
  batch, = shared_rows.batches(requests, max_length=99, tokens=2048)
  arrays = shared_rows.arrays(batch)._replace(owner_A=None)
  for run, most in ((scorer, 128), (one, 2)):
    jaxpr = jax.make_jaxpr(run._score_fn(1))(variables, arrays)
    sizes = [x.aval.size for x in _inner(jaxpr.jaxpr) if hasattr(x, 'aval')]
    assert cfg.V <= max(sizes) / most <= cfg.V + cfg.D
  np.testing.assert_allclose(
      scorer(requests).log_p_LQ, one(requests).log_p_LQ, rtol=1e-5)


def _inner(jaxpr):
  """All values that a jaxpr computes, and those inside it."""
  for equation in jaxpr.eqns:
    yield from equation.outvars
    for inner in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from _inner(inner)


def test_results_come_batch_by_batch():
  cfg = tiny.FAMILIES['llama']
  variables = tiny.variables(cfg)
  requests = requests_of(cfg.V, longest=120)
  scorer = Scorer(cfg, variables, tokens=256)
  whole, seen, batches = scorer(requests), [], []

  def progress(several):
    for batch in several:
      batches.append(len(several))
      yield batch

  for numbers, scores in scorer.stream(requests, progress=progress):
    seen += numbers.tolist()
    assert np.array_equal(scores.log_p_LQ, whole.log_p_LQ[:, numbers])
    assert np.array_equal(scores.greedy_LQ, whole.greedy_LQ[:, numbers])
  assert sorted(seen) == list(range(len(requests)))
  assert len(batches) > 2 and set(batches) == {len(batches)}


def test_no_requests_give_no_scores():
  cfg = tiny.FAMILIES['llama']
  assert Scorer(cfg, tiny.variables(cfg))([]).log_p_LQ.shape == (1, 0)


@pytest.mark.parametrize('request_,words', [
    (Request([], [1]), ('empty context', 'BOS')),
    (Request([1], []), ('empty continuation',)),
    (Request([1], [2] * 5), ('continuation of 5 tokens', 'at most 4')),
])
def test_what_cannot_be_scored_is_refused(request_, words):
  cfg = tiny.FAMILIES['llama']
  with tiny.refused('request 1', *words):
    Scorer(cfg, tiny.variables(cfg), max_length=4)([
        Request([1], [2] * 4), request_])
