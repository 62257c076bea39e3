"""A training step of the library on one device, outside of a run.

Functions that several benchmarks share. No file, log or checkpoint: what
`recursive_tx.train` compiles, and batches that are there.
"""

import time
from typing import Any

from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np

import recursive_tx as rtx
from recursive_tx import losses, machine, model
from recursive_tx.data import DataConfig, Task, packing
from recursive_tx.machine import flops
from recursive_tx.train import optim, step
from recursive_tx.train.config import Config

# As configs/common.py has it, which needs ml_collections.
TABLE = (('adapters/.*/[ab]', 1.0, 0.0), ('.*/(scale|bias)', 1.0, 0.0),
         ('embed/.*', 1.0, 0.0), ('.*/kernel', 1.0, 1.0))


class Trainer:
  """The update, compiled for one device.

  Attributes:
    tokens: of a batch.
    flops: of an update, see `machine.flops`.
    state: step.TrainState, of `start`.
    compile_seconds: what the first update of `timed` took.
  """

  def __init__(
      self, cfg: rtx.ModelConfig, run: rtx.Run, *, batch: int, seq_len: int,
      steps: int, lr: float, teacher: tuple[rtx.ModelConfig, Any] | None = None,
      table: tuple[tuple[str, float, float], ...] = TABLE,
  ):
    """`teacher`: (cfg, variables) of a model to distil from as well."""
    config = Config(
        model=cfg,
        data=DataConfig(
            tasks=(Task(name='corpus', kind='jsonl', train=('-',)),),
            seq_len=seq_len, batch=batch, shards=1),
        optim=optim.OptimConfig(
            steps=steps, lr=lr, warmup=-(-steps // 20), min_ratio=0.05,
            table=table),
        losses=losses.LossConfig(distill=(1.0,) if teacher else ()), run=run)
    teacher_cfg, variables = teacher or (None, None)
    self._mesh = machine.make_mesh(
        machine.MeshConfig(), devices=jax.devices()[:1])
    with jax.set_mesh(self._mesh):
      self._tx, abstract = step.abstract_state(config, self._mesh)
      self._step = step.jit_step(
          config, self._mesh, self._tx, abstract, teacher_cfg)
    self._teacher = jax.device_put(jax.tree.map(
        lambda x: np.asarray(x, run.dtype), variables))
    self.tokens = batch * seq_len
    self.flops = flops.train_step(
        cfg, config.losses.weights(cfg.loops), teacher_cfg, batch,
        seq_len)['total']

  def start(self, variables: Any):
    """Sets the first state; compiles nothing of the update."""
    with jax.set_mesh(self._mesh):
      params = jax.device_put(jax.tree.map(
          lambda x: jnp.asarray(x, jnp.float32), variables['params']),
          machine.replicated(self._mesh))
      self.state = step.TrainState(
          jnp.int32(0), params, jax.jit(self._tx.init)(params))

  def update(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """One update; its metrics, on the device."""
    with jax.set_mesh(self._mesh):
      placed = machine.place(batch, machine.rows(self._mesh))
      self.state, metrics = self._step(self.state, placed, self._teacher)
    return metrics

  def timed(self, batch: dict[str, np.ndarray], repeats: int) -> float:
    """Seconds of an update, after one that compiles."""
    begin = time.perf_counter()
    jax.block_until_ready(self.update(batch))
    self.compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(self.update(batch))
    begin = time.perf_counter()
    for _ in range(repeats):
      metrics = self.update(batch)
    jax.block_until_ready((metrics, self.state))
    return (time.perf_counter() - begin) / repeats


def random_variables(cfg: rtx.ModelConfig) -> dict:
  """Of a model as it is before any training."""
  return jax.jit(lambda key: meta.unbox(model.Decoder(cfg).init(
      key, jnp.zeros((1, 2), jnp.int32))))(jax.random.key(0))


def random_batch(V: int, batch: int, seq_len: int) -> dict[str, np.ndarray]:
  """Rows of one document of random tokens each."""
  ids = np.random.default_rng(0).integers(
      0, V, (batch, seq_len + 1)).astype(np.int32)
  return packing.batch([[row] for row in ids], seq_len)
