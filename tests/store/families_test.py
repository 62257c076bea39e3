"""Law 1: logits equal Hugging Face's, and no attribute is ignored."""

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import model
from recursive_tx.store import config_json, families

LONG = 600  # Past every window and every original length in tiny.HF.


@pytest.mark.parametrize('name', tiny.HF)
def test_logits_equal_those_of_transformers(name, checkpoint):
  directory, made = checkpoint(name)
  cfg, values = rtx.load_hf(directory)
  token_BT = tiny.tokens(cfg, 1, LONG)
  expected_BTV = tiny.torch_logits(made, token_BT)
  logits_BTV = tiny.decoder(cfg.opened_for(LONG))(values, token_BT)
  assert tiny.distance(logits_BTV, expected_BTV) < 1e-5
  assert expected_BTV.std() > 0.1


def test_long_rope_has_other_factors_in_short_contexts(checkpoint):
  directory, made = checkpoint('phi3_long')
  cfg, values = rtx.load_hf(directory)
  original = int(cfg.long_rope[0])
  token_BT = tiny.tokens(cfg, 1, original)
  expected_BTV = tiny.torch_logits(made, token_BT)
  for context in (0, original):
    logits_BTV = tiny.decoder(cfg.opened_for(context))(values, token_BT)
    assert tiny.distance(logits_BTV, expected_BTV) < 1e-5
  logits_BTV = tiny.decoder(cfg.opened_for(original + 1))(values, token_BT)
  assert tiny.distance(logits_BTV, expected_BTV) > 1e-2


def test_every_family_has_a_row():
  assert {kind for kind, _ in tiny.HF.values()} == set(rtx.FAMILIES)


@pytest.mark.parametrize('name', ['stories260K', 'stories3M'])
def test_logits_of_real_models(name):
  pytest.importorskip('torch', reason=tiny.TORCH)
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory = tiny.REAL / name
  if not directory.exists():
    pytest.skip(f'the model {name} is not beside this repository')
  made = tiny.load_hf(directory)
  cfg, values = rtx.load_hf(directory)
  token_BT = tiny.tokens(cfg, 1, 520)
  logits_BTV = tiny.decoder(cfg)(values, token_BT)
  assert tiny.distance(
      logits_BTV, tiny.torch_logits(made, token_BT)) < 1e-5


def test_the_flags_of_each_row_are_read(checkpoint):
  cfgs = {name: rtx.load_hf(checkpoint(name)[0])[0] for name in tiny.HF}
  heads = {name: (cfg.N, cfg.K, cfg.H) for name, cfg in cfgs.items()}
  assert heads == {
      'llama_mha': (4, 4, 8), 'llama_gqa': (4, 2, 8), 'llama_mqa': (4, 1, 12),
      'llama_3': (4, 2, 16), 'mistral': (4, 2, 8), 'gemma': (4, 1, 16),
      'gpt2': (4, 4, 8), 'gpt_neox': (4, 4, 8),
      'gpt_neox_serial': (4, 4, 8),
      'qwen2': (4, 2, 8), 'qwen3': (4, 2, 16), 'olmo2': (4, 2, 8),
      'granite': (4, 2, 8), 'gemma2': (4, 2, 16), 'gemma3': (4, 2, 16),
      'phi3': (4, 2, 8), 'phi3_long': (4, 2, 8), 'smollm3': (4, 2, 8)}
  assert [cfgs[name].pattern for name in ('gemma2', 'gemma3', 'smollm3')] == [
      'wg', 'wg', 'gn']
  assert cfgs['gemma3'].window_theta == 100
  assert cfgs['phi3'].window == 100 and not cfgs['phi3'].long_rope
  assert cfgs['phi3_long'].long_rope == (
      64, (1 + math.log(16) / math.log(64)) ** 0.5, 1.25, 1.5, 2, 7)
  assert cfgs['gemma3'].rope_scaling == (2.5,)
  assert cfgs['granite'].logits_scale == 0.5
  assert cfgs['llama_gqa'].tied and cfgs['gemma'].tied
  assert not cfgs['llama_mha'].tied and not cfgs['gpt_neox'].tied
  assert cfgs['llama_3'].rope_scaling == (8, 1, 4, 64)
  assert cfgs['llama_mqa'].rope_scaling == (2.5,)
  assert cfgs['mistral'].window == 100
  assert cfgs['gpt_neox'].rope_fraction == 0.5
  assert cfgs['gpt_neox'].parallel and not cfgs['gpt_neox_serial'].parallel
  assert cfgs['gemma'].act == 'gelu_tanh' and cfgs['gemma'].embed_scale


