"""Cells of a table are never glued to the next ones."""

from recursive_tx.text.columns import columns


def test_columns_are_as_wide_as_their_widest_cell():
  text = columns([('name', 'size'), ('a' * 30, '1'), ('b', '9' * 20)])
  first, second, third = text.splitlines()
  assert first == 'name' + ' ' * (26 + 3 + 16) + 'size'
  assert second == 'a' * 30 + ' ' * (3 + 19) + '1'
  assert third == 'b' + ' ' * (29 + 3) + '9' * 20
  assert [len(line.split('   ')[-1].split()) for line in (
      first, second, third)] == [1, 1, 1]


def test_rows_of_other_lengths_are_our_mistake():
  import pytest
  with pytest.raises(ValueError):
    columns([('a', 'b'), ('c',)])
