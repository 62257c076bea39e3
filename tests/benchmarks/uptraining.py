"""Uptrains a start by distillation from its original, and reads its curve."""

import dataclasses
import pathlib

import recursive_tx as rtx
from recursive_tx import data, losses, train
from recursive_tx.store import native
from recursive_tx.train import log as log_lib
from recursive_tx.train import optim as optim_lib

EVERY = 25  # Steps between the points of a curve.
NEAR = 0.05  # Nats a token.


@dataclasses.dataclass(frozen=True)
class Plan:
  """Uptraining runs, whatever they start from.

  Attributes:
    teacher: directory of the original, with its tokenizer.
    task: what is read.
    budgets: steps of each run.
    heldout: tokens of the task's held-out text that a curve is of.
    lr: at its peak, after EVERY steps; a cosine leads down to a tenth.
    batch, seq_len: of a step.
  """
  teacher: str
  task: data.Task
  budgets: tuple[int, ...]
  heldout: int
  lr: float
  batch: int
  seq_len: int


def uptrain(plan: Plan, model, folder: pathlib.Path, seed: int, measure):
  """Trains `model`, (cfg, variables), in `folder`, where it can go on.

  Returns:
    'after': {budget: measure(model)}; 'curves': {budget: [[tokens, held-out
    nats a token]]}; 'original': its nats.
  """
  if not (folder / 'start').exists():
    native.save(folder / 'start', *model, companions=plan.teacher)
  key, after, curves = f'eval/loop{model[0].loops}/loss', {}, {}
  for steps in plan.budgets:
    run = str(folder / str(steps))
    train.train(train.Config(
        model=model[0], seed=seed, init_from=str(folder / 'start'),
        teacher=plan.teacher,
        losses=losses.LossConfig(next_token=(0.0,), distill=(1.0,)),
        data=data.DataConfig(
            (plan.task,), seq_len=plan.seq_len, batch=plan.batch, seed=seed,
            shards=1),
        optim=optim_lib.OptimConfig(
            steps=steps, lr=plan.lr, warmup=EVERY,
            table=(('.*/kernel', 1.0, 1.0), ('.*', 1.0, 0.0))),
        log=log_lib.LogConfig(every=EVERY, tensorboard=False),
        eval=train.EvalConfig(every=EVERY, max_tokens=plan.heldout),
    ), run)
    after[steps] = measure(rtx.open(run)[:2])
    rows = [row for row in log_lib.read_metrics(run) if key in row]
    curves[steps] = [[row['step'] * plan.batch * plan.seq_len, row[key]]
                     for row in rows]
  return {'after': after, 'curves': curves,
          'original': rows[0]['eval/teacher/loss']}


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
