"""The engine cut along `tensor` gives the tokens of one device.

In a process of its own, whose CPU pretends to be two devices.
"""

import json
import os
import subprocess
import sys

import pytest
import tiny

SCRIPT = """
import json, sys
import jax, numpy as np
import tiny
import recursive_tx as rtx
from recursive_tx import exits, machine
from recursive_tx.engine import engine

rows = []
for cfg in (tiny.MIXED, tiny.FAMILIES['gpt_neox'])[:int(sys.argv[1])]:
  rule = exits.Exit('top', (0.2,) * (cfg.loops - 1))
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, cfg.V, n).tolist() for n in (5, 1, 9)]
  found = {'tokens': [], 'compiled': []}
  cuts = [None, dict(data=1, fsdp=1, tensor=2)]
  for cut in cuts:
    mesh = cut and machine.make_mesh(machine.MeshConfig(**cut))
    served = rtx.Engine(
        cfg, tiny.variables(cfg), slots=2, max_len=32, steps=5, mesh=mesh,
        exit=rule)
    before = engine._burst._cache_size()
    ids = [served.submit(rtx.Request(prompt, 6)) for prompt in prompts]
    got = {id: [] for id in ids}
    while served.pending:
      for event in served.poll():
        got[event.id].append((event.token, event.depth))
    found['tokens'].append(list(got.values()))
    found['compiled'].append(engine._burst._cache_size() - before)
  found['cache'] = str(served._state.cache.k.sharding.spec)
  found['depths'] = sorted({depth for row in got.values() for _, depth in row})
  rows.append(found)
try:
  rtx.Engine(cfg, tiny.variables(cfg), mesh=machine.make_mesh(
      machine.MeshConfig(data=2, fsdp=1, tensor=1)))
except ValueError as error:
  rows.append(str(error))
print(json.dumps(rows))
"""


@pytest.mark.parametrize('models', [
    1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_tensor_parallel_engine_gives_the_same_tokens(models):
  env = {
      **os.environ, 'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'PYTHONPATH': os.pathsep.join(sys.path),
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  done = subprocess.run(
      [sys.executable, '-c', SCRIPT, str(models)], env=env,
      cwd=tiny.TESTS, capture_output=True, text=True,
      timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  *rows, refused = json.loads(done.stdout.splitlines()[-1])
  for found in rows:
    assert found['tokens'][0] == found['tokens'][1]
    # No burst after the first is compiled anew.
    assert found['compiled'] == [1, 1]
    assert 'tensor' in found['cache']
  assert len(rows[0]['depths']) > 1
  assert 'tensor alone' in refused
