"""The data stream: every token once, the same for all hosts, exact resume."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_data import make_tfds, pieces_of
import tiny_tokenizers
from tiny_tokenizers import byte_level_dir as byte_level_dir
from tiny_tokenizers import sentencepiece_dir as sentencepiece_dir
import tokenizers

from recursive_tx import data
from recursive_tx.data import documents, files, packing, records
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

T = 32
SEPARATOR = '<|endoftext|>'
ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789 \n'


@pytest.fixture(scope='session')
def tok(tmp_path_factory) -> tokenizer.Tokenizer:
  """One id a character: 'a' is 0. BOS is 38 and EOS 39."""
  directory = tmp_path_factory.mktemp('characters')
  tiny_tokenizers.letters(directory, [*ALPHABET, '<bos>', '<eos>'])
  return tokenizer.load(directory)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """400 different documents of 1 to 99 characters, in 4 files a format."""
  directory = tmp_path_factory.mktemp('corpus')
  rng = random.Random(0)
  for part in range(4):
    texts = [
        f'{part}x{i}x' + 'a' * rng.randrange(1, 90) + '\nb' * (i % 3)
        for i in range(100)
    ]
    path = directory / f'{part}.txt'
    path.write_text(''.join(f'{text}\n{SEPARATOR}\n' for text in texts))
    path = directory / f'{part}.jsonl'
    path.write_text(
        ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    )
  return directory


def separated(corpus, **changes) -> data.Task:
  task = data.Task(
      'separated', 'text', (f'{corpus}/*.txt',), document=SEPARATOR
  )
  return dataclasses.replace(task, **changes)


def config_of(*tasks, **changes) -> data.DataConfig:
  config = data.DataConfig(tasks, seq_len=T, batch=4, shards=2, shuffle=16)
  return dataclasses.replace(config, **changes)


def take(stream, steps) -> list[dict[str, np.ndarray]]:
  return [next(stream) for _ in range(steps)]


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for one, other in zip(batches, others, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def differ(batches, others) -> bool:
  return any(
      not np.array_equal(one['token_BT'], other['token_BT'])
      for one, other in zip(batches, others, strict=True)
  )


def ids_of(text, tok) -> list[int]:
  return [tok.bos_id, *tok.encode(text), tok.eos_id]


def cut(ids) -> list[list[int]]:
  """Law of long documents, spelled out: T targets each, none twice."""
  starts = range(0, len(ids) - 1, T)
  return [ids[i : min(i + T + 1, len(ids))] for i in starts]


def texts_of(corpus) -> list[str]:
  return [
      json.loads(line)['text']
      for path in sorted(corpus.glob('*.jsonl'))
      for line in path.read_text().splitlines()
  ]


def starts_of(batches, tok) -> collections.Counter:
  """How often each document of the corpus opens, by its unique first words."""
  opened = [piece for piece in pieces_of(batches) if piece[0] == tok.bos_id]
  heads = [tok.decode(piece[1:10]) for piece in opened]
  return collections.Counter(
      re.match(r'(.*?x.*?x|.*)', head, re.S)[0] for head in heads
  )


def blocks_of(found: documents.Documents) -> list[documents.Block]:
  return [block for number in range(found.num_units)
          for block in found.blocks(number)]


def bag(pieces) -> collections.Counter:
  return collections.Counter(tuple(int(i) for i in piece) for piece in pieces)


# Packing.


def test_packer_returns_every_piece_once_and_fills_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 3 * T, 2000)
  texts = [rng.integers(0, 3, n).astype(np.int32) for n in lengths]
  pieces = [piece for ids in texts for piece in packing.split(ids, T)]
  packer = packing.Packer(T)
  for piece in pieces:
    packer.add(piece)
  full = len(packer.ready)
  packer.flush()
  rows = list(packer.ready)
  assert bag(pieces_of([packing.batch(rows, T)])) == bag(pieces)
  used = packing.batch(rows[:full], T)['weight_BT'].mean()
  assert used > 0.99


def test_split_predicts_every_id_but_the_first_once():
  for n in range(0, 4 * T + 3):
    ids = list(range(n))
    pieces = packing.split(np.array(ids), T)
    assert [p.tolist() for p in pieces] == (cut(ids) if n > 1 else [])
    targets = [i for piece in pieces for i in piece[1:]]
    assert targets == ids[1:]


def test_packing_is_dense_at_2048():
  """97 % of slots where no length is likelier than another."""
  rng = np.random.default_rng(0)
  packer = packing.Packer(2048)
  for n in rng.integers(2, 2050, 3000):
    packer.add(np.zeros(n, np.int32))
  rows = list(packer.ready)
  used = sum(len(piece) - 1 for row in rows for piece in row)
  assert used / (2048 * len(rows)) > 0.97


def test_packer_continues_where_it_was_saved():
  rng = np.random.default_rng(0)
  pieces = [np.arange(n) for n in rng.integers(2, T + 2, 300)]
  for stop in (0, 1, 150, 299):
    packer = packing.Packer(T)
    for piece in pieces[:stop]:
      packer.add(piece)
    other = packing.Packer(T)
    other.restore(packer.save())
    for piece in pieces[stop:]:
      packer.add(piece)
      other.add(piece)
    one, two = packer.ready, other.ready
    assert [list(map(list, row)) for row in one] == [
        list(map(list, row)) for row in two
    ]


# Documents.


def blocks(size: int, block: int) -> list[tuple[int, int]]:
  return [(start, start + block) for start in range(0, size, block)]


def test_blocks_cut_files_as_whole_files_are_cut(tmp_path):
  """Whatever the block, each document comes once, in order."""
  path = tmp_path / 'text'
  rng = random.Random(0)
  for trial in range(60):
    lines = rng.choices(['--', '', 'a', '-', '--b', 'ccc', 'é'], k=12)
    ends = rng.choices(['\n', '\r\n'], k=12)
    ends[-1] = rng.choice(['', '\n'])
    text = ''.join(map(''.join, zip(lines, ends, strict=True)))
    path.write_bytes(text.encode())
    size = len(text.encode())
    separate = re.split(r'(?m)^--\r?(?:\n|\Z)', text)
    separate = [re.sub(r'\r?\n\Z', '', part) for part in separate]
    separate = [part.encode() for part in separate if part.strip()]
    lines = [line.encode() + b'\n' for line in text.split('\n')]
    for block in range(1, size + 2):
      found = [
          part
          for start, stop in blocks(size, block)
          for part in records._separated(
              records.Plain(str(path), size), start, stop, b'--'
          )
      ]
      assert found == separate, (trial, block)
      lines_found = [
          records.lines_of(records.Plain(str(path), size), start, stop)[1]
          for start, stop in blocks(size, block)
      ]
      assert b''.join(lines_found) == b''.join(lines)[:-1], (trial, block)


def test_epochs_are_different_permutations(tmp_path):
  (tmp_path / 'text').write_text('a\n' * 200_000)
  task = data.Task('t', 'text', f'{tmp_path}/text', document='--')
  n = documents.Documents(task, 'train', fraction=0.5).num_units
  assert n > 20
  epochs = [
      [documents.shuffled(e * n + i, 5, n) for i in range(n)] for e in range(3)
  ]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 3
  assert [documents.shuffled(i, 6, n) for i in range(n)] != epochs[0]


# The stream.


def test_documents_full_of_id_0_come_back_once(tok, tmp_path):
  texts = ['a' * n for n in range(1, 100)]
  for i, text in enumerate(texts):
    (tmp_path / f'{i}.txt').write_text(text)
  (tmp_path / 'train').write_text('a')
  task = data.Task(
      't', 'text', f'{tmp_path}/train', heldout=f'{tmp_path}/*.txt'
  )
  held = data.heldout(config_of(task), tok)
  assert tok.encode('aa') == [0, 0]
  want = [piece for text in texts for piece in cut(ids_of(text, tok))]
  assert bag(pieces_of(held.batches)) == bag(want)
  assert held.num_documents == len(texts)
  assert held.num_bytes == sum(map(len, texts))


@pytest.mark.parametrize('kind', ['text', 'jsonl'])
def test_epochs_hold_every_document_equally_often(tok, corpus, kind):
  task = separated(corpus)
  if kind == 'jsonl':
    task = data.Task('t', 'jsonl', (f'{corpus}/*.jsonl',))
  config = config_of(task, heldout_fraction=0.1)
  batches = take(data.Stream(config, tok), 2000)
  held = starts_of(data.heldout(config, tok).batches, tok)
  seen = starts_of(batches, tok)
  everything = {text.split('a')[0] for text in texts_of(corpus)}
  assert 20 < len(held) < 60
  assert set(held.values()) == {1}
  assert not seen.keys() & held.keys()
  assert seen.keys() | held.keys() == everything
  # About 14 times, less the copies that wait in buffers and open rows.
  assert 6 < min(seen.values()) and max(seen.values()) < 18
  # Every piece is one of a document's, nothing is cut in another way.
  known = {
      tuple(piece)
      for text in texts_of(corpus)
      for piece in cut(ids_of(text, tok))
  }
  assert set(bag(pieces_of(batches))) <= known


def test_shards_partition_each_epoch(tok, corpus):
  import seqio

  from recursive_tx.data import pipeline

  config = config_of(separated(corpus), heldout_fraction=1e-9, shards=2)
  source = pipeline.build_tasks(config, tok, 'train')[0][0].source
  epochs = [[], [], []]
  for shard in range(2):
    dataset = source.get_dataset(shard_info=seqio.ShardInfo(shard, 2))
    texts = [e['text'].decode() for e in dataset.take(600).as_numpy_iterator()]
    for epoch in range(3):
      epochs[epoch] += texts[200 * epoch : 200 * (epoch + 1)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(texts_of(corpus))
  assert epochs[0] != epochs[1]


def test_a_family_without_bos_opens_with_the_text(tok, corpus):
  without = dataclasses.replace(tok, bos_id=None)
  config = config_of(separated(corpus), heldout_fraction=0.5)
  held = data.heldout(config, without, max_documents=9)
  with_bos = data.heldout(config, tok, max_documents=9)
  num = [sum(b['weight_BT'].sum() for b in h.batches) for h in (held, with_bos)]
  assert num[0] == num[1] - 9
  assert tok.bos_id not in np.concatenate([b['token_BT'] for b in held.batches])


def mixture(corpus) -> data.DataConfig:
  return config_of(
      separated(corpus, weight=2.0),
      data.Task('other', 'jsonl', (f'{corpus}/[01].jsonl',)),
  )


def test_the_stream_is_a_function_of_config_and_seed(tok, corpus):
  config = mixture(corpus)
  batches = take(data.Stream(config, tok), 20)
  assert_equal(batches, take(data.Stream(config, tok), 20))
  assert all(batch['token_BT'].shape == (4, T) for batch in batches)
  other = dataclasses.replace(config, seed=1)
  assert differ(batches, take(data.Stream(other, tok), 20))


def test_shards_differ(tok, corpus):
  batches = take(data.Stream(config_of(separated(corpus)), tok), 20)
  assert differ(
      [{'token_BT': batch['token_BT'][0::2]} for batch in batches],
      [{'token_BT': batch['token_BT'][1::2]} for batch in batches],
  )


@pytest.mark.parametrize(
    'held', [([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 4], [7, 2, 1, 3, 5, 6])]
)
def test_hosts_get_slices_of_the_global_batch(tok, corpus, held):
  config = config_of(separated(corpus), batch=8, shards=4)
  whole = take(data.Stream(config, tok), 12)
  for rows in held:
    stream = data.Stream(config, tok, rows=rows)
    part = take(stream, 12)
    assert_equal(part, [{k: v[rows] for k, v in b.items()} for b in whole])


def test_a_process_opens_only_the_shards_of_its_rows(tok, corpus):
  config = config_of(separated(corpus), batch=8, shards=4)
  position = data.Stream(config, tok, rows=[2, 6]).save()
  with pytest.raises(UserError, match=r'lacks shards \[0, 1, 3\] of 4'):
    data.Stream(config, tok).restore(position)


# Resume.


def test_resume_is_exact(tok, corpus):
  config = mixture(corpus)
  stream, positions, batches = data.Stream(config, tok), {}, []
  for step in range(70):
    if step in (0, 1, 7, 40):
      positions[step] = stream.save()
    batches += take(stream, 1)
  # One stream goes back and forth; the last position is restored twice.
  other = data.Stream(config, tok)
  for step in (40, 0, 1, 7, 7):
    other.restore(positions[step])
    assert_equal(take(other, 30), batches[step : step + 30])


def test_saving_does_not_move_the_stream(tok, corpus):
  config = config_of(separated(corpus))
  stream = data.Stream(config, tok)
  batches = []
  for _ in range(8):
    batches += take(stream, 1)
    assert isinstance(stream.save(), bytes)
  assert_equal(batches, take(data.Stream(config, tok), 8))


# Its last stream still works when the program ends, which must not hang it.
RESUME = """
import sys, time
import numpy as np
from recursive_tx import data
from recursive_tx.text import tokenizer
corpus, directory, out = sys.argv[1:]
config = data.DataConfig(
    (data.Task('separated', 'text', corpus, document='<|endoftext|>'),),
    seq_len=32, batch=4, shards=2, shuffle=16)
