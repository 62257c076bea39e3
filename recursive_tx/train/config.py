"""A training run as one value, and the checks across its sections."""

import dataclasses
import typing
from typing import Any

from recursive_tx import losses
from recursive_tx.config import ModelConfig, Run
from recursive_tx.data import DataConfig
from recursive_tx.errors import UserError, check_ranges, in_range
from recursive_tx.losses.terms import LossConfig
from recursive_tx.machine.mesh import MeshConfig
from recursive_tx.store.checkpoint import CheckpointConfig
from recursive_tx.train.log import LogConfig
from recursive_tx.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When to score the held-out set, and how much of it.

  Attributes:
    every: steps between evaluations, in [0, inf); 0 evaluates at the start
      and the end.
    max_tokens: size of the fixed set, in [0, inf), see `data.heldout`; 0 is
      all there is.
    prompts: texts that the model continues, greedily, at each evaluation.
  """

  every: int = 0
  max_tokens: int = 0
  prompts: tuple[str, ...] = ()

  RANGES = dict(every='[0, inf)', max_tokens='[0, inf)')

  def __post_init__(self):
    check_ranges('eval', self)


@dataclasses.dataclass(frozen=True)
class Config:
  """A run: what it computes, from what, and how.

  Attributes:
    model: the model to train.
    data: the text and the shape of its batches.
    optim: the optimizer and the number of steps.
    losses: terms and their weights per loop.
    seed: of fresh parameters and of what relaxing draws, in
      [0, 4294967296).
    init_from: directory of the first weights: a Hugging Face one, one of
      ours, or another run's workdir. Where `model` is recursive and the source
      is not, it is relaxed on the way in. '' is random weights.
    init: how the block is then made of the source's layers.
    lora: initialisation of the adapters, 'svd' or 'zero'.
    tokenizer: directory of the tokenizer; '' is init_from's.
    teacher: directory, of the same kinds, of the model to distil from, or one
      of the top-k logits that the verb `teach` saved of it.
    mesh: devices along each axis.
    checkpoint: when to save.
    log: what to log.
    eval: when to evaluate.
    run: how the models are executed. The teacher is held in its dtype.
  """

  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  losses: LossConfig = LossConfig()
  seed: int = 0
  init_from: str = ''
  init: str = 'average'
  lora: str = 'svd'
  tokenizer: str = ''
  teacher: str = ''
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  eval: EvalConfig = EvalConfig()
  run: Run = Run()

  RANGES = dict(seed='[0, 4294967296)')

  def __post_init__(self):
    in_range('seed', self.seed, self.RANGES['seed'], int)

  @property
  def tokenizer_from(self) -> str:
    """Where the tokenizer is. Raises UserError where no directory is named."""
    if not (self.tokenizer or self.init_from):
      raise UserError(
          'There is no tokenizer; name its directory with --config.tokenizer=')
    return self.tokenizer or self.init_from


def from_json(kind: Any, value: Any) -> Any:
  """What `dataclasses.asdict` made JSON of: a Config, or a field's value.

  Args:
    kind: the type.
    value: as JSON has it: dictionaries for dataclasses, lists for tuples.
  """
  if dataclasses.is_dataclass(kind):
    types = typing.get_type_hints(kind)
    return kind(**{
        name: from_json(types[name], item) for name, item in value.items()})
  if isinstance(value, list):
    inner, *_ = typing.get_args(kind) or (None,)
    return tuple(from_json(inner, item) for item in value)
  return value


def check(config: Config) -> None:
  """Raises UserError where sections of the config contradict each other."""
  config.losses.weights(config.model.loops)
  if losses.uses_teacher(config.losses) and not config.teacher:
    raise UserError(
        f'losses.distill is {config.losses.distill} but there is no teacher;'
        ' name its directory with --config.teacher=, or drop the term with'
        ' --config.losses.distill="()"')
  if config.teacher and not losses.uses_teacher(config.losses):
    raise UserError(
        f'teacher is {config.teacher!r} but losses.distill is'
        f' {config.losses.distill}; give it a weight, such as (1.0,).')
  if losses.uses_gate(config.losses) and not config.model.exit_gate:
    raise UserError(
        f'losses.gate is {config.losses.gate} but the model has no exit gate;'
        ' give it one with --config.model.exit_gate=64, or drop the term with'
        ' --config.losses.gate="()"')
  _ = config.tokenizer_from  # Raises where there is none.
  if config.data.batch % config.optim.accumulate:
    raise UserError(
        f'optim.accumulate is {config.optim.accumulate}, which does not divide'
        f' data.batch, {config.data.batch}.')
