"""What a run logs: progress line, metrics.jsonl and TensorBoard.

Knows names and numbers. Does not know what they measure.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import tqdm

from recursive_tx.errors import check_ranges
from recursive_tx.train.log.goodput import Sessions
from recursive_tx.train.log.rows import Rows, read_metrics
from recursive_tx.train.log.trace import Trace
from recursive_tx.train.log.window import Window, Work


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What a run logs.

  Attributes:
    every: steps between rows of metrics, in [1, inf); a row is the mean over
      them.
    progress: a line with the loss, tokens/s, MFU and the time left.
    tensorboard: event files in the workdir.
    profile_step: the step at which a profile starts, in [0, inf); 0 is none.
      A file `profile` in the workdir (`touch WORKDIR/profile`) starts one
      after the next row.
    profile_steps: how many steps a profile takes, in [1, inf).
  """

  every: int = 10
  progress: bool = True
  tensorboard: bool = True
  profile_step: int = 0
  profile_steps: int = 3

  RANGES = dict(
      every='[1, inf)', profile_step='[0, inf)', profile_steps='[1, inf)')

  def __post_init__(self):
    check_ranges('log', self)


class History:
  """The rows of a run, written as they come; process 0 only.

  A row has a `step` and keys such as 'train/loss', 'train/next_token/loop2'
  or 'eval/loop1/bits_per_byte'. Training rows are means over `every` steps,
  but for

    train/lr: of the last of them.
    train/skipped, train/skipped_total: steps that changed nothing, of these
      and of the whole run. The means leave them out.
    train/tokens_per_second, train/tokens_per_second_per_chip, train/mfu:
      compilation, evaluation and saving left out; MFU where the chip is known.
    train/step_seconds/p50, p90, p99: likewise.
    train/input_wait_seconds: a step's share of the time in `waiting`. The
      device computes meanwhile, so that only what exceeds a step delays.
    train/goodput: share of the time since the run first began that was spent
      in steps that count: not in starting, compiling, evaluating or saving,
      nor in steps that were skipped or had to be repeated.
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
      flops: float = 0.0,
      peak: float | None = None,
      began: float | None = None,
      clock: Callable[[], float] = time.time):
    """Opens the outputs.

    Args:
      config: what to log.
      workdir: where the files go.
      start: steps done already; rows of later ones are dropped, since
        those steps will be repeated.
      steps: in all.
      tokens: in a step.
      settings: of the run, JSON values, kept as workdir/config.json.
      flops: model FLOPs of a step.
      peak: FLOP/s of one chip, for MFU; None is not known.
      began: when this session began, by the clock; None is now.
      clock: seconds since the epoch.
    """
    self._every, self._steps, self._clock = config.every, steps, clock
    self._work = Work(tokens, flops, jax.device_count(), peak)
    self._window = Window(self._work)
    self._pending, self._done = None, start
    self._since = self._pace = None
    self._waited, self._noted = 0.0, {}
    self._main = jax.process_index() == 0
    self._open = contextlib.ExitStack()
    self._writer = None
    self._bar = self._open.enter_context(tqdm.tqdm(
        total=steps, initial=start, dynamic_ncols=True,
        disable=not (self._main and config.progress),
        # The time left is ours: tqdm's follows each pause.
        bar_format='{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]'))
    if self._main:
      began = clock() if began is None else began
      self._open_files(config, epath.Path(workdir), start, settings, began)
      self._trace.before(start + 1)

  def __enter__(self) -> 'History':
    return self

  def __exit__(self, *unused) -> None:
    self._open.close()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Time in here is time waited for the next step's data."""
    begin = self._clock()
    yield
    self._waited += self._clock() - begin

  def update(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Takes a step's metrics, and waits for those of the step before."""
    self._flush()
    self._pending = step, metrics, self._waited
    self._waited = 0.0
    if step == self._steps:
      self._flush()
    elif self._main:
      self._trace.before(step + 1)

  def note(self, values: Mapping[str, float]) -> None:
    """Numbers of the host, such as counts, for every row from now on."""
    self._noted |= values

  def evaluation(
      self, step: int, result: Mapping[str, Any],
      teacher: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes the result of `evaluate`, and the teacher's where there is one."""
    self._flush()
    scores = {f'loop{row["loop"]}': row for row in result['loops']}
    if teacher:
      scores['teacher'] = teacher['loops'][-1]
    self._write(step, {
        f'eval/{name}/{key}': value
        for name, row in scores.items()
        for key, value in row.items()
        if key != 'loop'})

  def parameters(self, params: Any) -> None:
    """Logs names, shapes and shardings of all parameters or abstract ones."""
    if not self._main:
      return
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(
        params, include_stats='sharding')
    logging.info('Parameters:\n%s', table)
    if self._writer:
      self._writer.write_texts(self._done, {'parameters': _verbatim(table)})

  def samples(self, step: int, texts: Mapping[str, str]) -> None:
    """Logs how the model continues prompts: {prompt: continuation}."""
    self._flush()
    if not self._main:
      return
    for prompt, text in texts.items():
      logging.info('Step %d, %r continues %r.', step, prompt, text)
    if self._writer:
      self._writer.write_texts(step, {
          f'samples/{i}': f'{_verbatim(prompt)}\n\n---\n\n{_verbatim(text)}'
          for i, (prompt, text) in enumerate(texts.items(), 1)})

  def pause(self) -> None:
    """What happened since the last step is not to count as training time."""
    self._flush()
    self._since = None
    if self._main:
      self._sessions.mark(self._done, self._clock())

  def _open_files(
      self, config: LogConfig, folder: epath.Path, start: int,
      settings: Mapping[str, Any], began: float,
  ) -> None:
    def opened(output):  # To be closed with the rest.
      return self._open.enter_context(contextlib.closing(output))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n')
    rows = read_metrics(str(folder)) if start else []
    kept = [row for row in rows if row['step'] <= start]
    self._rows = opened(Rows(folder / 'metrics.jsonl', kept))
    self._sessions = opened(
        Sessions(folder, start=start, began=began))
    self._trace = opened(Trace(
        folder, step=config.profile_step, steps=config.profile_steps))
    if config.tensorboard:
      # It imports TensorFlow, which takes seconds.
      from clu import metric_writers

      self._writer = opened(metric_writers.SummaryWriter(str(folder)))
      self._writer.write_hparams(settings)

  def _flush(self) -> None:
    if self._pending is None:
      return
    step, metrics, waited = self._pending
    self._pending = None
    values = jax.tree.map(float, jax.device_get(dict(metrics)))
    now = self._clock()
    # Not known of a step that waited for a compilation, an evaluation or a
    # checkpoint.
    seconds = None if self._since is None else now - self._since
    self._since, self._done = now, step
    if not self._main:
      return
    self._window.add(values, seconds, waited)
    if values.get('skipped'):
      self._sessions.skipped += 1
    elif seconds is not None:
      self._sessions.useful += seconds
    self._report(step, values['loss'], now)
    self._trace.after(step)
    if step % self._every == 0 or step == self._steps:
      self._summarize(step, now)

  def _report(self, step: int, loss: float, now: float) -> None:
    """The progress line."""
    parts, speeds = [f'loss {loss:.3f}'], self._window.speeds()
    if speeds:
      parts.append(f'{speeds["tokens_per_second"]:,.0f} tokens/s')
    if 'mfu' in speeds:
      parts.append(f'MFU {speeds["mfu"]:.1%}')
    if self._pace is None:
      # Counted from the first step's end: before it is the compilation.
      self._pace = step, now
    else:
      first, then = self._pace
      left = (now - then) / (step - first) * (self._steps - step)
      parts.append(f'ETA {tqdm.tqdm.format_interval(left)}')
    self._bar.set_postfix_str(', '.join(parts), refresh=False)
    self._bar.update()

  def _summarize(self, step: int, now: float) -> None:
    row = {f'train/{key}': value for key, value in self._window.row().items()}
    row['train/skipped_total'] = float(self._sessions.skipped)
    row['train/goodput'] = self._sessions.goodput(now)
    self._window = Window(self._work)
    self._write(step, row | self._noted)
    self._sessions.mark(step, now)
    self._trace.poll(step)

  def _write(self, step: int, row: Mapping[str, float]) -> None:
    if not self._main:
      return
    self._rows.write({'step': step, **row})
    if self._writer:
      self._writer.write_scalars(step, row)


def _verbatim(text: str) -> str:
  """As TensorBoard's Markdown shows without changing it."""
  return '\n'.join(f'    {line}' for line in text.split('\n'))
