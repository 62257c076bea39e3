"""Other programs that run what is exported, each in an environment of its own.

A job is read from standard input, one JSON object: the directory `path`; token
ids `prompts`, all of a length, which `new` greedy tokens follow; `texts` to
tokenise; the file `logits` that those of the prompts go to, or ''; `length`,
the context; and `compiled`, for vLLM. The last line of standard output is an
object with 'tokens' and 'texts'.
"""

import json
import os
import pathlib
import subprocess

import pytest

NAMES = ('llama_cpp', 'mlx', 'vllm')


def python(name: str) -> str | None:
  """The interpreter of a program's environment, which interop.sh names."""
  return os.environ.get(f'RECURSIVE_TX_{name.upper()}')


def needs(name: str) -> str:
  """The same; skips a test where there is none."""
  found = python(name)
  if not found:
    pytest.skip(f'bash launch/interop.sh makes an environment with {name}')
  return found


def run(name: str, path, prompts, *, new: int = 16, texts=(), logits='',
        length: int = 256, compiled: bool = False, interpreter: str) -> dict:
  """Runs one job and returns what the program found."""
  job = {'path': str(path), 'prompts': prompts, 'new': new,
         'texts': list(texts), 'logits': str(logits), 'length': length,
         'compiled': compiled}
  done = subprocess.run(
      [interpreter, str(pathlib.Path(__file__).parent / f'run_{name}.py')],
      input=json.dumps(job), capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return json.loads(done.stdout.strip().splitlines()[-1])