tok = tokenizer.load(directory)
stream = data.Stream(config, tok)
stream.restore(open(f'{out}/position', 'rb').read())
for i in range(20):
  np.savez(f'{out}/{i}.npz', **next(stream))

class Slow(tokenizer.Tokenizer):
  def encode_batch(self, texts):
    time.sleep(0.3)
    return super().encode_batch(texts)

other = Slow(**{**vars(tok), 'bos_id': None})
other = data.Stream(config, other)
next(other)
"""


@pytest.mark.slow
def test_resume_is_exact_in_a_new_process(corpus, tmp_path):
  directory = tmp_path / 'characters'
  directory.mkdir()
  model = tokenizers.Tokenizer(
      tokenizers.models.BPE({c: i for i, c in enumerate(ALPHABET)}, [])
  )
  model.save(str(directory / 'tokenizer.json'))
  (directory / 'config.json').write_text('{"eos_token_id": 1}')
  stream = data.Stream(
      config_of(separated(corpus)), tokenizer.load(directory)
  )
  take(stream, 9)
  (tmp_path / 'position').write_bytes(stream.save())
  subprocess.run(
      [sys.executable, '-c', RESUME, f'{corpus}/*.txt', directory, tmp_path],
      check=True,
      timeout=120,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
  )
  got = [dict(np.load(tmp_path / f'{i}.npz')) for i in range(20)]
  assert_equal(got, take(stream, 20))


def test_positions_of_two_processes_serve_one_and_back(tok, corpus):
  config = config_of(separated(corpus), batch=8, shards=4)
  one = data.Stream(config, tok)
  two = [data.Stream(config, tok, rows=r) for r in ([0, 2, 4], [1, 3, 7])]
  for stream in (one, *two):
    take(stream, 5)
  whole, halves = one.save(), [stream.save() for stream in two]
  want = take(one, 10)
  fresh = data.Stream(config, tok)
  fresh.restore(*halves)
  assert_equal(take(fresh, 10), want)
  for rows in ([4, 0, 2, 6], [1, 3, 5, 7]):
    fresh = data.Stream(config, tok, rows=rows)
    fresh.restore(whole)
    assert_equal(
        take(fresh, 10), [{k: v[rows] for k, v in b.items()} for b in want]
    )


def test_positions_of_processes_that_share_shards_serve_either(tok, corpus):
  """Halves of the batch, every shard in both; each has all that one needs."""
  config = config_of(separated(corpus), batch=4, shards=2)
  halves = [data.Stream(config, tok, rows=r) for r in ([0, 1], [2, 3])]
  for stream in halves:
    take(stream, 5)
  one = data.Stream(config, tok)
  one.restore(*(stream.save() for stream in halves))
  want = take(one, 10)
  for rows, stream in zip(([0, 1], [2, 3]), halves, strict=True):
    assert_equal(
        take(stream, 10), [{k: v[rows] for k, v in b.items()} for b in want]
    )


def test_positions_of_something_else_are_refused(tok, corpus, tmp_path):
  config = config_of(separated(corpus))
  stream = data.Stream(config, tok)
  position = stream.save()
  for changes, message in (
      ({'seed': 1}, r'data.seed=0, now it is 1'),
      ({'seq_len': 8}, r'data.seq_len=32, now it is 8'),
      ({'batch': 2}, r'data.batch=4, now it is 2'),
      ({'tasks': (separated(corpus, weight=2.0),)}, r"'weight': 1.0"),
  ):
    other = data.Stream(dataclasses.replace(config, **changes), tok)
    with pytest.raises(UserError, match=message):
      other.restore(position)
  with pytest.raises(UserError, match='3 bytes that are no position'):
    stream.restore(b'abc')
  next(stream)
  with pytest.raises(UserError, match=r'of steps \[0, 1\]'):
    stream.restore(position, stream.save())


def test_a_position_is_tied_to_the_files(tok, tmp_path):
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text('text')
  config = config_of(data.Task('t', 'text', f'{tmp_path}/*.txt'))
  config = dataclasses.replace(config, heldout_fraction=1e-9)
  position = data.Stream(config, tok).save()
  (tmp_path / 'c.txt').write_text('more')
  with pytest.raises(UserError, match='data.files='):
    data.Stream(config, tok).restore(position)


# Mixtures and held-out sets.


def test_mixture_weights_are_rates_of_examples(tok, tmp_path):
  for name in 'bc':
    (tmp_path / name).write_text(f'\n{SEPARATOR}\n'.join([name * 12] * 400))
  tasks = [
      data.Task(n, 'text', f'{tmp_path}/{n}', document=SEPARATOR, weight=w)
      for n, w in (('b', 3.0), ('c', 1.0))
  ]
  # All documents are the same, and so are all their hashes.
  config = config_of(*tasks, heldout_fraction=1e-9)
  pieces = pieces_of(take(data.Stream(config, tok), 200))
  letters = collections.Counter(piece[1] for piece in pieces)
  share = letters[tok.encode('b')[0]] / letters.total()
  assert letters.keys() == {1, 2}
  # Three standard deviations of a fair draw.
  assert abs(share - 0.75) < 3 * (0.75 * 0.25 / letters.total()) ** 0.5


def test_named_heldout_files_are_taken_off_train(tok, corpus):
  task = separated(corpus, heldout=(f'{corpus}/3.txt',))
  config = config_of(task)
  seen = starts_of(take(data.Stream(config, tok), 300), tok)
  held = starts_of(data.heldout(config, tok).batches, tok)
  assert {name[0] for name in seen} == set('012')
  assert {name[0] for name in held} == {'3'}
  assert len(seen) > 290 and len(held) == 100


def test_heldout_is_fixed_and_limited(tok, corpus):
  config = config_of(separated(corpus), heldout_fraction=0.5)
  held = data.heldout(config, tok)
  again = data.heldout(dataclasses.replace(config, seed=3, shards=1), tok)
  assert_equal(held.batches, again.batches)
  assert all(batch['token_BT'].shape == (4, T) for batch in held.batches)
  some = data.heldout(config, tok, max_documents=10)
  assert some.num_documents == 10
  names = starts_of(some.batches, tok)
  assert len(names) == 10
  texts = {text.split('a')[0]: text for text in texts_of(corpus)}
  assert some.num_bytes == sum(len(texts[name]) for name in names)
  few = data.heldout(config, tok, max_tokens=500)
  tokens = sum(batch['weight_BT'].sum() for batch in few.batches)
  assert 400 < tokens <= 500
  assert few.num_tokens == tokens and not few.is_cut


# One document of T = 32 and more tokens, each of one character and one byte.
@pytest.mark.parametrize('max_tokens', [1, 2, 31, 32, 33, 700, 999])
def test_max_tokens_cuts_inside_a_long_document(tok, tmp_path, max_tokens):
  novel = ''.join(random.Random(1).choices(ALPHABET[:-1], k=1000))
  (tmp_path / 'train').write_text('a')
  (tmp_path / 'held').write_text(novel)
  task = data.Task('t', 'text', f'{tmp_path}/train', heldout=f'{tmp_path}/held')
  held = data.heldout(config_of(task), tok, max_tokens=max_tokens)
  assert held.is_cut and held.num_documents == 1
  assert held.num_tokens == max_tokens == sum(
      batch['weight_BT'].sum() for batch in held.batches)
  # BOS is given, so that each prediction is a character of the text.
  assert bag(pieces_of(held.batches)) == bag(
      cut([tok.bos_id, *tok.encode(novel[:max_tokens])]))
  assert held.num_bytes == max_tokens
  whole = data.heldout(config_of(task), tok, max_tokens=1001)
  assert not whole.is_cut
  assert (whole.num_tokens, whole.num_bytes) == (1001, 1000)


def test_a_document_is_cut_only_if_less_than_half_is_filled(tok, tmp_path):
  (tmp_path / 'train').write_text('a')
  (tmp_path / 'held').write_text(
      ''.join(f'{"ab"[n > 20] * n}\n{SEPARATOR}\n' for n in (9, 9, 300)))
  task = data.Task('t', 'text', f'{tmp_path}/train', document=SEPARATOR,
                   heldout=f'{tmp_path}/held')

  def found(max_tokens):
    held = data.heldout(config_of(task), tok, max_tokens=max_tokens)
    return held.num_documents, held.num_tokens, held.num_bytes, held.is_cut

  # One block, whose documents come in order: 10, 10 and 301 predictions.
  assert found(40) == (2, 20, 18, False)
  assert found(41) == (3, 41, 18 + 21, True)
  assert found(320) == (3, 320, 18 + 300, True)
  assert found(321) == (3, 321, 318, False)


@pytest.mark.parametrize('kind', [
    pytest.param('byte_level_dir', marks=pytest.mark.slow),
    'sentencepiece_dir'])
def test_bytes_of_a_cut_document_are_those_of_its_tokens(
    kind, request, tmp_path
):
  tok = tokenizer.load(request.getfixturevalue(kind))
  text = 'the cat é sat 漢字 on 🎉 the mat\n  and the dog ate it'
  (tmp_path / 'train').write_text('a')
  (tmp_path / 'held').write_text(text, encoding='utf-8')
  task = data.Task('t', 'text', f'{tmp_path}/train', heldout=f'{tmp_path}/held')
  ids = [*tok.opening, *tok.encode(text), tok.eos_id]
  for max_tokens in range(1, len(ids) - 1):
    held = data.heldout(config_of(task), tok, max_tokens=max_tokens)
    kept = ids[len(tok.opening) : max_tokens + 1]
    # Whole characters only.
    prefix = max((text[:n] for n in range(len(text) + 1)
                  if tok.decode(kept).startswith(text[:n])), key=len)
    assert held.num_bytes == len(prefix.encode()), (max_tokens, prefix)


def test_heldout_takes_tasks_in_turn(tok, corpus):
  tasks = [
      separated(corpus, name=f't{i}', heldout=(f'{corpus}/{i}.txt',))
      for i in (0, 1)
  ]
  held = data.heldout(config_of(*tasks), tok, max_documents=8)
  names = starts_of(held.batches, tok)
  assert collections.Counter(name[0] for name in names) == {'0': 4, '1': 4}


def test_bytes_are_counted_as_utf8(tok, tmp_path):
  (tmp_path / 'train').write_text('a')
  (tmp_path / 'held').write_text('é漢🎉', encoding='utf-8')
  task = data.Task('t', 'text', f'{tmp_path}/train', heldout=f'{tmp_path}/held')
  assert data.heldout(config_of(task), tok).num_bytes == 2 + 3 + 4


@pytest.fixture(scope='session')
def tfds_corpus(tmp_path_factory) -> None:
  make_tfds(tmp_path_factory.mktemp('tfds'), 'tiny')


def tfds_task(**changes) -> data.Task:
  task = data.Task(
      't', 'tfds', 'train[10:]', 'train[:10]', key='body', dataset='tiny:1.0.0'
  )
  return dataclasses.replace(task, **changes)


def test_tfds_by_name(tok, tfds_corpus):
  config = config_of(tfds_task())
  stream = data.Stream(config, tok)
  seen = starts_of(take(stream, 100), tok)
  held = starts_of(data.heldout(config, tok).batches, tok)
  assert seen.keys() == {f'0x{i}x' for i in range(10, 60)}
  assert held == {f'0x{i}x': 1 for i in range(10)}
  position = stream.save()
  want = take(stream, 20)
  fresh = data.Stream(config, tok)
  fresh.restore(position)
  assert_equal(take(fresh, 20), want)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'dataset': 'no_such_thing'}, "TFDS has no dataset 'no_such_thing'"),
        ({'key': 'text'}, "no feature 'text', only body"),
        ({'train': 'validation'}, "no split 'validation', only train"),
        ({'train': 'train'}, "'train' and 'train.:10.' overlap"),
    ],
)
def test_bad_tfds_tasks(tok, tfds_corpus, changes, message):
  with pytest.raises(UserError, match=message):
    data.Stream(config_of(tfds_task(**changes)), tok)


# Faults: left out and counted, nothing stops.

BAD = {
    b'{"text": "caf\xe9"}': 'not_utf8',
    b'{"text": "\\udc80"}': 'not_utf8',
    b'{"text": "cut': 'not_json',
    b'{"body": "a"}': 'no_text',
    b'["text"]': 'no_text',
    b'{"text": ""}': 'empty',
}


def good_text(i: int) -> str:
  """Of 60, the first 20 are longer than T predictions, ten of them by one;
  the ten after them have just T."""
  n = 3 * T if i < 10 else T - 3 if i < 20 else T - 4 if i < 30 else 9
  return f'{i}x' + 'a' * n


@pytest.fixture(scope='module')
def faulty(tmp_path_factory) -> data.DataConfig:
  """60 good records, 20 of them long, among 6 bad ones and an empty file."""
  directory = tmp_path_factory.mktemp('faulty')
  good = [good_text(i) for i in range(60)]
  lines = [json.dumps({'text': text}).encode() for text in good]
  for i, line in enumerate(BAD):
    lines.insert(9 * i + 4, line)
  (directory / 'a.jsonl').write_bytes(b'\n'.join(lines))
  (directory / 'b.jsonl').write_bytes(b'')
  pattern = f'{directory}/*.jsonl'
  return config_of(data.Task('t', 'jsonl', pattern, heldout=(pattern,)))


def as_train(config: data.DataConfig) -> data.DataConfig:
  task = dataclasses.replace(config.tasks[0], heldout=())
  return dataclasses.replace(config, tasks=(task,), heldout_fraction=1e-9)


EPOCH = {'not_utf8': 2, 'not_json': 1, 'no_text': 2, 'empty': 2, 'long': 20}


def test_faults_of_one_pass_are_counted_exactly(tok, faulty):
  held = data.heldout(faulty, tok)
  assert held.faults == {f't/{kind}': n for kind, n in EPOCH.items()}
  assert held.num_documents == 60
  opened = starts_of(held.batches, tok)
  assert len(opened) == 60 and set(opened.values()) == {1}


def test_faults_do_not_stop_a_stream(tok, faulty):
  """They come as often as their neighbours, and nothing of them comes out."""
  stream = data.Stream(as_train(faulty), tok)
  assert stream.faults == {}
  batches = take(stream, 300)
  pieces = pieces_of(batches)
  counts = stream.faults
  assert counts.keys() == {f't/{kind}' for kind in EPOCH}
  epochs = counts['t/long'] / EPOCH['long']
  assert epochs > 10
  for kind, n in EPOCH.items():
    assert abs(counts[f't/{kind}'] / n - epochs) < 2, kind
  known = {
      tuple(piece)
      for i in range(60)
      for piece in cut(ids_of(good_text(i), tok))
  }
  assert set(bag(pieces)) == known


def test_counts_of_faults_are_a_function_of_the_step(tok, faulty):
  config = as_train(faulty)
  stream = data.Stream(config, tok)
  take(stream, 20)
  position, early = stream.save(), stream.faults
  batches, late = take(stream, 20), stream.faults
  assert sum(late.values()) > sum(early.values()) > 0
  take(stream, 5)
  for other in (stream, data.Stream(config, tok)):
    other.restore(position)
    assert other.faults == early
    assert_equal(take(other, 20), batches)
    assert other.faults == late


def test_faults_are_those_of_a_process_shards(tok, faulty):
  config = as_train(faulty)
  streams = [data.Stream(config, tok, rows=r) for r in (None, [0, 2], [1, 3])]
  for stream in streams:
    take(stream, 20)
  whole, *halves = (collections.Counter(s.faults) for s in streams)
  assert whole == halves[0] + halves[1] and halves[0] != whole
  fresh = data.Stream(config, tok)
  fresh.restore(*(stream.save() for stream in streams[1:]))
  assert fresh.faults == whole


def test_the_first_fault_of_a_kind_is_told_with_its_place(tok, faulty, caplog):
  data.heldout(faulty, tok)
  told = [record.getMessage() for record in caplog.records
          if 'Data task' in record.getMessage()]
  assert len(told) == 4
  (first,) = [line for line in told if 'not UTF-8' in line]
  assert re.search(r"task 't': .*a.jsonl:5: not UTF-8", first)


def test_bad_files_among_others_are_left_out(tok, tmp_path):
  for name, content in {'a': b'', 'b': b'\xff', 'c': b'c', 'd': b'd'}.items():
    (tmp_path / name).write_bytes(content)
  task = data.Task('t', 'text', f'{tmp_path}/*')
  stream = data.Stream(config_of(task, heldout_fraction=1e-9), tok)
  pieces = pieces_of(take(stream, 50))
  assert set(bag(pieces)) == {tuple(ids_of(text, tok)) for text in 'cd'}
  assert stream.faults.keys() == {'t/empty', 't/not_utf8'}


def test_an_endless_row_of_faults_ends_the_run(tok, faulty, monkeypatch):
  from recursive_tx.data import stream as module

  monkeypatch.setattr(module, '_MOST_BARREN', 0)
  with pytest.raises(UserError, match='finds no document to use') as error:
    take(data.Stream(as_train(faulty), tok), 50)
  assert '\n' not in str(error.value)


def test_bad_texts_of_tfds_are_left_out(tok, tfds_corpus):
  """The dataset ends with an empty text and one that is not UTF-8."""
  config = config_of(tfds_task(train='train[:50]', heldout='train[50:]'))
  held = data.heldout(config, tok)
  assert held.num_documents == 10
  assert held.faults == {'t/empty': 1, 't/not_utf8': 1}


# Refusals. In a pattern of files, DIR is a directory with the files given.


@pytest.mark.parametrize(
    'content, task, message',
    [
        ({'a': b''}, {}, '/a is empty, expected UTF-8'),
        ({'a': b' \n', 'b': b''}, {}, '/[ab] is empty, expected UTF-8'),
        ({'a': b'\xff', 'b': b'\xff'}, {}, '/[ab] is not UTF-8 text .*0xff'),
        ({'a': b''}, {'kind': 'jsonl'}, '/a is empty, expected UTF-8'),
        ({}, {'train': 'DIR/sub/*.txt'}, "no file matches .*DIR' exists"),
        ({}, {'train': 'DIR'}, r"a directory; write .*DIR/\*'"),
        ({'a': b'ok'}, {'heldout': 'DIR/a'}, 'every file of train'),
        ({'a': b'--\n\n--\n'}, {'document': '--'}, 'files are blank'),
        ({'a': b'ok'}, {'document': '--'}, 'data.heldout_fraction=0.5 leaves'),
        ({'a': b'b'}, {}, '1 documents .a file each. for data.shards=2'),
        (
            {'a': b'\n\n{"body": "y"}\n{"text": 1}\n'},
            {'kind': 'jsonl'},
            r"/a:3: no text under key 'text', the record has \['body'\]",
        ),
        ({'a': b'{"text": 1}'}, {'kind': 'jsonl'}, '/a:1: no text under key'),
        ({'a': b'[1]'}, {'kind': 'jsonl'}, '/a:1: no text .* has list'),
        ({'a': b'\n{"text'}, {'kind': 'jsonl'}, '/a:2: not a JSON record'),
        ({'a': b'{"text": "\xff"}'}, {'kind': 'jsonl'}, '/a:1: not UTF-8'),
        ({'a': b'{"text": "\\ud800"}'}, {'kind': 'jsonl'}, '/a:1: .*surrogate'),
        ({'a': b'{"text": ""}'}, {'kind': 'jsonl'}, "/a:1: the text .* is em"),
        ({'a': b'[' * 100_000}, {'kind': 'jsonl'}, '/a:1: not a JSON record'),
    ],
)
def test_a_task_that_is_all_faults_is_refused_with_the_first(
    tok, tmp_path, content, task, message
):
  for name, text in content.items():
    (tmp_path / name).write_bytes(text)
  fields = {'name': 't', 'kind': 'text', 'train': 'DIR/*'} | task
  for key in ('train', 'heldout'):
    fields[key] = fields.get(key, '').replace('DIR', str(tmp_path))
  config = config_of(data.Task(**fields), heldout_fraction=0.5)
  message = message.replace('DIR', str(tmp_path))
  with pytest.raises(UserError, match=message) as error:
    data.Stream(config, tok)
  assert '\n' not in str(error.value)


def test_the_search_for_a_document_ends(tok, tmp_path, monkeypatch):
  """A large corpus of faults is refused before it is read through."""
  monkeypatch.setattr(documents, '_CHECKED_BYTES', 10)
  monkeypatch.setattr(documents, '_CHECKED_BLOCKS', 3)
  for i in range(9):
    (tmp_path / f'{i}.txt').write_bytes(b'\xff\xff\xff')
  config = config_of(data.Task('t', 'text', f'{tmp_path}/*.txt'))
  opened, read_bytes = [], files.read_bytes

  def read(*args):
    opened.append(args)
    return read_bytes(*args)

  monkeypatch.setattr(files, 'read_bytes', read)
  with pytest.raises(UserError, match='has no train document that can be'):
    data.Stream(config, tok)
  assert len(opened) < 7


def test_a_file_that_disappears_stops_the_run_in_one_line(tok, tmp_path):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text('ok')
  config = config_of(data.Task('t', 'text', f'{tmp_path}/*.txt'))
  config = dataclasses.replace(config, heldout_fraction=1e-9)
  stream = data.Stream(config, tok)
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(UserError, match='data cannot be read: .*txt') as error:
    take(stream, 200)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'name': 'a b'}, 'a name is letters'),
        ({'kind': 'csv'}, "unknown kind 'csv', expected one of text, jsonl"),
        ({'train': ''}, 'train is empty'),
        ({'train': 3}, 'train is 3, expected strings'),
        ({'heldout': ('',)}, "heldout is .'',., expected strings"),
        ({'document': 'record'}, "kind 'text' takes document='file'"),
        ({'kind': 'jsonl', 'document': 'file'}, "others document='record'"),
        ({'document': 'a\nb'}, 'is more than one line'),
        ({'document': None}, 'document is None, expected a string'),
        ({'weight': 0.0}, 'weight is 0.0, expected a finite number above 0'),
        ({'weight': float('nan')}, 'weight is nan, expected a finite'),
        ({'weight': '1'}, "weight is '1', expected a finite"),
        ({'dataset': 'c4'}, "'tfds' and 'seqio' need the dataset's name"),
        ({'kind': 'tfds'}, "'tfds' and 'seqio' need the dataset's name"),
        ({'kind': 'tfds', 'dataset': 'c4'}, 'one split to train on and one'),
    ],
)
def test_bad_tasks(fields, message):
  with pytest.raises(UserError, match=message):
    data.Task(**{'name': 't', 'kind': 'text', 'train': ('x',)} | fields)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'tasks': ()}, 'there must be one at least'),
        ({'tasks': ({},)}, 'expected a sequence of data.Task'),
        ({'tasks': (data.Task('t', 'text', 'x'),) * 2}, 'no name twice'),
        ({'batch': 3}, r'3 is not a multiple of data.shards 2; .* \[1, 3\]'),
        ({'seq_len': 0}, 'data.seq_len is 0, expected a whole number of at'),
        ({'batch': 4.0}, 'data.batch is 4.0, expected a whole number'),
        ({'shards': True}, 'data.shards is True, expected a whole number'),
        ({'seed': -1}, 'data.seed is -1'),
        ({'heldout_fraction': 0.6}, 'above 0 and at most 0.5'),
    ],
)
def test_bad_configs(fields, message):
  good = {'tasks': (data.Task('t', 'text', 'x'),), 'seq_len': 8, 'batch': 4}
  with pytest.raises(UserError, match=message):
    data.DataConfig(**good | {'shards': 2} | fields)


def test_bad_arguments(tok, corpus):
  config = config_of(separated(corpus))
  with pytest.raises(UserError, match='row 4 is outside'):
    data.Stream(config, tok, rows=[0, 4])
  with pytest.raises(UserError, match='max_tokens is 0'):
    data.heldout(config, tok, max_tokens=0)


def test_configs_are_hashable(corpus):
  config = config_of(separated(corpus, train=[f'{corpus}/*.txt']))
  assert hash(config) == hash(config_of(separated(corpus)))


# Names and bytes of real files.


@pytest.mark.parametrize('name', [
    'a[1].txt', 'a*.txt', 'a?.txt', '[ab].txt', 'a[!1].txt', '**', 'd[1]/x.txt',
    'd[1]/e[2]/x.txt', 'a b.txt', 'a[.txt'])
def test_a_path_that_exists_is_that_path(tok, tmp_path, name):
  for other in ('a1.txt', 'a.txt', 'd1/x.txt', 'd1/e2/x.txt', name):
    path = tmp_path / other
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('a' if other == name else 'bbbb')
  task = data.Task('t', 'text', f'{tmp_path}/{name}')
  assert files.find(task, 'train') == [f'{tmp_path}/{name}']
  held = dataclasses.replace(
      task, train=(f'{tmp_path}/**/*.txt',), heldout=task.train)
  assert files.find(held, 'heldout') == [f'{tmp_path}/{name}']
  assert f'{tmp_path}/{name}' not in files.find(held, 'train')
  assert data.heldout(config_of(held), tok).num_bytes == 1


def test_a_glob_below_a_folder_that_exists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('d[1]/x.txt', 'd[1]/y.txt', 'd1/z.txt', 'e1/z.txt'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('a')

  def found(pattern):
    return files.find(data.Task('t', 'text', pattern), 'train')

  assert found('d[1]/*.txt') == ['d[1]/x.txt', 'd[1]/y.txt']
  assert found(f'{tmp_path}/d[1]/[y].txt') == [f'{tmp_path}/d[1]/y.txt']
  assert found('e[1]/*.txt') == ['e1/z.txt']
  assert found('**/z.txt') == ['d1/z.txt', 'e1/z.txt']


# What str.splitlines takes for ends of lines, and JSON lines do not.
_BREAKS = '\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e'


@pytest.mark.parametrize('block', [1 << 20, 7])
def test_lines_end_at_newlines_alone(tmp_path, monkeypatch, block):
  monkeypatch.setattr(documents, '_LEAST_BLOCK_BYTES', block)
  monkeypatch.setattr(documents, '_BLOCKS', 1 << 20)
  texts = [f'{i}{_BREAKS}{SEPARATOR}{_BREAKS}b\r\n' for i in range(9)]
  (tmp_path / 'a.jsonl').write_bytes(''.join(
      json.dumps({'text': text}, ensure_ascii=False) + '\r\n'[i % 2:]
      for i, text in enumerate(texts)).encode())
  (tmp_path / 'a.txt').write_bytes(
      f'{SEPARATOR}\n'.join(texts).encode())
  for task in (data.Task('t', 'jsonl', f'{tmp_path}/a.jsonl'),
               data.Task('t', 'text', f'{tmp_path}/a.txt',
                         document=SEPARATOR)):
    found = documents.Documents(task, 'train', fraction=0.0)
    blocks = blocks_of(found)
    assert not any(block.faults for block in blocks)
    read = [text.decode() for block in blocks for text in block.texts]
    if task.kind == 'text':
      read = [f'{text}\r\n' for text in read]
    assert read == texts


@pytest.mark.parametrize('block', [1 << 20, 7])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, block):
  monkeypatch.setattr(documents, '_LEAST_BLOCK_BYTES', block)
  monkeypatch.setattr(documents, '_BLOCKS', 1 << 20)
  mark = b'\xef\xbb\xbf'
  # Only the first is a mark.
  lines = [b'{"text": "a"}', b'{"text": "\xef\xbb\xbfb"}', b'no', mark + b'{}']
  (tmp_path / 'a.jsonl').write_bytes(mark + b'\n'.join(lines))
  (tmp_path / 'a.txt').write_bytes(mark + b'a\n' + mark + b'b')
  separator = SEPARATOR.encode()
  (tmp_path / 'b.txt').write_bytes(
      mark + separator + b'\na\n' + separator + b'\n' + mark + b'b')
  (tmp_path / 'c.txt').write_bytes(mark)

  def read(*args, **kwargs):
    found = documents.Documents(
        data.Task('t', *args, **kwargs), 'train', fraction=0.0)
    blocks = blocks_of(found)
    return ([text for block in blocks for text in block.texts],
            [str(fault).split(':')[1] if fault.offset else fault.kind
             for block in blocks for fault in block.faults])

  assert read('jsonl', f'{tmp_path}/a.jsonl') == (
      [b'a', mark + b'b'], ['3', '4'])
  assert read('text', f'{tmp_path}/a.txt') == ([b'a\n' + mark + b'b'], [])
  assert read('text', f'{tmp_path}/b.txt', document=SEPARATOR) == (
      [b'a', mark + b'b'], [])
  assert read('text', f'{tmp_path}/c.txt') == ([], ['empty'])


def test_a_heldout_file_under_another_path_is_not_trained_on(
    tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for name in 'abcd':
    (tmp_path / name).write_text(name)
  (tmp_path / 'link').symlink_to(tmp_path / 'd')
  task = data.Task('t', 'text', '?', heldout=(
      './a', f'{tmp_path}/b', 'link'))
  assert files.find(task, 'train') == ['c']
  assert len(files.find(task, 'heldout')) == 3


@pytest.mark.parametrize('kind', ['text', 'jsonl'])
def test_compressed_files_are_named_as_such(tmp_path, kind):
  import bz2
  import gzip
  import lzma

  for name, module, way in (
      ('gzip', gzip, 'name it .gz'), ('bzip2', bz2, 'unpack the file first'),
      ('xz', lzma, 'unpack')):
    path = tmp_path / name
    path.write_bytes(module.compress(b'{"text": "a"}\n' * 9))
    with pytest.raises(UserError, match=f'begins as {name} does; {way}'):
      documents.Documents(
          data.Task('t', kind, str(path)), 'train', fraction=0.0).check()


def test_a_pipe_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(UserError, match='is no file; write what a pipe gives'):
    files.find(data.Task('t', 'text', f'{tmp_path}/pipe'), 'train')


def test_a_record_may_hold_any_number_beside_its_text(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a", "n": %s}\n{"text": "b", "n": NaN}\n'
                  '{"text": 5}\n' % ('9' * 5000))
  found = documents.Documents(
      data.Task('t', 'jsonl', str(path)), 'train', fraction=0.0)
  block, = blocks_of(found)
  assert block.texts == [b'a', b'b']
  assert [fault.kind for fault in block.faults] == ['no_text']
