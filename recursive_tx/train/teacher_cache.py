"""A teacher's top-k logits at every position of a run's batches, on disk.

The stream is a function of config and step, so a teacher can run before its
students, once for all of them, and they read its top-k logits:

  teacher.json                  of which teacher, data and tokenizer
  steps/00000001/00000-00008/   rows 0 to 7 of the first batch, as
    model.safetensors             id [rows, T, J] int32, the best first
                                  log_p [rows, T, J] float32, nats
                                  check [rows] int64, CRC-32 of each row's ids
                                  position, of the stream, at some steps

A step's rows may be cut in any way: a run may have other processes than the
teacher had. Each part is there whole or not at all.

Knows batches and files. Does not know models: the caller runs them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import re
from typing import Any
import zlib

import jax
import numpy as np

from recursive_tx import files, machine
from recursive_tx.data import DataConfig, Stream
from recursive_tx.errors import UserError
from recursive_tx.text.tokenizer import Tokenizer

VERSION = 1
_FORMAT = 'recursive_tx teacher'
# Steps between positions, a megabyte each, from which an interrupted teacher
# resumes without reading all that came before.
_POSITION_EVERY = 50

Batch = Mapping[str, np.ndarray]


def is_saved(directory: str | os.PathLike) -> bool:
  """Whether a directory holds top-k logits, rather than a model."""
  path = pathlib.Path(directory, 'teacher.json')
  return path.is_file() and files.read_json(path).get('format') == _FORMAT


def facts(
    data: DataConfig, tokenizer: Tokenizer, *, V: int, best: int, teacher: str
) -> dict[str, Any]:
  """What top-k logits are of, as teacher.json has it.

  Args:
    data: of which stream.
    tokenizer: of the stream.
    V: the vocabulary.
    best: top-k logits a position, J.
    teacher: the model's directory.

  Raises:
    UserError: no such number of top-k logits.
  """
  if not 1 <= best <= V:
    raise UserError(f'best={best}; expected 1 to the vocabulary of {V}.')
  values = dataclasses.asdict(data)
  # A cache of files gives the batches that the files give.
  if not any(task.kind == 'tfds' for task in data.tasks):
    del values['cache']
  return json.loads(json.dumps({
      'format': _FORMAT, 'version': VERSION, 'teacher': teacher, 'V': V,
      'best': best, 'data': values,
      'tokenizer': [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id]}))


def save(
    directory: str | os.PathLike, about: dict[str, Any], stream: Stream,
    top_k: Callable[[Batch], tuple[jax.Array, jax.Array]], *,
    rows: Sequence[int], steps: range,
    progress: Callable[[int], Any] = lambda step: None,
) -> None:
  """Writes the top-k logits of the steps that are not there yet.

  Args:
    directory: on disk, the same for all processes; what an earlier call wrote
      is kept.
    about: of `facts`.
    stream: at its start.
    top_k: the rows of this process of a batch -> ids and log-probabilities
      [B, T, J] of the global batch, cut along B.
    rows: this process's rows, of `machine.local_rows`.
    steps: consecutive, from 1.
    progress: called after every step.

  Raises:
    UserError: the directory holds something else.
  """
  directory = pathlib.Path(directory)
  _begin(directory, about)
  B = about['data']['batch']
  missing = next((s for s in steps if not _covers(directory, s, range(B))),
                 steps.stop)
  start = machine.agree(missing)
  if start not in steps:
    return
  at = _rewind(directory, stream, start - 1)
  waiting = None
  for step in range(at + 1, steps.stop):
    batch = next(stream)
    if step < start:
      continue
    is_last = step == steps.stop - 1
    position = None
    if is_last or step % _POSITION_EVERY == 0:
      position = np.frombuffer(stream.save(), np.uint8)
    # The device works on a step while the one before it is written.
    now = step, batch, top_k(batch), position
    for each in filter(None, (waiting, now if is_last else None)):
      _write(directory, rows, *each)
      progress(each[0])
    waiting = now
  machine.wait('the top-k logits are saved')


def reader(
    directory: str | os.PathLike, data: DataConfig, tokenizer: Tokenizer, *,
    V: int, rows: Sequence[int], steps: range,
) -> Callable[[int, Batch], Batch]:
  """What adds the teacher's top-k logits to the batch of a step.

  Args:
    directory: of `save`; of anything else, batches stay as they are.
    data, tokenizer, V: the run's.
    rows: this process's, as its batches have them.
    steps: those that will be read.

  Returns:
    (step, batch) -> the batch, with `teacher_id_BTJ` and `teacher_log_p_BTJ`.

  Raises:
    UserError: top-k logits of another data config, tokenizer or vocabulary, or
      not of all steps; from the function, where the text has changed since.
  """
  if not directory or not is_saved(directory):
    return lambda step, batch: batch
  directory = pathlib.Path(directory)
  found = files.read_json(directory / 'teacher.json')
  wanted = facts(data, tokenizer, V=V, best=1, teacher='')
  for key in ('version', 'V', 'tokenizer', 'data'):
    _check_same(directory, key, found.get(key), wanted[key])
  for step in steps:
    if not _covers(directory, step, rows):
      raise UserError(
          f'{directory} lacks top-k logits for step {step} of the steps'
          f' {steps.start} to {steps.stop - 1}; write them with `teach'
          f' --last={steps.stop - 1}`.')
  pool, ahead = futures.ThreadPoolExecutor(1), {}

  def add(step: int, batch: Batch) -> Batch:
    read = ahead.pop(step, None) or pool.submit(_read, directory, step, rows)
    if step + 1 in steps:
      ahead[step + 1] = pool.submit(_read, directory, step + 1, rows)
    found = read.result()
    odd = np.flatnonzero(found['check'] != _checks(batch['token_BT']))
    if len(odd):
      raise UserError(
          f'{directory} was made of other text: row {rows[odd[0]]} of step'
          f' {step} differs; run `teach` again for the text as it is.')
    return {**batch, 'teacher_id_BTJ': found['id'],
            'teacher_log_p_BTJ': found['log_p']}

  return add


def _begin(directory: pathlib.Path, about: dict[str, Any]) -> None:
  """Writes teacher.json, or checks that it holds the same facts."""
  path = directory / 'teacher.json'
  if path.exists():
    found = files.read_json(path)
    for key, value in about.items():
      _check_same(directory, key, found.get(key), value)
  else:
    files.check_directory(directory)
  # Before anybody makes that directory.
  machine.wait('the directory is checked')
  if machine.is_main() and not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / '.teacher.json'
    files.write_json(beside, about)
    beside.rename(path)
  machine.wait('the directory is made')


def _check_same(where: pathlib.Path, key: str, found: Any, wanted: Any) -> None:
  """Raises UserError, naming the innermost difference."""
  if isinstance(found, dict) and isinstance(wanted, dict):
    for part in {**wanted, **found}:
      _check_same(where, f'{key}.{part}', found.get(part), wanted.get(part))
  elif found != wanted and key == 'tokenizer':
    raise UserError(
        f'{where} holds top-k logits for another tokenizer (digest, BOS, EOS:'
        f' {found!r}, not {wanted!r}); name the one that it was made with, or'
        ' make it anew with `teach`.')
  elif found != wanted:
    raise UserError(
        f'{where} holds top-k logits for {key}={found!r}, not {wanted!r}; name'
        ' another directory, or make this one anew with `teach`.')


def _rewind(directory: pathlib.Path, stream: Stream, step: int) -> int:
  """Puts the stream at most `step` batches on; returns how many."""
  for at in range(step, 0, -1):
    if at % _POSITION_EVERY and at != step:
      continue
    readers = [files.Reader(path) for path, _ in _parts(directory, at)]
    positions = [reader.read('position').tobytes() for reader in readers
                 if 'position' in reader.shapes]
    if positions:
      stream.restore(*positions)
      return at
  return 0


def _write(directory, rows, step, batch, top_k, position) -> None:
  """This process's parts of a step, one for each run of rows."""
  id_BTJ, log_p_BTJ = map(_local, top_k)
  tensors = {'id': id_BTJ.astype(np.int32),
             'log_p': log_p_BTJ.astype(np.float32),
             'check': _checks(batch['token_BT'])}
  breaks = np.flatnonzero(np.diff(rows) != 1) + 1
  for places in np.split(np.arange(len(rows)), breaks):
    part = {name: value[places] for name, value in tensors.items()}
    if position is not None and places[0] == 0:
      part['position'] = position
    start, stop = rows[places[0]], rows[places[-1]] + 1
    path = _step(directory, step) / f'{start:05}-{stop:05}'
    with files.new_directory(path, overwrite=True) as new:
      shapes = {k: (v.shape, v.dtype) for k, v in part.items()}
      with files.Writer(new / 'model.safetensors', shapes) as writer:
        for name, value in part.items():
          writer.write(name, value)


