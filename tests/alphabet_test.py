"""One letter, one meaning: the alphabet of config.py, held where it is used.

A capital letter is a dimension: in an einsum string, at the end of an array's
name, or alone as a size. Here every one of them is looked up in the alphabet,
and those that are sizes of the model in ModelConfig.
"""

import ast
import contextlib
import dataclasses
import io
import pathlib
import re
import sys
import tokenize

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import config, engine, exits
from recursive_tx.exits import forward

PACKAGE = pathlib.Path(rtx.__file__).parent
MODULES = sorted(PACKAGE.rglob('*.py'))


def alphabet() -> set[str]:
  """Letters with a meaning: words of one capital in config.py's table."""
  table = re.search(r'\n\n((?:  .*\n)+)\n', config.__doc__).group(1)
  return set(re.findall(r'\b[A-Z]\b', table))


LETTERS = alphabet()
_SUFFIX = re.compile(r'[a-z][a-z0-9_]*_([A-Z1]+)')
_EINSUM = re.compile(r'[A-Za-z.]*,[A-Za-z.,]*->[A-Za-z.]*')


def _used(path: pathlib.Path) -> dict[str, set[str]]:
  """Letters of a module, and where each stands."""
  found = {}
  text = path.read_text()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.NAME:
      match = _SUFFIX.fullmatch(token.string)
      letters = match.group(1) if match else (
          token.string if len(token.string) == 1 else '')
    else:
      letters = ''
    for letter in letters:
      if letter.isupper():
        found.setdefault(letter, set()).add(token.string)
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and (
        _EINSUM.fullmatch(node.value)):
      for letter in node.value:
        if letter.isupper():
          found.setdefault(letter, set()).add(node.value)
  return found


def test_the_alphabet_is_that_of_the_model():
  fields = {field.name for field in dataclasses.fields(config.ModelConfig)}
  sizes = {name for name in fields if len(name) == 1}
  kernels = set(''.join(config.KERNELS.values())) - set(',->')
  assert sizes | kernels <= LETTERS
  assert len(LETTERS) >= 20


@pytest.mark.parametrize(
    'path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_letter_has_its_meaning(path):
  strange = {letter: names for letter, names in _used(path).items()
             if letter not in LETTERS}
  assert not strange


# Distinct sizes, so that a letter with another meaning has another size.
CFG = rtx.ModelConfig(
    V=61, D=24, F=40, N=20, K=5, H=6, layers_per_loop=1, loops=3, prelude=1,
    coda=1, rank='9', exit_gate=11, window=8, attention_bias=True, tied=False)
SIZES = {**{letter: getattr(CFG, letter) for letter in 'VDFNKHW'},
         'G': CFG.N // CFG.K, 'L': CFG.loops, 'E': CFG.loops - 1}


@contextlib.contextmanager
def _arrays_of_the_package():
  """{name: shapes} of every array in a variable that the package returns with.
  """
  found = {}

  def watch(frame, event, arg):
    if event == 'return' and frame.f_code.co_filename.startswith(str(PACKAGE)):
      for name, value in frame.f_locals.items():
        if _SUFFIX.fullmatch(name) and hasattr(value, 'ndim'):
          found.setdefault(name, set()).add(tuple(value.shape))

  sys.setprofile(watch)
  try:
    yield found
  finally:
    sys.setprofile(None)


def test_arrays_have_the_dimensions_of_their_names():
  """In a pass with exits, and in generating."""
  values, token_BT = tiny.variables(CFG), tiny.tokens(CFG, 2, 16)
  batch = {'token_BT': token_BT, 'segment_BT': np.ones_like(token_BT),
           'position_BT': np.tile(np.arange(16, dtype=np.int32), (2, 1))}
  run = rtx.Run(layout='plain')
  with _arrays_of_the_package() as found:
    tiny.decoder(CFG, run, 'hidden_and_gates')(values, **batch)
    forward.forward(dataclasses.replace(CFG, coda=0), run, 'gate', every=True)(
        values, batch, np.zeros(SIZES['E']))
    served = rtx.Engine(
        CFG, values, slots=7, max_len=20, run=run,
        exit=exits.Exit('gate', (0.5, 0.5)))
    served.submit(engine.Request((1, 2, 3), 4))
    while served.pending:
      served.poll()
  wrong = {}
  for name, shapes in found.items():
    letters = _SUFFIX.fullmatch(name).group(1)
    for shape in shapes:
      if len(shape) != len(letters) or any(
          size not in (1, SIZES.get(letter, size))
          for letter, size in zip(letters, shape, strict=True)):
        wrong.setdefault(name, set()).add(shape)
  assert len(found) > 50
  assert not wrong, '\n'.join(map(str, wrong.items()))
