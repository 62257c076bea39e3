"""What the data of a config is, before anything is trained on it.

It imports TensorFlow only where a pipeline is built.
"""

import collections
from collections.abc import Callable, Iterator
import dataclasses
import itertools
import time
from typing import Any

import numpy as np

from recursive_tx.data.config import DataConfig
from recursive_tx.data.stream import Stream
from recursive_tx.text.tokenizer import Tokenizer

SPLITS = ('train', 'heldout')


@dataclasses.dataclass
class Documents:
  """Documents of one split of a task.

  Attributes:
    task: its name.
    split: 'train' or 'heldout'.
    is_all: whether there are no others.
    lengths: tokens of each, what opens and ends it included.
    learnt: tokens of all that are learnt.
    num_bytes: UTF-8 bytes of the texts that are learnt.
    faults: by kind.
    seconds: for all but the first, before which the pipeline starts.
  """

  task: str
  split: str
  is_all: bool = False
  lengths: list[int] = dataclasses.field(default_factory=list)
  learnt: int = 0
  num_bytes: int = 0
  faults: collections.Counter = dataclasses.field(
      default_factory=collections.Counter)
  seconds: float = 0.0

  @property
  def tokens_per_second(self) -> float:
    """Of one pipeline, on one core or so; nan where there is too little."""
    if len(self.lengths) < 2 or not self.seconds:
      return float('nan')
    return sum(self.lengths[1:]) / self.seconds


@dataclasses.dataclass
class Batches:
  """The first batches of the training stream.

  Attributes:
    count: how many.
    slots: of all rows.
    used: slots that hold a token.
    learnt: slots whose target is learnt.
    pieces: documents, or pieces of longer ones.
    rows: of the first batches, decoded: what is learnt between '⟦' and '⟧',
      documents separated by ' ‖ '.
  """

  count: int = 0
  slots: int = 0
  used: int = 0
  learnt: int = 0
  pieces: int = 0
  rows: list[str] = dataclasses.field(default_factory=list)


def documents(
    config: DataConfig, tokenizer: Tokenizer, *, most: int,
    progress: Callable[[int, int], Any] = lambda total, done: None,
) -> list[Documents]:
  """Counts of every task and split.

  Args:
    config: the stream's.
    tokenizer: the stream's.
    most: documents of a task and split; 0 is all.
    progress: called with the number of documents that are expected, and of
      those just read.

  Raises:
    UserError: as `Stream`.
  """
  from recursive_tx.data import pipeline

  found, total = [], 2 * len(config.tasks) * most
  for split in SPLITS:
    tasks, _ = pipeline.build_tasks(config, tokenizer, split)
    names = pipeline.fault_names(config)
    for task, own in zip(tasks, config.tasks, strict=True):
      counts = Documents(own.name, split)
      passed = pipeline.one_pass(task, config.seq_len, split)
      start = None
      for pieces, num_bytes, code in itertools.islice(passed, most or None):
        start = start or time.monotonic()
        progress(total, 1)
        if code:
          counts.faults[names[code - 1].split('/')[1]] += 1
        if pieces:
          counts.lengths.append(1 + sum(len(piece) - 1 for piece in pieces))
          counts.learnt += sum(int((p[1:] >= 0).sum()) for p in pieces)
          counts.num_bytes += num_bytes
      counts.seconds = time.monotonic() - start if start else 0.0
      counts.is_all = next(passed, None) is None
      passed.close()
      found.append(counts)
  return found


def batches(
    config: DataConfig, tokenizer: Tokenizer, *, count: int, rows: int,
    progress: Callable[[int, int], Any] = lambda total, done: None,
) -> Batches:
  """What the first batches of the training stream are.

  Args:
    config, tokenizer: the stream's.
    count: of batches, in [1, inf).
    rows: how many are decoded.
    progress: called with `count`, and with the batches just made.

  Raises:
    UserError: as `Stream`.
  """
  found, stream = Batches(count), Stream(config, tokenizer)
  for _ in range(count):
    batch = next(stream)
    progress(count, 1)
    found.slots += batch['token_BT'].size
    found.used += int((batch['segment_BT'] > 0).sum())
    found.learnt += int(batch['weight_BT'].sum())
    found.pieces += int(batch['segment_BT'].max(axis=1).sum())
    for b in range(min(rows - len(found.rows), config.batch)):
      found.rows.append(' ‖ '.join(_decoded(
          {name: value[b] for name, value in batch.items()}, tokenizer)))
  return found


def histogram(found: list[Documents], T: int, path: str) -> None:
  """A picture of how long documents are, a line for each task."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  longest = max([T + 1, *(n for each in found for n in each.lengths)])
  edges = np.geomspace(1, longest + 1, 60)
  figure, axes = pyplot.subplots(figsize=(8, 4), layout='constrained')
  for each in found:
    if each.lengths:
      axes.hist(
          each.lengths, edges, histtype='step',
          weights=np.full(len(each.lengths), 100 / len(each.lengths)),
          linestyle='-' if each.split == 'train' else ':',
          label=f'{each.task}, {each.split} ({len(each.lengths):,})')
  axes.axvline(T + 1, color='C7', linestyle='--', label=f'a row of {T}')
  axes.set(xscale='log', xlabel='tokens of a document',
           ylabel='documents, %', xlim=(1, 1.1 * longest))
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def _decoded(
    row: dict[str, np.ndarray], tokenizer: Tokenizer
) -> Iterator[str]:
  """The text of each document of a row, what is learnt marked."""
  for number in range(1, int(row['segment_BT'].max()) + 1):
    slots = row['segment_BT'] == number
    first = row['token_BT'][slots][:1]
    targets, is_learnt = row['target_BT'][slots], row['weight_BT'][slots] > 0
    ids = np.concatenate([first, targets])
    marks = np.concatenate([[False], is_learnt])
    cuts = np.flatnonzero(np.diff(marks)) + 1
    text = ''
    for run, mark in zip(
        np.split(ids, cuts), marks[[0, *cuts]], strict=True):
      text += f'⟦{tokenizer.decode(run)}⟧' if mark else tokenizer.decode(run)
    yield text
