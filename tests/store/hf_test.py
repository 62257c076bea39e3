"""Law 2: a round trip keeps every bit; and what is wrong is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files
from recursive_tx.files import paths
from recursive_tx.store import convert, export, hf

# Bits of each dtype seen as integers, to compare without rounding.
_BITS = {'float32': np.int32, 'float16': np.int16, 'bfloat16': np.int16}
LLAMA, NEOX = tiny.FAMILIES['llama'], tiny.FAMILIES['gpt_neox']
UP = 'model.layers.1.mlp.up_proj.weight'


def _tensors(directory):
  """{name: (dtype, shape, bytes)}, by the safetensors library."""
  safetensors = pytest.importorskip(
      'safetensors.torch', reason=tiny.TORCH)
  torch = pytest.importorskip('torch', reason=tiny.TORCH)
  tensors = {}
  for path in directory.glob('*.safetensors'):
    for name, value in safetensors.load_file(path).items():
      assert name not in tensors
      raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
      tensors[name] = value.dtype, tuple(value.shape), raw
  return tensors


# Law 2.


@pytest.mark.parametrize('name', tiny.HF)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_round_trip_keeps_every_bit(name, dtype, checkpoint, tmp_path):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, made = checkpoint(name, dtype)
  cfg, values = rtx.load_hf(directory)
  assert {str(v.dtype) for _, v in paths.items(values)} == {dtype}
  stored = json.loads((directory / 'config.json').read_text())
  for kept, out in ((None, tmp_path / 'new'), (stored, tmp_path / 'kept')):
    rtx.save_hf(out, cfg, values, hf=kept)
    assert _tensors(out) == _tensors(directory)
    assert rtx.load_hf(out)[0] == cfg
    again = tiny.load_hf(out)
    assert type(again) is type(made)
    token_BT = tiny.tokens(cfg, 1, 150)
    assert np.array_equal(tiny.torch_logits(again, token_BT),
                          tiny.torch_logits(made, token_BT))
  written = json.loads((tmp_path / 'kept/config.json').read_text())
  # transformers 5 says dtype where 4 says torch_dtype and reads both.
  names = ('dtype', 'torch_dtype')
  assert [written[name] for name in names if name in written] == [dtype]
  assert {k: v for k, v in written.items() if k not in names} == {
      k: v for k, v in stored.items() if k not in names}


@pytest.mark.parametrize('name', ['stories260K', 'stories3M'])
def test_a_round_trip_of_real_models(name, tmp_path):
  if not (tiny.REAL / name).exists():
    pytest.skip(f'the model {name} is not beside this repository')
  rtx.save_hf(tmp_path / 'out', *rtx.load_hf(tiny.REAL / name))
  ours, theirs = _tensors(tmp_path / 'out'), _tensors(tiny.REAL / name)
  theirs.pop('lm_head.weight', None)  # A copy of the tied embedding.
  assert ours == theirs


def test_pythias_fp16_files_have_buffers(checkpoint, tmp_path):
  directory, _ = checkpoint('gpt_neox', 'float16')
  old = tmp_path / 'old'
  shutil.copytree(directory, old)

  def add_buffers(tensors):
    for i in range(3):
      at = f'gpt_neox.layers.{i}.attention.'
      tensors[at + 'bias'] = np.tril(np.ones((1, 1, 8, 8), np.bool_))
      # -1e9 does not fit fp16.
      tensors[at + 'masked_bias'] = np.array(-np.inf, np.float16)
      tensors[at + 'rotary_emb.inv_freq'] = np.ones(4, np.float16)

  tiny.edit_tensors(old, add_buffers)
  one, other = rtx.load_hf(directory), rtx.load_hf(old)
  assert one[0] == other[0]
  tiny.assert_same_tree(one[1], other[1])
  assert hf.Source(old).dtype == np.float16


@pytest.mark.parametrize('name', ['llama_gqa', 'gpt_neox'])
def test_shards_are_read(name, checkpoint, tmp_path):
  directory, made = checkpoint(name)
  made.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
  tiny.assert_same_tree(rtx.load_hf(tmp_path / 'shards')[1],
                        rtx.load_hf(directory)[1])


def test_shards_are_written(checkpoint, tmp_path, monkeypatch):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, made = checkpoint('llama_gqa')
  monkeypatch.setattr(hf, '_SHARD_BYTES', 20_000)
  out = tmp_path / 'out'
  rtx.save_hf(out, *rtx.load_hf(directory))
  names = sorted(path.name for path in out.glob('*.safetensors'))
  assert len(names) > 2
  assert names[0] == f'model-00001-of-{len(names):05d}.safetensors'
  assert all((out / f).stat().st_size < 24_000 for f in names)
  assert _tensors(out) == _tensors(directory)
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map'].values()) == set(names)
  assert index['metadata']['total_size'] == sum(
      len(raw) for _, _, raw in _tensors(out).values())
  again = tiny.load_hf(out)
  token_BT = tiny.tokens(LLAMA, 1, 30)
  assert np.array_equal(tiny.torch_logits(again, token_BT),
                        tiny.torch_logits(made, token_BT))


# A relaxed model opens as a stock one.


@pytest.mark.parametrize('name, how', [
    ('llama_3', dict(rank=3, loop_norms=False)),
    ('gpt_neox', dict(rank='q2+mlp4', prelude=0)),
    pytest.param('mistral', dict(rank=2), marks=pytest.mark.slow),
    pytest.param('gemma', dict(rank=0, init='stepwise'),
                 marks=pytest.mark.slow),
    pytest.param('llama_gqa', dict(rank='full', init='random'),
                 marks=pytest.mark.slow),
])
def test_an_exported_relaxed_model_opens_in_transformers(
    name, how, checkpoint, tmp_path):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, _ = checkpoint(name)
  cfg, values = rtx.load_hf(directory)
  rcfg, rvars = rtx.relax(cfg, values, loops=3, **how)
  stored = json.loads((directory / 'config.json').read_text())
  token_BT = tiny.tokens(cfg, 1, 150)
  expected_BTV = tiny.decoder(rcfg)(rvars, token_BT)
  for kept, out in ((None, tmp_path / 'new'), (stored, tmp_path / 'kept')):
    rtx.save_hf(out, rcfg, rvars, hf=kept)
    made = tiny.load_hf(out)
    assert type(made).__name__ == stored['architectures'][0]
    assert tiny.distance(
        tiny.torch_logits(made, token_BT), expected_BTV) < 1e-5
    again, merged = rtx.load_hf(out)
    assert dataclasses.replace(again, loop_norms=rcfg.loop_norms) == rtx.merge(
        rcfg, rvars)[0]
    tiny.assert_same_tree(merged, rtx.merge(rcfg, rvars)[1])
  kept = json.loads((tmp_path / 'kept/config.json').read_text())
  for key in ('bos_token_id', 'eos_token_id', 'max_position_embeddings'):
    assert kept[key] == stored[key]


def test_a_shorter_model_keeps_what_is_not_used(tmp_path):
  """Fewer layers than the source: its ids stay, its layer count does not."""
  tiny.make_ours(tmp_path / 'source', LLAMA)
  stored = json.loads((tmp_path / 'source/config.json').read_text())
  stored.update(eos_token_id=7, max_position_embeddings=99)
  cfg, values = tiny.truncated(LLAMA, tiny.variables(LLAMA)['params'], 3)
  rtx.save_hf(tmp_path / 'out', cfg, values, hf=stored)
  again, loaded = rtx.load_hf(tmp_path / 'out')
  assert again == cfg
  tiny.assert_same_tree(loaded, values)
  kept = json.loads((tmp_path / 'out/config.json').read_text())
  assert (kept['eos_token_id'], kept['max_position_embeddings']) == (7, 99)
  assert kept['num_hidden_layers'] == 3


def test_export_in_another_dtype(tmp_path):
  values = tiny.variables(LLAMA)
  rtx.save_hf(tmp_path / 'out', LLAMA, values, dtype=ml_dtypes.bfloat16)
  for path, value in paths.items(rtx.load_hf(tmp_path / 'out')[1]):
    expected = paths.get(values, path).astype(ml_dtypes.bfloat16)
    assert value.dtype == expected.dtype
    assert np.array_equal(value, expected)


# Without torch: what this library writes it reads.


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_what_is_written_is_read_back(name, tmp_path):
  cfg = tiny.FAMILIES[name]
  values = tiny.make_ours(tmp_path / 'out', cfg)
  again, loaded = rtx.load_hf(tmp_path / 'out')
  assert again == cfg
  tiny.assert_same_tree(loaded, values)


@pytest.mark.parametrize('name', ['llama', 'gpt_neox'])
def test_leaves_may_be_read_in_any_order(name, tmp_path):
  cfg = tiny.FAMILIES[name]
  values = tiny.make_ours(tmp_path / 'out', cfg)
  source = hf.Source(tmp_path / 'out')
  assert source.cfg == cfg and source.dtype == np.float32
  reads = [(path, layer) for path, value in paths.items(values['params'])
           for layer in (range(len(value)) if path.startswith('block/')
                         else (None,))]
  shuffled = np.random.default_rng(0).permutation(len(reads))
  # Layer by layer, the parts of a fused tensor come one after the other.
  by_layer = sorted(reads, key=lambda read: -1 if read[1] is None else read[1])
  for path, layer in [*(reads[i] for i in shuffled), *by_layer]:
    value = paths.get(values['params'], path)
    expected = value if layer is None else value[layer]
    assert np.array_equal(source.read(path, layer), expected), path


# Where a head's rows lie in GPT-NeoX's fused tensor: query, key and value of
# one head together, heads one after the other.
def test_fused_rows_are_by_head(tmp_path):
  values = tiny.make_ours(tmp_path / 'out', NEOX)
  name = 'gpt_neox.layers.2.attention.query_key_value'
  reader = files.Reader(tmp_path / 'out')
  weight, bias = reader.read(f'{name}.weight'), reader.read(f'{name}.bias')
  block = values['params']['block']
  for head in range(4):
    for part, letter in enumerate('qkv'):
      rows = slice((3 * head + part) * 4, (3 * head + part + 1) * 4)
      kernel = block['layers']['attn'][letter]['kernel'][2]
      assert np.array_equal(weight[rows], kernel[:, head].T)
      assert np.array_equal(
          bias[rows], block['vectors'][letter]['bias'][2, head])


# What transformers reads where files are many.


def test_a_whole_file_wins_over_shards(checkpoint, tmp_path, caplog):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  directory, made = checkpoint('llama_gqa')
  both = tmp_path / 'both'
  made.save_pretrained(both, max_shard_size='20KB')
  shutil.copy(directory / 'model.safetensors', both)
  tiny.edit_tensors(directory_of(both, tmp_path), lambda t: t.update(
      {UP: 2 * t[UP]}))
  with caplog.at_level('WARNING'):
    cfg, values = rtx.load_hf(both)
  assert 'model.safetensors.index.json' in caplog.text
  assert len(caplog.text.strip().splitlines()) == 1
  theirs = tiny.load_hf(both)
  token_BT = tiny.tokens(cfg, 1, 60)
  logits_BTV = tiny.decoder(cfg)(values, token_BT)
  assert tiny.distance(
      logits_BTV, tiny.torch_logits(theirs, token_BT)) < 1e-5
  assert tiny.distance(
      logits_BTV, tiny.torch_logits(made, token_BT)) > 1e-3


def directory_of(both, tmp_path):
  """A place where only the whole file is, linked to the one in `both`."""
  alone = tmp_path / 'alone'
  alone.mkdir()
  (alone / 'model.safetensors').symlink_to(both / 'model.safetensors')
  return alone


@pytest.mark.parametrize('name', ['llama_gqa', 'gpt_neox_tied'])
def test_a_model_without_its_head_has_no_prefix(name, checkpoint, tmp_path):
  pytest.importorskip('transformers', reason=tiny.TORCH)
  base = tmp_path / 'base'
  if name == 'gpt_neox_tied':
    made = checkpoint('gpt_neox')[1]
    made = type(made)(type(made.config)(**{
        **made.config.to_dict(), 'tie_word_embeddings': True})).eval()
  else:
    made = checkpoint(name)[1]
  made.base_model.save_pretrained(base)
  assert not any(key.startswith(('model.', 'gpt_neox.'))
                 for key in files.Reader(base).shapes)
  cfg, values = rtx.load_hf(base)
  theirs = tiny.load_hf(base)
  token_BT = tiny.tokens(cfg, 1, 60)
  logits_BTV = tiny.decoder(cfg)(values, token_BT)
  assert tiny.distance(
      logits_BTV, tiny.torch_logits(theirs, token_BT)) < 1e-5
  stored = json.loads((base / 'config.json').read_text())
  assert stored['architectures'] == [type(made.base_model).__name__]
  rtx.save_hf(tmp_path / 'out', cfg, values, hf=stored)
  written = json.loads((tmp_path / 'out/config.json').read_text())
  assert written['architectures'] == [type(made).__name__]
  tiny.edit_config(base, lambda hf: hf.update(tie_word_embeddings=False))
  with tiny.refused('is not there', 'tie_word_embeddings'):
    rtx.load_hf(base)


# As they are loaded.


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_loaded_arrays_work_under_every_transformation(name, tmp_path):
  tiny.make_ours(tmp_path / 'model', tiny.FAMILIES[name])
  cfg, values = rtx.load_hf(tmp_path / 'model')
  token_BT = tiny.tokens(cfg)
  expected_BTV = tiny.decoder(cfg)(values, token_BT)
  decoder = rtx.Decoder(cfg)
  def one(token_T):
    return decoder.apply(values, token_T[None])[0]
  for logits_BTV in (
      tiny.jit(lambda token_BT: decoder.apply(values, token_BT))(token_BT),
      jax.vmap(one)(token_BT), jax.lax.map(one, jnp.asarray(token_BT))):
    assert tiny.distance(logits_BTV, expected_BTV) < 1e-5


# Bad input.


@pytest.fixture
def model_directory(tmp_path):
  tiny.make_ours(tmp_path / 'model', LLAMA)
  return tmp_path / 'model'


def _broken(directory, change, *parts):
  tiny.edit_tensors(directory, change)
  with tiny.refused(*parts):
    rtx.load_hf(directory)


def test_a_directory_without_config_json(model_directory):
  (model_directory / 'config.json').unlink()
  with tiny.refused(model_directory, 'no config.json', 'Hugging Face'):
    rtx.load_hf(model_directory)
  with tiny.refused('nowhere', 'config.json'):
    rtx.load_hf(model_directory / 'nowhere')


@pytest.mark.parametrize('text', ['{"model_type": ', '[1]', '"llama"', ''])
def test_a_config_that_is_no_object(text, model_directory):
  (model_directory / 'config.json').write_text(text)
  with tiny.refused('config.json'):
    rtx.load_hf(model_directory)


def test_a_config_that_is_no_text(model_directory):
  (model_directory / 'config.json').write_bytes(b'\xff\xfe{}')
  with tiny.refused('config.json', 'not JSON'):
    rtx.load_hf(model_directory)


def test_a_missing_tensor_is_named(model_directory):
  _broken(model_directory, lambda t: t.pop(UP), '1 missing', UP)


def test_an_extra_tensor_is_named(model_directory):
  _broken(model_directory,
          lambda t: t.update({'model.layers.0.q_norm.weight': t[UP][0]}),
          '1 not claimed', 'model.layers.0.q_norm.weight')


def test_layers_beyond_the_config_are_named(model_directory):
  tiny.edit_config(model_directory, lambda h: h.update(num_hidden_layers=5))
  with tiny.refused('not claimed', 'model.layers.5.'):
    rtx.load_hf(model_directory)
  tiny.edit_config(model_directory, lambda h: h.update(num_hidden_layers=7))
  with tiny.refused('missing', 'model.layers.6.'):
    rtx.load_hf(model_directory)


def test_biases_that_the_config_denies_are_named(model_directory):
  tiny.edit_config(model_directory, lambda h: h.update(mlp_bias=False))
  with tiny.refused('18 not claimed', 'mlp.down_proj.bias'):
    rtx.load_hf(model_directory)


@pytest.mark.parametrize('shape', [(16, 24), (24, 15), (24 * 16,),
                                   (1, 24, 16)])
def test_a_misshapen_tensor_is_named(shape, model_directory):
  _broken(
      model_directory,
      lambda t: t.update({UP: np.zeros(shape, np.float32)}),
      UP, str(shape), '(24, 16)')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_tensor_that_is_not_finite_is_named(value, dtype, model_directory):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))

  def change(tensors):
    for name in tensors:
      tensors[name] = tensors[name].astype(dtype)
    tensors[UP][-1, -1] = value

  _broken(model_directory, change, UP, 'NaN or infinity')


@pytest.mark.parametrize('kept', [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(kept, model_directory):
  path = model_directory / 'model.safetensors'
  whole = path.read_bytes()
  path.write_bytes(whole[:int(kept * len(whole))])
  with tiny.refused('model.safetensors', 'truncated'):
    rtx.load_hf(model_directory)


def test_a_missing_shard_is_named(checkpoint, tmp_path):
  made = checkpoint('llama_gqa')[1]
  made.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
  gone = sorted((tmp_path / 'shards').glob('*.safetensors'))[1]
  gone.unlink()
  with tiny.refused(gone.name, 'model.safetensors.index.json'):
    rtx.load_hf(tmp_path / 'shards')


def test_a_pickle_is_refused(model_directory):
  (model_directory / 'model.safetensors').rename(
      model_directory / 'pytorch_model.bin')
  with tiny.refused('pytorch_model.bin', 'safetensors'):
    rtx.load_hf(model_directory)


def test_no_weights_at_all(model_directory):
  (model_directory / 'model.safetensors').unlink()
  with tiny.refused(model_directory, 'model.safetensors'):
    rtx.load_hf(model_directory)


def test_a_tied_heads_copy_is_accepted_if_it_is_one(tmp_path):
  directory = tmp_path / 'model'
  values = tiny.make_ours(directory, tiny.FAMILIES['gemma'])
  embedding = 'model.embed_tokens.weight'
  tiny.edit_tensors(directory, lambda t: t.update(
      {'lm_head.weight': t[embedding].copy()}))
  tiny.assert_same_tree(rtx.load_hf(directory)[1], values)

  def differ(tensors):
    tensors['lm_head.weight'][3, 2] += 1e-6

  _broken(directory, differ, 'lm_head.weight', embedding,
          'tie_word_embeddings')


def test_companions_go_along(model_directory, tmp_path):
  for name in ('tokenizer.json', 'LICENSE', 'README.md', 'other.txt'):
    (model_directory / name).write_text(name)
  rtx.save_hf(tmp_path / 'out', LLAMA, tiny.variables(LLAMA),
              companions=model_directory)
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
      'config.json', 'model.safetensors', 'tokenizer.json', 'LICENSE',
      'README.md'}


def test_terms_and_templates_go_along(model_directory, tmp_path):
  names = ('LICENSE.txt', 'USE_POLICY.md', 'Notice', 'tokenizer.model.v3',
           'additional_chat_templates/rag.jinja', 'chat_template.json')
  for name in names:
    (model_directory / name).parent.mkdir(exist_ok=True)
    (model_directory / name).write_text(name)
    (model_directory / name).chmod(0o444)
  rtx.save_hf(tmp_path / 'out', LLAMA, tiny.variables(LLAMA),
              companions=model_directory)
  for name in names:
    assert (tmp_path / 'out' / name).read_text() == name


@pytest.mark.parametrize('value, parts', [
    (7e4, ('up to 70000', 'float16 cannot hold', 'bfloat16')),
    (np.nan, ('NaN',))])
def test_values_that_a_dtype_cannot_hold_are_not_exported(
    value, parts, tmp_path):
  values = tiny.variables(LLAMA)
  values['params']['block']['layers']['mlp']['up']['kernel'][1, 0, 0] = value
  with tiny.refused(UP, *parts):
    rtx.save_hf(tmp_path / 'out', LLAMA, values, dtype=np.float16)
  assert list(tmp_path.iterdir()) == []


def test_rope_that_was_changed_is_exported_in_one_dialect(
    checkpoint, tmp_path):
  directory, _ = checkpoint('llama_mqa')
  cfg, values = rtx.load_hf(directory)
  cfg = dataclasses.replace(cfg, rope_scaling=(4.0,))
  stored = json.loads((directory / 'config.json').read_text())
  rtx.save_hf(tmp_path / 'out', cfg, values, hf=stored)
  assert rtx.load_hf(tmp_path / 'out')[0] == cfg


def test_every_end_of_text_is_written_back(model_directory, tmp_path):
  ends = dict(bos_token_id=1, eos_token_id=[2, 7, 9])
  tiny.edit_config(model_directory, lambda hf: hf.update(ends))
  (model_directory / 'generation_config.json').write_text(json.dumps(ends))
  convert.convert(model_directory, tmp_path / 'new', loops=2)
  export.export(tmp_path / 'new', tmp_path / 'out')
  for name in ('config.json', 'generation_config.json'):
    written = json.loads((tmp_path / 'out' / name).read_text())
    assert {k: written[k] for k in ends} == ends


def test_an_output_that_exists_is_not_touched(model_directory):
  before = {p.name: p.read_bytes() for p in model_directory.iterdir()}
  with tiny.refused(model_directory, 'exists'):
    rtx.save_hf(model_directory, LLAMA, tiny.variables(LLAMA, seed=1))
  assert before == {p.name: p.read_bytes() for p in model_directory.iterdir()}


def test_a_failed_export_leaves_nothing(tmp_path):
  values = tiny.variables(LLAMA)
  del values['params']['block']['layers']['mlp']['down']
  with tiny.refused('block/layers/mlp/down/kernel', 'None'):
    rtx.save_hf(tmp_path / 'deep/out', LLAMA, values)
  assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_family_is_not_exported(tmp_path):
  cfg = dataclasses.replace(tiny.FAMILIES['gemma'], parallel=True)
  with tiny.refused('no family'):
    rtx.save_hf(tmp_path / 'out', cfg, tiny.variables(cfg))
  assert list(tmp_path.iterdir()) == []
