"""Every form from one directory: whole, checked and described, or refused."""

import dataclasses
import json
import sys

import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files
from recursive_tx.errors import UserError
from recursive_tx.store import convert, export, looped

_LLAMA = dataclasses.replace(
    tiny.FAMILIES['llama'], attention_bias=False, mlp_bias=False)
TIED = dataclasses.replace(
    _LLAMA, layers_per_loop=2, loops=3, loop_norms=False)
NEEDS = {'gguf': ['gguf'], 'recursive': ['torch', 'transformers']}


def skip_without(form):
  for package in NEEDS.get(form, ()):
    pytest.importorskip(package, reason=f'pip install {package}')


@pytest.fixture
def tied(tmp_path):
  rtx.save(tmp_path / 'tied', TIED, tiny.variables(TIED))
  return tmp_path / 'tied'


@pytest.mark.parametrize('form', export.FORMS)
def test_a_form_is_checked_and_described(form, tied, tmp_path):
  skip_without(form)
  found = export.export(tied, tmp_path / 'out', form=form, check=True)
  assert found['max_logit_difference'] < 1e-4 < found['max_logit']
  assert 0 <= found['max_kl'] < 1e-6 and found['length'] == 512
  stored = json.loads((tmp_path / 'out' / 'check.json').read_text())
  assert stored == {'form': form, 'dtype': 'float32', **found}
  card = (tmp_path / 'out' / 'README.md').read_text()
  for part in (f'--form={form}', 'max_kl', 'A recursive decoder', 'check.json'):
    assert part in card
  assert str(tmp_path) not in card
  size = sum(path.stat().st_size for path in (tmp_path / 'out').iterdir()
             if path.suffix in ('.gguf', '.safetensors'))
  once = 4 * convert.parameters(TIED)['total']
  assert (once < size < 1.5 * once + 3000) == (form != 'unrolled')


@pytest.mark.parametrize('form', export.FORMS)
def test_a_check_finds_what_is_wrong(form, tied, tmp_path, monkeypatch):
  """In half precision both sides differ, and the check says how far."""
  skip_without(form)
  found = export.export(
      tied, tmp_path / 'out', form=form, dtype='bfloat16', check=True)
  assert found['max_logit_difference'] > 1e-3
  assert 1e-7 < found['kl'] < found['max_kl']


@pytest.mark.parametrize('form', export.FORMS)
def test_what_is_for_early_exits_is_dropped_with_a_line(
    form, tmp_path, caplog):
  skip_without(form)
  cfg = dataclasses.replace(TIED, rank='head2', exit_gate=5)
  values = tiny.variables(cfg)
  rtx.save(tmp_path / 'model', cfg, values)
  with caplog.at_level('WARNING'):
    found = export.export(
        tmp_path / 'model', tmp_path / 'out', form=form, check=True)
  said = [row.getMessage() for row in caplog.records]
  assert len([line for line in said if 'Dropped the exit gate' in line]) == 1
  assert len([line for line in said
              if 'Dropped the adapter of the head' in line]) == 1
  assert found['max_logit_difference'] < 1e-4


@pytest.mark.parametrize('form', export.FORMS)
def test_loops_that_share_keys_are_refused(form, tmp_path):
  skip_without(form)
  cfg = dataclasses.replace(TIED, loop_keys=False)
  rtx.save(tmp_path / 'model', cfg, tiny.variables(cfg))
  with tiny.refused('loop_keys=False'):
    export.export(tmp_path / 'model', tmp_path / 'out', form=form)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model']


def test_a_form_or_dtype_that_is_none_is_refused(tied, tmp_path):
  with tiny.refused("'gguff'", "did you mean 'gguf'"):
    export.export(tied, tmp_path / 'out', form='gguff')
  for form in ('unrolled', 'recursive', 'nanbeige'):
    with tiny.refused(f'dtype of --form={form}', 'q8_0'):
      export.export(tied, tmp_path / 'out', form=form, dtype='q8_0')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('form, package', [
    ('gguf', 'gguf'), ('recursive', 'transformers')])
