"""Training: one state, one step, one loop.

Pretraining, uptraining and distillation are the same loop. Which model, from
which weights, with which losses at which loops, is all in the Config.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh

from recursive_tx import data as data_lib
from recursive_tx import machine
from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint, hf, native, opening
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.train import figures
from recursive_tx.train import skips as skips_lib
from recursive_tx.train import state as state_lib
from recursive_tx.train import step as step_lib
from recursive_tx.train import teacher_cache as teacher_lib
from recursive_tx.train.config import Config, check
from recursive_tx.train.log import History, read_metrics
from recursive_tx.train.step import TrainState


def train(config: Config, workdir: str) -> TrainState:
  """Trains, or resumes, and leaves the model in `workdir`/model.

  Args:
    config: the run.
    workdir: where checkpoints, metrics.jsonl and event files go; of several
      processes the same for all. One that holds the same run is resumed from
      its latest checkpoint.

  Returns:
    The last state.

  Raises:
    UserError: settings that contradict each other, the machine, the files
      they name, or the run that the workdir holds; it cannot be written; or
      nothing was learned: steps were skipped as `optim.max_skips` has it, all
      of them, or a parameter is not finite. The last good checkpoint stays.
    SystemExit: it saved after SIGTERM; the status is 0.
  """
  began = time.time()
  check(config)
  steps, settings = config.optim.steps, dataclasses.asdict(config)
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    stack.enter_context(_plain_errors(workdir))
    done = _steps_done(config, mesh, workdir, settings)

    logging.info('Data: %s.', config.data)
    tokenizer = opening.load_tokenizer(config.tokenizer_from)
    tokenizer_lib.check_vocab(tokenizer, config.model.V)
    rows = machine.local_rows(mesh, config.data.batch)
    stream = data_lib.Stream(config.data, tokenizer, rows=rows)
    add_top_k = teacher_lib.reader(
        config.teacher, config.data, tokenizer, V=config.model.V, rows=rows,
        steps=range((done or 0) + 1, steps + 1))
    heldout = data_lib.heldout(
        config.data, tokenizer, max_tokens=config.eval.max_tokens or None)

    logging.info('Model: %s.', config.model)
    tx, abstract = step_lib.abstract_state(config, mesh)
    checkpoint.check_writable(workdir, state_lib.num_bytes(abstract))
    teacher, teacher_variables = state_lib.load_teacher(
        config, mesh, tokenizer)
    step_fn = step_lib.jit_step(config, mesh, tx, abstract, teacher)

    logging.info('State: from the workdir, else init_from, else fresh.')
    if done is None:
      state, done = state_lib.first_state(config, tx, abstract), 0
    else:
      checkpoint.set_aside_broken(workdir)
      state, positions = checkpoint.restore(workdir, done, abstract)
      stream.restore(*positions)
    preemption = stack.enter_context(machine.Preemption())
    checkpoints = stack.enter_context(
        checkpoint.Checkpoints(workdir, config.checkpoint))

    logging.info('Loop: %d of %d steps are done.', done, steps)
    evaluated = _is_evaluated(config, workdir, done)
    history = stack.enter_context(History(
        config.log, workdir, start=done, steps=steps,
        tokens=config.data.batch * config.data.seq_len, settings=settings,
        flops=figures.flops_of_step(config, teacher), peak=figures.peak(),
        began=began))
    history.parameters(abstract.params)
    skips = skips_lib.Skips(config.optim.max_skips, tokenizer.decode, workdir)

    def check_state(step):
      skips.in_row()
      skips_lib.check_state(state, step=step, steps=steps, workdir=workdir)

    def evaluate_at(step):
      check_state(step)
      variables = {'params': state.params}
      result = figures.heldout_loss(
          config, mesh, config.model, variables, heldout)
      taught = None
      if teacher and step == 0:
        taught = figures.heldout_loss(
            config, mesh, teacher, teacher_variables, heldout)
      history.evaluation(step, result, taught)
      if config.eval.prompts:
        history.samples(step, figures.samples(config, variables, tokenizer))
      history.pause()
      return checkpoints.score_of(result) if step else None

    def save_at(step, score):
      check_state(step)
      checkpoints.save(
          step, state=state, position=stream.save(), settings=settings,
          score=score)
      history.pause()

    if not evaluated:
      checkpoints.mark_best(done, evaluate_at(done))
    for step in range(done + 1, steps + 1):
      with history.waiting():
        local = add_top_k(step, next(stream))
      state, metrics = step_fn(
          state, machine.place_rows(local, mesh), teacher_variables)
      # Waits for the metrics of the step before, while this one runs.
      history.note({f'data/{k}': n for k, n in stream.faults.items()})
      history.update(step, metrics)
      skips.update(step, metrics, local)
      checkpoints.check()
      if preemption.reached(step) and step < steps:
        # No time to evaluate: the resumed run does it.
        save_at(step, None)
        checkpoints.wait()
        _stop(step, workdir)
      score = None
      if _due(step, config.eval.every, steps):
        score = evaluate_at(step)
      # Not in the middle of skipped steps: what came before is worth more.
      if _due(step, config.checkpoint.every, steps) or score is not None:
        if not skips.in_row() or step == steps:
          save_at(step, score)
    skips.in_row()
    checkpoints.wait()

    logging.info('Saving the model: %s.', epath.Path(workdir) / 'model')
    _save_model(config, workdir)
  return state


def _steps_done(
    config: Config, mesh: Mesh, workdir: str, settings: dict[str, Any]
) -> int | None:
  """The steps done of the workdir's run, if it holds one that fits here."""
  done = checkpoint.latest_step(workdir)
  common = machine.agree(-1 if done is None else done)
  if common != (-1 if done is None else done):
    raise UserError(
        f'{workdir} holds checkpoint {done} for process {jax.process_index()}'
        f' and {common} for process 0; all need the same directory, on a file'
        ' system or bucket that they share.')
  if done is None:
    return None
  checkpoint.check_same(workdir, done, settings)
  rows = config.data.batch // config.optim.accumulate
  parts = math.prod(mesh.shape[axis] for axis in machine.LETTERS['B'])
  if rows % parts:
    fits = [n for n in range(1, rows + 1) if rows % n == 0]
    raise UserError(
        f'{workdir} holds a run of {rows} sequences at once, which {parts}'
        f' devices (mesh data x fsdp) cannot share evenly; resume with one of'
        f' {fits}, the other devices being mesh tensor, so that the batch'
        ' stays what it was.')
  return done


