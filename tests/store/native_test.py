"""A saved directory holds the model, bit for bit, and where it came from."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files
from recursive_tx.files import paths
from recursive_tx.store import native

LLAMA = tiny.FAMILIES['llama']


@pytest.fixture
def directory(tmp_path):
  rtx.save(tmp_path / 'saved', tiny.MIXED, tiny.variables(tiny.MIXED))
  return tmp_path / 'saved'


@pytest.mark.parametrize('cfg', [
    tiny.MIXED, LLAMA,
    dataclasses.replace(tiny.FAMILIES['gpt_neox'], loops=2, rank='full',
                        rope_scaling=(8.0, 1.0, 4.0, 64.0))])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_restore_is_what_was_saved(cfg, dtype, tmp_path):
  values = jax.tree.map(lambda v: v.astype(dtype), tiny.variables(cfg))
  rtx.save(tmp_path / 'saved', cfg, values)
  again, loaded = rtx.restore(tmp_path / 'saved')
  assert again == cfg and hash(again) == hash(cfg)
  tiny.assert_same_tree(loaded, values)
  again, loaded, *_ = rtx.open(tmp_path / 'saved')
  assert again == cfg
  tiny.assert_same_tree(loaded, values)


def test_leaves_may_be_arrays_of_jax_and_of_several_dtypes(tmp_path):
  values = tiny.variables(LLAMA)
  values['params']['norm']['scale'] = jax.numpy.asarray(
      values['params']['norm']['scale'], 'bfloat16')
  rtx.save(tmp_path / 'saved', LLAMA, values)
  loaded = rtx.restore(tmp_path / 'saved')[1]['params']
  assert loaded['norm']['scale'].dtype == ml_dtypes.bfloat16
  assert loaded['embed']['embedding'].dtype == np.float32


def test_load_reads_hugging_face_directories_too(tmp_path):
  values = tiny.make_ours(tmp_path / 'hf', LLAMA)
  cfg, loaded, *_ = rtx.open(tmp_path / 'hf')
  assert cfg == LLAMA
  tiny.assert_same_tree(loaded, values)


def test_the_config_is_the_models_fields(directory):
  stored = json.loads((directory / 'config.json').read_text())
  assert stored['format'] == 'recursive_tx'
  assert stored['version'] == native.VERSION
  assert set(stored['model']) == {
      field.name for field in dataclasses.fields(rtx.ModelConfig)}


# What is carried along.


def test_where_it_came_from_is_carried_along(tmp_path):
  source = tmp_path / 'hf'
  tiny.make_ours(source, LLAMA)
  tiny.edit_config(source, lambda hf: hf.update(
      eos_token_id=[3, 4], max_position_embeddings=77))
  for name in ('tokenizer.model', 'tokenizer.json', 'LICENSE', 'README.md'):
    (source / name).write_bytes(name.encode())
  (source / 'training_log.txt').write_text('not ours to copy')
  cfg, values = rtx.relax(*rtx.load_hf(source), loops=2, rank=2)
  rtx.save(tmp_path / 'one', cfg, values, companions=source)
  # Once more, from a saved directory.
  rtx.save(tmp_path / 'two', cfg, values, companions=tmp_path / 'one')
  for directory in (tmp_path / 'one', tmp_path / 'two'):
    assert {p.name for p in directory.iterdir()} == {
        'config.json', 'model.safetensors', 'source.json', 'tokenizer.model',
        'tokenizer.json', 'LICENSE', 'README.md'}
    assert (directory / 'LICENSE').read_bytes() == b'LICENSE'
    hf = json.loads((source / 'config.json').read_text())
    origin = native.read_source(directory)
    assert origin == {**hf, 'dtype_on_disk': 'float32'}
    again, loaded = rtx.restore(directory)
    assert again == cfg
    tiny.assert_same_tree(loaded, values)


def test_no_companions_no_source(directory):
  assert native.read_source(directory) is None
  assert {p.name for p in directory.iterdir()} == {
      'config.json', 'model.safetensors'}


# Bad input.


def test_a_newer_format_is_refused(directory):
  tiny.edit_config(directory, lambda c: c.update(version=native.VERSION + 1))
  with tiny.refused(directory, native.VERSION + 1, f'up to {native.VERSION}',
                    'newer'):
    rtx.restore(directory)


def test_an_unknown_field_names_the_nearest(directory):
  tiny.edit_config(directory, lambda c: c['model'].update(loop_norm=True))
  with tiny.refused("'loop_norm'", "'loop_norms'", 'config.json'):
    rtx.restore(directory)


@pytest.mark.parametrize('key', ['version', 'model'])
def test_an_incomplete_config_is_refused(key, directory):
  tiny.edit_config(directory, lambda c: c.pop(key))
  with tiny.refused(key):
    rtx.restore(directory)


def test_a_missing_field_is_refused(directory):
  tiny.edit_config(directory, lambda c: c['model'].pop('D'))
  with tiny.refused('D'):
    rtx.restore(directory)


def test_another_kind_of_directory_is_refused(tmp_path):
  tiny.make_ours(tmp_path / 'hf', LLAMA)
  with tiny.refused(tmp_path / 'hf', 'not a saved model', 'convert'):
    rtx.restore(tmp_path / 'hf')
  with tiny.refused('nowhere', 'not a saved model'):
    rtx.restore(tmp_path / 'nowhere')
  with tiny.refused('nowhere', 'no config.json'):
    rtx.open(tmp_path / 'nowhere')


@pytest.mark.parametrize('change', [
    lambda t: t.pop('adapters/q/a'),
    lambda t: t.update({'adapters/q/a': t['adapters/q/a'][:1]}),
    lambda t: t.update({'adapters/q/aa': t['adapters/q/a']}),
])
def test_tensors_that_do_not_fit_are_named(change, directory):
  tiny.edit_tensors(directory, change)
  with tiny.refused("'adapters/q/a"):
    rtx.restore(directory)


def test_a_tensor_that_is_not_finite_is_named(directory):
  def spoil(tensors):
    tensors['norm/scale'][2] = np.nan

  tiny.edit_tensors(directory, spoil)
  with tiny.refused("'norm/scale'", 'NaN'):
    rtx.restore(directory)


def test_a_truncated_file_is_named(directory):
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  with tiny.refused('model.safetensors', 'truncated'):
    rtx.restore(directory)


def test_an_interrupted_save_leaves_nothing(tmp_path):
  # The companions are read last, when the weights have been written.
  with tiny.refused('nowhere'):
    rtx.save(tmp_path / 'out', LLAMA, tiny.variables(LLAMA),
             companions=tmp_path / 'nowhere')
  assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_keeps_what_was_there(directory):
  before = rtx.restore(directory)
  with tiny.refused('nowhere'):
    rtx.save(directory, LLAMA, tiny.variables(LLAMA), overwrite=True,
             companions=directory / 'nowhere')
  assert rtx.restore(directory)[0] == before[0]
  tiny.assert_same_tree(rtx.restore(directory)[1], before[1])
  assert [p.name for p in directory.parent.iterdir()] == [directory.name]


def test_a_directory_is_replaced_only_if_asked(directory):
  with tiny.refused(directory, 'exists'):
    rtx.save(directory, LLAMA, tiny.variables(LLAMA))
  assert rtx.restore(directory)[0] == tiny.MIXED
  rtx.save(directory, LLAMA, tiny.variables(LLAMA), overwrite=True)
  assert rtx.restore(directory)[0] == LLAMA


def test_variables_of_another_config_are_not_saved(tmp_path):
  values = tiny.variables(LLAMA)
  with tiny.refused():
    rtx.save(tmp_path / 'out', tiny.FAMILIES['mistral'], values)
  assert not (tmp_path / 'out').exists()


def test_paths_are_the_trees(directory):
  assert set(files.Reader(directory).shapes) == {
      path for path, _ in paths.items(tiny.variables(tiny.MIXED)['params'])}
