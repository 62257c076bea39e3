"""The training step, and the shapes and places of all that it touches.

A step is a pure function; nothing here reads files or data, so that it can be
compiled ahead of time for machines that are not there.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from recursive_tx import losses, machine, model
from recursive_tx.config import ModelConfig
from recursive_tx.model import adapters
from recursive_tx.train import optim
from recursive_tx.train.config import Config

# (variables, batch) -> every loop's hidden states h_LBTD, the exit gates'
# logits where they are wanted, and the head.
Forward = Callable[
    [Any, Mapping[str, jax.Array]],
    tuple[jax.Array, jax.Array | None, losses.Head]]


@struct.dataclass
class TrainState:
  """All that a step changes: updates done, parameters, optimizer state."""

  step: jax.Array
  params: Any
  opt_state: Any


def make_step(
    config: Config, mesh: Mesh, tx: optax.GradientTransformation,
    teacher: ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The update: (state, batch, teacher's variables) -> (state, metrics)."""
  student = forward(
      config, config.model, mesh, gates=losses.uses_gate(config.losses),
      early=True)
  teach = teacher and forward(config, teacher, mesh)

  def loss_fn(params, batch, teacher_variables, norm):
    h_LBTD, gate_EBT, head = student({'params': params}, batch)
    target = None
    if teach is not None:
      teacher_h_LBTD, _, teacher_head = teach(teacher_variables, batch)
      target = teacher_h_LBTD[-1], teacher_head
    return losses.total(
        config.losses, h_LBTD, batch, head, norm=norm, teacher=target,
        gate_EBT=gate_EBT, chunk=chunk(config, mesh))

  def step(state, batch, teacher_variables):
    # Of the whole batch, so that losses and gradients of its parts add up.
    tokens = jnp.maximum(batch['weight_BT'].sum(), 1.0)
    if config.losses.early:
      batch = {**batch, 'depth_BT': _depths(config, state.step, batch)}
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, terms), grads = _sum_over_parts(
        lambda part: grad_fn(state.params, part, teacher_variables, tokens),
        batch, config.optim.accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optim.gradient_norm(config.optim, grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A step that would spoil everything changes nothing but the count.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state), (state.params, state.opt_state))
    metrics = {
        'loss': loss,
        'lr': optim.learning_rate(config.optim, state.step),
        'grad_norm': norm,
        'skipped': 1.0 - finite,
        **terms}
    return TrainState(state.step + 1, params, opt_state), metrics

  return step


def make_top_k(
    config: Config, cfg: ModelConfig, mesh: Mesh, best: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """(variables, batch) -> a model's best ids, and their log-probabilities.

  Both are [B, T, best], the best first, in parts and chunks as in a step.
  """
  hidden = forward(config, cfg, mesh)
  size, parts = chunk(config, mesh), config.optim.accumulate

  def top_k(variables, batch):
    h_LBTD, _, head = hidden(variables, batch)

    def of_chunk(start):
      h_BTD = lax.dynamic_slice_in_dim(h_LBTD[-1], start, size, axis=1)
      logits_BTV = head.logits(head.params, h_BTD)
      log_p, ids = lax.top_k(logits_BTV, best)
      return ids, log_p - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)

    found = lax.map(of_chunk, jnp.arange(0, h_LBTD.shape[2], size))
    return jax.tree.map(lambda x: _join(jnp.moveaxis(x, 0, 1), 1), found)

  def of_parts(variables, batch):
    found = lax.map(
        lambda part: top_k(variables, part), _split(batch, parts))
    return jax.tree.map(lambda x: _join(jnp.moveaxis(x, 0, 1), 0), found)

  return of_parts


