"""Training: one state, one step, one loop.

Pretraining, uptraining and distillation are the same loop. Which model, from
which weights, with which losses at which loops, is all in the Config.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

from absl import logging
from etils import epath
from flax import linen as nn
import jax
from jax.sharding import Mesh
import numpy as np

from recursive_tx import checkpoint, hf, saved, sharding, start
from recursive_tx import data as data_lib
from recursive_tx import tokenizer as tokenizer_lib
from recursive_tx.evaluate import evaluate
from recursive_tx.history import History
from recursive_tx.train import state as state_lib
from recursive_tx.train import step as step_lib
from recursive_tx.train.config import Config, check
from recursive_tx.train.step import TrainState


def train(config: Config, workdir: str) -> TrainState:
  """Trains, or goes on training, and leaves the model in `workdir`/model.

  Args:
    config: the run.
    workdir: where checkpoints, metrics.jsonl and event files go. One that
      holds the same run is resumed from its latest checkpoint.

  Returns:
    The last state.

  Raises:
    ValueError: settings that contradict each other, the machine, the files
      they name, or the run that the workdir holds.
  """
  check(config)
  steps = config.optim.steps
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    logging.info('Data: %s.', config.data)
    tokenizer = tokenizer_lib.load(
        config.tokenizer or start.companions(config.init_from)
    )
    tokenizer_lib.check_vocab(tokenizer, config.model.V)
    rows = sharding.local_rows(mesh, config.data.batch)
    stream = data_lib.Stream(config.data, tokenizer, rows=rows)
    heldout = data_lib.heldout(
        config.data, tokenizer, max_tokens=config.eval.max_tokens or None
    )

    logging.info('Model: %s.', config.model)
    tx, abstract = step_lib.abstract_state(config, mesh)
    teacher, teacher_variables = state_lib.load_teacher(config, mesh)
    step_fn = step_lib.jit_step(config, mesh, tx, abstract, teacher)

    logging.info('State: from the workdir, else init_from, else fresh.')
    settings = dataclasses.asdict(config)
    fresh = checkpoint.latest_step(workdir) is None
    if fresh:
      state = state_lib.first_state(config, tx, abstract)
    manager = stack.enter_context(
        checkpoint.open_manager(workdir, config.checkpoint)
    )
    if not fresh:
      checkpoint.check_same(manager, settings, workdir)
      state, position = checkpoint.restore(manager, abstract)
      stream.restore(position)

    done = int(state.step)
    logging.info('Loop: %d of %d steps are done.', done, steps)
    history = stack.enter_context(History(
        config.log, workdir, start=done, steps=steps,
        tokens=config.data.batch * config.data.seq_len, settings=settings,
    ))
    if done == 0:
      history.evaluation(0, _evaluate(config, mesh, state, heldout))
    for step in range(done + 1, steps + 1):
      batch = sharding.place_rows(next(stream), mesh)
      state, metrics = step_fn(state, batch, teacher_variables)
      # Waits for the metrics of the step before, while this one runs.
      history.update(step, metrics)
      if _due(step, config.eval.every, steps):
        history.evaluation(step, _evaluate(config, mesh, state, heldout))
        history.pause()
      if _due(step, config.checkpoint.every, steps):
        checkpoint.save(
            manager, step, state=state, position=stream.save(),
            settings=settings,
        )
        history.pause()
    manager.wait_until_finished()

    logging.info('Saving the model: %s.', epath.Path(workdir) / 'model')
    _save_model(config, workdir, state)
  return state


def _evaluate(
    config: Config, mesh: Mesh, state: TrainState, heldout: Any
) -> dict[str, Any]:
  with nn.logical_axis_rules(step_lib.rules(config, config.model, mesh)):
    return evaluate(
        config.model, {'params': state.params}, heldout,
        run=config.run, mesh=mesh,
    )


def _save_model(config: Config, workdir: str, state: TrainState) -> None:
  """Writes the parameters, whole, with the tokenizer, to workdir/model."""
  model = epath.Path(workdir) / 'model'
  params = jax.tree.map(np.asarray, state.params)
  saved.save(
      model, config.model, {'params': params}, overwrite=True,
      companions=start.companions(config.init_from) or None,
  )
  if config.tokenizer:
    hf.copy_companions(pathlib.Path(config.tokenizer), model)


def _due(step: int, every: int, last: int) -> bool:
  """Whether something done `every` steps, and at the last, is done now."""
  return step == last or (every > 0 and step % every == 0)
