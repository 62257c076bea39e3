"""The training stream and the held-out set.

A stream is a function of its config, tokenizer and step, never of the
processes that read it. It imports TensorFlow only where a pipeline is built.
"""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import io
import json
import pathlib
import tempfile
import weakref
import zipfile

import numpy as np

from recursive_tx.data import packing
from recursive_tx.data.chats import Chats
from recursive_tx.data.config import DataConfig
from recursive_tx.errors import UserError
from recursive_tx.text.tokenizer import Tokenizer

_VERSION = 3

# Draws of a shard (64 documents or pieces) in a row without one piece.
_MOST_BARREN = 1 << 10


class Stream:
  """Endless batches of packed documents; an iterator.

  Row i of the global batch comes from shard i % shards; each shard has a
  pipeline and a packer of its own, and a position of its own.

  A document that cannot be used stops nothing. It is left out and counted.
  """

  def __init__(
      self,
      config: DataConfig,
      tokenizer: Tokenizer,
      *,
      rows: Iterable[int] | None = None):
    """Opens the pipelines of the shards that are needed.

    Args:
      config: what is read.
      tokenizer: makes the ids.
      rows: which rows of the global batch this process holds, in the order
        it wants them; None is all of them.

    Raises:
      UserError: a fault in the config or its files, or a task of which no
        document can be used.
    """
    from recursive_tx.data import pipeline

    self._config = config
    self._rows = list(range(config.batch) if rows is None else rows)
    for row in self._rows:
      if not 0 <= row < config.batch:
        raise UserError(
            f'row {row} is outside the global batch of {config.batch} rows')
    self._tasks, self._documents = pipeline.build_tasks(
        config, tokenizer, 'train')
    self._origin = _origin(config, tokenizer, self._documents)
    self._names = pipeline.fault_names(config)
    self._step = 0
    self._iterators = {}
    self._packers = {}
    self._faults = {}
    # A pipeline's threads call Python. If they still run when the interpreter
    # goes down, it waits for them and they for it: end them before.
    weakref.finalize(self, self._iterators.clear)
    for shard in sorted({row % config.shards for row in self._rows}):
      self._iterators[shard] = self._iterator(shard)
      self._packers[shard] = packing.Packer(config.seq_len)
      self._faults[shard] = collections.Counter()

    # Whether the iterators have been read or restored.
    self._is_used = False

  def __iter__(self) -> 'Stream':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """The next batch.

    Returns:
      `token_BT`, `target_BT`, `segment_BT`, `position_BT` int32 and
      `weight_BT` float32, B being the number of rows held: weight 1 where
      the target is to be learnt, 0 where it is only read, as a chat's user,
      and on padding, which alone is in segment 0.

    Raises:
      UserError: a file that can no longer be read, or a shard in which no
        document can be used.
    """
    shards = self._config.shards
    each = self._config.batch // shards
    made = {shard: self._take(shard, each) for shard in self._packers}
    self._step += 1
    self._is_used = True
    rows = [made[row % shards][row // shards] for row in self._rows]
    return packing.batch(rows, self._config.seq_len)

  @property
  def faults(self) -> dict[str, int]:
    """How many faulty documents were met, by 'task/kind'; kinds met only.

    Of the documents drawn so far for this process's shards, in every epoch
    again, and exact after a resume. Kinds are records.FAULTS, of which
    'long' alone is used: cut into pieces of `seq_len`. A process counts whole
    shards, of which it may hold only some rows.
    """
    return dict(sum(self._faults.values(), collections.Counter()))

  def save(self) -> bytes:
    """The position after the last batch returned; a zip, no pickle in it."""
    import tensorflow as tf

    file = io.BytesIO()
    with zipfile.ZipFile(
        file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
      head = {'version': _VERSION, 'step': self._step, 'origin': self._origin}
      archive.writestr('position.json', json.dumps(head))
      for shard, iterator in self._iterators.items():
        for name, array in self._packers[shard].save().items():
          archive.writestr(f'{shard}/{name}', array.tobytes())
        archive.writestr(f'{shard}/faults', json.dumps(self._faults[shard]))
        with tempfile.TemporaryDirectory() as directory:
          path = f'{directory}/iterator'
          tf.train.Checkpoint(iterator=iterator).write(path)
          for part in sorted(pathlib.Path(directory).iterdir()):
            archive.write(part, f'{shard}/{part.name}')
    return file.getvalue()

  def restore(self, *positions: bytes) -> None:
    """Continues as the stream that was saved would have, without replaying.

    Args:
      *positions: what `save` gave, of every process if the rows are now
        divided among processes in another way.

    Raises:
      UserError: not a position; of another config, tokenizer or files; of
        different steps; or without a shard that this stream needs.
    """
    steps, archives = set(), {}
    for position in positions:
      archive = _open(position)
      head = json.loads(archive.read('position.json'))
      _check_origin(head, self._origin)
      steps.add(head['step'])
      for name in archive.namelist():
        archives[name.split('/')[0]] = archive
    if len(steps) != 1:
      raise UserError(
          f'the positions are of steps {sorted(steps)}, expected one step; '
          'give those that were saved together')
    missing = [n for n in self._packers if str(n) not in archives]
    if missing:
      raise UserError(
          f'the position lacks shards {missing} of {self._config.shards}; '
          'give the positions of all processes that saved it')
    for shard in self._packers:
      if self._is_used:
        # What TensorFlow shuffles anew each epoch it does not reset to the
        # first; SeqIO's own sources have it.
        self._iterators[shard] = self._iterator(shard)
      self._restore_shard(shard, archives[str(shard)])
    self._step, self._is_used = steps.pop(), True

  def _iterator(self, shard: int) -> Iterator:
    from recursive_tx.data import pipeline

    return iter(pipeline.shard_dataset(self._tasks, self._config, shard))

  def _restore_shard(self, shard: int, archive: zipfile.ZipFile) -> None:
    import tensorflow as tf

    packer = self._packers[shard]
    packer.restore({
        name: np.frombuffer(archive.read(f'{shard}/{name}'), '<i4')
        for name in packer.save()})
    faults = json.loads(archive.read(f'{shard}/faults'))
    self._faults[shard] = collections.Counter(faults)
    with tempfile.TemporaryDirectory() as directory:
      for name in archive.namelist():
        if name.startswith(f'{shard}/iterator'):
          part = pathlib.Path(directory, name.split('/')[1])
          part.write_bytes(archive.read(name))
      checkpoint = tf.train.Checkpoint(iterator=self._iterators[shard])
      checkpoint.read(f'{directory}/iterator').assert_consumed()

  def _take(self, shard: int, count: int) -> list[packing.Row]:
    """The shard's next `count` rows."""
    from recursive_tx.data import ragged

    packer, barren = self._packers[shard], 0
    while len(packer.ready) < count:
      drawn = next(self._iterators[shard], None)
      _raise_errors(self._documents)
      if drawn is None:
        raise UserError(
            f'shard {shard} of data.shards={self._config.shards} has no '
            'documents: lower data.shards')
      codes, pieces = drawn['fault'].numpy(), drawn['targets']
      for code in codes[codes > 0]:
        self._faults[shard][self._names[code - 1]] += 1
      barren = 0 if len(pieces.values) else barren + 1
      if barren == _MOST_BARREN:
        raise UserError(
            f'shard {shard} of data.shards={self._config.shards} finds no '
            f'document to use any more: {dict(self._faults[shard])}; repair '
            'the files, or take the task out of the mixture')
      lengths = pieces.row_lengths().numpy()
      for piece in ragged.split(pieces.values.numpy(), lengths):
        if len(piece):
          packer.add(piece)
    return [packer.ready.popleft() for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Heldout:
  """A fixed set of documents that are never trained on.

  Attributes:
    batches: as a stream's, all [batch, seq_len], the last one padded.
    num_bytes: UTF-8 bytes of the texts that the predicted tokens stand for.
    num_documents: how many there are, one that is cut included.
    faults: how many documents had which fault, as `Stream.faults`.
    is_cut: whether the last document was cut at `max_tokens`.
    documents: the token ids of each, whole: what opens it, its text, EOS.
  """

  batches: list[dict[str, np.ndarray]]
  num_bytes: int
  num_documents: int
  faults: dict[str, int] = dataclasses.field(default_factory=dict)
  is_cut: bool = False
  documents: list[np.ndarray] = dataclasses.field(default_factory=list)

  @property
  def num_tokens(self) -> int:
    """Predicted tokens, EOS included."""
    return int(sum(batch['weight_BT'].sum() for batch in self.batches))


def heldout(
    config: DataConfig, tokenizer: Tokenizer, *,
    max_documents: int | None = None, max_tokens: int | None = None,
) -> Heldout:
  """The held-out set: the tasks' documents in turn, up to the limits.

  It depends neither on `config.seed` nor on `shards`, so that runs compare.

  Args:
    config: the stream's.
    tokenizer: the stream's.
    max_documents: no more documents than this.
    max_tokens: no more predicted tokens than this. Documents stay whole: the
      set ends before the first that does not fit. Only where the set would
      then hold less than half of `max_tokens`, as before a novel, is that
      document cut, so that the set holds exactly `max_tokens`. See `_cut` for
      the bytes of what is left of it.

  Raises:
    UserError: a limit below 1, or no held-out document.
  """
  from recursive_tx.data import pipeline

  for name, limit in (
      ('max_documents', max_documents),
      ('max_tokens', max_tokens)):
    if limit is not None and limit < 1:
      raise UserError(f'{name} is {limit}, expected at least 1 or None')
  tasks, documents = pipeline.build_tasks(config, tokenizer, 'heldout')
  sources = [
      pipeline.one_pass(task, config.seq_len, 'heldout') for task in tasks]
  packer = packing.Packer(config.seq_len)
  num_bytes = num_documents = num_tokens = 0
  names, faults = pipeline.fault_names(config), collections.Counter()
  is_cut, texts = False, []
  try:
    for pieces, size, code in _in_turn(sources):
      _raise_errors(documents)
      tokens = sum(int((piece[1:] >= 0).sum()) for piece in pieces)
      if max_tokens and num_tokens + tokens > max_tokens:
        if 2 * num_tokens >= max_tokens:
          break
        is_cut, tokens = True, max_tokens - num_tokens
        pieces, size = _cut(
            pieces, size, tokens, T=config.seq_len, tokenizer=tokenizer)
      if code:
        faults[names[code - 1]] += 1
      if not pieces:
        continue
      for piece in pieces:
        packer.add(piece)
      texts.append(packing.known(_joined(pieces)))
      num_bytes += size
      num_tokens += tokens
      num_documents += 1
      if is_cut or num_documents == max_documents:
        break
  finally:
    # For the reason that a stream ends its pipelines.
    for source in sources:
      source.close()
  packer.flush()
  rows = list(packer.ready)
  rows += [[]] * (-len(rows) % config.batch)
  batches = [
      packing.batch(rows[i : i + config.batch], config.seq_len)
      for i in range(0, len(rows), config.batch)
  ]
  return Heldout(
      batches, num_bytes, num_documents, dict(faults), is_cut, texts)


def _joined(pieces: packing.Row) -> np.ndarray:
  """The ids that `packing.split` cut into pieces."""
  return np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])])


