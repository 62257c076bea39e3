"""What the verbs' command lines share."""

from collections.abc import Callable, Iterator
import contextlib

from absl import flags, logging
import jax
from tqdm import tqdm

from recursive_tx.errors import UserError, in_range
from recursive_tx.store import native, opening


def check(argv: list[str], **required: object) -> None:
  """Raises UserError for stray words or missing flags."""
  if len(argv) > 1:
    raise UserError(f'unexpected arguments {argv[1:]}; flags start with --')
  for name, value in required.items():
    if value in (None, ''):
      raise UserError(f'--{name} is missing; see {argv[0]} --help')


def opened(directory: str) -> opening.Opened:
  """A model for a verb that reads or writes text.

  Raises:
    UserError: as `opening.open`, or there is no tokenizer.
  """
  found = opening.open(directory)
  if found.tokenizer is None:
    opening.load_tokenizer(directory)  # Says what is missing.
  return found


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
  """For the verbs that run batches: too large ones are a person's to mend.

  Raises:
    UserError: the device's memory was too small for the block's work.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    line = str(error).strip().splitlines()[0]
    if 'RESOURCE_EXHAUSTED' not in line:
      raise
    raise UserError(
        f'{line.rstrip(".")}; give a smaller --seq_len or --batch') from error


@contextlib.contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
  """A bar on stderr; yields what takes all the work, and what was just done."""
  with tqdm(desc=what, unit=unit, unit_scale=True, delay=0.5) as bar:
    def show(total: int, done: int) -> None:
      bar.total = total
      bar.update(done)

    yield show


def at_least(least: int, *several: flags.FlagHolder) -> None:
  """Raises UserError for a flag below `least`, infinite or NaN."""
  for flag in several:
    in_range(f'--{flag.name}', flag.value, f'[{least}, inf)')


def context(model: opening.Opened) -> int | None:
  """Positions that a model's source was trained with, None if unknown."""
  source = native.source_config(model.companions)
  found = model.config.positions or source.get('max_position_embeddings')
  return found if type(found) is int and found > 0 else None


def warn_beyond(length: int, trained: int | None, what: str) -> None:
  """Logs one line where a model is to read further than it learnt to."""
  if trained is not None and length > trained:
    logging.warning(
        '%s are more than the %d that the model was trained with'
        ' (max_position_embeddings); what it makes of later ones is undefined.',
        what, trained)