def _is_evaluated(config: Config, workdir: str, step: int) -> bool:
  """Whether a step needs no evaluation any more.

  A step that was saved on SIGTERM may be due, and was not evaluated.
  """
  if step and not _due(step, config.eval.every, config.optim.steps):
    return True
  rows = read_metrics(workdir) if step and machine.is_main() else []
  found = any(
      row['step'] == step and any(key.startswith('eval/') for key in row)
      for row in rows)
  return bool(machine.agree(found))


@contextlib.contextmanager
def _plain_errors(workdir: str) -> Iterator[None]:
  """Errors of the file system, such as a full disk, in one line."""
  try:
    yield
  except OSError as error:
    raise UserError(
        f'{error}; when that is mended, the same command resumes from the last'
        f' checkpoint in {workdir}.'
    ) from error


def _stop(step: int, workdir: str) -> None:
  if machine.is_main():
    folder = epath.Path(workdir) / 'checkpoints' / str(step)
    print(f'Stopped by SIGTERM: saved step {step} to {folder}. Run the same'
          ' command to resume.', flush=True)
  raise SystemExit(0)


def _save_model(config: Config, workdir: str) -> None:
  """Writes the last checkpoint's model, with the tokenizer: workdir/model."""
  if machine.is_main():
    params = checkpoint.Latest(workdir).params()
    with _on_disk(epath.Path(workdir) / 'model') as model:
      native.save(
          model, config.model, {'params': params}, overwrite=True,
          companions=(opening.companions(config.init_from)
                      if config.init_from else None))
      if config.tokenizer:
        hf.copy_companions(opening.companions(config.tokenizer), model)
  machine.wait('the model is saved')


@contextlib.contextmanager
def _on_disk(target: epath.Path) -> Iterator[pathlib.Path]:
  """A directory on disk that becomes `target`, which may be in a bucket.

  A bucket has no atomic rename, so config.json, by which a directory is known
  as a model, is copied last.
  """
  if '://' not in str(target):
    yield pathlib.Path(target)
    return
  with tempfile.TemporaryDirectory() as folder:
    local = pathlib.Path(folder, 'model')
    yield local
    publish(local, target)


def publish(local: pathlib.Path, target: epath.Path) -> None:
  """Copies all files of a directory to another place, config.json last."""
  found = [path for path in sorted(local.rglob('*')) if path.is_file()]
  for path in sorted(found, key=lambda path: path == local / 'config.json'):
    copy = target / str(path.relative_to(local))
    copy.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).copy(copy, overwrite=True)


def _due(step: int, every: int, last: int) -> bool:
  """Whether something done `every` steps, and at the last, is done now."""
  return step == last or (every > 0 and step % every == 0)
