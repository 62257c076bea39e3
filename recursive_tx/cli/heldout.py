"""The flags of held-out text, for the verbs that read some."""

from collections.abc import Callable, Sequence
import os

from absl import flags

from recursive_tx import data
from recursive_tx.data import files
from recursive_tx.errors import UserError

# Whoever calls `define` owns the flags, and shows them in its help.
flags.disclaim_key_flags()

_MOST = 1 << 20  # Sequences, or tokens of one.


def define(verb: str, seq_len: int, help_len: str) -> Callable:
  """Defines them.

  Args:
    verb: whose they are.
    seq_len: default of --seq_len.
    help_len: what a sequence is to the verb.

  Returns:
    tokenizer -> held-out batches, of one sequence after the other.
  """
  text = flags.DEFINE_multi_string(
      'text', [],
      'Held-out files, a glob; give it again for more. Those named .jsonl hold'
      ' a document in the field "text" of each line.')
  document = flags.DEFINE_string(
      'document', 'file',
      'What a document of a text file is: file, or the line between two'
      ' documents, such as <|endoftext|>.')
  length = flags.DEFINE_integer(
      'seq_len', seq_len, help_len, lower_bound=1, upper_bound=_MOST)
  batch = flags.DEFINE_integer(
      'batch', 8, 'Sequences at a time.', lower_bound=1, upper_bound=_MOST)
  max_tokens = flags.DEFINE_integer(
      'max_tokens', 0, 'Tokens to predict at most, which may end inside a'
      ' document; 0: all there are.', lower_bound=0)

  def task(number, glob):
    records = glob.lower().endswith('.jsonl')
    return data.Task(
        f'text{number}', 'jsonl' if records else 'text', train=(glob,),
        heldout=(glob,), document='' if records else document.value)

  def read(tokenizer):
    if not text.value:
      raise UserError(f'--text is missing; see {verb} --help')
    tasks = tuple(task(i, glob) for i, glob in enumerate(text.value))
    _check_once(tasks)
    config = data.DataConfig(
        tasks, seq_len=length.value, batch=batch.value, shards=1)
    return data.heldout(
        config, tokenizer, max_tokens=max_tokens.value or None)

  return read


def _check_once(tasks: Sequence[data.Task]) -> None:
  """Raises UserError where two tasks match a file, which would count twice."""
  found = {}
  for task in tasks:
    for path in files.find(task, 'heldout'):
      real = path if '://' in path else os.path.realpath(path)
      other = found.setdefault(real, task)
      if other is not task:
        raise UserError(
            f'{path} would count twice, by --text={other.heldout[0]} and by'
            f' --text={task.heldout[0]}; give it once')