# Both dialects of config.json.


def _old(hf):
  """What transformers 4 wrote for what transformers 5 writes, in place."""
  rope = hf.pop('rope_parameters')
  if 'full_attention' in rope:
    hf['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope = rope['full_attention']
  theta, share = rope.pop('rope_theta'), rope.pop('partial_rotary_factor', 1)
  if hf['model_type'] == 'gpt_neox':
    hf.update(rotary_emb_base=theta, rotary_pct=share)
  else:
    hf.update(rope_theta=theta, partial_rotary_factor=share)
  if rope['rope_type'] != 'default':
    hf['rope_scaling'] = rope
  if 'dtype' in hf:
    hf['torch_dtype'] = hf.pop('dtype')


@pytest.mark.parametrize('name', [name for name in tiny.HF if name != 'gpt2'])
def test_both_dialects_of_rope_are_read(name, checkpoint, tmp_path):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, made = checkpoint(name)
  old = tmp_path / 'old'
  shutil.copytree(directory, old)
  tiny.edit_config(old, _old)
  assert rtx.load_hf(old)[0] == rtx.load_hf(directory)[0]
  # transformers itself takes it for the same model.
  token_BT = tiny.tokens(rtx.load_hf(directory)[0], 1, 200)
  again = tiny.load_hf(old)
  assert np.array_equal(tiny.torch_logits(again, token_BT),
                        tiny.torch_logits(made, token_BT))


def test_the_first_name_of_a_rope_type_is_read(checkpoint):
  hf = json.loads((checkpoint('llama_mqa')[0] / 'config.json').read_text())
  cfg = config_json.read(hf)[1]
  _old(hf)
  hf['rope_scaling']['type'] = hf['rope_scaling'].pop('rope_type')
  assert config_json.read(hf)[1] == cfg


LLAMA_3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize('name, both', [
    ('llama_3', dict(rope_scaling=LLAMA_3, rope_theta=5e5)),
    ('llama_mqa', dict(rope_scaling=dict(type='linear', factor=2.5))),
    ('gpt_neox', dict(rotary_pct=0.5, rotary_emb_base=10_000)),
    ('llama_mha', dict(torch_dtype='float32', dtype='float32')),
    ('llama_mha', dict(head_dim=8, partial_rotary_factor=1.0)),
    ('gemma', dict(hidden_activation='gelu', hidden_act='gelu_pytorch_tanh')),
])
def test_fields_that_mean_the_same_may_agree(name, both, checkpoint):
  hf = json.loads((checkpoint(name)[0] / 'config.json').read_text())
  assert config_json.read({**hf, **both}) == config_json.read(hf)


@pytest.mark.parametrize('name, other, parts', [
    ('llama_mha', dict(rope_scaling=LLAMA_3),
     ('rope_parameters.rope_type', 'rope_scaling.rope_type')),
    ('llama_3', dict(rope_scaling={**LLAMA_3, 'factor': 4.0}),
     ('rope_parameters', 'rope_scaling', '4.0')),
    ('llama_mqa', dict(rope_scaling=dict(
        type='linear', rope_type='llama3', factor=2.5)),
     ('rope_scaling.rope_type', 'rope_scaling.type')),
    ('llama_3', dict(rope_theta=1e4), ('rope_theta=10000.0', '500000.0')),
    ('gpt_neox', dict(rotary_emb_base=77), ('rotary_emb_base=77',)),
    ('gpt_neox', dict(rotary_pct=1.0), ('rotary_pct=1.0', '0.5')),
    ('gpt_neox', dict(partial_rotary_factor=0.25), ('=0.25',)),
    ('llama_mha', dict(dtype='float16', torch_dtype='bfloat16'),
     ('float16', 'bfloat16')),
    ('gemma', dict(hidden_activation='relu'), ('hidden_activation',)),
])
def test_fields_that_contradict_each_other_are_refused(
    name, other, parts, checkpoint):
  hf = json.loads((checkpoint(name)[0] / 'config.json').read_text())
  with tiny.refused('config.json', 'contradict', *parts):
    config_json.read({**hf, **other})


@pytest.mark.parametrize('name, odd', [
    ('llama_mha', dict(rope_theta=float('nan'), rope_parameters=None)),
    ('llama_mha', dict(rope_parameters=dict(rope_theta=float('inf')))),
    ('gpt_neox', dict(rotary_pct=0, rope_parameters=None)),
    ('llama_mha', dict(rope_parameters=dict(rope_type=['linear']))),
    ('llama_mha', dict(rope_scaling='linear', rope_parameters=None)),
    ('gemma', dict(hidden_activation=['gelu'])),
])
def test_values_without_a_meaning_are_refused(name, odd, checkpoint):
  hf = json.loads((checkpoint(name)[0] / 'config.json').read_text())
  with tiny.refused():
    config_json.read({**hf, **odd})


def test_what_trainers_leave_behind_is_ignored(checkpoint):
  hf = json.loads((checkpoint('llama_mha')[0] / 'config.json').read_text())
  left = dict(unsloth_version='2025.3', unsloth_fixed=True, temperature=0.6,
              do_sample=True, use_flash_attention_2=True, pad_token_id=61,
              _attn_implementation_autoset=True, gradient_checkpointing=False)
  assert config_json.read({**hf, **left}) == config_json.read(hf)
  with tiny.refused('qk_norm=True', 'remove it from config.json'):
    config_json.read({**hf, 'qk_norm': True})


def test_gemmas_first_releases_mean_the_tanh_form(checkpoint, tmp_path):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, made = checkpoint('gemma')
  old = tmp_path / 'old'
  shutil.copytree(directory, old)
  for legacy in (dict(hidden_act='gelu'),
                 dict(hidden_act='gelu', hidden_activation=None),
                 dict(hidden_act='gelu_pytorch_tanh')):
    tiny.edit_config(old, lambda hf, legacy=legacy: hf.update(legacy))
    cfg, values = rtx.load_hf(old)
    token_BT = tiny.tokens(cfg, 1, LONG)
    again = tiny.load_hf(old)
    assert tiny.distance(tiny.decoder(cfg)(values, token_BT),
                         tiny.torch_logits(again, token_BT)) < 1e-5


@pytest.mark.parametrize('name', ['llama_gqa', 'mistral', 'gemma',
                                  'gpt_neox'])
def test_an_absent_key_means_what_transformers_takes_it_for(name, checkpoint):
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  hf = json.loads((checkpoint(name)[0] / 'config.json').read_text())
  # Enough heads for transformers' default number of key heads.
  hf.update(num_attention_heads=32, hidden_size=256)
  sizes = ('model_type', 'vocab_size', 'hidden_size', 'intermediate_size',
           'num_hidden_layers', 'num_attention_heads')
  odd = {}
  for key in set(hf) - set(sizes):
    absent = {k: v for k, v in hf.items() if k != key}
    kind = type(transformers.AutoConfig.for_model(hf['model_type']))
    filled = kind.from_dict(copy.deepcopy(absent)).to_dict()
    filled = {k: v for k, v in filled.items() if k in hf}
    ours = config_json.read(absent)[1]
    theirs = config_json.read(filled)[1]
    for field in dataclasses.fields(ours):
      pair = getattr(ours, field.name), getattr(theirs, field.name)
      if pair[0] != pair[1]:
        odd[key, field.name] = pair
  assert not odd


# config.json of our own.


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_what_is_written_is_read_back(name):
  cfg = tiny.FAMILIES[name]
  scalings, thetas = ((), (3.0,), (8.0, 1.0, 4.0, 64.0)), (1e4, 12345.0)
  if not rtx.FAMILIES[name].rope:
    scalings, thetas = ((),), (1e4,)
  for scaling in scalings:
    for theta in thetas:
      variant = dataclasses.replace(
          cfg, rope_scaling=() if cfg.long_rope else scaling,
          rope_theta=theta)
      family = families.of(variant)
      assert family.model_type == name
      hf = json.loads(json.dumps(config_json.write(family, variant)))
      assert config_json.read(hf) == (family, variant)


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_a_tensors_rows_cover_the_tree_once(name):
  cfg = tiny.FAMILIES[name]
  rows = families.tensors(families.of(cfg), cfg)
  names = [row[0] for row in rows]
  assert len(set(names)) == len(names)
  leaves = [(leaf, layer) for _, parts, _, layer in rows for leaf in parts]
  assert len(set(leaves)) == len(leaves)
  shapes = model.flat_shapes(cfg)
  expected = set()
  for path in shapes:
    if path.startswith('block/'):
      expected |= {(path.removeprefix('block/'), i) for i in range(6)}
    else:
      expected.add((path, None))
  assert set(leaves) == expected


@pytest.mark.parametrize('change', [
    dict(gated=False), dict(parallel=True), dict(norm='layer'),
    dict(residual_scale=0.5)])
def test_a_model_of_no_family_cannot_be_exported(change):
  with tiny.refused('no family', 'llama', 'gpt_neox', 'saved'):
    families.of(dataclasses.replace(tiny.FAMILIES['mistral'], **change))


# Bad input.

HF = {name: config_json.write(families.of(cfg), cfg)
      for name, cfg in tiny.FAMILIES.items()}


@pytest.mark.parametrize('kind', [
    'lama', 'gemma4', 'mistral3', 'bert', None, ['llama']])
def test_an_unknown_model_type_lists_the_known(kind):
  with tiny.refused('model_type', repr(kind),
                    'llama, mistral, gemma, gpt_neox') as caught:
    config_json.read({**HF['llama'], 'model_type': kind})
  # Gemma 4 is no misspelt Gemma.
  assert 'did you mean' not in str(caught.value)


@pytest.mark.parametrize('name', tiny.FAMILIES)
@pytest.mark.parametrize('key, value', [
    ('attn_logit_softcapping', 50.0), ('num_local_experts', 8),
    ('quantization_config', {'bits': 4}), ('attention_dropout', 0.1),
    ('use_qk_norm', True), ('layer_types', ['sliding_attention']),
    ('rope_interleaved', True), ('is_encoder_decoder', True),
    ('use_bidirectional_attention', True),
])
def test_an_attribute_that_is_not_implemented_is_refused(name, key, value):
  if key in config_json.handled(families.FAMILIES[name]):
    return
  with tiny.refused(f'{key}={value!r}', name, 'remove it'):
    config_json.read({**HF[name], key: value})


@pytest.mark.parametrize('name, key, value', [
    ('qwen2', 'use_sliding_window', True), ('olmo2', 'mlp_bias', True),
    ('llama', 'sliding_window', 128), ('gemma', 'sliding_window', 128),
    ('gpt_neox', 'sliding_window', 128), ('mistral', 'attention_bias', True),
    ('mistral', 'mlp_bias', True), ('gemma', 'mlp_bias', True),
    ('llama', 'use_parallel_residual', True),
    ('llama', 'hidden_activation', 'gelu'),
    ('gpt_neox', 'num_key_value_heads', 2), ('gpt_neox', 'head_dim', 3),
    ('gpt_neox', 'hidden_dropout', 0.1),
])
def test_another_familys_attribute_is_refused(name, key, value):
  with tiny.refused(f'{key}={value!r}', name):
    config_json.read({**HF[name], key: value})


@pytest.mark.parametrize('name', ['llama', 'mistral', 'gemma'])
def test_a_share_that_the_family_does_not_rotate_is_refused(name):
  # transformers rotates all of the head in these families, whatever it says.
  rope = dict(rope_type='default', rope_theta=1e4)
  for share in (1.0, 0.5):
    for change in (dict(partial_rotary_factor=share),
                   dict(rope_parameters={
                       **rope, 'partial_rotary_factor': share})):
      # The other dialect's keys are not there beside it.
      hf = {k: v for k, v in HF[name].items() if not k.startswith('rope_')}
      hf.update(head_dim=8, **change)
      if share == 1:
        assert config_json.read(hf)[1].rope_fraction == 1
      else:
        with tiny.refused('partial_rotary_factor', '0.5', name):
          config_json.read(hf)


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_attributes_at_their_neutral_value_are_accepted(name):
  neutral = dict(
      quantization_config=None, sliding_window=None, attention_dropout=0.0,
      use_cache=True, transformers_version='9', bos_token_id=1,
      is_encoder_decoder=False)
  if 'sliding_window' in config_json.handled(families.FAMILIES[name]):
    neutral.pop('sliding_window')
  expected = config_json.read(HF[name])
  assert config_json.read({**HF[name], **neutral}) == expected


@pytest.mark.parametrize('name, key', [
    (family.model_type, key) for family in rtx.FAMILIES.values()
    for key, field, default in family.fields
    if field in ('V', 'D', 'F', 'N', 'layers') and default is None])
def test_a_missing_size_is_named(name, key):
  for hf in ({k: v for k, v in HF[name].items() if k != key},
             {**HF[name], key: None}):
    with tiny.refused(repr(key), name):
      config_json.read(hf)


@pytest.mark.parametrize('key', ['hidden_size', 'num_hidden_layers'])
@pytest.mark.parametrize('value', ['16', 16.0, -3, 0])
def test_a_size_that_is_no_size_is_refused(key, value):
  hf = {**HF['gpt_neox'], key: value}
  with tiny.refused(str(value)):
    config_json.read(hf)


@pytest.mark.parametrize('rope, parts', [
    (dict(rope_type='yarn', factor=4.0), ("'yarn'", 'linear', 'llama3')),
    (dict(rope_type='dynamic', factor=4.0), ("'dynamic'", 'default')),
    (dict(rope_type='linear'), ("'linear'", "['factor']")),
    (dict(rope_type='llama3', factor=8.0), ("'llama3'", 'low_freq_factor')),
    (dict(rope_type='linear', factor=2.0, mscale=1.0), ("'mscale'",)),
    (dict(rope_type='default', factor=2.0), ("'factor'",)),
])
@pytest.mark.parametrize('place', ['rope_scaling', 'rope_parameters'])
def test_an_unknown_rope_is_refused(rope, parts, place):
  hf = {k: v for k, v in HF['llama'].items() if k != 'rope_scaling'}
  with tiny.refused(*parts):
    config_json.read({**hf, place: rope})


def test_a_known_buffer_is_ignored_and_nothing_else():
  neox, llama = rtx.FAMILIES['gpt_neox'], rtx.FAMILIES['llama']
  for name in ('bias', 'masked_bias', 'rotary_emb.inv_freq'):
    assert families.is_buffer(neox, f'gpt_neox.layers.11.attention.{name}')
  for name in ('gpt_neox.layers.1.attention.dense.bias',
               'gpt_neox.layers.1.attention.query_key_value.bias',
               'gpt_neox.final_layer_norm.bias'):
    assert not families.is_buffer(neox, name)
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  assert families.is_buffer(llama, name)
  assert not families.is_buffer(llama, 'model.layers.0.self_attn.bias')


def test_an_act_that_is_not_implemented_is_refused():
  with tiny.refused("'swiglu'", 'silu', 'hidden_act'):
    config_json.read({**HF['llama'], 'hidden_act': 'swiglu'})
