"""evaluate: a model on held-out text, or on tasks.

  python -m recursive_tx evaluate --checkpoint=DIR --text='books/*.txt'
  python -m recursive_tx evaluate --checkpoint=DIR --tasks=piqa,arc_easy

Text gives the loss, the perplexity and bits per byte of every loop's output.
Tasks are those of lm-evaluation-harness (the extra [eval]).
"""

import functools

from absl import flags
from tqdm import tqdm

from recursive_tx import config as config_lib
from recursive_tx import evaluate, files
from recursive_tx.cli import arguments, evaluate_tasks, heldout
from recursive_tx.errors import UserError
from recursive_tx.store.opening import Opened

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, a Hugging Face one, or the workdir of a run.')
_HELDOUT = heldout.define(
    'evaluate', 1024, 'Tokens of context; longer documents are cut.')
_STRIDE = flags.DEFINE_integer(
    'stride', 0, 'Predict so many tokens at a time, at most --seq_len, with as'
    ' many before them as make --seq_len; 0: pieces of --seq_len, each from its'
    ' own tokens only.', lower_bound=0)
_TASKS = evaluate_tasks.define()
_DTYPE = flags.DEFINE_string(
    'dtype', 'float32', 'Of the computation: float32 or bfloat16.')
_OUTPUT = flags.DEFINE_string(
    'output', '', 'JSON file for the result. Of tasks, the table is written'
    ' beside it (.md) and, with --exits, a plot (.png).')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  if _OUTPUT.value:
    files.check_file(_OUTPUT.value)
  run = config_lib.Run(dtype=_DTYPE.value)
  tasks = _TASKS()
  if tasks and flags.FLAGS.text:
    raise UserError('--text and --tasks are two evaluations; give one of them')
  if _STRIDE.value > flags.FLAGS.seq_len:
    raise UserError(f'--stride={_STRIDE.value} leaves tokens out; expected at'
                    f' most --seq_len={flags.FLAGS.seq_len}')
  model = arguments.opened(_CHECKPOINT.value)
  with arguments.enough_memory():
    if tasks:
      evaluate_tasks.show(tasks(model, run), _OUTPUT.value)
      return
    result = _of_text(model, run)
  print(evaluate.table(result))
  if _OUTPUT.value:
    with files.new_file(_OUTPUT.value) as new:
      files.write_json(new, result)


def _of_text(model: Opened, run: config_lib.Run) -> dict:
  text = _HELDOUT(model.tokenizer)
  score = evaluate.evaluate
  if _STRIDE.value:
    score = functools.partial(
        evaluate.evaluate_strided, seq_len=flags.FLAGS.seq_len,
        stride=_STRIDE.value)
  result = score(
      model.config, model.variables, text, run=run,
      progress=functools.partial(
          tqdm, desc='evaluate', unit=' batches', delay=0.5))
  evaluate.add_words(result, text, model.tokenizer)
  return result
