"""The worked examples of docstrings give what they show."""

import doctest

import pytest

from recursive_tx import data
from recursive_tx.losses import terms


@pytest.mark.parametrize('module', [data, terms])
def test_examples_give_what_they_show(module):
  found = doctest.testmod(module)
  assert found.attempted and not found.failed
