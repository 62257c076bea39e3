"""Plans: real compiles for TPUs that are not there, and their arithmetic."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile

import jax
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import losses, machine, plan, train
from recursive_tx.data import DataConfig, Task
from recursive_tx.machine import flops
from recursive_tx.plan import process, topology
from recursive_tx.train import optim

ROOT = tiny.ROOT
CFG = rtx.ModelConfig(
    V=1024, D=256, F=512, N=4, K=1, H=128, layers_per_loop=1, loops=2,
    rank='32')
CONFIG = train.Config(
    model=CFG,
    data=DataConfig((Task('t', 'text', ('x',)),), seq_len=256, batch=8,
                    shards=1),
    optim=optim.OptimConfig(steps=100, lr=1e-4, accumulate=1),
    losses=losses.LossConfig((0.1, 1.0), (1.0,)),
    run=rtx.Run(dtype='bfloat16', remat='full'))


def quiet(line):
  del line


def changed(config, **sections):
  """A config with fields of its sections replaced."""
  return dataclasses.replace(config, **{
      name: dataclasses.replace(getattr(config, name), **fields)
      for name, fields in sections.items()})


@pytest.fixture(scope='module')
def four():
  return plan.plan(CONFIG, 'v5e:2x2', report=quiet)


def test_a_compiled_plan_agrees_with_arithmetic(four):
  assert (four['chip'], four['chips'], four['fits']) == ('v5e', 4, True)
  assert four['attention'] == 'splash'
  # fp32 parameters and two moments, cut over four chips but for what is
  # small; the teacher in bf16.
  sizes = jax.tree.leaves(
      train.abstract_state(CONFIG, machine.make_mesh(
          machine.MeshConfig()))[1].params)
  whole = sum(4 * x.size for x in sizes)
  assert four['bytes']['parameters'] == pytest.approx(whole / 4, rel=0.02)
  assert four['bytes']['optimizer'] == pytest.approx(whole / 2, rel=0.02)
  assert four['peak_bytes_per_chip'] == sum(four['bytes'].values())
  # All of the model's products, the forward pass of the layers twice but for
  # their last product, and adapters merged rather than applied.
  model = flops.train_step(
      CFG, CONFIG.losses.weights(2),
      dataclasses.replace(CFG, loops=1, layers_per_loop=2, rank='0'), 8, 256)
  assert four['model_flops'] == model['total'] / 4
  done = four['compiled_flops'] + four['kernel_flops']
  assert 0.95 * four['model_flops'] < done < 1.35 * four['model_flops']
  assert four['sent_bytes']['all-gather'] > 0
  # No array has all the logits, nor all the table.
  assert not any(str(CFG.V) in name for name in four['largest_arrays'])
  assert four['tokens'] == 100 * 8 * 256
  assert 0 < four['mfu'] < 1
  assert four['seconds'] <= four['seconds_serial']
  json.dumps(four)


def test_the_table_tells_facts_from_estimates(four):
  text = plan.table(four)
  facts, estimates = text.split('ESTIMATES')
  assert 'MEMORY, GiB a chip (compiled)' in facts
  assert 'COMPILED TRAFFIC' in facts and 'tokens/s' not in facts
  assert 'MFU' in estimates


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'])
def test_every_family_of_tpus_compiles(name):
  found = plan.plan(CONFIG, name, report=quiet)
  assert found['fits'] and found['source'] == 'compiled'
  assert found['attention'] == 'splash'
  assert found['compiled_flops'] > 0 and found['sent_bytes']


@pytest.mark.slow
def test_a_mesh_of_all_axes_does_the_same_arithmetic(four):
  other = changed(CONFIG, mesh=dict(data=1, fsdp=2, tensor=2))
  found = plan.plan(other, 'v5e:2x2', report=quiet)
  assert found['compiled_flops'] == pytest.approx(
      four['compiled_flops'], rel=0.1)


def test_the_largest_batch_is_the_largest_that_fits():
  found = plan.plan(CONFIG, 'h100:8', search=True, report=quiet)
  largest = found['largest_batch']
  assert largest % 8 == 0

  def fits(batch):
    config = changed(CONFIG, data=dict(batch=batch))
    return plan.plan(config, 'h100:8', report=quiet)['fits']

  assert fits(largest)
  assert not fits(largest + 8 * max(1, largest // 8 // 16))


def test_gpus_are_planned_by_arithmetic():
  found = plan.plan(CONFIG, 'h100:8', report=quiet)
  assert found['source'] == 'estimated' and found['chips'] == 8
  assert 'compiled_flops' not in found
  assert '(estimated)' in plan.table(found)
  more = plan.plan(
      changed(CONFIG, data=dict(batch=16)), 'h100:8', report=quiet)
  assert more['peak_bytes_per_chip'] > found['peak_bytes_per_chip']
  assert more['bytes']['optimizer'] == found['bytes']['optimizer']


@pytest.mark.parametrize('name, part', [
    ('v9:2x2', "'v9:2x2' is not known"), ('v5e', "'v5e' is not known"),
    ('v5e:', 'v5e:4x4'), ('', 'v5e:4x4'), ('v5e:2x2x', 'v5e:4x4'),
    ('v5e:-2x2', 'v5e:4x4'), ('v5e:2.5x2', 'v5e:4x4'), ('v5e:٤x٤', 'v5e:4x4'),
    ('v5litepod-16', 'v5e:4x4'), ('v4-8', 'v4:2x2x1'),
    ('v5e:4x4x4', 'slice of v5e has 2 dimensions'),
    ('v6e:2x2x2', 'slice of v6e has 2 dimensions'),
    ('v5e:16', 'has 2 dimensions'), ('v4:4x4', 'slice of v4 has 3 dimensions'),
    ('v5e:0x4', 'pod of 16x16'), ('v5e:1000x1000', 'pod of 16x16'),
    ('v5e:8x32', 'pod of 16x16'), ('v5p:28x20x17', 'pod of 16x20x28'),
    ('v5e:' + '9' * 40 + 'x1', 'v5e:4x4'), ('v5e:3x7', "'v5e:3x7'"),
    ('h100:2x2', 'number of GPUs'), ('h100:0', 'GPUs from 1'),
    ('h100:999999999', 'GPUs from 1'), ('h100:3', 'does not divide')])
def test_bad_topologies_are_refused(name, part):
  """By what exists, or by the compiler; never by its death."""
  with tiny.refused(part):
    plan.plan(CONFIG, name, report=quiet)


def test_another_fault_of_the_child_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr(process, '_CHILD', '1 / 0')
  with pytest.raises(RuntimeError, match='Traceback(.|\n)*ZeroDivisionError'):
    plan.plan(CONFIG, 'v5e:2x2', report=quiet)


@pytest.mark.parametrize('name, chips', [
    ('v5e:1x1', 1), ('v6e:1x1', 1), ('v5e:2x4', 8), ('v5e:04x04', 16),
    ('V5E:4x8', 32), ('v4:2x2x1', 4), ('v5p:2x2x2', 8), ('v5p:28x16x20', 8960),
    ('H100:8', 8)])
def test_topologies_that_exist_have_their_chips(name, chips):
  """Cores of a chip are one device each, or one together."""
  devices, chip = plan.devices_of(name)
  assert len(devices) == chips
  assert chip.hbm_bytes >= 16 << 30


def test_a_compiler_that_aborts_is_an_error_message(monkeypatch, tmp_path):
  """What it does for a slice of v5e with three dimensions, if asked to."""
  monkeypatch.setitem(topology._PODS, 'v5e', (16, 16, 16))
  monkeypatch.setattr(process, '_CHILD', (
      'from recursive_tx.plan import process, topology;'
      "topology._PODS['v5e'] = (16, 16, 16); process.main()"))
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  with tiny.refused('v5e:4x4x4', 'SIGABRT', 'chip_bounds().z', 'another'):
    plan.plan(changed(CONFIG, data=dict(batch=64)), 'v5e:4x4x4', report=quiet)
  # What the compiler had written is gone.
  assert not list(tmp_path.iterdir())


def test_the_command_prints_json():
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', 'plan', '--json',
       '--config=configs/gemma_2b.py:loops=3,rank=512,teacher',
       '--topology=h100:64'],
      cwd=ROOT, capture_output=True, text=True, env={
          **os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['fits'] and found['peak_bytes_per_chip'] < 80 * 2**30
  assert found['bytes']['teacher'] > 0


@pytest.mark.parametrize('message, gib', [
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of'
     ' 15.75G hbm.', 17.5),
    ('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, '
     'the total memory required for HLO temporaries (512.0M) exceeds available '
     'HBM (15.75G).', 0.5),
    ('INTERNAL: Used 3G of nothing', None)])
def test_what_the_compiler_says_it_needed(message, gib):
  needed = plan.needed_bytes(message)
  assert needed == (gib and gib * 2**30)
