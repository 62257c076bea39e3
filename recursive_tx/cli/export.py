"""export: write a model in a form that other programs load, with a card.

  python -m recursive_tx export --checkpoint=DIR --output=DIR --form=FORM

  unrolled   a stock model: loops unrolled, adapters merged; transformers,
             vLLM and whatever reads the architecture of the source
  recursive  the block once, adapters per loop, with its own PyTorch code;
             transformers and vLLM with trust_remote_code
  gguf       model.gguf for llama.cpp; the block once where that is exact
  nanbeige   a Llama whose layers run several times, the block once; mlx-lm
"""

from absl import flags

from recursive_tx.cli import arguments
from recursive_tx.store import check, export

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Saved model directory, of convert or of train.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory to make; it appears whole or not at all.')
_FORM = flags.DEFINE_string(
    'form', 'unrolled', f'One of {", ".join(export.FORMS)}; see above.')
_DTYPE = flags.DEFINE_string(
    'dtype', '', 'float32, bfloat16 or float16, or q8_0 of --form=gguf. Empty: '
    'what the model it came from had, else float32.')
_CHECK = flags.DEFINE_bool(
    'check', False, 'Compare logits with those of --checkpoint on long '
    'prompts, and keep the result in check.json; needs memory for both '
    'models, and for --form=recursive torch and transformers.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value, output=_OUTPUT.value)
  with (arguments.progress('export', 'B') as written,
        arguments.progress('check', ' tokens') as checked):
    bars = {'export': written, 'check': checked}
    found = export.export(
        _CHECKPOINT.value, _OUTPUT.value, form=_FORM.value,
        dtype=_DTYPE.value, check=_CHECK.value,
        progress=lambda what, total, done: bars[what](total, done))
  print(f'wrote {_OUTPUT.value}')
  if found:
    print(check.table(found))