def _read(directory, step, rows) -> dict[str, np.ndarray]:
  """The tensors of some rows of a step, but for the position."""
  found = {}
  for path, held in _parts(directory, step):
    wanted = [row for row in rows if row in held and row not in found]
    if wanted:
      part = files.Reader(path)
      values = {name: part.read(name) for name in ('id', 'log_p', 'check')}
      for row in wanted:
        found[row] = {k: v[row - held.start] for k, v in values.items()}
  return {name: np.stack([found[row][name] for row in rows])
          for name in ('id', 'log_p', 'check')}


def _covers(directory: pathlib.Path, step: int, rows: Sequence[int]) -> bool:
  held = {row for _, part in _parts(directory, step) for row in part}
  return held.issuperset(rows)


def _parts(
    directory: pathlib.Path, step: int
) -> Iterator[tuple[pathlib.Path, range]]:
  """Every whole part of a step, and its rows."""
  folder = _step(directory, step)
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if match := re.fullmatch(r'(\d+)-(\d+)', path.name):
      yield path, range(int(match[1]), int(match[2]))


def _step(directory: pathlib.Path, step: int) -> pathlib.Path:
  return directory / 'steps' / f'{step:08}'


def _checks(token_BT: np.ndarray) -> np.ndarray:
  """CRC-32 of each row, int64 [B]."""
  rows = np.ascontiguousarray(token_BT, '<i4')
  return np.array([zlib.crc32(row) for row in rows], np.int64)


def _local(x: jax.Array) -> np.ndarray:
  """The rows of an array that this process's devices hold, in order."""
  parts = {part.index[0].start or 0: part.data for part in
           x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
