"""Writes what `cache` reads, from several processes of this machine.

SeqIO's own writer runs on Apache Beam. The files here are the ones it would
write, but for the order of documents, which is the sources'.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import functools
import multiprocessing
import os
import pathlib
import threading
from typing import Any
import zlib

import numpy as np

from recursive_tx import files
from recursive_tx.data import cache, units
from recursive_tx.data.chats import Chats
from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.documents import Documents
from recursive_tx.data.records import FAULTS
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.tokenizer import Tokenizer

# TFRecords of one split: enough to write and to shuffle in parallel, as SeqIO
# does, and none made of much more text than this.
_PARTS = 64
_PART_BYTES = 1 << 28
# Documents of TFDS that are read at once; a stream shuffles no finer.
_TFDS_UNIT = 64

# Of each block of documents: does a unit begin with it, and is that read from
# the front; where it is in its TFRecord; faults by kind.
_INDEX = {
    'opens': np.bool_, 'is_stream': np.bool_, 'offset': np.int64,
    'size': np.int64, 'checksum': np.uint32, 'faults': np.int32}

_load = functools.lru_cache(1)(tokenizer_lib.load)


def write(
    config: DataConfig, tokenizer: str, output: str, *, processes: int,
    overwrite: bool = False,
    progress: Callable[[int, int], Any] = lambda total, done: None,
) -> list[dict[str, Any]]:
  """Makes the cache of all tasks, both splits.

  Args:
    config: the stream's.
    tokenizer: the tokenizer's directory.
    output: directory to make, on disk; it appears whole or not at all.
    processes: how many tokenise at a time.
    overwrite: replace `output`.
    progress: called with the number of parts, and of those just done.

  Returns:
    For each task and split 'task', 'split', 'documents', 'tokens' (EOS not
    counted, as SeqIO does), 'bytes' of text and 'faults' by kind.

  Raises:
    UserError: `output` exists or is not on disk, or as `Stream`.
  """
  files.check_directory(output, overwrite=overwrite)
  if processes < 1:
    raise UserError(f'--processes is {processes}, expected at least 1')
  loaded = _load(tokenizer)
  digests, jobs = {}, []
  for task in config.tasks:
    for split in cache.SPLITS:
      parts = _num_parts(config, loaded, task, split)
      digests[task, split] = cache.digest_files(config, task, split)
      jobs += [(task, split, part, parts) for part in range(parts)]
  rows = []
  with files.new_directory(output, overwrite=overwrite) as folder:
    for task in config.tasks:
      (folder / task.name).mkdir()
    made = _run(config, tokenizer, folder, jobs, processes, progress)
    for task in config.tasks:
      splits = {}
      for split in cache.SPLITS:
        parts = [
            part for job, part in zip(jobs, made, strict=True)
            if job[:2] == (task, split)]
        digest = digests[task, split]
        if cache.digest_files(config, task, split) != digest:
          raise UserError(
              f'the files of data task {task.name!r} changed while they were '
              'read; start again')
        rows.append({
            'task': task.name, 'split': split,
            **_finish(folder / task.name, split, parts)})
        size = [part['part_bytes'] for part in parts]
        splits[split] = {'files': digest, 'bytes': size}
      files.write_json(folder / task.name / cache.DESCRIPTION, {
          'version': cache.VERSION,
          **cache.describe(config, loaded, task),
          'splits': splits})
      (folder / task.name / 'COMPLETED').touch()
  return rows


def _run(
    config: DataConfig, tokenizer: str, folder: pathlib.Path, jobs: list,
    processes: int, progress: Callable[[int, int], Any],
) -> list[dict[str, Any]]:
  """The results of `_write_part` for the jobs, in their order."""
  others = set(multiprocessing.active_children())
  # Each process loads TensorFlow, which does not survive a fork.
  pool = concurrent.futures.ProcessPoolExecutor(
      min(processes, len(jobs)), multiprocessing.get_context('spawn'),
      initializer=_end_with_parent)
  with pool:
    waiting = [
        pool.submit(_write_part, config, tokenizer, folder, *job)
        for job in jobs]
    try:
      for done in concurrent.futures.as_completed(waiting):
        done.result()
        progress(len(jobs), 1)
    except BrokenProcessPool:
      raise UserError(
          'a process that tokenises was killed, perhaps for want of memory; '
          f'give fewer than --processes={processes}'
      ) from None
    except BaseException:
      # A part may take minutes, and nobody wants it any more.
      for child in {*multiprocessing.active_children()} - others:
        child.terminate()
      pool.shutdown(cancel_futures=True)
      raise
  return [done.result() for done in waiting]


def _end_with_parent() -> None:
  """Ends this process when the one that started it is killed.

  It would wait for work for ever: nobody closes the queue.
  """
  parent = multiprocessing.parent_process()

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _num_parts(
    config: DataConfig, tokenizer: Tokenizer, task: Task, split: str
) -> int:
  """How many files a split becomes; raises UserError if it has nothing."""
  if task.kind == 'tfds':
    from recursive_tx.data import sources

    info = sources.tfds_builder(task).info
    count = info.splits[getattr(task, split)[0]].num_examples
    return min(_PARTS, -(-count // _TFDS_UNIT))
  render = Chats(tokenizer).render if task.is_chat else None
  documents = Documents(
      task, split, fraction=config.heldout_fraction, render=render)
  documents.check()
  parts = max(_PARTS, documents.num_bytes // _PART_BYTES)
  return min(parts, documents.num_units)


def _write_part(
    config: DataConfig, tokenizer: str, folder: pathlib.Path, task: Task,
    split: str, part: int, parts: int,
) -> dict[str, Any]:
  """One TFRecord. Returns its part of the index and its counts."""
  import tensorflow as tf

  from recursive_tx.data import pipeline

  loaded = _load(tokenizer)
  encode = pipeline.encoder(loaded, task)
  index = {name: [] for name in _INDEX}
  lengths, text_bytes, offset = [], 0, 0
  path = folder / task.name / units.part_name(split, part, parts)
  with tf.io.TFRecordWriter(str(path)) as writer:
    for opens, is_stream, texts, codes in _blocks(
        config, loaded, task, split, part, parts):
      size = checksum = 0
      for ids, num_bytes, code in encode(texts, [0] * len(texts)):
        if code:
          codes.append(code)
          continue
        record = _example(ids, num_bytes)
        writer.write(record)
        size += 16 + len(record)
        checksum = zlib.crc32(record, checksum)
        text_bytes += num_bytes
        lengths.append(int((ids != loaded.eos_id).sum()))
      index['opens'].append(opens)
      index['is_stream'].append(is_stream)
      index['offset'].append(offset)
      index['size'].append(size)
      index['checksum'].append(checksum)
      counts = np.bincount(np.array(codes, int), minlength=1 + len(FAULTS))
      index['faults'].append(counts[1:])
      offset += size
  assert os.path.getsize(path) == offset, path
  return {
      'index': index, 'part_bytes': offset, 'bytes': text_bytes,
      'documents': len(lengths), 'tokens': sum(lengths),
      'most': max(lengths, default=0)}


def _blocks(
    config: DataConfig, tokenizer: Tokenizer, task: Task, split: str,
    part: int, parts: int,
) -> Iterator[tuple[bool, bool, list[bytes], list[int]]]:
  """The blocks of a part.

  Yields:
    Whether it is the first of a unit; whether the unit is read from the front;
    texts; the codes of what is left out.
  """
  if task.kind == 'tfds':
    import tensorflow_datasets as tfds

    from recursive_tx.data import sources

    splits = tfds.even_splits(getattr(task, split)[0], parts)
    dataset = sources.tfds_builder(task).as_dataset(
        split=splits[part], shuffle_files=False)
    for examples in dataset.batch(_TFDS_UNIT).as_numpy_iterator():
      yield True, False, list(examples[task.key]), []
    return
  render = Chats(tokenizer).render if task.is_chat else None
  documents = Documents(
      task, split, fraction=config.heldout_fraction, render=render)
  count = documents.num_units
  for number in range(part * count // parts, (part + 1) * count // parts):
    is_stream = documents.is_stream(number)
    for i, block in enumerate(documents.blocks(number)):
      yield not i, is_stream, block.texts, block.codes


def _example(ids: np.ndarray, num_bytes: int) -> bytes:
  import tensorflow as tf

  def integers(values):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

  features = {'targets': integers(ids), 'num_bytes': integers([num_bytes])}
  return tf.train.Example(
      features=tf.train.Features(feature=features)).SerializeToString()


def _finish(
    folder: pathlib.Path, split: str, parts: list[dict[str, Any]]
) -> dict[str, Any]:
  """Writes a split's index and SeqIO's info and stats; returns its counts."""
  import seqio

  index = {
      name: np.concatenate([
          np.asarray(part['index'][name], dtype) for part in parts])
      for name, dtype in _INDEX.items()}
  units = [len(part['index']['size']) for part in parts]
  index['part'] = np.repeat(np.arange(len(parts), dtype=np.int32), units)
  np.savez_compressed(folder / f'units.{split}.npz', **index)
  row = {
      name: sum(part[name] for part in parts)
      for name in ('documents', 'tokens', 'bytes')}
  files.write_json(pathlib.Path(seqio.get_cached_info_path(folder, split)), {
      'num_shards': len(parts),
      'features': {
          'num_bytes': {'shape': [], 'dtype': 'int32'},
          'targets': {'shape': [None], 'dtype': 'int32'}},
      'seqio_version': seqio.__version__})
  files.write_json(pathlib.Path(seqio.get_cached_stats_path(folder, split)), {
      'examples': row['documents'],
      'targets_tokens': row['tokens'],
      'targets_max_tokens': max(part['most'] for part in parts)})
  counts = index['faults'].sum(axis=0).tolist()
  faults = {k: n for k, n in zip(FAULTS, counts, strict=True) if n}
  return {**row, 'faults': faults}
