"""The flags of lm-evaluation-harness's tasks, for `evaluate`."""

from collections.abc import Callable
import os
import pathlib
from typing import Any

from absl import flags
from tqdm import tqdm

from recursive_tx import files
from recursive_tx.cli import arguments
from recursive_tx.config import Run
from recursive_tx.errors import UserError
from recursive_tx.evaluate import harness, task_report
from recursive_tx.store.opening import Opened

# Whoever calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()

_LENGTH = 2048  # Where a model does not say how many it was trained with.


def define() -> Callable[[], Callable[[Opened, Run], dict[str, Any]] | None]:
  """Defines them.

  Returns:
    What checks them, and returns None where no task is named, else (model,
    run) -> results.
  """
  names = flags.DEFINE_list(
      'tasks', [], 'Tasks of lm-evaluation-harness, separated by commas, such'
      ' as piqa,arc_easy,lambada_openai.')
  limit = flags.DEFINE_integer(
      'limit', 0, 'Most documents of each task; 0: all.', lower_bound=0)
  shots = flags.DEFINE_integer(
      'num_fewshot', None, 'Examples before each question; not given: as each'
      ' task has it.', lower_bound=0)
  include = flags.DEFINE_string(
      'include_path', '', 'Directory with YAML files of further tasks.')
  exits = flags.DEFINE_boolean(
      'exits', False, "Score the output of every loop, not only the last's.")
  control = flags.DEFINE_integer(
      'control', 200, 'Most documents of each task on which random weights are'
      ' scored, to show what knowing nothing gives; 0: none.', lower_bound=0)
  length = flags.DEFINE_integer(
      'max_length', 0, 'Most tokens that the model reads; longer contexts lose'
      ' their first. 0: as many as it was trained with.', lower_bound=0)
  cache = flags.DEFINE_string(
      'cache', '~/.cache/recursive_tx/evaluate', 'Directory of what models'
      ' answered, so that an interrupted run continues; empty: none.')

  def read():
    if not names.value:
      return None
    tasks = harness.Tasks(
        tuple(names.value), limit.value, shots.value, include.value,
        exits.value, control.value)
    kept = files.check_workdir(cache.value) if cache.value else None
    if kept and '://' in kept:
      raise UserError(f'--cache={kept} is not on disk; name a directory')

    def run(model: Opened, run: Run) -> dict[str, Any]:
      # The harness reads no model through the tokenizers library's threads.
      os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
      return harness.evaluate(
          tasks, model.config, model.variables, model.tokenizer, run=run,
          max_length=length.value or arguments.context(model) or _LENGTH,
          cache=kept and pathlib.Path(kept), progress=_progress)

    return run

  return read


def show(result: dict[str, Any], output: str) -> None:
  """Prints the table; writes it, the JSON and a plot of several loops."""
  text = task_report.table(result)
  print(text)
  if not output:
    return
  path = pathlib.Path(output)
  with files.new_file(path) as new:
    files.write_json(new, result)
  with files.new_file(path.with_suffix('.md')) as new:
    new.write_text(text + '\n', 'utf-8')
  if len(result['recursive_tx']['loops']) > 1:
    with files.new_file(path.with_suffix('.png')) as new:
      task_report.plot(result, new)


def _progress(items, what):
  return tqdm(items, desc=what, delay=0.5, smoothing=0)
