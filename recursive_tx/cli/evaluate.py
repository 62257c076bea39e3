"""evaluate: loss, perplexity and bits per byte of every loop's output.

  python -m recursive_tx evaluate --checkpoint=DIR --text='books/*.txt'
"""

import json
import pathlib

from absl import flags

from recursive_tx import config as config_lib
from recursive_tx import data, evaluate, start
from recursive_tx import tokenizer as tokenizer_lib
from recursive_tx.cli import arguments

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, a Hugging Face one, or the workdir of a run.')
_TEXT = flags.DEFINE_multi_string(
    'text', [],
    'Files to score, a glob; give it again for more. Those named .jsonl hold'
    ' a document in the field "text" of each line.')
_DOCUMENT = flags.DEFINE_string(
    'document', 'file',
    'What a document of a text file is: file, or the line between two'
    ' documents, such as <|endoftext|>.')
_SEQ_LEN = flags.DEFINE_integer(
    'seq_len', 1024, 'Tokens of context; longer documents are cut.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Sequences at a time.')
_MAX_TOKENS = flags.DEFINE_integer(
    'max_tokens', 0, 'Stop after so many tokens, at a document; 0: never.')
_DTYPE = flags.DEFINE_string(
    'dtype', 'float32', 'Of the computation: float32 or bfloat16.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file for the result.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  run = config_lib.Run(dtype=_DTYPE.value)
  if not _TEXT.value:
    raise ValueError('--text is missing; see evaluate --help')
  cfg, variables = start.load(_CHECKPOINT.value)
  tokenizer = tokenizer_lib.load(start.companions(_CHECKPOINT.value))
  tokenizer_lib.check_vocab(tokenizer, cfg.V)
  config = data.DataConfig(
      tuple(_task(i, glob) for i, glob in enumerate(_TEXT.value)),
      seq_len=_SEQ_LEN.value, batch=_BATCH.value, shards=1)
  heldout = data.heldout(
      config, tokenizer, max_tokens=_MAX_TOKENS.value or None)
  result = evaluate.evaluate(cfg, variables, heldout, run=run)
  print(table(result))
  if _OUTPUT.value:
    path = pathlib.Path(_OUTPUT.value)
    path.write_text(json.dumps(result, indent=2) + '\n')


def table(result: dict) -> str:
  """The result of `evaluate` as a person reads it."""
  lines = [
      f'{result["documents"]} documents, {result["bytes"]:,} bytes,'
      f' {result["tokens"]:,} tokens',
      'loop   nats/token   perplexity   bits/byte',
  ]
  for row in result['loops']:
    lines.append(
        f'{row["loop"]:4}{row["loss"]:13.4f}{row["perplexity"]:13.3f}'
        f'{row["bits_per_byte"]:12.4f}')
  return '\n'.join(lines)


def _task(number: int, glob: str) -> data.Task:
  """All files of a glob as held-out documents."""
  records = glob.endswith('.jsonl')
  return data.Task(
      f'text{number}', 'jsonl' if records else 'text', train=(glob,),
      heldout=(glob,), document='' if records else _DOCUMENT.value)
