"""Uptrains a start by distillation from its original, and reads its curve."""

import dataclasses
import math
import pathlib
import shutil

from recursive_tx import checkpoint, data, history, losses, saved, train
from recursive_tx import optim as optim_lib

EVERY = 25  # Steps between the points of a curve.
NEAR = 0.05  # Nats a token.


@dataclasses.dataclass(frozen=True)
class Plan:
  """An uptraining run, whatever it starts from.

  Attributes:
    teacher: directory of the original, with its tokenizer.
    task: what is read.
    steps: after which to look, the last one ends it.
    heldout: tokens of the task's held-out text that a curve is of.
    lr: constant, after EVERY steps of warm-up.
    batch, seq_len: of a step.
  """
  teacher: str
  task: data.Task
  steps: tuple[int, ...]
  heldout: int
  lr: float
  batch: int
  seq_len: int


def uptrain(plan: Plan, model, folder: pathlib.Path, seed: int, measure):
  """Trains `model`, (cfg, variables), in `folder`, which is gone afterwards.

  Returns:
    'after': {step: measure(model)}; 'curve': [[tokens, held-out nats a
    token]]; 'original': its nats.
  """
  if not (folder / 'start').exists():
    saved.save(folder / 'start', *model, companions=plan.teacher)
  run, last = folder / 'run', max(plan.steps)
  train.train(train.Config(
      model=model[0], seed=seed, init_from=str(folder / 'start'),
      teacher=plan.teacher,
      losses=losses.LossConfig(next_token=(0.0,), distill=(1.0,)),
      data=data.DataConfig(
          (plan.task,), seq_len=plan.seq_len, batch=plan.batch, seed=seed,
          shards=1),
      optim=optim_lib.OptimConfig(
          steps=last, lr=plan.lr, schedule='constant', warmup=EVERY,
          table=(('.*/kernel', 1.0, 1.0), ('.*', 1.0, 0.0))),
      checkpoint=checkpoint.CheckpointConfig(
          every=math.gcd(*plan.steps), keep=0),
      log=history.LogConfig(every=EVERY, tensorboard=False),
      eval=train.EvalConfig(every=EVERY, max_tokens=plan.heldout),
  ), str(run))
  after = {}
  for step in sorted(plan.steps, reverse=True):
    for newer in (run / 'checkpoints').iterdir():
      if int(newer.name) > step:
        shutil.rmtree(newer)
    after[step] = measure((model[0], {
        'params': checkpoint.load_params(str(run))[1]}))
  key = f'eval/loop{model[0].loops}/loss'
  points = [row for row in history.read_metrics(str(run)) if key in row]
  shutil.rmtree(folder)
  return {
      'after': dict(sorted(after.items())),
      'original': points[0]['eval/teacher/loss'],
      'curve': [[row['step'] * plan.batch * plan.seq_len, row[key]]
                for row in points]}


def tokens_to(curve: list[list[float]], nats: float) -> float | None:
  """Tokens after which a curve first is at `nats`, None if it never is."""
  (before, above), *rest = curve
  if above <= nats:
    return before
  for tokens, loss in rest:
    if loss <= nats:
      return before + (tokens - before) * (above - nats) / (above - loss)
    before, above = tokens, loss
  return None
