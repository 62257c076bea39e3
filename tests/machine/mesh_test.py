"""Where the letters go: parameters, activations, and the same losses."""

import json
import os
import subprocess
import sys

import chex
import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from recursive_tx import machine
from recursive_tx.errors import UserError

SIZES = {'B': 8, 'V': 64, 'D': 16, 'F': 32, 'N': 4, 'K': 2, 'R': 4}

# Runs on 8 fake devices, prints what each test below asserts.
SCRIPT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from recursive_tx import machine, train
from recursive_tx.config import ModelConfig
from recursive_tx.data import DataConfig, Task
from recursive_tx.losses import LossConfig
from recursive_tx.model import Decoder
from recursive_tx.train.optim import OptimConfig

cfg = ModelConfig(
    V=64, D=16, F=32, N=4, K=2, H=8, layers_per_loop=1, loops=2, rank='4')
spec = lambda x: str(x.sharding.spec)
told = {'devices': jax.device_count()}


def config_of(mesh, accumulate=1):
  return train.Config(
      model=cfg,
      data=DataConfig((Task('t', 'text', ('x',)),), seq_len=16, batch=8),
      optim=OptimConfig(steps=9, lr=0.03, accumulate=accumulate, warmup=2),
      losses=LossConfig((0.5, 1.0)),
      mesh=machine.MeshConfig(**mesh))


def batches():
  rng = np.random.default_rng(0)
  for _ in range(3):
    token = rng.integers(0, 64, (8, 17), np.int32)
    yield {
        'token_BT': token[:, :-1], 'target_BT': token[:, 1:],
        'segment_BT': np.repeat([[1] * 10 + [2] * 6], 8, 0),
        'position_BT': np.repeat([[*range(10), *range(6)]], 8, 0),
        'weight_BT': rng.integers(0, 2, (8, 16)).astype(np.float32)}


def losses_on(**mesh):
  config = config_of(mesh.pop('mesh', {}), **mesh)
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(config, mesh)
    state = train.first_state(config, tx, abstract)
    step = train.jit_step(config, mesh, tx, abstract)
    rows = []
    for batch in batches():
      state, metrics = step(state, machine.place_rows(batch, mesh), None)
      rows.append(jax.tree.map(float, metrics))
  told['compiled'] = max(told.get('compiled', 0), step._cache_size())
  up = state.params['block']['layers']['mlp']['up']['kernel']
  told['parameter'] = spec(up)
  told['table'] = spec(state.params['embed']['embedding'])
  factors = state.params['adapters']['up']
  told['factors'] = [spec(factors[leaf]) for leaf in 'ab']
  specs = lambda tree: sorted(spec(x) for x in jax.tree.leaves(tree) if x.ndim)
  told['moments_like_parameters'] = (
      specs(state.opt_state) == sorted(specs(state.params) * 2))
  return rows


told['losses'] = {
    str(sorted(kind.items())): losses_on(**kind)
    for kind in json.loads(sys.argv[1])}

if told['devices'] > 1:
  mesh = machine.make_mesh(machine.MeshConfig(data=2, fsdp=2, tensor=2))
  sizes = {'B': 8, 'R': 4,
           **{letter: getattr(cfg, letter) for letter in 'VDFNK'}}
  rules = machine.make_rules(mesh, sizes)
  decoder = Decoder(cfg)
  token = jax.device_put(np.zeros((8, 16), np.int32), machine.replicated(mesh))
  with jax.set_mesh(mesh):
    variables = nn.meta.unbox(decoder.init(jax.random.key(0), token))
    variables = jax.device_put(variables, machine.replicated(mesh))
    hidden = lambda v, t: decoder.apply(v, t, method='hidden')
    # Everything that goes in is replicated: only the constraints can cut.
    told['without_rules'] = spec(jax.jit(hidden)(variables, token))
    with nn.logical_axis_rules(rules):
      cut = jax.jit(lambda v, t: hidden(v, t))(variables, token)
  told['hidden'] = spec(cut)
