"""Bits per byte of packed batches against single documents, by hand."""

import dataclasses
import json
import math
import subprocess
import sys

from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_tokenizers

import recursive_tx as rtx
from recursive_tx import data, losses, machine
from recursive_tx.data import packing
from recursive_tx.errors import UserError
from recursive_tx.evaluate import table
from recursive_tx.evaluate.heldout import (
  add_words,
  evaluate,
  evaluate_strided,
)

T = 24
BOS, EOS = 1, 2
CFG = rtx.ModelConfig(
    V=64, D=16, F=32, N=4, K=2, H=4, layers_per_loop=2, loops=3, coda=1
)


@pytest.fixture(scope='module')
def variables():
  """Far from zero, so that loops and positions differ."""
  init = jax.jit(rtx.Decoder(CFG).init)
  params = init(jax.random.key(0), jnp.zeros((1, 2), int))
  return jax.tree.map(lambda x: 2 * np.asarray(x), meta.unbox(params))


@pytest.fixture(scope='module')
def documents():
  """Ids with BOS and EOS; id 0 is a token as any other."""
  rng = np.random.default_rng(0)
  return [
      np.array([BOS, *rng.integers(0, 64, n), EOS], np.int32)
      for n in (1, 3, 20, 7, 7, 12, 2)
  ]


@pytest.fixture(scope='module')
def heldout(documents):
  packer = packing.Packer(T)
  for ids in documents:
    packer.add(ids)
  packer.flush()
  rows = list(packer.ready)
  rows += [[]] * (-len(rows) % 4)
  batches = [packing.batch(rows[i : i + 4], T) for i in range(0, len(rows), 4)]
  return data.Heldout(batches, num_bytes=123, num_documents=len(documents),
                      documents=documents)


def of_loop(variables, loop):
  """A vanilla model that ends after a loop: the block tiled, and the coda."""
  cfg = dataclasses.replace(CFG, loops=loop, loop_norms=False)
  block = variables['params']['block']
  vectors = variables['params']['adapters']
  # Each loop has its own norms here, so the loops are unrolled.
  params = {
      **{k: v for k, v in variables['params'].items() if k != 'adapters'},
      'block': {
          'layers': jax.tree.map(
              lambda x: np.concatenate([x] * loop), block['layers']),
          'vectors': jax.tree.map(
              lambda x: x[:loop].reshape(-1, *x.shape[2:]), vectors),
      },
  }
  cfg = dataclasses.replace(cfg, loops=1, layers_per_loop=2 * loop)
  return cfg, {'params': params}


def by_hand(variables, documents, loop):
  """Summed nats of documents that are each alone in a row, in float64."""
  cfg, params = of_loop(variables, loop)
  apply = jax.jit(rtx.Decoder(cfg).apply)
  nats = 0.0
  for ids in documents:
    # What follows on the right is not seen.
    token_BT = np.zeros((1, T), np.int32)
    token_BT[0, : len(ids) - 1] = ids[:-1]
    logits_TV = np.asarray(apply(params, token_BT)[0], np.float64)
    for logits_V, target in zip(logits_TV, ids[1:], strict=False):
      nats += math.log(np.exp(logits_V).sum()) - logits_V[target]
  return nats


def test_equals_single_documents_by_hand(variables, documents, heldout):
  result = evaluate(CFG, variables, heldout)
  assert result['documents'] == 7
  assert result['bytes'] == 123
  assert result['tokens'] == sum(len(ids) - 1 for ids in documents)
  assert [row['loop'] for row in result['loops']] == [1, 2, 3]
  for row in result['loops']:
    nats = by_hand(variables, documents, row['loop'])
    assert row['loss'] == pytest.approx(nats / result['tokens'], rel=1e-5)
    assert row['perplexity'] == pytest.approx(math.exp(row['loss']))
    assert row['bits_per_byte'] == pytest.approx(
        nats / math.log(2) / 123, rel=1e-5)
  loss = [row['loss'] for row in result['loops']]
  assert len({round(x, 4) for x in loss}) == 3


