"""Several processes: how they meet, agree, save together and stop together."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from recursive_tx import machine
from recursive_tx.errors import UserError
from recursive_tx.store import checkpoint

# Steps of a tiny model on made-up batches: all of a run but the text.
SCRIPT = """
import json, os, pathlib, signal, sys, time
import jax, numpy as np
from recursive_tx import machine, train
from recursive_tx.files import paths
from recursive_tx.store import checkpoint
from recursive_tx.config import ModelConfig
from recursive_tx.data import DataConfig, Task
from recursive_tx.losses import LossConfig
from recursive_tx.train.optim import OptimConfig

given = json.loads(sys.argv[1])
machine.initialize(*given['meet'])
config = train.Config(
    model=ModelConfig(V=64, D=16, F=32, N=4, K=2, H=8, layers_per_loop=1),
    data=DataConfig((Task('t', 'text', ('x',)),), seq_len=16, batch=8),
    optim=OptimConfig(steps=9, lr=0.03, warmup=2),
    losses=LossConfig((1.0,)),
    mesh=machine.MeshConfig(**given['mesh']))
workdir, me = given['workdir'], jax.process_index()
told = {'process': me, 'devices': jax.device_count(), 'losses': {}}


def wholes(tree):
  # {path: an array of the shape of each leaf}.
  return {path: np.arange(x.size, dtype=np.float16).reshape(x.shape)
          for path, x in paths.items(tree)}


def some_at_a_time(arrays):
  # Parts of them all, not in order.
  for path, array in sorted(arrays.items(), key=lambda item: item[1].size):
    if array.ndim < 3:
      yield path, (), array
  for i in range(9):
    for path, array in arrays.items():
      if array.ndim > 2 and i < len(array):
        for j, part in enumerate(array[i]):
          yield path, (i, j), part


def misplaced(placed, arrays):
  # Leaves whose shares here are not those of the whole.
  return [path for path, x in paths.items(placed)
          for share in x.addressable_shards
          if not np.array_equal(share.data, arrays[path][share.index])]


def rows_of(step, rows):
  rng = np.random.default_rng(step)
  token = rng.integers(0, 64, (8, 17), np.int32)[rows]
  return {
      'token_BT': token[:, :-1], 'target_BT': token[:, 1:],
      'segment_BT': np.ones((len(rows), 16), np.int32),
      'position_BT': np.tile(np.arange(16, dtype=np.int32), (len(rows), 1)),
      'weight_BT': np.ones((len(rows), 16), np.float32)}


mesh = machine.make_mesh(config.mesh)
with jax.set_mesh(mesh), machine.Preemption() as preemption:
  tx, abstract = train.abstract_state(config, mesh)
  checkpoint.check_writable(workdir, 1)
  done = checkpoint.latest_step(workdir)
  if done is None:
    state, done = train.first_state(config, tx, abstract), 0
  else:
    state, positions = checkpoint.restore(workdir, done, abstract)
    told['positions'] = [x.decode() for x in positions]
  arrays = wholes(abstract.params)
  placed = train.state.place_parts(
      some_at_a_time(arrays), abstract.params, np.float32)
  told['misplaced'] = misplaced(placed, arrays)
  told['placed'] = len(paths.items(placed))
  told['cut'] = sum(x.sharding.shard_shape(x.shape) != x.shape
                    for x in jax.tree.leaves(placed))
  step_fn = train.jit_step(config, mesh, tx, abstract)
  rows = machine.local_rows(mesh, 8)
  told['agreed'] = machine.agree(7 + me)
  with checkpoint.Checkpoints(workdir, config.checkpoint) as checkpoints:
    for step in range(done + 1, given['last'] + 1):
      batch = machine.place_rows(rows_of(step, rows), mesh)
      state, metrics = step_fn(state, batch, None)
      told['losses'][step] = float(metrics['loss'])
      assert not preemption.reached(step)
    checkpoints.save(step, state=state, position=b'%d' % me, settings={})
  if given['meet']:
    # The last process alone hears of it.
    if me == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.reached(step):
      step += 1
      machine.wait('a step')
      time.sleep(0.02)
    told['stopped'] = step
    if me == 0:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1)
  # What only process 0 may do waits for nobody.
  if me == 0:
    told['read'] = sorted(checkpoint.Latest(workdir).params())
print(json.dumps(told))
"""
FIRST, LAST = 2, 4


def start(workdir, last, *, meet=(), devices, **mesh):
  env = {
      **os.environ, 'JAX_PLATFORMS': 'cpu',
      # Tiny programs take longer to optimise than to run.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  given = dict(workdir=str(workdir), last=last, meet=meet, mesh=mesh)
  return subprocess.Popen(
      [sys.executable, '-c', SCRIPT, json.dumps(given)], env=env,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process):
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors[-3000:]
  return json.loads(output.splitlines()[-1])


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('run') / 'w'


@pytest.fixture(scope='module')
def two(workdir):
  """Two processes of 2 devices each, which make and save the first steps."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  started = [
      start(workdir, FIRST, devices=2, data=2, fsdp=2,
            meet=(f'127.0.0.1:{port}', 2, i))
      for i in range(2)]
  return [told(process) for process in started]


