"""What the verbs share: faults that a person can mend."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from recursive_tx.cli import arguments


def test_too_large_a_batch_is_one_line():
  with tiny.refused('RESOURCE_EXHAUSTED', '--seq_len', '--batch'):
    with arguments.enough_memory():
      jnp.zeros((1 << 21, 1 << 21)).block_until_ready()  # 16 TiB.


def test_other_faults_stay_what_they_are():
  with pytest.raises(ZeroDivisionError):
    with arguments.enough_memory():
      1 / 0  # noqa: B018
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    with arguments.enough_memory():
      raise jax.errors.JaxRuntimeError('INTERNAL: something else')
