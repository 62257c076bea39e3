"""data: what a config's data is, before it is trained on.

  python -m recursive_tx data --config=configs/gemma_2b.py \\
    --config.tokenizer=GEMMA_DIR --histogram=lengths.png

Counts documents of every task, then makes the first batches that `train` would
read, and shows rows of them. In a row ⟦ and ⟧ hold what is learnt, and ‖ stands
between documents.
"""

from absl import flags
import numpy as np

from recursive_tx import files
from recursive_tx.cli import arguments, configs
from recursive_tx.data import survey
from recursive_tx.store import opening
from recursive_tx.text.columns import columns

_CONFIG = configs.define()
_DOCUMENTS = flags.DEFINE_integer(
    'documents', 1000, 'Documents to count of each task and split; 0: all.',
    lower_bound=0)
_BATCHES = flags.DEFINE_integer(
    'batches', 20, 'Batches to make, as train would.', lower_bound=1)
_ROWS = flags.DEFINE_integer(
    'rows', 10, 'Rows to show.', lower_bound=0)
_WIDTH = flags.DEFINE_integer(
    'width', 400, 'Characters to show of a row; 0: all.', lower_bound=0)
_HISTOGRAM = flags.DEFINE_string(
    'histogram', '', 'A picture to write of how long documents are, by its'
    ' suffix .png, .svg or .pdf.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value)
  if _HISTOGRAM.value:
    files.check_file(_HISTOGRAM.value)
  config = configs.typed(_CONFIG.value)
  tokenizer = opening.load_tokenizer(config.tokenizer_from)
  with arguments.progress('documents', '') as progress:
    found = survey.documents(
        config.data, tokenizer, most=_DOCUMENTS.value, progress=progress)
  print(columns([_HEADINGS, *map(_line, found)], left=3))
  if not all(each.is_all for each in found):
    print('+: there are more; --documents=0 counts all.')
  with arguments.progress('batches', '') as progress:
    batches = survey.batches(
        config.data, tokenizer, count=_BATCHES.value, rows=_ROWS.value,
        progress=progress)
  print(
      f'\n{batches.count} batches of [{config.data.batch}, '
      f'{config.data.seq_len}]: {batches.used:,} tokens in {batches.pieces:,} '
      f'pieces of documents; {batches.used / batches.slots:.2%} of the slots '
      f'used, {batches.learnt / batches.used:.2%} of these learnt')
  for i, row in enumerate(batches.rows):
    width = _WIDTH.value or len(row)
    more = f' ... ({len(row):,} characters)' if len(row) > width else ''
    print(f'\nrow {i}: {row[:width]}{more}')
  if _HISTOGRAM.value:
    with files.new_file(_HISTOGRAM.value) as path:
      survey.histogram(found, config.data.seq_len, str(path))
    print(f'\n{_HISTOGRAM.value}')


_HEADINGS = ('task', 'split', 'left out or cut', 'documents', 'tokens',
             'learnt', 'bytes', 'median', 'longest', 'tokens/s')


def _line(counts: survey.Documents) -> tuple[str, ...]:
  faults = ', '.join(f'{n} {kind}' for kind, n in counts.faults.items())
  lengths = counts.lengths or [0]
  return (
      counts.task, counts.split, faults or 'none',
      f'{len(counts.lengths):,}{"" if counts.is_all else "+"}',
      f'{sum(lengths):,}', f'{counts.learnt:,}', f'{counts.num_bytes:,}',
      f'{np.median(lengths):,.0f}', f'{max(lengths):,}',
      f'{counts.tokens_per_second:,.0f}')