def _cut(
    pieces: packing.Row, num_bytes: int, tokens: int, *, T: int,
    tokenizer: Tokenizer,
) -> tuple[packing.Row, int]:
  """The first predicted tokens of a document, and the bytes they stand for.

  The bytes are those of the text of the kept ids. Where a character is cut in
  two, its bytes do not count, and an error of up to 3 bytes is made. Where the
  tokenizer normalises, so that ids do not give back the text byte for byte,
  the document's bytes are divided in the proportion of what they do give back.

  Args:
    pieces: of the whole document, see `packing.split`.
    num_bytes: of its text.
    tokens: how many predictions are kept; fewer than there are.
    T: predictions of a row.
    tokenizer: that made the ids.
  """
  ids = _joined(pieces)
  kept = ids[: np.flatnonzero(ids[1:] >= 0)[tokens - 1] + 2]
  start = len(tokenizer.opening)
  whole, part = (
      tokenizer.decode(some[some >= 0])
      for some in (ids[start:-1], kept[start:]))
  whole, part = len(whole.encode()), len(part.rstrip('\ufffd').encode())
  return packing.split(kept, T), round(num_bytes * part / max(1, whole))


def _in_turn(sources: list) -> Iterator:
  """One of each, again and again, until all are at their end."""
  while sources:
    for source in list(sources):
      item = next(source, None)
      if item is None:
        sources.remove(source)
      else:
        yield item


