"""Tasks of lm-evaluation-harness, run on a model of this library.

Every loop's output is scored where that is wanted, and beside the scores
stand those of a model of the same config with random weights: what the task
gives for knowing nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import sys
from typing import Any

from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx.config import ModelConfig, Run
from recursive_tx.errors import UserError, nearest
from recursive_tx.evaluate import answers as answers_lib
from recursive_tx.model import Decoder
from recursive_tx.text import Tokenizer

_RUN = Run()
_SEED = 1234  # Of few-shot examples, as the harness has it.
_BOOTSTRAPS = 200


@dataclasses.dataclass(frozen=True)
class Tasks:
  """What is run.

  Attributes:
    names: of tasks, groups or tags.
    limit: most documents of each task; 0 is all.
    num_fewshot: examples before each question, but for tasks that fix their
      number at 0; None is what a task says, else none.
    include_path: a directory with YAML files of further tasks, or ''.
    exits: score every loop's output.
    control: most documents of each task that the model with random weights
      is scored on; 0 is no such model.
  """
  names: Sequence[str]
  limit: int = 0
  num_fewshot: int | None = None
  include_path: str = ''
  exits: bool = False
  control: int = 200


def evaluate(
    tasks: Tasks, cfg: ModelConfig, variables: dict, tokenizer: Tokenizer, *,
    max_length: int, run: Run = _RUN, cache: pathlib.Path | None = None,
    progress: Callable[..., Iterable] = lambda items, what: items,
) -> dict[str, Any]:
  """Runs tasks.

  Args:
    tasks: which.
    cfg, variables, tokenizer: the model.
    max_length: most tokens that it reads: longer contexts lose their first.
    run: how it is executed.
    cache: a directory for what it answered; None keeps nothing.
    progress: is given batches or requests and what for ('loglikelihood',
      'random weights'), and iterates over them.

  Returns:
    The harness's own dictionary, of the final loop ('results', 'configs',
    'n-samples', ...), and in 'recursive_tx': 'loops', the 'results' of every
    loop that was scored, first loop first, and 'control', those of random
    weights, or None.

  Raises:
    UserError: lm_eval is not installed, a task is not known or its data
      cannot be read.
  """
  with _explained(tasks.names):
    loaded = _load(tasks)

  def run_on(variables, what, limit, exits):
    """One dictionary of the harness for each loop."""
    from recursive_tx.evaluate.harness_model import HarnessModel
    path = cache and cache / answers_lib.fingerprint(
        cfg, variables, run.dtype, tokenizer.digest, tokenizer.opening,
        max_length, exits)
    model = HarnessModel(
        cfg, variables, tokenizer, run=run, exits=exits, max_length=max_length,
        answers=answers_lib.Answers(path and path.with_suffix('.jsonl')),
        progress=lambda items: progress(items, what))
    results = []
    for loop in range(1 if exits else cfg.loops, cfg.loops + 1):
      model.loop = loop
      results.append(_run(loaded, model, tasks, limit))
    return results

  found = run_on(variables, 'evaluate', tasks.limit, tasks.exits)
  control = None
  if tasks.control:
    most = min(tasks.control, tasks.limit or tasks.control)
    control = run_on(random_variables(cfg), 'random weights', most, False)[0]
  result = dict(found[-1])
  result['recursive_tx'] = {
      'model': {**dataclasses.asdict(cfg), 'max_length': max_length,
                'dtype': run.dtype},
      'loops': [each['results'] for each in found],
      'control': control and {
          key: control[key] for key in ('results', 'n-samples')}}
  # Tasks may hold functions, numpy's numbers or paths.
  return json.loads(json.dumps(result, default=str))


def random_variables(cfg: ModelConfig) -> dict:
  """Variables as training from scratch begins with, of seed 0."""
  params = _init_fn(cfg)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  return jax.device_get(meta.unbox(params))


@functools.cache
def _init_fn(cfg: ModelConfig) -> Callable:
  """Kept between calls, so that it is compiled once."""
  return jax.jit(Decoder(cfg).init)


def _load(tasks: Tasks) -> dict[str, Any]:
  """The harness's tasks by name, with their data."""
  from lm_eval.tasks import TaskManager

  manager = None
  if tasks.include_path:
    if not pathlib.Path(tasks.include_path).is_dir():
      raise UserError(
          f'--include_path={tasks.include_path} is no directory; expected one'
          ' with YAML files of tasks')
    manager = TaskManager(
        include_path=tasks.include_path, include_defaults=False)
  # The harness's own tasks are thousands of files.
  if not manager or set(tasks.names) - set(manager.all_tasks):
    manager = TaskManager(include_path=tasks.include_path or None)
  for name in tasks.names:
    if name not in manager.all_tasks:
      raise UserError(
          f'task {name!r} is not known{nearest(name, manager.all_tasks)};'
          ' expected a task of lm-evaluation-harness, or of a YAML file in'
          ' --include_path')
  loaded = manager.load(list(tasks.names))
  for task in loaded['tasks'].values():
    shots = task.get_config('num_fewshot')
    if shots != 0:  # A 0 is meant, as for a prompt that has its own examples.
      wanted = tasks.num_fewshot
      task.set_config(
          key='num_fewshot', value=(shots or 0) if wanted is None else wanted)
  return loaded


def _run(loaded: dict, model: Any, tasks: Tasks, limit: int) -> dict:
  """One evaluation, seeded as the harness's own command is."""
  from lm_eval import evaluator

  random.seed(0)
  np.random.seed(_SEED)
  for task in loaded['tasks'].values():
    task.set_fewshot_seed(seed=_SEED)
  # It would fork this process, in which JAX has threads.
  os.environ['DISABLE_MULTIPROC'] = '1'
  # Standard output is for the results.
  with contextlib.redirect_stdout(sys.stderr):
    result = evaluator.evaluate(
        model, loaded, limit=limit or None, bootstrap_iters=_BOOTSTRAPS,
        log_samples=False)
  result['config'] = {
      'model': 'recursive_tx', 'model_args': None, 'limit': limit or None,
      'num_fewshot': tasks.num_fewshot, 'bootstrap_iters': _BOOTSTRAPS,
      'random_seed': 0, 'numpy_seed': _SEED, 'fewshot_seed': _SEED,
      **model.get_model_info()}
  return result


@contextlib.contextmanager
def _explained(names: Sequence[str]) -> Iterator[None]:
  """Makes a UserError of what stands between a user and a task's data."""
  try:
    import lm_eval  # noqa: F401
  except ImportError:
    raise UserError(
        '--tasks needs lm-evaluation-harness; pip install'
        " 'recursive_tx[eval]'") from None
  from datasets.exceptions import DatasetsError
  try:
    yield
  except (OSError, DatasetsError) as error:
    line = ' '.join(str(error).split())[:200]
    raise UserError(
        f'the data of {", ".join(names)} cannot be read ({line}); tasks of the'
        ' harness read the Hugging Face hub: run where it is reached, or'
        ' write tasks that read local files (docs/evaluate.md)') from error
