"""Does a run fit a machine, and what would a step cost there?

The very step that `train` runs is compiled ahead of time by the TPU compiler,
which needs no TPU: memory, arithmetic and traffic are read off the compiled
program. Times are estimates from the chip's published figures. For GPUs there
is no compiler without a GPU, so all figures are arithmetic.
"""

from collections.abc import Callable
import dataclasses
import math
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from recursive_tx import losses, machine
from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError
from recursive_tx.machine import chips, flops
from recursive_tx.model import attention
from recursive_tx.plan import hlo
from recursive_tx.train import step as step_lib
from recursive_tx.train.config import Config

TOPOLOGIES = 'v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:8, a100:8'
_SPARE = 0.97  # Of a chip's memory; the rest is the runtime's.


def plan(
    config: Config, topology: str, *, search: bool = False,
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
  """Compiles a run's step for a topology.

  Args:
    config: the run. Where its losses need a teacher, that is the full-size
      model of the same shapes, in `run.dtype`.
    topology: such as 'v5e:4x4', or 'h100:8' for as many GPUs.
    search: also find the largest batch that fits.
    report: given a line at each step.

  Returns:
    Figures of one step, JSON values; bytes and FLOPs are those of one chip.
    `peak_bytes_per_chip` and `fits`, `bytes` by part, `model_flops`,
    `compiled_flops`, `sent_bytes` by kind of collective, `seconds` and `mfu`
    (estimates), ... What is read off the compiled program is missing where
    there is none: for GPUs, and where the compiler ran out of memory.

  Raises:
    UserError: an unknown topology, or a mesh or batch that it does not fit.
  """
  devices, chip = devices_of(topology)
  report(f'plan: {len(devices)} x {chip.name} of {_gib(chip.hbm_bytes)} GiB')
  found = _figures(config, devices, chip, report)
  if search:
    found['largest_batch'] = _largest(config, devices, chip, found, report)
  return found


def table(found: dict[str, Any]) -> str:
  """The figures as text, facts and estimates apart."""
  chip, parts = found['chip'], found['bytes']
  source = found['source']
  lines = [
      f'{found["chips"]} x {chip}, mesh {found["mesh"]}, batch'
      f' {found["batch"]} x {found["seq_len"]}, attention'
      f' {found["attention"]}', '',
      f'MEMORY, GiB a chip ({source})',
      f'  {"fits" if found["fits"] else "DOES NOT FIT":22}'
      f'{_gib(found["peak_bytes_per_chip"]):>12} of'
      f' {_gib(found["chip_bytes"])}']
  lines += [f'  {name:22}{_gib(size):>12}' for name, size in parts.items()]
  lines += ['', 'ARITHMETIC, TFLOP a chip and step',
            f'  {"model (by hand)":22}{found["model_flops"] / 1e12:12.2f}']
  if 'compiled_flops' in found:
    lines += [
        f'  {"compiled":22}{found["compiled_flops"] / 1e12:12.2f}   products,'
        ' recomputation included',
        f'  {"attention kernels":22}{found["kernel_flops"] / 1e12:12.2f}   by'
        ' their shapes',
        '', 'COMPILED TRAFFIC, GiB a chip sends in a step']
    lines += [f'  {kind:22}{_gib(size):>12}'
              for kind, size in found['sent_bytes'].items()]
  lines += ['', 'ESTIMATES from the chip\'s published peaks']
  lines += [
      f'  {"step, all overlapped":22}{found["seconds"]:12.3f} s   MFU'
      f' {found["mfu"]:.0%}, {found["tokens_per_second"]:,.0f} tokens/s',
      f'  {"step, none overlapped":22}{found["seconds_serial"]:12.3f} s',
      f'  {"the run":22}{found["days"]:12.2f} days for {found["steps"]:,}'
      f' steps, {found["tokens"] / 1e9:.2f} B tokens']
  if 'largest_batch' in found:
    lines += ['', f'LARGEST BATCH that fits: {found["largest_batch"]}'
              f' sequences ({source})']
  return '\n'.join(lines)


def devices_of(topology: str) -> tuple[list[Any], chips.Chip]:
  """The devices of a topology, and what one of them can do."""
  kind, _, size = topology.partition(':')
  chip = chips.find(kind)
  if chip is None or not re.fullmatch(r'\d+(x\d+)*', size):
    raise UserError(
        f'topology {topology!r} is not known; expected one such as'
        f' {TOPOLOGIES}')
  if not kind.startswith('v'):
    if not size.isdecimal() or int(size) < 1:
      raise UserError(f'topology {topology!r}: expected a number of GPUs,'
                       f' such as {kind}:8')
    return [None] * int(size), chip
  # Of several programs one at a time may hold a TPU; this one holds none, and
  # asks no metadata server what machine it is on.
  os.environ.update(
      ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_SKIP_MDS_QUERY='1',
      TPU_MIN_LOG_LEVEL='3', TPU_STDERR_LOG_LEVEL='3',
      TPU_ACCELERATOR_TYPE='v5litepod-1', TPU_WORKER_HOSTNAMES='localhost')
  jax.config.update('jax_platforms', 'cpu')
  # The two cores of a v4 chip are one device to programs that train.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    description = topologies.get_topology_desc(
        platform='tpu', topology_name=topology, **options)
  except Exception as error:  # Several kinds, the text says which.
    reason = str(error).strip().splitlines()[0]
    if 'libtpu' in reason.lower():
      reason += '; install it with `pip install "jax[tpu]"`'
    raise UserError(f'topology {topology!r}: {reason}') from None
  devices = description.devices
  return devices, chips.find(devices[0])


