"""Trees of nested dictionaries by path, such as 'block/vectors/q/bias'."""

from typing import Any


def get(tree: dict, path: str) -> Any:
  """The leaf or branch at a path."""
  for name in path.split('/'):
    tree = tree[name]
  return tree


def put(tree: dict, path: str, value: Any) -> None:
  """Sets the leaf at a path, making the branches on the way."""
  *branches, leaf = path.split('/')
  for name in branches:
    tree = tree.setdefault(name, {})
  tree[leaf] = value


def items(tree: dict, prefix: str = '') -> list[tuple[str, Any]]:
  """(path, leaf) of every leaf, in the tree's order."""
  rows = []
  for name, value in tree.items():
    path = f'{prefix}/{name}' if prefix else name
    rows += items(value, path) if isinstance(value, dict) else [(path, value)]
  return rows
