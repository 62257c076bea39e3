"""Requests to score, packed into rows so that a shared context is read once.

A tree is a context and the continuations that follow it, its branches. In a
row, the context comes first and the branches one after the other; the
positions of every branch count from the end of the context. A row holds
several trees. An example, with the context 7 8 and the continuations 1 2 3 and
4 5 (the last token of each is only predicted):

  token     7 8 1 2 4
  position  0 1 2 3 2
  branch    0 0 1 1 2

A token sees the tokens before it of its own tree that belong to the context
(branch 0) or to its own branch. NumPy only; knows nothing of models.
"""

import bisect
import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recursive_tx.errors import UserError

# The shortest row. Trees that are shorter share it.
_SHORTEST = 256
# A context is repeated rather than have one tree exceed this many tokens, or
# twice the context.
_TREE = 1024


class Request(NamedTuple):
  """A continuation to score.

  Attributes:
    context: token ids before it, at least one: BOS, or whatever the model
      reads first, where there is no text.
    continuation: the token ids whose probability is asked, at least one.
  """
  context: Sequence[int]
  continuation: Sequence[int]


class Tree(NamedTuple):
  """A context, its continuations, and the numbers of their requests."""
  context: tuple[int, ...]
  continuations: list[Sequence[int]]
  numbers: list[int]

  @property
  def size(self) -> int:
    """Tokens that it takes in a row; at least as many as are predicted."""
    predicted = sum(map(len, self.continuations))
    return predicted + max(0, len(self.context) - len(self.continuations))


class Batch(NamedTuple):
  """Rows of one length.

  Attributes:
    rows: the trees of each.
    length: T, of every row.
    size: B; rows beyond `rows` are empty.
  """
  rows: list[list[Tree]]
  length: int
  size: int


class Arrays(NamedTuple):
  """A batch as the model reads it; int32.

  Attributes:
    token_BT: token ids, 0 where a row is empty.
    position_BT: position of each token in its context and branch.
    tree_BT: from 1; 0 where a row is empty.
    branch_BT: 0 for a context, from 1 for the branches of a tree.
    at_A: for every predicted token, b * T + t of the token before it; A is
      B * T, and what exceeds `count` is 0.
    target_A: the predicted tokens.
    owner_A: number of the request of each; what exceeds `count` is -1.
    count: predicted tokens.
  """
  token_BT: np.ndarray
  position_BT: np.ndarray
  tree_BT: np.ndarray
  branch_BT: np.ndarray
  at_A: np.ndarray
  target_A: np.ndarray
  owner_A: np.ndarray
  count: int


def batches(
    requests: Sequence[Request], *, max_length: int, tokens: int
) -> list[Batch]:
  """Packs requests, the longest first, so that any time estimate is high.

  Args:
    requests: what to score.
    max_length: most tokens that the model reads; longer requests lose the
      first tokens of their context.
    tokens: of a batch, at most, unless one row has more.

  Raises:
    UserError: an empty context or continuation, or a continuation of more
      than max_length tokens.
  """
  rows = collections.defaultdict(list)
  for length, row in _rows(_trees(requests, max_length)):
    rows[length].append(row)
  found = []
  for length, several in rows.items():
    # Batches of one size, which is compiled once, with few empty rows.
    count = -(-len(several) * length // max(tokens, length))
    size = -(-len(several) // count)
    found += [Batch(several[i:i + size], length, size)
              for i in range(0, len(several), size)]
  return found


def arrays(batch: Batch) -> Arrays:
  """The arrays of a batch."""
  shape = batch.size, batch.length
  token_BT, position_BT, tree_BT, branch_BT = np.zeros((4, *shape), np.int32)
  at, target, owner = [], [], []
  for b, row in enumerate(batch.rows):
    t = 0
    for number, tree in enumerate(row, 1):
      begin, C = t, len(tree.context)
      last = t + C - 1
      token_BT[b, t:t + C] = tree.context
      position_BT[b, t:t + C] = np.arange(C)
      t += C
      for branch, (ids, of) in enumerate(
          zip(tree.continuations, tree.numbers, strict=True), 1):
        n = len(ids) - 1
        token_BT[b, t:t + n] = ids[:-1]
        position_BT[b, t:t + n] = C + np.arange(n)
        branch_BT[b, t:t + n] = branch
        places = [last, *range(t, t + n)]
        at += [b * batch.length + place for place in places]
        target += ids
        owner += [of] * len(ids)
        t += n
      tree_BT[b, begin:t] = number
  A = batch.size * batch.length
  at_A, target_A, owner_A = np.zeros((3, A), np.int32)
  at_A[:len(at)], target_A[:len(at)] = at, target
  owner_A[:len(at)], owner_A[len(at):] = owner, -1
  return Arrays(token_BT, position_BT, tree_BT, branch_BT, at_A, target_A,
                owner_A, len(at))


def _trees(requests: Sequence[Request], max_length: int) -> list[Tree]:
  """Requests by context."""
  open_trees: dict[tuple[int, ...], Tree] = {}
  trees = []
  for number, (context, continuation) in enumerate(requests):
    if not len(context) or not len(continuation):
      raise UserError(
          f'request {number} has an empty'
          f' {"continuation" if len(context) else "context"}; expected at least'
          ' one token (BOS, where there is no text)')
    if len(continuation) > max_length:
      raise UserError(
          f'request {number} has a continuation of {len(continuation)} tokens,'
          f' but the model reads at most {max_length}; shorten it or raise the'
          ' maximal length')
    room = max_length + 1 - len(continuation)
    key = tuple(int(id) for id in context[-room:])
    ids = [int(id) for id in continuation]
    tree = open_trees.get(key)
    if tree is None or tree.size + len(ids) > max(_TREE, 2 * len(key)):
      tree = open_trees[key] = Tree(key, [], [])
      trees.append(tree)
    tree.continuations.append(ids)
    tree.numbers.append(number)
  return trees


def _rows(trees: list[Tree]) -> Iterator[tuple[int, list[Tree]]]:
  """Lengths and trees of rows, the longest first; best fit."""
  trees = sorted(trees, key=lambda tree: tree.size)
  sizes = [tree.size for tree in trees]
  while trees:
    room = length = _bucket(sizes[-1])
    row = []
    while i := bisect.bisect_right(sizes, room):
      room -= sizes.pop(i - 1)
      row.append(trees.pop(i - 1))
    yield length, row


def _bucket(size: int) -> int:
  """The least of 256, 384, 512, 768, 1024, ... that holds `size`."""
  power = _SHORTEST
  while power < size:
    power *= 2
  middle = power // 4 * 3
  return middle if size <= middle and power > _SHORTEST else power
