"""export: write a stock Hugging Face model, loops unrolled, adapters merged.

  python -m recursive_tx export --checkpoint=DIR --output=HF_DIR

It opens in transformers, vLLM and whatever reads its architecture.
"""

from absl import flags

from recursive_tx.cli import arguments
from recursive_tx.store import convert, export

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Saved model directory, of convert or of train.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory to make; it appears whole or not at all.')
_DTYPE = flags.DEFINE_string(
    'dtype', '', 'float32, bfloat16 or float16. Empty: what the model it '
    'came from had, else float32.')
_CHECK = flags.DEFINE_bool(
    'check', False, 'Compare logits with those of --checkpoint on a long '
    'prompt; needs memory for both models.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value, output=_OUTPUT.value)
  with (arguments.progress('export', 'B') as written,
        arguments.progress('check', ' parameters') as checked):
    bars = {'export': written, 'check': checked}
    found = export.export(
        _CHECKPOINT.value, _OUTPUT.value, dtype=_DTYPE.value,
        check=_CHECK.value,
        progress=lambda what, total, done: bars[what](total, done))
  print(f'wrote {_OUTPUT.value}')
  if found:
    print(convert.check_table(found))
