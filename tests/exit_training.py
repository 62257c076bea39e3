"""Training steps of a small model with exits, without data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import processes
import tiny

import recursive_tx as rtx
from recursive_tx import machine, train
from recursive_tx.train.optim import OptimConfig

CFG = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=4, layers_per_loop=1, loops=3, rank='q2')
B, T = 4, 6


def random_batch():
  """Rows of one document, the first of them short."""
  token_BT = tiny.tokens(CFG, B, T + 1)
  weight_BT = np.ones((B, T), np.float32)
  weight_BT[0, 3:] = 0
  return {'token_BT': token_BT[:, :-1], 'target_BT': token_BT[:, 1:],
          'segment_BT': np.ones((B, T), np.int32),
          'position_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
          'weight_BT': weight_BT}


def run(cfg, loss, table=(('.*', 1.0, 0.0),), mesh=None):
  """A train.Config of no data but the shape of its batches."""
  base = processes.config('nowhere', data=dict(seq_len=T, batch=B))
  return dataclasses.replace(
      base, model=cfg, losses=loss, mesh=mesh or base.mesh,
      optim=OptimConfig(steps=9, lr=0.02, schedule='constant', table=table))


def stepped(config, variables, batch, steps, teacher=(None, None)):
  """The parameters after some steps on one batch, and every step's metrics."""
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    state = train.TrainState(
        jnp.int32(0), variables['params'], tx.init(variables['params']))
    state = machine.place(
        jax.tree.map(np.asarray, state),
        jax.tree.map(lambda x: x.sharding, abstract))
    step = train.jit_step(config, mesh, tx, abstract, teacher[0])
    rows, found = machine.place_rows(batch, mesh), []
    for _ in range(steps):
      state, metrics = step(state, rows, teacher[1])
      found.append(jax.tree.map(np.asarray, metrics))
  return jax.tree.map(np.asarray, state.params), found


@functools.cache
def logits_of(cfg, loop):
  """(variables, tokens) -> a loop's logits."""
  decoder = rtx.Decoder(cfg)

  def of(variables, token_BT):
    h_LBTD = decoder.apply(variables, token_BT, method='hidden')
    return decoder.apply(variables, h_LBTD[loop], loop, method='logits')

  return jax.jit(of)