print(json.dumps(told))
"""
KIND = {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'accumulate': 2}
OTHERS = [
    {'mesh': {'data': 8, 'fsdp': 1, 'tensor': 1}},
    {'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1}},
    {'mesh': {'data': 1, 'fsdp': 2, 'tensor': 4}},
]


def run_script(devices: int, kinds) -> dict:
  env = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      # Tiny programs take longer to optimise than to run.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  done = subprocess.run(
      [sys.executable, '-c', SCRIPT, json.dumps(kinds)],
      env=env, capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def eight() -> dict:
  return run_script(8, [KIND])


@pytest.fixture(scope='module')
def one() -> dict:
  return run_script(1, [{}])


def assert_same_losses(several, one):
  assert (one['devices'], several['devices']) == (1, 8)
  (expected,) = one['losses'].values()
  # They are losses of a model that learns.
  assert expected[-1]['loss'] != expected[0]['loss']
  for found in several['losses'].values():
    for row, other in zip(found, expected, strict=True):
      assert row.keys() == other.keys()
      for key in row:
        np.testing.assert_allclose(row[key], other[key], rtol=2e-4)


def test_losses_do_not_depend_on_the_mesh(eight, one):
  assert_same_losses(eight, one)


@pytest.mark.slow
def test_losses_do_not_depend_on_any_mesh(one):
  others = run_script(8, OTHERS)
  assert len(others['losses']) == len(OTHERS)
  assert_same_losses(others, one)


def test_parameters_and_moments_are_cut_by_their_letters(eight):
  assert eight['parameter'] == str(PartitionSpec(None, 'fsdp', 'tensor'))
  assert eight['moments_like_parameters']


def test_the_vocabulary_and_the_factors_are_cut(eight):
  assert eight['table'] == str(PartitionSpec(('fsdp', 'tensor'), None))
  # Layers and loops first, then 'DR' and 'RF'.
  assert eight['factors'] == [
      str(PartitionSpec(None, None, 'fsdp', None)),
      str(PartitionSpec(None, None, 'fsdp', 'tensor'))]


def test_a_vocabulary_that_does_not_divide_is_cut_less():
  def rules(V, **mesh):
    found = dict(machine.make_rules(fake_mesh(**mesh), {**SIZES, 'V': V}))
    return found['V'], found[machine.HEAD_BATCH]

  everywhere = ('data', 'fsdp')
  assert rules(64, fsdp=4, tensor=2) == (('fsdp', 'tensor'), ('data',))
  assert rules(66, fsdp=4, tensor=2) == (('tensor',), everywhere)
  assert rules(65, fsdp=4, tensor=2) == (None, everywhere)


def test_activations_are_cut_by_their_letters(eight):
  # [loops, B, T, D]: the batch takes 'data' and 'fsdp', so D stays whole.
  assert eight['hidden'] == str(PartitionSpec(None, ('data', 'fsdp')))
  assert eight['without_rules'] == str(PartitionSpec())


def test_a_step_is_compiled_once(eight):
  assert eight['compiled'] == 1


def fake_mesh(data=1, fsdp=1, tensor=1):
  return jax.sharding.AbstractMesh((data, fsdp, tensor), machine.AXES)


def test_a_letter_that_does_not_divide_stays_whole():
  rules = dict(machine.make_rules(fake_mesh(tensor=4), SIZES))
  assert rules['N'] == ('tensor',)
  assert rules['K'] is None
  assert set(rules) == {*SIZES, *machine.WHOLE, machine.HEAD_BATCH}


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match='batch of 8 .* multiple of 16'):
    machine.make_rules(fake_mesh(data=4, fsdp=4), SIZES)


@pytest.mark.parametrize(
    'sizes',
    [dict(data=3), dict(data=-1, fsdp=-1), dict(fsdp=0), dict(tensor=2)],
)
def test_a_mesh_of_another_size_is_refused(sizes):
  with pytest.raises(UserError, match='does not multiply to the 1 device'):
    machine.make_mesh(machine.MeshConfig(**sizes))


def test_rest_of_the_devices():
  for axis in machine.AXES:
    sizes = {name: 1 for name in machine.AXES} | {axis: -1}
    mesh = machine.make_mesh(machine.MeshConfig(**sizes))
    assert dict(mesh.shape) == {name: 1 for name in machine.AXES}


def test_place_takes_host_arrays_as_they_are():
  mesh = machine.make_mesh(machine.MeshConfig())
  tree = {'a': np.arange(6.0).reshape(2, 3), 'b': np.float32(4).reshape(())}
  found = machine.place(tree, machine.replicated(mesh))
  chex.assert_trees_all_equal(found, tree)
