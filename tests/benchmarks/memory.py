"""Memory of the paper's largest step on TPUs, compiled without one.

  python tests/benchmarks/memory.py [--output=FILE] [--only=TOPOLOGY]

Gemma 2B to 3 loops at rank 512, its 18-layer bf16 teacher in the same step,
forward KL and exit losses on every loop, context 2048. The last two rows are
the paper's batch of 2 M tokens, without accumulation.
"""

import argparse
import dataclasses
import json
import pathlib

from recursive_tx import plan
from recursive_tx.cli import configs
from recursive_tx.configs import gemma_2b
from recursive_tx.machine.mesh import MeshConfig

# Topology, mesh, sequences a chip, GiB at most.
CASES = (
    ('v5e:4x4', MeshConfig(), 8, 14.0),
    ('v5e:4x4', MeshConfig(), 1, 5.0),
    ('v6e:16x16', MeshConfig(data=16, fsdp=16), 4, 6.0),
    ('v5p:4x4x4', MeshConfig(data=4, fsdp=16), 16, 20.0),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output')
  parser.add_argument('--only')
  args = parser.parse_args()
  config = configs.typed(
      gemma_2b.get_config('loops=3,rank=512,teacher,exits'))
  print('topology   mesh                        a chip   GiB   bar  largest')
  rows = []
  for topology, mesh, sequences, bar in CASES:
    if args.only not in (None, topology):
      continue
    chips = len(plan.devices_of(topology)[0])
    found = plan.plan(dataclasses.replace(
        config, mesh=mesh, data=dataclasses.replace(
            config.data, batch=chips * sequences, shards=1)), topology,
        report=lambda line: None)
    rows.append({**found, 'topology': topology, 'bar': bar})
    print(f'{topology:11}{found["mesh"]:28}{sequences:6}'
          f'{found["peak_bytes_per_chip"] / 2**30:6.2f}{bar:6.1f}  '
          f'{found["largest_arrays"][0]}', flush=True)
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