@pytest.fixture(scope='module')
def one(two, workdir):
  """One process of 4 devices, another mesh, which continues from there."""
  return told(start(workdir, LAST, devices=4, fsdp=2, tensor=2))


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One device, all steps."""
  folder = tmp_path_factory.mktemp('alone')
  return told(start(folder, LAST, devices=1))


def test_processes_meet_and_agree(two):
  assert [each['process'] for each in two] == [0, 1]
  assert [each['devices'] for each in two] == [4, 4]
  assert [each['agreed'] for each in two] == [7, 7]


@pytest.mark.slow
def test_losses_do_not_depend_on_processes(two, one, alone):
  assert two[0]['losses'] == two[1]['losses']
  found = two[0]['losses'] | one['losses']
  assert found.keys() == alone['losses'].keys()
  for step, loss in alone['losses'].items():
    assert found[step] == pytest.approx(loss, rel=2e-4)
  assert len(set(alone['losses'].values())) == LAST


@pytest.mark.slow
def test_parameters_are_placed_some_at_a_time(two, one, alone):
  for each in (*two, one, alone):
    assert each['placed'] > 9 and each['misplaced'] == []
  assert two[0]['cut'] and one['cut'] and not alone['cut']


def test_what_several_saved_one_restores(two, one):
  assert list(two[0]['losses']) == ['1', '2']
  # It went on, and it has the positions of both.
  assert list(one['losses']) == ['3', '4']
  assert one['positions'] == ['0', '1']


def test_all_stop_at_one_step_when_one_is_told(two):
  assert two[0]['stopped'] == two[1]['stopped'] > FIRST


def test_one_process_reads_without_the_others(two):
  assert 'block' in two[0]['read'] and 'read' not in two[1]


# In this process.


@pytest.mark.parametrize(
    'given',
    [('127.0.0.1:1', 2), ('127.0.0.1:1', 2, 2), ('', 2, 0), ('host', 2, 0),
     ('127.0.0.1:1', 0, 0), ('127.0.0.1:0', 2, 0), ('127.0.0.1:x', 2, 0),
     (':1', 2, 0), ('127.0.0.1:65536', 2, 0)],
)
def test_half_an_address_is_refused(given):
  with pytest.raises(UserError, match='Give all three or none') as error:
    machine.initialize(*given)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('environment', 'joins'),
    [
        ({}, False),
        ({'SLURM_STEP_NUM_TASKS': '4'}, True),
        ({'SLURM_STEP_NUM_TASKS': '1'}, False),
        # A batch script, outside srun.
        ({'SLURM_NTASKS': '4'}, False),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'TPU_ML_PLATFORM': 'JAX'}, True),
        # Tests on such a machine.
        ({'TPU_ML_PLATFORM': 'JAX', 'JAX_PLATFORMS': 'cpu'}, False),
    ],
)
def test_the_environment_says_whether_there_are_others(
    monkeypatch, environment, joins
):
  monkeypatch.setattr(os, 'environ', environment)
  joined = []
  monkeypatch.setattr(jax.distributed, 'initialize',
                      lambda *args, **kwargs: joined.append(args))
  machine.initialize()
  assert bool(joined) == joins


def test_chips_without_a_pod_are_alone(monkeypatch):
  monkeypatch.setattr(os, 'environ', {'TPU_ML_PLATFORM': 'JAX'})

  def initialize():
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  machine.initialize()


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh asks of it."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def slices(count, each):
  return [Device(i, i // each) for i in range(count * each)]


def test_only_data_goes_across_slices():
  mesh = machine.make_mesh(
      machine.MeshConfig(data=4, fsdp=2, tensor=2), slices(2, 8))
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 2}
  index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  np.testing.assert_array_equal(
      index, np.repeat([0, 0, 1, 1], 4).reshape(4, 2, 2))
  rest = machine.make_mesh(machine.MeshConfig(data=2), slices(2, 8))
  assert dict(rest.shape) == {'data': 2, 'fsdp': 8, 'tensor': 1}


def test_a_copy_of_the_model_in_two_slices_is_refused():
  with pytest.raises(UserError, match='data=1 does not divide among 2 slices'):
    machine.make_mesh(machine.MeshConfig(), slices(2, 4))


def test_a_workdir_of_one_process_only_is_refused(monkeypatch, tmp_path):
  # As seen by the second process, to which the first one said all is well.
  monkeypatch.setattr(machine, 'is_main', lambda: False)
  with pytest.raises(UserError, match='that they share'):
    checkpoint.check_writable(str(tmp_path / 'w'), 1)
