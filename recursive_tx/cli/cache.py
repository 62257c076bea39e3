"""cache: tokenise a config's data once, so that training only reads ids.

  python -m recursive_tx cache --config=configs/gemma_2b.py \\
    --config.tokenizer=GEMMA_DIR --output=DIR
  python -m recursive_tx train --config.data.cache=DIR ...

The files are those of SeqIO's cached tasks. A cache is tied to the tokenizer
and to the files' names and sizes, and serves every seq_len, batch and seed.
"""

import dataclasses
import os

from absl import flags

from recursive_tx.cli import arguments, configs
from recursive_tx.data import cache_writer
from recursive_tx.errors import in_range
from recursive_tx.store import opening
from recursive_tx.text.columns import columns

_CONFIG = configs.define()
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory on disk to make; it appears whole or not at '
    'all. It may be copied to a bucket.')
_OVERWRITE = flags.DEFINE_bool(
    'overwrite', False, 'Replace --output where it exists.')
_PROCESSES = flags.DEFINE_integer(
    'processes', 0, 'How many tokenise at a time, in [0, inf); 0: one a core.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, output=_OUTPUT.value)
  in_range('--processes', _PROCESSES.value, '[0, inf)', int)
  config = configs.typed(_CONFIG.value)
  source = config.tokenizer_from
  with arguments.progress('cache', ' files') as progress:
    rows = cache_writer.write(
        dataclasses.replace(config.data, cache=''),
        opening.companions(source), _OUTPUT.value,
        processes=_PROCESSES.value or len(os.sched_getaffinity(0)),
        overwrite=_OVERWRITE.value, progress=progress)
  lines = [('task', 'split', 'left out', 'documents', 'tokens', 'bytes')]
  for row in rows:
    faults = ', '.join(f'{n} {kind}' for kind, n in row['faults'].items())
    lines.append((
        row['task'], row['split'], faults or 'none', f'{row["documents"]:,}',
        f'{row["tokens"]:,}', f'{row["bytes"]:,}'))
  print(columns(lines, left=3))
  print(f'{_OUTPUT.value}; train with --config.data.cache={_OUTPUT.value}')
