"""evaluate: loss, perplexity and bits per byte of every loop's output.

  python -m recursive_tx evaluate --checkpoint=DIR --text='books/*.txt'
"""

import functools

from absl import flags
from tqdm import tqdm

from recursive_tx import config as config_lib
from recursive_tx import evaluate, files
from recursive_tx.cli import arguments, heldout

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, a Hugging Face one, or the workdir of a run.')
_HELDOUT = heldout.define(
    'evaluate', 1024, 'Tokens of context; longer documents are cut.')
_DTYPE = flags.DEFINE_string(
    'dtype', 'float32', 'Of the computation: float32 or bfloat16.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file for the result.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  if _OUTPUT.value:
    files.check_file(_OUTPUT.value)
  run = config_lib.Run(dtype=_DTYPE.value)
  model = arguments.opened(_CHECKPOINT.value)
  with arguments.enough_memory():
    result = evaluate.evaluate(
        model.config, model.variables, _HELDOUT(model.tokenizer), run=run,
        progress=functools.partial(
            tqdm, desc='evaluate', unit=' batches', delay=0.5))
  print(evaluate.table(result))
  if _OUTPUT.value:
    with files.new_file(_OUTPUT.value) as new:
      files.write_json(new, result)
