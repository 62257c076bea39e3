"""What a step of a run costs on a machine, and whether it fits there.

The step that `train` runs is compiled ahead of time by the TPU compiler,
which needs no TPU: memory, arithmetic and traffic are read off the compiled
program. Times are estimates from the chip's published figures. For GPUs there
is no compiler without a GPU, so all figures are arithmetic.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from recursive_tx import losses, machine
from recursive_tx.config import ModelConfig
from recursive_tx.machine import chips, flops
from recursive_tx.model import attention
from recursive_tx.plan.compile import compiled
from recursive_tx.train import step as step_lib
from recursive_tx.train.config import Config

SPARE = 0.97  # Of a chip's memory; the rest is the runtime's.


def costs(
    config: Config, devices: list[Any], chip: chips.Chip,
    report: Callable[[str], Any],
) -> dict[str, Any]:
  """The figures of `plan` for one batch.

  Args:
    config: the run.
    devices, chip: of `devices_of`.
    report: given a line at each step.
  """
  mesh = mesh_of(config, devices)
  teacher = None
  if losses.uses_teacher(config.losses):
    teacher = _full_size(config.model)
  # Outside the mesh: it makes small arrays, on a device that is there.
  tx, state = step_lib.abstract_state(config, mesh)
  arguments = (state, batch_of(config, mesh), _teacher(config, teacher, mesh))
  parts = {
      'parameters': _bytes(state.params),
      'optimizer': _bytes(state.opt_state),
      'teacher': _bytes(arguments[2])}
  found = {
      'chip': chip.name, 'chips': len(devices), 'chip_bytes': chip.hbm_bytes,
      'mesh': ', '.join(f'{k}={v}' for k, v in mesh.shape.items()),
      'batch': config.data.batch, 'seq_len': config.data.seq_len,
      'attention': _attention(config, devices[0]),
      'model_flops': flops.train_step(
          config.model, config.losses.weights(config.model.loops), teacher,
          config.data.batch, config.data.seq_len)['total'] / len(devices)}
  if devices[0] is None:
    found['source'] = 'estimated'
    peak = sum(parts.values()) + _activations(config, mesh, state)
  else:
    found['source'] = 'compiled'
    report(f'plan: compiling a batch of {config.data.batch} sequences, which'
           ' takes a minute or more')
    with jax.set_mesh(mesh):
      function = step_lib.jit_step(config, mesh, tx, state, teacher)
      peak, counted = compiled(function.lower(*arguments), report)
    found |= counted
  found['bytes'] = {
      **parts, 'activations': max(0, int(peak - sum(parts.values())))}
  found['peak_bytes_per_chip'] = int(peak)
  found['fits'] = peak <= SPARE * chip.hbm_bytes
  return found | _times(config, chip, found)


def _times(config, chip, found) -> dict[str, Any]:
  """Seconds, MFU and days, by the chip's peaks."""
  compute = found['model_flops']
  if 'compiled_flops' in found:
    compute = found['compiled_flops'] + found['kernel_flops']
  elif config.run.remat != 'none':
    # The forward pass of the layers once more.
    again = flops.forward(
        config.model, config.data.batch, config.data.seq_len)
    compute += (sum(again.values()) - again['head']) / found['chips']
  compute /= chip.flops
  links = sum(found.get('sent_bytes', {}).values())
  links /= chip.link_bytes_per_second
  seconds = max(compute, links)
  tokens = config.data.batch * config.data.seq_len
  return {
      'compute_seconds': compute, 'link_seconds': links, 'seconds': seconds,
      'seconds_serial': compute + links,
      'mfu': found['model_flops'] / chip.flops / seconds,
      'tokens_per_second': tokens / seconds, 'steps': config.optim.steps,
      'tokens': tokens * config.optim.steps,
      'days': seconds * config.optim.steps / 86_400}


def mesh_of(config: Config, devices: list[Any]) -> Any:
  """The run's mesh of a topology's devices; of GPUs an abstract one."""
  if devices[0] is not None:
    return machine.make_mesh(config.mesh, devices)
  return jax.sharding.AbstractMesh(
      machine.mesh_sizes(config.mesh, len(devices)), machine.AXES)


def _full_size(cfg: ModelConfig) -> ModelConfig:
  """The vanilla model that a recursive one was made of."""
  return dataclasses.replace(
      cfg, layers_per_loop=cfg.num_layers, loops=1, prelude=0, coda=0,
      rank='0')


def batch_of(config: Config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and places of a batch."""
  shape = config.data.batch, config.data.seq_len
  names = ('token_BT', 'target_BT', 'segment_BT', 'position_BT', 'weight_BT')
  return {
      name: jax.ShapeDtypeStruct(
          shape, jnp.float32 if name == 'weight_BT' else jnp.int32,
          sharding=machine.rows(mesh))
      for name in names}


def _teacher(config: Config, teacher: ModelConfig | None, mesh) -> Any:
  if teacher is None:
    return None
  params = step_lib.abstract_params(config, teacher, mesh)
  return {'params': jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, config.run.dtype, sharding=x.sharding), params)}


def _bytes(tree: Any) -> int:
  """Of one device's parts of a tree."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree))


def _activations(config: Config, mesh, state) -> float:
  """Bytes besides the arguments: a rule of thumb, for run.remat='full'.

  Gradients; every layer's input; one layer's values and gathered weights,
  twice each; logits and their gradients.
  """
  cfg, run = config.model, config.run
  item = jnp.dtype(run.dtype).itemsize
  tokens = config.data.batch * config.data.seq_len / config.optim.accumulate
  tokens /= mesh.shape['data'] * mesh.shape['fsdp']
  inside = 4 * cfg.D + 2 * (cfg.N + cfg.K) * cfg.H + 3 * cfg.F
  layer = sum(math.prod(cfg.in_out(kernel)) for kernel in cfg.kernels)
  return (
      _bytes(state.params)
      + item * tokens * cfg.D * (cfg.num_layers + 2 * cfg.loops)
      + 2 * item * (tokens * inside + layer) / mesh.shape['tensor']
      + 3 * (run.logits_mib << 20))


def _attention(config: Config, device) -> str:
  T = config.data.seq_len
  return attention.choose(
      config.run.attention, T=T, S=T, window=config.model.window,
      platform='gpu' if device is None else device.platform)
