"""What the verbs share: faults that a person can mend."""

import types

import jax
import jax.numpy as jnp
import pytest
import tiny

import recursive_tx as rtx
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


def test_the_context_a_model_was_trained_with(tmp_path, caplog):
  cfg = tiny.FAMILIES['llama']
  tiny.make_ours(tmp_path / 'hf', cfg)
  assert arguments.context(rtx.open(tmp_path / 'hf')) is None
  tiny.edit_config(
      tmp_path / 'hf', lambda hf: hf.update(max_position_embeddings=77))
  found = rtx.open(tmp_path / 'hf')
  assert arguments.context(found) == 77
  rtx.save(tmp_path / 'saved', cfg, found.variables,
           companions=tmp_path / 'hf')
  trained = arguments.context(rtx.open(tmp_path / 'saved'))
  assert trained == 77
  with caplog.at_level('WARNING', logger='absl'):
    arguments.warn_beyond(77, trained, '--max_len=77 tokens')
    arguments.warn_beyond(999, None, '--max_len=999 tokens')
    assert not caplog.records
    arguments.warn_beyond(78, trained, '--max_len=78 tokens')
  (record,) = caplog.records
  assert '--max_len=78 tokens are more than the 77' in record.getMessage()


@pytest.mark.parametrize('value', [0, -1, float('nan'), float('inf')])
def test_a_flag_below_its_least_value_is_refused(value):
  flag = types.SimpleNamespace(name='slots', value=value)
  with tiny.refused('--slots', repr(value), 'at least 1'):
    arguments.at_least(1, flag)
