"""Several engines on several devices answer as one does.

In a process of its own, whose CPU pretends to be three devices.
"""

import json
import os
import subprocess
import sys

import tiny

SCRIPT = """
import json
import jax
import tiny
import recursive_tx as rtx
from recursive_tx import engine

CFG = tiny.FAMILIES['llama']
DEVICES = jax.devices()

def one(device):
  return rtx.Engine(CFG, tiny.variables(CFG), slots=2, max_len=32, steps=4,
                    device=device)

def requests(count):
  return [rtx.Request(prompt[:1 + i % 5].tolist(), 3 + i)
          for i, prompt in enumerate(tiny.tokens(CFG, count, 6))]

def drain(served, wanted):
  ids = [served.submit(request) for request in wanted]
  found = {id: [] for id in ids}
  while served.pending:
    for event in served.poll():
      found[event.id].append((event.token, event.depth, event.finish))
  return list(found.values())

engines = [one(device) for device in DEVICES[1:]]
both, alone, found = engine.Replicas(engines), one(None), {}
found['slots'] = both.slots, both.replicas, both.max_len
# The second time with what the first left behind.
found['texts'] = [[drain(served, wanted) for served in (both, alone)]
                 for wanted in (requests(7), requests(7)[::-1])]
found['devices'] = [
    sorted({str(leaf.device) for leaf in jax.tree.leaves(
        (served._state, served._weights))}) for served in engines]
ids = [both.submit(request) for request in requests(6)]
found['shares'] = [served.pending for served in engines]
found['counts'] = both.pending, both.waiting
both.cancel(ids[1])
found['left'] = [served.pending for served in engines]
heard = set()
while both.pending:
  heard |= {event.id for event in both.poll()}
found['events'] = sorted(ids.index(id) for id in heard)
print(json.dumps(found))
"""


def test_replicas_are_as_one_engine():
  env = {
      **os.environ, 'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'PYTHONPATH': os.pathsep.join(sys.path),
      'XLA_FLAGS': '--xla_force_host_platform_device_count=3',
  }
  done = subprocess.run(
      [sys.executable, '-c', SCRIPT], env=env, capture_output=True, text=True,
      cwd=tiny.TESTS, timeout=600, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['slots'] == [4, 2, 32]
  for together, alone in found['texts']:
    assert together == alone and len(together) == 7
  # Each computes on its own device alone.
  assert found['devices'] == [['cpu:1'], ['cpu:2']]
  # Shared out evenly; what is cancelled is not heard of.
  assert found['shares'] == [3, 3] and found['counts'] == [6, 6]
  assert found['left'] == [3, 2]
  assert found['events'] == [0, 2, 3, 4, 5]
