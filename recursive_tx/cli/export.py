"""export: write a stock Hugging Face model, loops unrolled, adapters merged.

  python -m recursive_tx export --checkpoint=DIR --output=HF_DIR

It opens in transformers, vLLM and whatever reads its architecture.
"""

from absl import flags

from recursive_tx.cli import arguments
from recursive_tx.store import export

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Saved model directory, of convert or of train.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory to make; it appears whole or not at all.')
_DTYPE = flags.DEFINE_string(
    'dtype', '', 'float32, bfloat16 or float16. Empty: what the model it '
    'came from had, else float32.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value, output=_OUTPUT.value)
  export.export(_CHECKPOINT.value, _OUTPUT.value, dtype=_DTYPE.value)
  print(f'wrote {_OUTPUT.value}')
