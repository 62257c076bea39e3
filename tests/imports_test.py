"""Imports go strictly downward, and the heavy ones wait until needed."""

import ast
import pathlib
import subprocess
import sys

import pytest

import recursive_tx
import recursive_tx.configs

PACKAGE = pathlib.Path(recursive_tx.__file__).parent
# They ship as recursive_tx.configs.
CONFIGS = pathlib.Path(recursive_tx.configs.__file__).parent
# Who may import whom: a room imports from rows above its own only, and its own
# modules may import each other.
ROWS = (
    ('errors',),
    ('config', 'demo', 'files', 'text'),
    ('model', 'data', 'machine'),
    ('exits', 'losses'),
    ('engine',),
    ('tying', 'serve'),
    ('store',),
    ('evaluate',),
    ('train',),
    ('plan',),
    ('configs',),
    ('cli',),
    ('__main__', '__init__'),
)
ROW = {module: i for i, row in enumerate(ROWS) for module in row}
TENSORFLOW = ('tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio',
              'clu')
HARNESS = ('lm_eval', 'datasets')
HEAVY = (*TENSORFLOW, *HARNESS, 'torch', 'transformers')


def _name(path: pathlib.Path) -> str:
  """'data.stream' for data/stream.py, 'data' for data/__init__.py."""
  parts = list(path.relative_to(
      PACKAGE if path.is_relative_to(PACKAGE) else CONFIGS.parent
  ).with_suffix('').parts)
  return '.'.join(parts[:-1] if len(parts) > 1 and parts[-1] == '__init__'
                  else parts)


MODULES = {_name(path): ast.parse(path.read_text())
           for path in sorted([*PACKAGE.rglob('*.py'), *CONFIGS.glob('*.py')])}


def _imports(tree: ast.AST, top_only: bool = False) -> set[str]:
  """Full names of what a module imports; `top_only`: when it is imported."""
  found = set()
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
    elif not (top_only and isinstance(
        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
      found |= _imports(node, top_only)
  return found


def _ours(names: set[str]) -> set[str]:
  """Of full names those of our modules, without the package's name."""
  ours = set()
  for name in names:
    package, *parts = name.split('.')
    if package == 'recursive_tx':
      while parts and '.'.join(parts) not in MODULES:
        parts.pop()  # 'config.one_of' is of 'config'.
      ours.add('.'.join(parts) or '__init__')
  return ours


def _outer(names: set[str]) -> set[str]:
  return {name.split('.')[0] for name in names} - {'recursive_tx'}


def test_every_module_has_a_row():
  odd = {name for name in MODULES if name.split('.')[0] not in ROW}
  assert not odd, 'give new modules a row in ROWS'


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_strictly_downward(name):
  top = name.split('.')[0]
  wrong = set()
  for imported in _ours(_imports(MODULES[name])):
    other = imported.split('.')[0]
    if other == top:
      continue
    if ROW[other] >= ROW[top]:
      wrong.add(imported)
  assert not wrong


def test_no_name_of_the_api_hides_a_room():
  rooms = {name.split('.')[0] for name in MODULES} - {'__init__', '__main__'}
  assert not {name for name in rooms if callable(
      getattr(recursive_tx, name, None))}


# TensorFlow and torch.


def test_heavy_imports_are_where_they_belong():
  for name, module in MODULES.items():
    heavy = _outer(_imports(module)) & set(HEAVY)
    top = name.split('.')[0]
    allowed = {'data': set(TENSORFLOW), 'train': {'clu'},
               'evaluate': set(HARNESS),
               # `export --check` runs what it wrote.
               'store': {'torch', 'transformers'}}.get(top, set())
    assert heavy <= allowed, name


def test_no_module_imports_tensorflow_when_it_is_imported():
  """But those that are themselves imported inside functions only."""
  at_top = {name: _imports(module, top_only=True)
            for name, module in MODULES.items()}
  heavy = {name for name, names in at_top.items()
           if _outer(names) & set(HEAVY)}
  assert heavy <= {'data.pipeline', 'data.ragged', 'data.registered',
                   'data.sources', 'evaluate.harness_model'}
  reached = {name for name, names in at_top.items() if _ours(names) & heavy}
  assert not reached - heavy


def test_config_dicts_and_flags_stay_at_the_door():
  for name, module in MODULES.items():
    if name.split('.')[0] not in ('cli', 'configs', '__main__'):
      names = _imports(module)
      assert 'ml_collections' not in _outer(names), name
      assert not {n for n in names if n.startswith('absl.flags')}, name


def _run(*words):
  """A fresh Python process, from where the package lies."""
  return subprocess.run(
      [sys.executable, *words], cwd=PACKAGE.parent, capture_output=True,
      text=True, timeout=300)


def test_a_fresh_import_loads_neither_tensorflow_nor_torch():
  code = ('import sys, recursive_tx; '
          f'print(*(set({HEAVY!r}) & set(sys.modules)))')
  done = _run('-c', code)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == []


@pytest.mark.parametrize('verb', ['convert', 'generate', 'plan', 'export'])
def test_a_verbs_help_loads_neither_tensorflow_nor_torch(verb):
  if f'cli.{verb}' not in MODULES:
    pytest.skip(f'there is no verb {verb} yet')
  # -X importtime tells every import on stderr.
  done = _run('-X', 'importtime', '-m', 'recursive_tx', verb, '--help')
  assert done.returncode == 0, done.stderr[-2000:]
  assert verb in done.stdout
  loaded = {line.split('|')[-1].strip().split('.')[0]
            for line in done.stderr.splitlines() if '|' in line}
  assert 'recursive_tx' in loaded
  assert not loaded & set(HEAVY)
