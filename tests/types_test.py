"""Types of the public API, as a user's type checker sees them.

`launch/test.sh` runs mypy over what pyproject.toml names; here is what that
cannot see.
"""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import tiny

import recursive_tx as rtx

ROOT = tiny.ROOT
NAMES = [name for name, value in vars(rtx).items()
         if not name.startswith('_') and not inspect.ismodule(value)]


def checked(path: pathlib.Path) -> str:
  """What mypy has against a file of a user."""
  done = subprocess.run(
      [sys.executable, '-m', 'mypy', path], cwd=ROOT, capture_output=True,
      text=True)
  return '' if done.returncode == 0 else done.stdout + done.stderr


def example() -> str:
  """README's example of the API."""
  code, = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(),
                     flags=re.M | re.S)
  return code


def test_the_front_pages_example_type_checks(tmp_path):
  path = tmp_path / 'example.py'
  path.write_text(example())
  assert not checked(path)
  wrong = example().replace('loops=2', "loops='two'")
  assert wrong != example()
  path.write_text(wrong)
  assert 'loops' in checked(path)


@pytest.mark.parametrize('name', NAMES)
def test_the_users_file_uses_every_public_name(name):
  assert f'rtx.{name}' in (ROOT / 'tests' / 'typing' / 'user.py').read_text()


def _functions():
  """Public functions, and public methods of the public classes.

  Not those of Decoder: users reach them by name through `apply`, which Flax
  types.
  """
  for name in NAMES:
    value = getattr(rtx, name)
    if inspect.isfunction(value):
      yield name, value
    elif inspect.isclass(value) and value is not rtx.Decoder:
      for method, of in vars(value).items():
        if inspect.isfunction(of) and (
            method == '__init__' or not method.startswith('_')):
          yield f'{name}.{method}', of


@pytest.mark.parametrize(
    'function', [pytest.param(f, id=name) for name, f in _functions()])
def test_every_parameter_and_result_has_a_type(function):
  signature = inspect.signature(function)
  bare = [name for name, parameter in signature.parameters.items()
          if name != 'self' and parameter.annotation is parameter.empty]
  assert not bare
  assert function.__name__ == '__init__' or (
      signature.return_annotation is not signature.empty)
