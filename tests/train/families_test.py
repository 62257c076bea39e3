"""A training step of a relaxed model of every family moves all it has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from recursive_tx import machine, train
from recursive_tx.data import DataConfig, Task, packing
from recursive_tx.files import paths
from recursive_tx.losses import LossConfig
from recursive_tx.train import step
from recursive_tx.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_a_step_moves_every_parameter_and_lowers_the_loss(name):
  cfg = dataclasses.replace(
      tiny.FAMILIES[name], layers_per_loop=3, loops=2, rank='2')
  config = train.Config(
      model=cfg,
      data=DataConfig(
          (Task('t', 'text', ('x',)),), seq_len=16, batch=4, shards=1),
      # Without decay nothing moves that has no gradient.
      optim=OptimConfig(
          steps=2, lr=1e-3, warmup=1, table=(('.*', 1.0, 0.0),)),
      losses=LossConfig((1.0,)))
  rows = [[tiny.tokens(cfg, 1, 17, seed=i)[0]] for i in range(4)]
  batch = packing.batch(rows, 16)
  mesh = machine.make_mesh(config.mesh, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    params = jax.tree.map(jnp.asarray, tiny.variables(cfg)['params'])
    before = jax.tree.map(np.array, params)
    state = step.TrainState(jnp.int32(0), params, tx.init(params))
    update = train.jit_step(config, mesh, tx, abstract)
    losses = []
    for _ in range(2):
      state, metrics = update(state, machine.place_rows(batch, mesh), None)
      losses.append(float(metrics['loss']))
  assert losses[1] < losses[0]
  still = [path for path, leaf in paths.items(state.params)
           if np.array_equal(leaf, paths.get(before, path))]
  assert not still
