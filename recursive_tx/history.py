"""What a run tells: progress line, metrics.jsonl and TensorBoard.

Knows names and numbers. Does not know what they measure.
"""

from collections.abc import Mapping
import dataclasses
import json
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import tqdm


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What a run tells.

  Attributes:
    every: steps between rows of metrics; a row is the mean over them.
    progress: a line with the loss, tokens/s and the time left.
    tensorboard: event files in the workdir.
  """

  every: int = 10
  progress: bool = True
  tensorboard: bool = True


class History:
  """The rows of a run, written as they come; process 0 only.

  A row has a `step` and keys such as 'train/loss', 'train/next_token/loop2'
  (means over `every` steps), 'train/tokens_per_second' (compilation,
  evaluation and saving left out) or 'eval/loop1/bits_per_byte'.
  """

  def __init__(
      self,
      config: LogConfig,
      workdir: str,
      *,
      start: int,
      steps: int,
      tokens: int,
      settings: Mapping[str, Any],
  ):
    """Opens the outputs.

    Args:
      config: what to tell.
      workdir: where the files go.
      start: steps done already; rows of later ones are dropped, since what
        they tell is about to happen again.
      steps: in all.
      tokens: in a step.
      settings: of the run, JSON values, kept as workdir/config.json.
    """
    self._every, self._steps, self._tokens = config.every, steps, tokens
    self._pending = None
    self._window = []
    self._since, self._timed = None, 0
    self._file = self._writer = None
    main = jax.process_index() == 0
    self._bar = tqdm.tqdm(
        total=steps, initial=start, unit='step', dynamic_ncols=True,
        disable=not (main and config.progress),
    )
    if not main:
      return
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n')
    rows = read_metrics(workdir) if start else []
    self._file = (folder / 'metrics.jsonl').open('w')
    for row in rows:
      if row['step'] <= start:
        self._file.write(json.dumps(row) + '\n')
    if config.tensorboard:
      # It imports TensorFlow, which takes seconds.
      from clu import metric_writers

      self._writer = metric_writers.SummaryWriter(str(workdir))

  def __enter__(self) -> 'History':
    return self

  def __exit__(self, *unused) -> None:
    self._bar.close()
    if self._file:
      self._file.close()
    if self._writer:
      self._writer.close()

  def update(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes a step's metrics, and waits for those of the step before."""
    self._flush()
    self._pending = step, metrics
    if step == self._steps:
      self._flush()

  def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
    """Writes the result of `evaluate`."""
    self._flush()
    self._write(step, {
        f'eval/loop{row["loop"]}/{key}': value
        for row in result['loops']
        for key, value in row.items()
        if key != 'loop'
    })

  def pause(self) -> None:
    """What happened since the last step is not to count as training time."""
    self._flush()
    self._since, self._timed = None, 0

  def _flush(self) -> None:
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = jax.tree.map(float, jax.device_get(dict(metrics)))
    self._window.append(values)
    now = time.monotonic()
    speed = None
    if self._since is None:
      # This step's own time is not known: it waited for a compilation, an
      # evaluation or a checkpoint.
      self._since = now
    else:
      self._timed += 1
      speed = self._timed * self._tokens / max(now - self._since, 1e-9)
    told = f'loss {values["loss"]:.3f}'
    self._bar.set_postfix_str(
        told if speed is None else f'{told}, {speed:,.0f} tokens/s',
        refresh=False,
    )
    self._bar.update()
    if step % self._every == 0 or step == self._steps:
      self._summarize(step, values, speed)
      self._since, self._timed = now, 0

  def _summarize(self, step: int, last: Mapping[str, float], speed) -> None:
    row = {
        f'train/{key}': float(np.mean([values[key] for values in self._window]))
        for key in last
    }
    row['train/lr'] = last['lr']
    if speed is not None:
      row['train/tokens_per_second'] = speed
    self._window = []
    self._write(step, row)

  def _write(self, step: int, row: Mapping[str, float]) -> None:
    if self._file:
      self._file.write(json.dumps({'step': step, **row}) + '\n')
      self._file.flush()
    if self._writer:
      self._writer.write_scalars(step, row)


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """The rows of a run's metrics.jsonl, in order; none where it has none."""
  path = epath.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]