def jit_step(
    config: Config, mesh: Mesh, tx: optax.GradientTransformation,
    abstract: TrainState, teacher: ModelConfig | None = None,
) -> Any:
  """`make_step`, compiled where it is called; the state it takes is donated.

  Args:
    config: the run.
    mesh: where it runs.
    tx: the optimizer, of `abstract_state`.
    abstract: the state's shapes and shardings, likewise.
    teacher: the teacher's model, if there is one.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
      make_step(config, mesh, tx, teacher), donate_argnums=0,
      out_shardings=(shardings, machine.replicated(mesh)))


def abstract_state(
    config: Config, mesh: Mesh
) -> tuple[optax.GradientTransformation, TrainState]:
  """The optimizer, and the shapes and shardings of the state."""
  params = abstract_params(config, config.model, mesh)
  tx = optim.make(config.optim, params)
  whole = machine.replicated(mesh)
  opt_state = optax.tree.map_params(
      tx,
      lambda x, param: x if isinstance(x, optax.MaskedNode) else param,
      jax.eval_shape(tx.init, params),
      params,
      transform_non_params=lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=whole),
      is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return tx, TrainState(step, params, opt_state)


def abstract_params(config: Config, cfg: ModelConfig, mesh: Mesh) -> Any:
  """Shapes and shardings of a model's fp32 parameters."""
  boxed = model.abstract_params(cfg)
  return machine.abstract(
      boxed, machine.of_boxed(boxed, mesh, rules(config, cfg, mesh)))


def rules(config: Config, cfg: ModelConfig, mesh: Mesh) -> machine.Rules:
  """Where a model's letters go, for the run's batch."""
  sizes = {letter: getattr(cfg, letter) for letter in 'VDFNK'}
  sizes['R'] = math.gcd(*cfg.ranks.values(), adapters.head_rank(cfg))
  sizes['B'] = config.data.batch // config.optim.accumulate
  return machine.make_rules(mesh, sizes)


def chunk(config: Config, mesh: Mesh) -> int:
  """Positions whose logits are made at once, by run.logits_mib."""
  letters = dict(rules(config, config.model, mesh))
  parts = math.prod(
      mesh.shape[axis] for letter in (machine.HEAD_BATCH, 'V')
      for axis in letters[letter] or ())
  rows = config.data.batch // config.optim.accumulate
  return config.run.chunk(
      config.data.seq_len, 4 * rows * config.model.V / parts)


def forward(
    config: Config, cfg: ModelConfig, mesh: Mesh, *, gates: bool = False,
    early: bool = False,
) -> Forward:
  """A model on the mesh, up to its head.

  With `gates`, its exit gates too; with `early`, tokens exit after the number
  of loops in a batch's `depth_BT`, if it has one.
  """
  decoder = model.Decoder(
      cfg.opened_for(config.data.seq_len), run=config.run)
  letters = rules(config, cfg, mesh)

  def hidden(variables, batch):
    params = variables['params']
    with nn.logical_axis_rules(letters):
      found = decoder.apply(
          variables, batch['token_BT'], batch['segment_BT'],
          batch['position_BT'], batch.get('depth_BT') if early else None,
          method='hidden_and_gates' if gates else 'hidden')
    h_LBTD, gate_EBT = found if gates else (found, None)

    table = 'embed' if cfg.tied else 'head'
    reads = {table: params[table]}
    if not adapters.head_rank(cfg):
      return h_LBTD, gate_EBT, losses.Head(reads, logits)
    reads['adapters'] = {'head': params['adapters']['head']}
    return h_LBTD, gate_EBT, losses.Head(reads, logits, logits)

  def logits(params, h, loop=None):
    with nn.logical_axis_rules(letters):
      return decoder.apply({'params': params}, h, loop, method='logits')

  return hidden


def _depths(
    config: Config, step: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
  """Loops that each token of a step goes through, see `LossConfig.early`."""
  loops, (B, T) = config.model.loops, batch['weight_BT'].shape
  rows, places = jax.random.split(
      jax.random.fold_in(jax.random.key(config.seed), step))
  return jnp.where(
      jax.random.uniform(rows, (B, 1)) < config.losses.early,
      jax.random.randint(places, (B, T), 1, loops + 1), loops)


def _sum_over_parts(
    function: Callable[[Any], Any], batch: Mapping[str, jax.Array], parts: int
) -> Any:
  """Sum of a function of a batch over its parts, one after the other."""
  if parts == 1:
    return function(batch)

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  batches = _split(batch, parts)
  one = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
  return lax.scan(add, zeros, batches)[0]


def _split(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
  """Part i takes rows i, i + parts, ...: every device keeps its own rows."""
  return {
      key: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
      for key, x in batch.items()}


def _join(x: jax.Array, axis: int) -> jax.Array:
  """A dimension and the next as one."""
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])
