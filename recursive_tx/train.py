"""Training: one state, one step, one loop.

Pretraining, uptraining and distillation are the same loop. Which model, from
which weights, with which losses at which loops, is all in the Config.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any

from absl import logging
from etils import epath
from flax import linen as nn
from flax import struct
from flax.linen import meta
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from recursive_tx import checkpoint, hf, losses, optim, saved, sharding, start
from recursive_tx import data as data_lib
from recursive_tx import tokenizer as tokenizer_lib
from recursive_tx.checkpoint import CheckpointConfig
from recursive_tx.config import ModelConfig, Run
from recursive_tx.data import DataConfig
from recursive_tx.evaluate import evaluate
from recursive_tx.history import History, LogConfig
from recursive_tx.losses import LossConfig
from recursive_tx.model import Decoder
from recursive_tx.optim import OptimConfig
from recursive_tx.sharding import MeshConfig

# (variables, batch) -> every loop's hidden states h_LBTD, and the head.
Forward = Callable[
    [Any, Mapping[str, jax.Array]], tuple[jax.Array, losses.Head]
]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When to score the held-out set, and how much of it.

  Attributes:
    every: steps between evaluations; 0 evaluates at the start and the end.
    max_tokens: size of the fixed set; 0 is all there is.
  """

  every: int = 0
  max_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """A run: what it computes, from what, and how.

  Attributes:
    model: the model to train.
    data: the text and the shape of its batches.
    optim: the optimizer and the number of steps.
    losses: terms and their weights per loop.
    seed: of fresh parameters and of what relaxing draws.
    init_from: directory of the first weights: a Hugging Face one, one of
      ours, or another run's workdir. Where `model` is recursive and the source
      is not, it is relaxed on the way in. '' starts from random weights.
    init: how the block is then made of the source's layers.
    lora: how the adapters start, 'svd' or 'zero'.
    tokenizer: directory of the tokenizer; '' is init_from's.
    teacher: directory, of the same kinds, of the model to distil from.
    mesh: devices along each axis.
    checkpoint: when to save.
    log: what to tell.
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


@struct.dataclass
class TrainState:
  """All that a step changes: updates done, parameters, optimizer state."""

  step: jax.Array
  params: Any
  opt_state: Any


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
  _check(config)
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
    tx, abstract = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    teacher, teacher_variables = _load_teacher(config, mesh)
    step_fn = jax.jit(
        make_step(config, mesh, tx, teacher),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )

    logging.info('State: from the workdir, else init_from, else fresh.')
    settings = dataclasses.asdict(config)
    fresh = checkpoint.latest_step(workdir) is None
    if fresh:
      state = first_state(config, tx, shardings)
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


def make_step(
    config: Config,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    teacher: Forward | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The update: (state, batch, teacher's variables) -> (state, metrics)."""
  student = _forward(config, config.model, mesh)

  def loss_fn(params, batch, teacher_variables, norm):
    h_LBTD, head = student({'params': params}, batch)
    target = None
    if teacher is not None:
      teacher_h_LBTD, teacher_head = teacher(teacher_variables, batch)
      target = teacher_h_LBTD[-1], teacher_head
    return losses.total(
        config.losses, h_LBTD, batch, head, norm=norm, teacher=target
    )

  def step(state, batch, teacher_variables):
    # Of the whole batch, so that losses and gradients of its parts add up.
    norm = jnp.maximum(batch['weight_BT'].sum(), 1.0)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, terms), grads = _sum_over_parts(
        lambda part: grad_fn(state.params, part, teacher_variables, norm),
        batch, config.optim.accumulate,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        'lr': optim.learning_rate(config.optim, state.step),
        'grad_norm': optim.gradient_norm(config.optim, grads),
        **terms,
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return step


def abstract_state(
    config: Config, mesh: Mesh
) -> tuple[optax.GradientTransformation, TrainState]:
  """The optimizer, and the shapes and shardings of the state."""
  boxed = jax.eval_shape(_init_fn(config), jax.random.key(config.seed))
  params = sharding.abstract(
      boxed,
      sharding.of_boxed(boxed, mesh, _rules(config, config.model, mesh)),
  )
  tx = optim.make(config.optim, params)
  whole = sharding.replicated(mesh)
  opt_state = optax.tree.map_params(
      tx,
      lambda x, param: x if isinstance(x, optax.MaskedNode) else param,
      jax.eval_shape(tx.init, params),
      params,
      transform_non_params=lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=whole
      ),
      is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return tx, TrainState(step, params, opt_state)


def _check(config: Config) -> None:
  """Raises ValueError for what no part of the config can see alone."""
  config.losses.weights(config.model.loops)
  if losses.uses_teacher(config.losses) and not config.teacher:
    raise ValueError(
        f'losses.distill is {config.losses.distill} but there is no teacher;'
        ' name its directory with --config.teacher=, or drop the term with'
        ' --config.losses.distill="()"'
    )
  if config.teacher and not losses.uses_teacher(config.losses):
    raise ValueError(
        f'teacher is {config.teacher!r} but losses.distill is'
        f' {config.losses.distill}; give it a weight, such as (1.0,).'
    )
  if not (config.tokenizer or config.init_from):
    raise ValueError(
        'There is no tokenizer; name its directory with --config.tokenizer='
    )
  if config.data.batch % config.optim.accumulate:
    raise ValueError(
        f'optim.accumulate is {config.optim.accumulate}, which does not divide'
        f' data.batch, {config.data.batch}.'
    )


def _rules(config: Config, cfg: ModelConfig, mesh: Mesh) -> sharding.Rules:
  """Where a model's letters go, for the run's batch."""
  sizes = {letter: getattr(cfg, letter) for letter in 'VDFNK'}
  return sharding.make_rules(
      mesh, {'B': config.data.batch // config.optim.accumulate, **sizes}
  )


def _init_fn(config: Config) -> Callable[[jax.Array], Any]:
  """key -> fresh parameters that carry their letters."""
  decoder = Decoder(config.model, run=config.run)
  return lambda key: decoder.init(key, jnp.zeros((1, 2), jnp.int32))['params']


def _forward(config: Config, cfg: ModelConfig, mesh: Mesh) -> Forward:
  """A model on the mesh, up to its head."""
  decoder = Decoder(cfg, run=config.run)
  rules = _rules(config, cfg, mesh)

  def forward(variables, batch):
    with nn.logical_axis_rules(rules):
      h_LBTD = decoder.apply(
          variables, batch['token_BT'], batch['segment_BT'],
          batch['position_BT'], method='hidden',
      )

    def head(h):
      with nn.logical_axis_rules(rules):
        return decoder.apply(variables, h, method='logits')

    return h_LBTD, head

  return forward


def _sum_over_parts(
    function: Callable[[Any], Any], batch: Mapping[str, jax.Array], parts: int
) -> Any:
  """Sum of a function of a batch over its parts, one after the other."""
  if parts == 1:
    return function(batch)

  # Part i takes rows i, i + parts, ...: every device keeps its own rows.
  def split(x):
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  batches = jax.tree.map(split, dict(batch))
  one = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
  return lax.scan(add, zeros, batches)[0]


def first_state(
    config: Config, tx: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
  """The state before the first step: from init_from, else random."""
  if config.init_from:
    variables = start.load_as(
        config.init_from, config.model, init=config.init, lora=config.lora,
        seed=config.seed,
    )
    params = jax.tree.map(
        lambda x: np.asarray(x, np.float32), variables['params']
    )
    params = sharding.place(params, shardings.params)
  else:
    init = _init_fn(config)
    params = jax.jit(
        lambda key: meta.unbox(init(key)), out_shardings=shardings.params
    )(jax.random.key(config.seed))
  return jax.jit(
      lambda params: TrainState(jnp.int32(0), params, tx.init(params)),
      donate_argnums=0, out_shardings=shardings,
  )(params)


def _load_teacher(config: Config, mesh: Mesh) -> tuple[Forward | None, Any]:
  """The teacher's forward pass and its variables, in the run's dtype."""
  if not config.teacher:
    return None, None
  cfg, variables = start.load(config.teacher)
  if cfg.V != config.model.V:
    raise ValueError(
        f'The teacher {config.teacher} has a vocabulary of {cfg.V}, the model'
        f' of {config.model.V}; distillation needs the same.'
    )
  boxed = jax.eval_shape(
      _init_fn(dataclasses.replace(config, model=cfg)), jax.random.key(0)
  )
  shardings = sharding.of_boxed(boxed, mesh, _rules(config, cfg, mesh))
  params = jax.tree.map(
      lambda x: np.asarray(x).astype(config.run.dtype), variables['params']
  )
  params = sharding.place(params, shardings)
  return _forward(config, cfg, mesh), {'params': params}


def _evaluate(
    config: Config, mesh: Mesh, state: TrainState, heldout: Any
) -> dict[str, Any]:
  with nn.logical_axis_rules(_rules(config, config.model, mesh)):
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
