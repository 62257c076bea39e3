"""plan: does a run fit a machine, and what would a step cost there?

  python -m recursive_tx plan \\
    --config=configs/gemma_2b.py:loops=3,rank=512,teacher \\
    --topology=v5e:16x16 [--search] [--json]

Compiles the training step ahead of time for a TPU topology (v4, v5e, v5p,
v6e), with no TPU at hand; needs the package libtpu. GPUs (h100:8) by
arithmetic only.
"""

import json
import sys

from absl import flags

from recursive_tx import plan
from recursive_tx.cli import arguments, configs

_CONFIG = configs.define()
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, f'Machine, such as {plan.TOPOLOGIES}.')
_SEARCH = flags.DEFINE_bool(
    'search', False,
    'Also find the largest batch (sequences) that fits; compiles a few times.')
_JSON = flags.DEFINE_bool('json', False, 'Print JSON, bytes and seconds.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, topology=_TOPOLOGY.value)
  found = plan.plan(
      configs.typed(_CONFIG.value), _TOPOLOGY.value, search=_SEARCH.value,
      report=lambda line: print(line, file=sys.stderr))
  print(json.dumps(found, indent=2) if _JSON.value else plan.table(found))
