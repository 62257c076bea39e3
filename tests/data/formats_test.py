"""Compressed files, Parquet and lists of files: the laws of the stream hold."""

import collections
import dataclasses
import gzip
import json
import pathlib
import random

import numpy as np
import pytest
from tiny_data import pieces_of
import tiny_tokenizers

from recursive_tx import data
from recursive_tx.data import (
    cache_writer,
    compressed,
    documents,
    files,
    parquet,
    records,
)
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

pyarrow = pytest.importorskip('pyarrow', reason='of the extra data')
zstandard = pytest.importorskip('zstandard', reason='of the extra data')
write_table = pytest.importorskip('pyarrow.parquet').write_table

T = 32
SEPARATOR = '<|endoftext|>'
ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789 \n'
KINDS = ('jsonl.gz', 'jsonl.zst', 'txt.gz', 'txt.zst', 'parquet')
PACK = {'gz': gzip.compress, 'zst': zstandard.ZstdCompressor().compress}


@pytest.fixture(scope='module')
def letters(tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp('characters')
  tiny_tokenizers.letters(directory, [*ALPHABET, '<bos>', '<eos>'])
  return directory


@pytest.fixture(scope='module')
def tok(letters) -> tokenizer.Tokenizer:
  return tokenizer.load(letters)


def texts_of(part: int) -> list[str]:
  rng = random.Random(part)
  return [f'{part}x{i}x' + 'a' * rng.randrange(1, 90) for i in range(100)]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
  """300 different documents in 3 files a format, and uncompressed."""
  directory = tmp_path_factory.mktemp('formats')
  for part in range(3):
    texts = texts_of(part)
    # As SlimPajama and The Pile have their records.
    lines = ''.join(
        json.dumps({'text': text, 'meta': {'set': 'C4'}}) + '\n'
        for text in texts)
    for suffix, content in (
        ('jsonl', lines),
        ('txt', f'\n{SEPARATOR}\n'.join(texts))):
      (directory / f'{part}.{suffix}').write_text(content)
      half = content.encode()[: len(content) // 2]
      rest = content.encode()[len(half) :]
      for way, pack in PACK.items():
        # Two members or frames, as of files that were joined.
        (directory / f'{part}.{suffix}.{way}').write_bytes(
            pack(half) + pack(rest))
    table = pyarrow.table({'text': texts, 'n': list(range(100))})
    write_table(
        table, directory / f'{part}.parquet', row_group_size=60)
  return directory


def task_of(corpus: pathlib.Path, kind: str, **changes) -> data.Task:
  text = kind.startswith('txt')
  task = data.Task(
      't', 'text' if text else 'jsonl', f'{corpus}/[012].{kind}',
      document=SEPARATOR if text else '')
  return dataclasses.replace(task, **changes)


def config_of(*tasks, **changes) -> data.DataConfig:
  config = data.DataConfig(
      tasks, seq_len=T, batch=8, shards=4, shuffle=16, heldout_fraction=1e-9)
  return dataclasses.replace(config, **changes)


@pytest.fixture
def small_blocks(monkeypatch):
  """About 20 blocks a file."""
  monkeypatch.setattr(documents, '_STREAM_BLOCK_BYTES', 300)
  monkeypatch.setattr(parquet, 'BLOCK', 7)


def take(stream, steps) -> list[dict[str, np.ndarray]]:
  return [next(stream) for _ in range(steps)]


def assert_equal(batches, others):
  for one, other in zip(batches, others, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def blocks_of(found: documents.Documents) -> list[documents.Block]:
  return [block for number in range(found.num_units)
          for block in found.blocks(number)]


def heads_of(batches, tok) -> collections.Counter:
  """How often each document opens, by its unique first words."""
  return collections.Counter(
      tok.decode(piece[1:]).split('a')[0] for piece in pieces_of(batches)
      if piece[0] == tok.bos_id)


EVERY = {text.split('a')[0] for part in range(3) for text in texts_of(part)}


# The same documents, whatever the format and the blocks.


@pytest.mark.parametrize('suffix', PACK)
def test_any_place_of_a_compressed_file_can_be_read(tmp_path, suffix):
  rng = random.Random(0)
  content = rng.randbytes(200_000) + b'abc\n' * 100_000
  path = tmp_path / f'a.{suffix}'
  path.write_bytes(b''.join(
      PACK[suffix](content[i : i + 90_000])
      for i in range(0, len(content), 90_000)))
  reader = compressed.Reader(str(path))
  for _ in range(100):
    start = rng.randrange(len(content) + 9)
    size = rng.choice([1, 100, 70_000, None])
    stop = None if size is None else start + size
    assert reader.read(start, size) == content[start:stop]
    assert reader.holds(start) == (start < len(content))
  assert reader.read(0, None) == content
  assert reader.broken is None and reader.size == len(content)


@pytest.mark.parametrize('shards', [1, 7])
@pytest.mark.parametrize('kind', KINDS)
def test_every_document_comes_once(small_blocks, corpus, kind, shards):
  found = documents.Documents(
      task_of(corpus, kind), 'train', fraction=0.0, shards=shards)
  files_or_groups = 6 if kind == 'parquet' else 3
  assert found.num_units >= max(shards, files_or_groups)
  blocks = blocks_of(found)
  assert len(blocks) > 30 and not any(block.faults for block in blocks)
  texts = [text.decode() for block in blocks for text in block.texts]
  want = [text for part in range(3) for text in texts_of(part)]
  assert sorted(texts) == sorted(want)
  if shards == 1:
    assert texts == want


@pytest.mark.parametrize('kind', KINDS)
def test_a_block_is_a_function_of_its_place(small_blocks, corpus, kind):
  """Read in order, backwards and at random, by one reader and by new ones."""
  found = documents.Documents(
      task_of(corpus, kind), 'train', fraction=0.0, shards=4)
  want = {}
  for number in range(found.num_units):
    for i, block in enumerate(found.blocks(number)):
      want[number, i] = block
  reader, places = found.reader(), list(want)
  for order in (places[::-1], random.Random(0).sample(places, len(places))):
    assert {place: reader(*place) for place in order} == want
  assert found.reader()(*places[-1]) == want[places[-1]]
  assert reader(0, 1000) is None


@pytest.mark.parametrize('kind', KINDS)
def test_shards_partition_each_epoch(small_blocks, tok, corpus, kind):
  """A shard reads every n-th unit of the order, each from end to end."""
  import seqio

  from recursive_tx.data import pipeline

  tasks, (found,) = pipeline.build_tasks(
      config_of(task_of(corpus, kind)), tok, 'train')
  epochs = collections.defaultdict(list)
  for shard in range(4):
    dataset = tasks[0].source.get_dataset(shard_info=seqio.ShardInfo(shard, 4))
    texts = (e['text'] for e in dataset.as_numpy_iterator())
    for count in range(shard, 2 * found.num_units, 4):
      number = documents.shuffled(count, 0, found.num_units)
      want = [text for block in found.blocks(number) for text in block.texts]
      assert [next(texts) for _ in want] == want
      epochs[count // found.num_units] += want
  for epoch in (0, 1):
    assert sorted(epochs[epoch]) == sorted(
        text.encode() for part in range(3) for text in texts_of(part))


def test_a_task_may_mix_formats(small_blocks, tok, corpus):
  task = task_of(corpus, 'jsonl.gz', train=(
      f'{corpus}/0.jsonl', f'{corpus}/1.jsonl.zst', f'{corpus}/2.parquet'))
  seen = heads_of(take(data.Stream(config_of(task), tok), 200), tok)
  assert {head[0] for head in seen} == set('012')
  found = documents.Documents(task, 'train', fraction=0.0)
  assert len([text for block in blocks_of(found) for text in block.texts]
             ) == len(EVERY)


@pytest.mark.parametrize('kind', KINDS)
def test_the_stream_is_the_same_for_all_hosts_and_resumes_exactly(
    small_blocks, tok, corpus, kind
):
  config = config_of(task_of(corpus, kind))
  whole, positions, batches = data.Stream(config, tok), {}, []
  for step in range(60):
    if step in (0, 1, 7, 30):
      positions[step] = whole.save()
    batches += take(whole, 1)
  other = data.Stream(config, tok)
  for step in (30, 0, 7, 1):
    other.restore(positions[step])
    assert_equal(take(other, 30), batches[step : step + 30])
  halves = []
  for rows in ([0, 4, 1], [7, 2, 3, 6, 5]):
    part = data.Stream(config, tok, rows=rows)
    assert_equal(take(part, 7), [
        {k: v[rows] for k, v in batch.items()} for batch in batches[:7]])
    halves.append(part.save())
  other.restore(*halves)
  assert_equal(take(other, 20), batches[7:27])


@pytest.mark.parametrize('kind', ['jsonl.zst', 'txt.gz', 'parquet'])
def test_a_cache_of_it_gives_the_same_batches(
    small_blocks, letters, tok, corpus, tmp_path, kind, monkeypatch
):
  """Whatever the shards, also more than there are files."""
  config = config_of(task_of(corpus, kind), heldout_fraction=0.2)

  def run(config, tokenizer, folder, jobs, *_):  # Here, with small blocks.
    return [cache_writer._write_part(config, tokenizer, folder, *job)
            for job in jobs]

  monkeypatch.setattr(cache_writer, '_run', run)
  cache_writer.write(
      config, str(letters), str(tmp_path / 'cache'), processes=1)
  for shards in (1, 8):
    plain = dataclasses.replace(config, shards=shards)
    cached = dataclasses.replace(plain, cache=str(tmp_path / 'cache'))
    assert_equal(*(
        take(data.Stream(each, tok), 60) for each in (plain, cached)))
  one, other = (data.heldout(each, tok) for each in (plain, cached))
  assert_equal(one.batches, other.batches)
  assert one.num_documents == other.num_documents > 20


# Damage.


def one_file(path: pathlib.Path, kind: str = 'jsonl') -> documents.Documents:
  task = data.Task('t', kind, str(path),
                   document='' if kind == 'jsonl' else SEPARATOR)
  return documents.Documents(task, 'train', fraction=0.0)


@pytest.mark.parametrize('block', [1 << 20, 300])
@pytest.mark.parametrize('suffix', PACK)
@pytest.mark.parametrize('kind', ['jsonl', 'text'])
def test_a_broken_member_is_one_fault(
    tmp_path, monkeypatch, suffix, kind, block
):
  """What comes before it is read; the fault has the file and the record."""
  monkeypatch.setattr(documents, '_STREAM_BLOCK_BYTES', block)
  monkeypatch.setattr(compressed, '_PIECE', 16)
  texts = [f'{i} ' + random.Random(i).randbytes(20).hex() for i in range(90)]
  ends = '\n' if kind == 'jsonl' else f'\n{SEPARATOR}\n'
  lines = [(json.dumps({'text': text}) if kind == 'jsonl' else text) + ends
           for text in texts]
  first, second = ''.join(lines[:50]), ''.join(lines[50:])
  members = [PACK[suffix](part.encode()) for part in (first, second)]
  path = tmp_path / f'a.{suffix}'
  for damaged in (members[1][:-20], members[1][:7], b'no member',
                  members[1][:30] + bytes(40) + members[1][70:]):
    path.write_bytes(members[0] + damaged)
    blocks = blocks_of(one_file(path, kind))
    got = [text.decode() for block in blocks for text in block.texts]
    # zstd knows that a block is damaged only once it has given it out.
    assert got[:50] == texts[:50] and len(got) < 90
    faults = [fault for block in blocks for fault in block.faults
              if fault.kind == 'broken']
    assert len(faults) == 1, damaged
    line = first.count('\n') + 1
    found = str(faults[0])
    assert found.startswith(f'{path}:'), found
    assert int(found[len(f'{path}:') :].split(':')[0]) >= line
    assert 'copy it again' in found and '\n' not in found


def test_a_truncated_last_record_is_not_another_fault(tmp_path):
  path = tmp_path / 'a.gz'
  content = ''.join(json.dumps({'text': f'{i}' * 9}) + '\n' for i in range(50))
  path.write_bytes(gzip.compress(content.encode())[:-60])
  block, = blocks_of(one_file(path))
  assert [fault.kind for fault in block.faults] == ['broken']
  assert 5 < len(block.texts) < 50


@pytest.mark.parametrize('document', ['file', SEPARATOR])
def test_a_broken_document_is_left_out(tmp_path, document):
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(gzip.compress(random.Random(0).randbytes(999).hex().encode()
                                 )[:-60])
  found = documents.Documents(data.Task(
      't', 'text', str(path), document=document), 'train', fraction=0.0)
  block, = blocks_of(found)
  assert not block.texts and [f.kind for f in block.faults] == ['broken']


def test_an_empty_compressed_file_is_empty(tmp_path):
  for name, content in (('a.gz', b''), ('b.gz', gzip.compress(b'')),
                        ('c.zst', PACK['zst'](b''))):
    (tmp_path / name).write_bytes(content)
    block, = blocks_of(one_file(tmp_path / name))
    assert not block.texts and [f.kind for f in block.faults] == ['empty']


def test_zeros_after_a_gzip_member_are_padding(tmp_path):
  path = tmp_path / 'a.gz'
  path.write_bytes(gzip.compress(b'{"text": "a"}\n') + bytes(99))
  block, = blocks_of(one_file(path))
  assert block.texts == [b'a'] and not block.faults


def test_a_broken_row_group_is_one_fault(tmp_path):
  path = tmp_path / 'a.parquet'
  texts = [random.Random(i).randbytes(50).hex() for i in range(90)]
  write_table(
      pyarrow.table({'text': texts}), path, row_group_size=30,
      compression='gzip', use_dictionary=False)
  content = bytearray(path.read_bytes())
  column = pytest.importorskip('pyarrow.parquet').ParquetFile(
      path).metadata.row_group(1).column(0)
  for i in range(200):
    content[column.data_page_offset + 60 + i] ^= 255
  path.write_bytes(content)
  blocks = blocks_of(one_file(path))
  got = [text.decode() for block in blocks for text in block.texts]
  assert got == texts[:30] + texts[60:]
  fault, = (fault for block in blocks for fault in block.faults)
  assert fault.kind == 'broken' and f'{path}, record 31: ' in str(fault)
  path.write_bytes(content[:-20])  # Without its end nothing can be found.
  block, = blocks_of(one_file(path))
  assert [fault.kind for fault in block.faults] == ['broken']


def test_faults_of_parquet_are_counted_by_record(tmp_path):
  path = tmp_path / 'a.parquet'
  write_table(pyarrow.table({
      'text': pyarrow.array([b'a', None, b'\xff', b'', b'b'],
                            pyarrow.binary())}), path)
  block, = blocks_of(one_file(path))
  assert block.texts == [b'a', b'b']
  assert [(fault.kind, fault.record) for fault in block.faults] == [
      ('no_text', 2), ('not_utf8', 3), ('empty', 4)]
  write_table(pyarrow.table({'body': ['a'] * 3}), path)
  block, = blocks_of(one_file(path))
  assert [fault.kind for fault in block.faults] == ['no_text'] * 3
  assert "the record has ['body']; set the key" in str(block.faults[0])


@pytest.mark.parametrize('column', [
    pyarrow.array(['é', 'b'], pyarrow.large_string()),
    pyarrow.array(['é', 'b']).dictionary_encode(),
    pyarrow.array(['é'.encode(), b'b'], pyarrow.large_binary())])
def test_text_of_any_type_is_read(tmp_path, column):
  path = tmp_path / 'a.parquet'
  write_table(pyarrow.table({'text': column}), path)
  block, = blocks_of(one_file(path))
  assert block.texts == ['é'.encode(), b'b']


def test_faults_of_a_stream_are_exact_after_a_resume(tok, tmp_path):
  for i in range(2):
    lines = ''.join(json.dumps({'text': f'{i}x{j}x'}) + '\nno\n'
                    for j in range(60))
    (tmp_path / f'{i}.jsonl.gz').write_bytes(
        gzip.compress(lines.encode())[: -9 if i else None])
  config = config_of(data.Task('t', 'jsonl', f'{tmp_path}/*.gz'))
  stream = data.Stream(config, tok)
  take(stream, 20)
  position, early = stream.save(), stream.faults
  batches, late = take(stream, 20), stream.faults
  assert early['t/broken'] > 0 and late['t/broken'] > early['t/broken']
  other = data.Stream(config, tok)
  other.restore(position)
  assert other.faults == early
  assert_equal(take(other, 20), batches)
  assert other.faults == late


# Refusals and lists.


def test_parquet_is_no_text(corpus):
  with pytest.raises(UserError, match="set kind='jsonl'"):
    documents.Documents(
        data.Task('t', 'text', f'{corpus}/0.parquet'), 'train', fraction=0.0)


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
  (tmp_path / 'a.zst').write_bytes(b'')
  monkeypatch.setitem(__import__('sys').modules, 'zstandard', None)
  with pytest.raises(UserError, match=r"pip install 'recursive_tx\[data\]'"):
    one_file(tmp_path / 'a.zst')


def test_a_file_may_list_the_files(corpus, tmp_path):
  listed = tmp_path / 'shards'
  listed.write_text(f'{corpus}/0.jsonl\n\n  {corpus}/[12].jsonl.gz\r\n')
  task = data.Task('t', 'jsonl', f'@{listed}')
  assert files.find(task, 'train') == [
      f'{corpus}/0.jsonl', f'{corpus}/1.jsonl.gz', f'{corpus}/2.jsonl.gz']
  assert files.exist(task)
  gone = dataclasses.replace(task, train=(f'@{listed}s',))
  assert not files.exist(gone)
  with pytest.raises(UserError, match='which is no file; write the paths'):
    files.find(gone, 'train')
  listed.write_text('nothing\n')
  with pytest.raises(UserError, match="no file matches 'nothing'"):
    files.find(task, 'train')


def test_the_layout_of_slimpajama_is_what_its_task_names(
    tok, tmp_path, monkeypatch
):
  from recursive_tx.configs import common

  monkeypatch.chdir(tmp_path)
  for split in ('train', 'validation'):
    for chunk in (1, 2):
      folder = tmp_path / 'data/slimpajama' / split / f'chunk{chunk}'
      folder.mkdir(parents=True)
      for i in range(2):
        (folder / f'example_{split}_{i}.jsonl.zst').write_bytes(PACK['zst'](
            b''.join(json.dumps({
                'text': f'{chunk}x{i}x{j}',
                'meta': {'redpajama_set_name': 'RedPajamaC4'},
            }).encode() + b'\n' for j in range(9))))
  task = data.Task(name='slimpajama', **common.TASKS['slimpajama'])
  assert len(files.find(task, 'train')) == 4
  held = data.heldout(config_of(task), tok)
  assert held.num_documents == 36 and not held.faults


def test_fault_kinds_keep_their_order():
  """Caches and positions have their numbers."""
  assert records.FAULTS == (
      'not_utf8', 'not_json', 'no_text', 'empty', 'long', 'not_chat', 'broken')
