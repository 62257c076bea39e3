"""Rows as the docstring draws them, and that nothing is lost or read twice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recursive_tx.evaluate import shared_rows
from recursive_tx.evaluate.shared_rows import Request


def test_a_row_is_what_the_module_describes():
  batch, = shared_rows.batches(
      [Request([7, 8], [1, 2, 3]), Request([7, 8], [4, 5])], max_length=9,
      tokens=99)
  assert (batch.size, batch.length) == (1, 256)
  arrays = shared_rows.arrays(batch)
  for name, row in (('token', [7, 8, 1, 2, 4]), ('position', [0, 1, 2, 3, 2]),
                    ('branch', [0, 0, 1, 1, 2]), ('tree', [1] * 5)):
    found = getattr(arrays, f'{name}_BT')[0].tolist()
    assert found == row + [0] * 251, name
  assert arrays.count == 5
  for name, row, rest in (('at', [1, 2, 3, 1, 4], 0),
                          ('target', [1, 2, 3, 4, 5], 0),
                          ('owner', [0, 0, 0, 1, 1], -1)):
    found = getattr(arrays, f'{name}_A').tolist()
    assert found == row + [rest] * 251, name


ids = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@settings(deadline=None)
@given(st.lists(st.tuples(ids, ids), max_size=30), st.integers(40, 60))
def test_every_request_is_in_one_place(pairs, max_length):
  requests = [Request(*pair) for pair in pairs]
  batches = shared_rows.batches(requests, max_length=max_length, tokens=600)
  found = {}
  for batch in batches:
    assert len(batch.rows) <= batch.size
    assert batch.size * batch.length <= max(600, batch.length)
    arrays = shared_rows.arrays(batch)
    place_A, owner_A = arrays.at_A[:arrays.count], arrays.owner_A[:arrays.count]
    for at, target, owner in zip(
        place_A, arrays.target_A[:arrays.count], owner_A, strict=True):
      b, t = divmod(at, batch.length)
      found.setdefault(int(owner), []).append((
          int(target), int(arrays.token_BT[b, t]),
          int(arrays.position_BT[b, t])))
  assert sorted(found) == list(range(len(requests)))
  for number, (context, more) in enumerate(requests):
    text = [*context, *more][-max_length - 1:]
    n = len(text) - len(more)
    assert found[number] == [
        (text[i], text[i - 1], i - 1) for i in range(n, len(text))]


def test_a_context_is_read_once():
  context = list(range(100))
  requests = [Request(context, [1, 2, 3]) for _ in range(4)]
  requests += [Request([9, *context], [5])]
  batch, = shared_rows.batches(requests, max_length=999, tokens=2048)
  arrays = shared_rows.arrays(batch)
  assert (arrays.tree_BT > 0).sum() == 100 + 4 * 2 + 101


def test_a_tree_of_many_continuations_is_split():
  requests = [Request([1, 2], [3] * 100) for _ in range(60)]
  batches = shared_rows.batches(requests, max_length=999, tokens=2048)
  assert max(batch.length for batch in batches) == 1024
  used = sum((shared_rows.arrays(batch).tree_BT > 0).sum()
             for batch in batches)
  assert used == 60 * 99 + 6 * 2


def test_rows_are_full_and_of_few_lengths():
  requests = [Request([i] * (20 + i * 7 % 400), [1] * (1 + i % 9))
              for i in range(500)]
  batches = shared_rows.batches(requests, max_length=999, tokens=2048)
  shapes = {(batch.size, batch.length) for batch in batches}
  assert {length for _, length in shapes} == {256, 384, 512}
  assert len(shapes) == 3
  used = sum((shared_rows.arrays(batch).tree_BT > 0).sum()
             for batch in batches)
  assert used > 0.85 * sum(batch.size * batch.length for batch in batches)