def _figures(config, devices, chip, report) -> dict[str, Any]:
  """Everything of one batch."""
  mesh = _mesh(config, devices)
  teacher = None
  if losses.uses_teacher(config.losses):
    teacher = _full_size(config.model)
  # Outside the mesh: it makes small arrays, on a device that is there.
  tx, state = step_lib.abstract_state(config, mesh)
  arguments = (state, batch_of(config, mesh), _teacher(config, teacher, mesh))
  parts = {
      'parameters': _bytes(state.params),
      'optimizer': _bytes(state.opt_state),
      'teacher': _bytes(arguments[2]),
  }
  found = {
      'chip': chip.name, 'chips': len(devices), 'chip_bytes': chip.hbm_bytes,
      'mesh': ', '.join(f'{k}={v}' for k, v in mesh.shape.items()),
      'batch': config.data.batch, 'seq_len': config.data.seq_len,
      'attention': _attention(config, devices[0]),
      'model_flops': flops.train_step(
          config.model, config.losses.weights(config.model.loops), teacher,
          config.data.batch, config.data.seq_len)['total'] / len(devices),
  }
  if devices[0] is None:
    found['source'] = 'estimated'
    peak = sum(parts.values()) + _activations(config, mesh, state)
  else:
    found['source'] = 'compiled'
    with jax.set_mesh(mesh):
      function = step_lib.jit_step(config, mesh, tx, state, teacher)
      peak, counted = _compile(function.lower(*arguments), config, report)
    found |= counted
  found['bytes'] = {
      **parts, 'activations': max(0, int(peak - sum(parts.values())))}
  found['peak_bytes_per_chip'] = int(peak)
  found['fits'] = peak <= _SPARE * chip.hbm_bytes
  return found | _times(config, chip, found)


def _compile(lowered, config, report) -> tuple[float, dict[str, Any]]:
  """Peak bytes of a chip, and what the program does."""
  report(f'plan: compiling a batch of {config.data.batch} sequences, which'
       ' takes a minute or more')
  start = time.monotonic()
  try:
    compiled, text = compile_text(lowered)
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error))
    if needed is None:
      raise
    report('plan: the compiler ran out of the chip\'s memory')
    return needed, {}
  report(f'plan: compiled in {time.monotonic() - start:.0f} s')
  memory = compiled.memory_analysis()
  peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes
          + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  account = hlo.account(text)
  return peak, {
      'compiled_flops': account.flops, 'kernel_flops': account.kernel_flops,
      'sent_bytes': account.bytes,
      'largest_arrays': [name for _, name in account.largest]}


def needed_bytes(message: str) -> float | None:
  """What a program asked for, by the compiler's words where it was too much."""
  needed = re.search(
      r'(?:Used |HLO temporaries \()([\d.]+)([MG])', message)
  if 'RESOURCE_EXHAUSTED' not in message or not needed:
    return None
  return float(needed[1]) * {'M': 2**20, 'G': 2**30}[needed[2]]


def compile_text(lowered: Any) -> tuple[Any, str]:
  """The compiled program, and its text in XLA's format."""
  with tempfile.TemporaryDirectory() as folder:
    # The compiler writes its program down, since its text may be newer than
    # what `compiled.as_text()` can read.
    compiled = lowered.compile(compiler_options={
        'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    path = next(pathlib.Path(folder).glob('*.after_codegen.txt'))
    return compiled, path.read_text()


def _times(config, chip, found) -> dict[str, Any]:
  """What the chip's peaks would make of it."""
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
      'days': seconds * config.optim.steps / 86_400,
  }


def _largest(config, devices, chip, found, report) -> int:
  """The largest batch that fits, a multiple of what the mesh asks for.

  Memory grows nearly in proportion to the batch, so that a line through the
  last two batches tells the next to try.
  """
  mesh = _mesh(config, devices)
  unit = math.lcm(
      math.prod(mesh.shape[axis] for axis in machine.LETTERS['B']),
      config.data.shards) * config.optim.accumulate
  known = {config.data.batch // unit: found['peak_bytes_per_chip']}

  def peak(units):
    if units not in known:
      data = dataclasses.replace(config.data, batch=units * unit)
      known[units] = _figures(
          dataclasses.replace(config, data=data), devices, chip, report
      )['peak_bytes_per_chip']
    return known[units]

  room = _SPARE * chip.hbm_bytes
  low, high = 0, None  # The largest that fits, the smallest that does not.
  units = next(iter(known))
  while True:
    low, high = (
        (max(low, units), high) if peak(units) <= room else
        (low, min(units, high or units)))
    if high is not None and high - low <= max(1, low // 16):
      return low * unit
    if len(known) == 1:
      units = units * 2 if low else max(1, units // 2)
      continue
    (x, a), (y, b) = sorted(known.items())[-2:]
    slope = max((b - a) / (y - x), 1.0)
    guess = int(x + (room - a) / slope)
    top = high - 1 if high is not None else 4 * low
    units = min(max(guess, low + 1), max(top, low + 1))


def _mesh(config: Config, devices) -> Any:
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


def _gib(size: float) -> str:
  return f'{size / 2**30:.2f}'
