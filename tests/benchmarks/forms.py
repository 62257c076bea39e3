"""A model through every form: size on disk, greedy tokens side by side.

  python tests/benchmarks/forms.py --source=HF_DIR --output=FORMS.json

Converts the source to two loops, relaxed (--rank) and tied (rank 0, norms
shared), exports both in fp32 in every form that holds them, and has each
program continue 20 prompts. Programs whose interpreter
RECURSIVE_TX_LLAMA_CPP, RECURSIVE_TX_MLX or RECURSIVE_TX_VLLM names are run; see
`launch/interop.sh`.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import runtimes  # noqa: E402

NEW = 24
PROMPTS = (
    'Once upon a time', 'The capital of France is', 'def fibonacci(n):',
    'In 1984 there were 23 cats, and', 'Water boils at', 'The quick brown fox',
    'My favourite book is', 'To make bread, you need', 'The moon is',
    'import numpy as np\n', 'Question: what is 2 + 2?\nAnswer:',
    'She opened the door and', 'The French Revolution began', 'Photosynthesis',
    'It was a dark and stormy night;', 'A list of colours: red,',
    'The largest planet is', 'for i in range(10):\n', 'Dear Sir or Madam,',
    'Once there was a little bear who')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', required=True)
  parser.add_argument('--rank', default='64')
  parser.add_argument('--output', required=True)
  args = parser.parse_args()
  from recursive_tx.store import convert

  rows = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for name, how in (('relaxed', dict(rank=args.rank)),
                      ('tied', dict(rank=0, loop_norms=False))):
      convert.convert(
          args.source, folder / name, loops=2, init='average', **how)
      rows += measured(folder, name)
      pathlib.Path(args.output).write_text(json.dumps(rows, indent=1) + '\n')


def measured(folder: pathlib.Path, name: str) -> list[dict]:
  """Rows of one model."""
  import recursive_tx as rtx
  from recursive_tx.store import export

  opened = rtx.open(folder / name)
  prompts = [opened.tokenizer.opening + opened.tokenizer.encode(text)
             for text in PROMPTS]
  ours = rtx.generate(
      opened.config, opened.variables, prompts, max_new_tokens=NEW)
  rows = []
  for form, programs in (
      ('unrolled', ['transformers']), ('recursive', ['transformers', 'vllm']),
      ('gguf', ['llama_cpp']), ('nanbeige', ['mlx'])):
    out = folder / f'{name}-{form}'
    try:
      found = export.export(folder / name, out, form=form, dtype='float32',
                            check=True)
    except rtx.UserError as error:
      print(name, form, error, flush=True)
      continue
    size = sum(path.stat().st_size for path in out.iterdir()
               if path.suffix in ('.safetensors', '.gguf'))
    for program in programs:
      interpreter = (sys.executable if program == 'transformers'
                     else runtimes.python(program))
      row = {'model': name, 'form': form, 'program': program,
             'bytes': size, 'kl': found['kl'],
             'max_logit_difference': found['max_logit_difference']}
      if interpreter:
        there = runtimes.run(program, out, prompts, new=NEW,
                             interpreter=interpreter)
        row |= {'prompts': len(prompts), 'equal': sum(
                    one == list(other) for one, other in zip(
                        there['tokens'], ours, strict=True))}
      rows.append(row)
      print(row, flush=True)
  return rows


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  main()