def _raise_errors(documents: list) -> None:
  for each in documents:
    if each.errors:
      reason = ' '.join(str(each.errors[0]).split())
      raise UserError(f'the data cannot be read: {reason}')


def _origin(config: DataConfig, tokenizer: Tokenizer, documents: list) -> dict:
  """All that a position depends on, as JSON has it."""
  origin = dataclasses.asdict(config)
  origin['tokenizer'] = [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id]
  origin['files'] = [each.digest for each in documents]
  if any(task.is_chat for task in config.tasks):
    origin['template'] = Chats(tokenizer).digest
  return json.loads(json.dumps(origin))


def _open(position: bytes) -> zipfile.ZipFile:
  try:
    archive = zipfile.ZipFile(io.BytesIO(position))
    archive.getinfo('position.json')
  except (zipfile.BadZipFile, KeyError):
    raise UserError(
        f'{len(position)} bytes that are no position of a data stream; '
        'use what Stream.save gave'
    ) from None
  return archive


def _check_origin(head: dict, origin: dict) -> None:
  if head['version'] != _VERSION:
    raise UserError(
        f'the position has format {head["version"]}, this program reads '
        f'{_VERSION}; resume with the version that saved it')
  for key, value in origin.items():
    saved = head['origin'].get(key)
    if saved != value:
      raise UserError(
          f'the position was saved with data.{key}={saved!r}, now it is '
          f'{value!r}; resume with the former or start afresh')