def strided_by_hand(variables, documents, loop, T, stride):
  """Nats of each id given the T (or fewer) before its window's end."""
  cfg, params = of_loop(variables, loop)
  apply = jax.jit(rtx.Decoder(cfg).apply)
  nats = 0.0
  for ids in documents:
    for target in range(1, len(ids)):
      # The last id of the window that predicts this one.
      end = T if target <= T else T + -(-(target - T) // stride) * stride
      first = max(0, min(end, len(ids) - 1) - T)
      token_BT = np.zeros((1, T), np.int32)
      token_BT[0, :target - first] = ids[first:target]
      logits_V = np.asarray(
          apply(params, token_BT)[0, target - first - 1], np.float64)
      nats += math.log(np.exp(logits_V).sum()) - logits_V[ids[target]]
  return nats


@pytest.mark.parametrize('stride', [1, 3, 5])
def test_a_stride_gives_the_context_of_earlier_pieces(
    variables, documents, heldout, stride):
  result = evaluate_strided(CFG, variables, heldout, seq_len=5, stride=stride)
  assert result['tokens'] == sum(len(ids) - 1 for ids in documents)
  assert (result['documents'], result['bytes']) == (7, 123)
  for loop in (1, 3):
    nats = strided_by_hand(variables, documents, loop, 5, stride)
    assert result['loops'][loop - 1]['loss'] == pytest.approx(
        nats / result['tokens'], rel=1e-5)


def test_a_stride_changes_nothing_where_documents_are_short(
    variables, heldout):
  result = evaluate_strided(CFG, variables, heldout, seq_len=T, stride=4)
  expected = evaluate(CFG, variables, heldout)
  for row, other in zip(result['loops'], expected['loops'], strict=True):
    assert row == pytest.approx(other, rel=1e-5)


def test_words_are_what_white_space_separates():
  """As lm-evaluation-harness counts: of re.split, empty ends included."""
  from recursive_tx.store import opening
  tokenizer = opening.load_tokenizer('recursive_tx/demo')
  texts = ['one two\n\nthree', 'four', 'five six \n']
  documents = [np.array([*tokenizer.opening, *tokenizer.encode(text),
                         tokenizer.eos_id]) for text in texts]
  # The last was cut before its end.
  documents[2] = documents[2][:-1]
  result = dict(bytes=31, tokens=20, loops=[dict(loss=1.5), dict(loss=200.0)])
  add_words(result, data.Heldout([], 31, 3, documents=documents), tokenizer)
  assert result['words'] == 3 + 1 + 3
  assert result['loops'][0]['word_perplexity'] == pytest.approx(
      math.exp(1.5 * 20 / 7))
  assert result['loops'][0]['byte_perplexity'] == pytest.approx(
      math.exp(1.5 * 20 / 31))
  assert result['loops'][1]['word_perplexity'] == pytest.approx(
      math.exp(200 * 20 / 7))


def test_the_mesh_does_not_matter(variables, heldout):
  mesh = machine.make_mesh(machine.MeshConfig())
  assert evaluate(CFG, variables, heldout, mesh=mesh) == evaluate(
      CFG, variables, heldout)


class _Pieces(rtx.Run):
  """A run whose logits are made for a few positions at a time."""

  def chunk(self, T, size):
    del size
    return T // 6


def test_chunks_of_logits_do_not_matter(variables, heldout):
  whole, pieces = (evaluate(CFG, variables, heldout, run=run)
                   for run in (rtx.Run(), _Pieces()))
  for row, other in zip(whole['loops'], pieces['loops'], strict=True):
    assert row['loss'] == pytest.approx(other['loss'], rel=1e-6)


def test_sums_do_not_lose_digits(variables):
  # 64 tokens of ln 64 nats each, over and over: float32 would drift.
  flat = jax.tree.map(np.zeros_like, variables)
  ones = {
      name: np.ones((64, T), np.int32)
      for name in ('token_BT', 'target_BT', 'segment_BT', 'position_BT')}
  batch = {**ones, 'weight_BT': np.ones((64, T), np.float32)}
  result = evaluate(CFG, flat, data.Heldout([batch] * 20, 1000, 1))
  exact = np.float64(losses.next_token_nats(
      jnp.zeros((1, 1, 64)), jnp.zeros((1, 1), int)).item())
  assert result['loops'][0]['loss'] == pytest.approx(exact, rel=1e-12)


def test_nothing_to_predict_is_refused(variables, heldout):
  empty = [
      {k: np.zeros_like(v) for k, v in batch.items()}
      for batch in heldout.batches]
  with pytest.raises(UserError, match='no token to predict'):
    evaluate(CFG, variables, data.Heldout(empty, 5, 1))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_result(variables, heldout, value):
  broken = jax.tree.map(lambda x: np.full_like(x, value), variables)
  with tiny.refused('loss of loop 1', 'float32'):
    evaluate(CFG, broken, heldout)


def test_progress_sees_every_batch(variables, heldout):
  seen = []

  def progress(batches):
    for batch in batches:
      yield batch
      seen.append(len(batches))

  assert evaluate(CFG, variables, heldout, progress=progress) == evaluate(
      CFG, variables, heldout)
  assert seen == [len(heldout.batches)] * len(heldout.batches)


def test_a_tables_columns_stay_apart():
  """Also where perplexity is huge, as of a model that was never trained."""
  rows = [dict(loop=loop, loss=loss, perplexity=math.exp(loss),
               bits_per_byte=loss / 2) for loop, loss in enumerate(
                   (24.266, 1.5, 30.0, 700.0), 1)]
  first, *lines = table(
      dict(documents=3, bytes=1234567, tokens=99999, loops=rows)).splitlines()
  assert first == '3 documents, 1,234,567 bytes, 99,999 tokens'
  assert [line.split() for line in lines] == [
      ['loop', 'nats/token', 'perplexity', 'bits/byte'],
      ['1', '24.2660', '3.456e+10', '12.1330'],
      ['2', '1.5000', '4.482', '0.7500'],
      ['3', '30.0000', '1.069e+13', '15.0000'],
      ['4', '700.0000', '1.014e+304', '350.0000']]


@pytest.mark.slow
def test_the_command_line_prints_the_same(variables, tmp_path):
  # One id a character: 'a' is 0. BOS is 1 and EOS 2, as above.
  model = tmp_path / 'model'
  rtx.save(model, CFG, variables)
  vocab = ['a', '<bos>', '<eos>', 'b', 'é']
  tiny_tokenizers.letters(model, vocab)
  texts = ['abba', 'b', 'éababé']
  (tmp_path / 'text.txt').write_text('\n--\n'.join(texts))
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', 'evaluate',
       f'--checkpoint={model}', f'--text={tmp_path}/*.txt', '--document=--',
       f'--seq_len={T}', '--batch=2', f'--output={tmp_path}/out.json'],
      cwd=tiny.ROOT, capture_output=True, text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / 'out.json').read_text())
  found = result['documents'], result['bytes'], result['tokens']
  assert found == (3, 4 + 1 + 8, 5 + 2 + 7)
  documents = [[BOS, *(vocab.index(c) for c in text), EOS] for text in texts]
  nats = by_hand(variables, documents, 3)
  assert result['loops'][2]['bits_per_byte'] == pytest.approx(
      nats / math.log(2) / 13, rel=1e-5)
  assert result['words'] == 3
  assert result['loops'][2]['word_perplexity'] == pytest.approx(
      math.exp(nats / 3), rel=1e-4)
  assert f'{result["loops"][2]["bits_per_byte"]:.4f}' in done.stdout
