"""Directory to directory: equals `relax` in memory, and reports the truth."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files
from recursive_tx.files import paths
from recursive_tx.store import convert, export, native


@pytest.fixture
def source(tmp_path):
  tiny.make_ours(tmp_path / 'source', tiny.FAMILIES['llama'])
  (tmp_path / 'source' / 'tokenizer.model').write_bytes(b'pieces')
  (tmp_path / 'source' / 'LICENSE').write_text('terms')
  return tmp_path / 'source'


def test_streaming_equals_relax_in_memory(source, tmp_path):
  arguments = dict(loops=2, rank='q3+mlp5', init='average', prelude=1, coda=1)
  convert.convert(source, tmp_path / 'new', **arguments)
  cfg, variables = rtx.restore(tmp_path / 'new')
  expected, values = rtx.relax(*rtx.load_hf(source), **arguments)
  assert cfg == expected
  tiny.assert_same_tree(variables, values)


@pytest.mark.slow
def test_fitting_streams_too(source, tmp_path):
  arguments = dict(
      loops=2, rank='q3+mlp5', init='fit', prelude=1, coda=1,
      calibration=tiny.tokens(tiny.FAMILIES['llama'], 16))
  told = []
  report = convert.convert(
      source, tmp_path / 'new', **arguments,
      progress=lambda total, done: told.append((total, done)))
  cfg, variables = rtx.restore(tmp_path / 'new')
  expected, values = rtx.relax(*rtx.load_hf(source), **arguments)
  assert cfg == expected
  tiny.assert_same_tree(variables, values)
  assert report['init'] == report['kept'] == 'fit'
  assert 'init:' not in convert.table(report)
  assert 'init: lower' in convert.table({**report, 'kept': 'lower'})
  # What is told comes to the whole, little by little; nothing stays behind.
  totals, done = zip(*told, strict=True)
  assert len(set(totals)) == 1 and len(done) > 30
  assert sum(done) == pytest.approx(totals[0], rel=1e-6)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['new', 'source']


def test_report_says_what_the_factors_keep(source, tmp_path):
  report = convert.convert(source, tmp_path / 'new', loops=2, rank=4,
                           init='lower')
  assert report == json.loads((tmp_path / 'new' / 'report.json').read_text())
  vanilla, original = rtx.load_hf(source)
  cfg, variables = rtx.restore(tmp_path / 'new')
  assert report['original']['total'] == sum(
      leaf.size for _, leaf in paths.items(original))
  assert report['parameters']['total'] == sum(
      leaf.size for _, leaf in paths.items(variables))
  params = variables['params']
  shared = params['block']['layers']['mlp']['up']['kernel']
  layers = original['params']['block']['layers']['mlp']['up']['kernel']
  residual = layers[cfg.layers_per_loop:] - shared
  product = np.matmul(params['adapters']['up']['a'][1],
                      params['adapters']['up']['b'][1])
  share = report['energy_kept']['up']['share']
  # The first loop is the lower layers themselves: nothing to keep.
  assert share[0] == 1
  np.testing.assert_allclose(
      share[1], (product**2).sum() / (residual**2).sum(), rtol=1e-5)
  assert 'up' in convert.table(report)


@pytest.mark.slow
def test_check_finds_no_difference_at_full_rank_and_some_below(
    source, tmp_path):
  exact = convert.convert(
      source, tmp_path / 'exact', loops=2, rank='full', check=True)['check']
  near = convert.convert(
      source, tmp_path / 'near', loops=2, rank=2, check=True)['check']
  assert exact['max_logit_difference'] < 1e-4 and exact['kl'] < 1e-6
  assert near['max_logit_difference'] > 1e-2 and near['kl'] > 1e-4


def test_what_goes_with_the_model_goes_along(source, tmp_path):
  convert.convert(source, tmp_path / 'new', loops=2)
  export.export(tmp_path / 'new', tmp_path / 'out')
  for name in ('tokenizer.model', 'LICENSE'):
    for folder in ('new', 'out'):
      assert (tmp_path / folder / name).read_bytes() == (
          source / name).read_bytes()
  assert native.read_source(tmp_path / 'new')['model_type'] == 'llama'


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_export_at_full_rank_restores_the_source(source, tmp_path, dtype):
  convert.convert(source, tmp_path / 'new', loops=3, rank='full')
  export.export(tmp_path / 'new', tmp_path / 'out', dtype=dtype)
  cfg, variables = rtx.load_hf(tmp_path / 'out')
  original, values = rtx.load_hf(source)
  assert cfg == original
  rounding = {'float32': 1e-5, 'float16': 2e-3, 'bfloat16': 2e-2}[dtype]
  for path, leaf in paths.items(variables['params']):
    assert str(leaf.dtype) == dtype
    assert tiny.distance(leaf.astype(np.float32),
                         paths.get(values['params'], path)) < rounding


def test_tensors_of_another_dtype_keep_it(source, tmp_path):
  """As bf16 models whose norms are fp32: every bit comes back."""
  def change(tensors):
    for name, value in tensors.items():
      if 'norm' not in name:
        tensors[name] = value.astype(ml_dtypes.bfloat16)

  tiny.edit_tensors(source, change)
  there = files.Reader(source)
  assert {str(dtype) for dtype in there.dtypes.values()} == {
      'float32', 'bfloat16'}
  export.export(source, tmp_path / 'same')
  convert.convert(source, tmp_path / 'new', loops=3, rank='full')
  export.export(tmp_path / 'new', tmp_path / 'out')
  same, out = (files.Reader(tmp_path / name) for name in ('same', 'out'))
  for name, dtype in there.dtypes.items():
    assert same.dtypes[name] == out.dtypes[name] == dtype, name
    assert np.array_equal(there.read(name), same.read(name)), name
    if 'norm' in name:
      assert np.array_equal(there.read(name), out.read(name)), name
  export.export(tmp_path / 'new', tmp_path / 'half', dtype='float16')
  assert set(map(str, files.Reader(tmp_path / 'half').dtypes.values())) == {
      'float16'}


def test_an_interrupted_convert_leaves_nothing(source, tmp_path):
  def interrupt(total, written):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    convert.convert(source, tmp_path / 'new', loops=2, progress=interrupt)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


def test_an_output_that_exists_is_kept_unless_told(source, tmp_path):
  (tmp_path / 'new').mkdir()
  (tmp_path / 'new' / 'precious').write_text('x')
  with tiny.refused('new exists', 'name another output'):
    convert.convert(source, tmp_path / 'new', loops=2)
  assert (tmp_path / 'new' / 'precious').exists()
  convert.convert(source, tmp_path / 'new', loops=2, overwrite=True)
  assert native.is_saved(tmp_path / 'new')


def test_the_source_is_not_replaced(source):
  with tiny.refused('is the source itself'):
    convert.convert(source, source, loops=2, overwrite=True)
  assert (source / 'model.safetensors').exists()


def test_a_checked_export_is_compared_and_reported(source, tmp_path):
  (source / 'tokenizer.model').unlink()
  convert.convert(source, tmp_path / 'new', loops=2, rank=3)
  reported = {}
  found = {}
  for dtype in ('float32', 'bfloat16'):
    def progress(what, total, done):
      before = reported.setdefault((what, total), 0)
      reported[what, total] = before + done
    reported.clear()
    found[dtype] = export.export(
        tmp_path / 'new', tmp_path / dtype, dtype=dtype, check=True,
        progress=progress)
    assert [what for what, _ in reported] == ['export', 'check']
    assert all(total == done for (_, total), done in reported.items())
  assert found['float32']['max_logit_difference'] < 1e-4
  assert found['bfloat16']['max_logit_difference'] > 1e-3
  assert export.export(tmp_path / 'new', tmp_path / 'unchecked') is None