def test_a_package_that_lacks_is_named_before_the_work(
    form, package, tied, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with tiny.refused('pip install', package):
    export.export(tied, tmp_path / 'out', form=form, check=True)
  assert not (tmp_path / 'out').exists()


def test_a_check_that_fails_leaves_nothing(tied, tmp_path):
  class Stopped(Exception):
    pass

  def stop(what, total, done):
    if what == 'check':
      raise Stopped

  with pytest.raises(Stopped):
    export.export(tied, tmp_path / 'out', check=True, progress=stop)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['tied']


# The looped Llama.


def test_nanbeige_holds_a_llamas_tensors_once(tied, tmp_path):
  export.export(tied, tmp_path / 'out', form='nanbeige')
  found = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert found['architectures'] == ['NanbeigeForCausalLM']
  assert (found['model_type'], found['num_loops']) == ('nanbeige', 3)
  assert found['num_hidden_layers'] == 2
  assert found['skip_loop_final_norm'] is True
  names = set(files.Reader(tmp_path / 'out').shapes)
  assert {name.split('.')[2] for name in names
          if name.startswith('model.layers')} == {'0', '1'}
  cfg, values = looped.load(tmp_path / 'out')
  assert cfg == TIED
  tiny.assert_same_tree(values, tiny.variables(TIED))


@pytest.mark.parametrize('change, said', [
    (dict(rank='q2'), 'adapters (rank=q2)'),
    (dict(loop_norms=True), 'norms of their own'),
    (dict(prelude=1), 'a prelude or a coda (1, 0)'),
    (dict(coda=1), 'a prelude or a coda (0, 1)')])
def test_what_a_looped_llama_lacks_is_refused(change, said, tmp_path):
  cfg = dataclasses.replace(TIED, **change)
  rtx.save(tmp_path / 'model', cfg, tiny.variables(cfg))
  with tiny.refused('--form=nanbeige', said, '--noloop_norms'):
    export.export(tmp_path / 'model', tmp_path / 'out', form='nanbeige')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('family', ['mistral', 'gemma', 'gpt_neox'])
def test_a_block_that_is_no_llamas_is_refused(family, tmp_path):
  cfg = dataclasses.replace(tiny.FAMILIES[family], layers_per_loop=2, loops=3,
                            loop_norms=False)
  rtx.save(tmp_path / 'model', cfg, tiny.variables(cfg))
  with tiny.refused(family, '--form=recursive'):
    export.export(tmp_path / 'model', tmp_path / 'out', form='nanbeige')
  assert not (tmp_path / 'out').exists()


# The card.


def test_the_card_says_where_a_model_is_from(tmp_path):
  source = tmp_path / 'source'
  tiny.make_ours(source, _LLAMA)
  tiny.edit_config(source, lambda hf: hf.update(_name_or_path='org/small'))
  (source / 'README.md').write_text(
      '---\nlicense: apache-2.0\ntags: [x]\n---\n# Small\n')
  (source / 'LICENSE').write_text('terms')
  convert.convert(source, tmp_path / 'new', loops=2, rank='q3+mlp5')
  export.export(tmp_path / 'new', tmp_path / 'out')
  card = (tmp_path / 'out' / 'README.md').read_text()
  cfg = rtx.open(tmp_path / 'new').config
  total = convert.parameters(cfg)['total']
  for part in (
      'license: apache-2.0', 'org/small', 'LICENSE', 'LlamaForCausalLM',
      '--loops=2 --rank=q3+mlp5 --init=average --lora=svd', f'{total:,}',
      'A relaxed recursive decoder', 'None was made',
      "from_pretrained('DIR')"):
    assert part in card, part
  assert 'tags: [x]' not in card
  assert (tmp_path / 'out' / 'SOURCE_README.md').read_text().endswith(
      '# Small\n')
  # Once more: the card of an export is not its source's.
  export.export(tmp_path / 'out', tmp_path / 'again')
  assert 'A decoder' in (tmp_path / 'again' / 'README.md').read_text()


def test_an_unknown_form_ends_the_verb_with_one_line(tied, tmp_path):
  with pytest.raises(UserError, match='form'):
    export.export(tied, tmp_path / 'out', form='onnx')
