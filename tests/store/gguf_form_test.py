"""The GGUF form: transformers reads it as we compute it; we read it back.

llama.cpp reads it in `launch/interop.sh`.
"""

import dataclasses

import numpy as np
import pytest
import tiny

from recursive_tx.store import gguf_form, gguf_tensors

gguf = pytest.importorskip(
    'gguf', reason='pip install gguf; it writes the files')

_RELAXED = dict(layers_per_loop=2, loops=3, rank='q2+k9+o3+mlp4')
_LLAMA = dataclasses.replace(
    tiny.FAMILIES['llama'], attention_bias=False, mlp_bias=False)
_TIED = dict(_RELAXED, rank='0', loop_norms=False)
CFGS = {
    **{name: dataclasses.replace(
        cfg, **_RELAXED, **tiny.LLAMA_CPP.get(name, {}))
       for name, cfg in tiny.FAMILIES.items()},
    'llama': dataclasses.replace(_LLAMA, **_RELAXED),
    'tied_head': dataclasses.replace(_LLAMA, **_RELAXED, tied=True),
    'serial': dataclasses.replace(
        tiny.FAMILIES['gpt_neox'], **_RELAXED, parallel=False, tied=True,
        attention_bias=False),
    'looped': dataclasses.replace(_LLAMA, **_TIED)}
SHORT = 5  # The window of the Mistral.


def save(directory, cfg, dtype='float32', **how):
  values = tiny.variables(cfg)
  gguf_form.save(directory, cfg, values, dtype=dtype, **how)
  return values


def fields(directory):
  """{key: value} of the file, as the package reads them."""
  reader = gguf.GGUFReader(directory / gguf_form.FILE)
  return {name: field.contents() for name, field in reader.fields.items()}


def tensors(directory):
  """{name: (shape, type)} of the file."""
  reader = gguf.GGUFReader(directory / gguf_form.FILE)
  return {t.name: (tuple(map(int, t.shape))[::-1], t.tensor_type.name)
          for t in reader.tensors}


def read_by_transformers(directory):
  torch = pytest.importorskip('torch', reason=tiny.TORCH)
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, gguf_file=gguf_form.FILE, dtype=torch.float32).eval()


@pytest.mark.parametrize('name, change', [
    ('llama', {}), ('tied_head', {}), ('mistral', {}), ('qwen2', {}),
    ('qwen3', dict(H=128)), ('gpt2', dict(V=50257, F=64, positions=1024)),
    ('gemma2', dict(H=256, attention_cap=50.0, logits_cap=30.0)),
    ('gemma3_text', dict(H=256, rope_scaling=()))])
def test_transformers_reads_our_logits(tmp_path, name, change):
  """But for rope scaling and some biases, which its reader leaves out, and
  sizes that it does not read."""
  cfg = dataclasses.replace(CFGS[name], **change)
  values = save(tmp_path / 'out', cfg)
  made = read_by_transformers(tmp_path / 'out')
  token_BT = tiny.tokens(
      cfg, T=SHORT if cfg.window and not cfg.pattern else 40)
  assert tiny.distance(
      tiny.torch_logits(made, token_BT),
      tiny.decoder(cfg)(values, token_BT)) < 1e-5


@pytest.mark.parametrize('name', CFGS)
def test_what_is_read_back_is_what_was_written(tmp_path, name):
  cfg = CFGS[name]
  values = save(tmp_path / 'out', cfg)
  found, read = gguf_form.load(tmp_path / 'out', cfg)
  assert found.loops == (3 if name == 'looped' else 1)
  token_BT = tiny.tokens(cfg)
  assert tiny.distance(
      tiny.decoder(found)(read, token_BT),
      tiny.decoder(cfg)(values, token_BT)) < 1e-5


def test_heads_are_permuted_as_llama_cpp_does(tmp_path):
  """Dimensions i and i + H / 2 of a head become 2 i and 2 i + 1."""
  cfg = dataclasses.replace(_LLAMA, layers_per_loop=1)
  values = save(tmp_path / 'out', cfg)
  reader = gguf.GGUFReader(tmp_path / 'out' / gguf_form.FILE)
  found = {t.name: np.asarray(t.data) for t in reader.tensors}
  layer = values['params']['block']['layers']['attn']
  for name, heads in (('q', cfg.N), ('k', cfg.K)):
    kernel_DNH = layer[name]['kernel'][0]
    for head in range(heads):
      for i in range(cfg.H // 2):
        rows = found[f'blk.0.attn_{name}.weight'].reshape(heads, cfg.H, cfg.D)
        np.testing.assert_array_equal(
            rows[head, 2 * i], kernel_DNH[:, head, i])
        np.testing.assert_array_equal(
            rows[head, 2 * i + 1], kernel_DNH[:, head, i + cfg.H // 2])
  np.testing.assert_array_equal(
      found['blk.0.attn_v.weight'], layer['v']['kernel'][0].reshape(
          cfg.D, -1).T)


def test_norms_of_gemma_are_stored_plus_one(tmp_path):
  cfg = CFGS['gemma']
  values = save(tmp_path / 'out', cfg)
  reader = gguf.GGUFReader(tmp_path / 'out' / gguf_form.FILE)
  found = {t.name: np.asarray(t.data) for t in reader.tensors}
  np.testing.assert_allclose(
      found['output_norm.weight'], values['params']['norm']['scale'] + 1)
  np.testing.assert_allclose(
      found['blk.5.attn_norm.weight'],
      values['params']['adapters']['attn_norm']['scale'][2, 1] + 1)


def test_a_block_that_llama_cpp_loops_is_written_once(tmp_path, caplog):
  cfg = CFGS['looped']
  save(tmp_path / 'once', cfg)
  assert not caplog.records
  found = fields(tmp_path / 'once')
  assert found['general.architecture'] == 'nanbeige'
  assert found['nanbeige.num_loops'] == 3
  assert found['nanbeige.skip_loop_final_norm'] is True
  assert found['nanbeige.block_count'] == 2
  assert sum('attn_q' in name for name in tensors(tmp_path / 'once')) == 2
  for other in (dict(rank='q2'), dict(loop_norms=True), dict(prelude=1),
                dict(coda=1), dict(attention_bias=True), dict(mlp_bias=True)):
    caplog.clear()
    cfg = dataclasses.replace(CFGS['looped'], **other)
    with caplog.at_level('WARNING'):
      save(tmp_path / f'{other}', cfg)
    said, = (row.getMessage() for row in caplog.records)
    assert 'unrolled' in said and '--noloop_norms' in said, other
    assert fields(tmp_path / f'{other}')['general.architecture'] == 'llama'
    assert sum('attn_q.w' in name
               for name in tensors(tmp_path / f'{other}')) == cfg.num_layers


@pytest.mark.parametrize('dtype', gguf_form.DTYPES)
def test_matrices_have_the_dtype_and_vectors_are_fp32(tmp_path, dtype):
  cfg = dataclasses.replace(CFGS['llama'], D=32, F=64, V=64, H=8)
  values = save(tmp_path / 'out', cfg, dtype)
  kind = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16',
          'q8_0': 'Q8_0'}[dtype]
  for name, (shape, found) in tensors(tmp_path / 'out').items():
    assert found == (kind if len(shape) == 2 else 'F32'), name
  found, read = gguf_form.load(tmp_path / 'out', cfg)
  token_BT = tiny.tokens(cfg)
  distance = tiny.distance(tiny.decoder(found)(read, token_BT),
                           tiny.decoder(cfg)(values, token_BT))
  assert distance < {'float32': 1e-5, 'float16': 5e-3, 'bfloat16': 5e-2,
                     'q8_0': 0.1}[dtype]
  assert fields(tmp_path / 'out')['general.file_type'] == {
      'float32': 0, 'float16': 1, 'q8_0': 7, 'bfloat16': 32}[dtype]


def test_rows_that_no_block_of_q8_0_fits_are_fp16(tmp_path, caplog):
  with caplog.at_level('WARNING'):
    save(tmp_path / 'out', dataclasses.replace(_LLAMA, D=32), 'q8_0')
  assert any('blk.0.ffn_down.weight has rows of 24' in row.getMessage()
             for row in caplog.records)
  found = tensors(tmp_path / 'out')
  assert found['blk.0.ffn_down.weight'][1] == 'F16'
  assert found['blk.0.ffn_up.weight'][1] == 'Q8_0'


def test_sizes_and_scaled_rope(tmp_path):
  cfg = dataclasses.replace(
      _LLAMA, H=16, rope_theta=5e5, rope_scaling=(8.0, 1.0, 4.0, 64.0))
  save(tmp_path / 'out', cfg, hf_config={'max_position_embeddings': 512})
  found = fields(tmp_path / 'out')
  assert {key.removeprefix('llama.'): value for key, value in found.items()
          if key.startswith('llama.')} == {
      'context_length': 512, 'vocab_size': 29, 'embedding_length': 16,
      'block_count': 6, 'feed_forward_length': 24,
      'attention.head_count': 4, 'attention.head_count_kv': 2,
      'attention.key_length': 16, 'attention.value_length': 16,
      'rope.dimension_count': 16, 'rope.freq_base': 5e5,
      'attention.layer_norm_rms_epsilon': pytest.approx(1e-5)}
  # The divisors are those of transformers' own Llama 3.
  torch = pytest.importorskip('torch', reason=tiny.TORCH)
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](transformers.LlamaConfig(
      head_dim=16, rope_parameters=dict(
          rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
          high_freq_factor=4.0, original_max_position_embeddings=64)))
  plain = 5e5 ** -(torch.arange(8) / 8)
  reader = gguf.GGUFReader(tmp_path / 'out' / gguf_form.FILE)
  factors, = (t.data for t in reader.tensors if t.name == 'rope_freqs.weight')
  np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)
  linear = dataclasses.replace(_LLAMA, rope_scaling=(2.5,))
  save(tmp_path / 'linear', linear)
  found = fields(tmp_path / 'linear')
  assert found['llama.rope.scaling.type'] == 'linear'
  assert found['llama.rope.scaling.factor'] == 2.5


def test_a_window_bounds_the_context_with_a_line(tmp_path, caplog):
  with caplog.at_level('WARNING'):
    save(tmp_path / 'out', CFGS['mistral'])
  assert any('sliding window' in row.getMessage() for row in caplog.records)
  assert fields(tmp_path / 'out')['llama.context_length'] == 5


@pytest.mark.parametrize('change', [
    dict(act='relu'), dict(norm='layer'), dict(gated=False),
    dict(rope_fraction=0.5, H=8, mlp_bias=True), dict(parallel=True)])
def test_what_no_architecture_computes_is_refused(tmp_path, change):
  cfg = dataclasses.replace(_LLAMA, **change)
  with tiny.refused('no architecture of llama.cpp', '--form=recursive'):
    save(tmp_path / 'out', cfg)
  assert not (tmp_path / 'out').exists()


def test_a_gemma_with_what_llama_cpp_leaves_out_is_refused(tmp_path):
  for change in (dict(tied=False), dict(attention_bias=True),
                 dict(rope_scaling=(8.0, 1.0, 4.0, 64.0))):
    with tiny.refused('no architecture of llama.cpp'):
      save(tmp_path / 'out', dataclasses.replace(
          tiny.FAMILIES['gemma'], **change))


def test_every_family_has_an_architecture():
  found = {name: gguf_tensors.architecture(dataclasses.replace(
      cfg, **tiny.LLAMA_CPP.get(name, {}))).name
           for name, cfg in tiny.FAMILIES.items()}
  others = {'mistral': 'llama', 'gpt_neox': 'gptneox', 'gemma3_text': 'gemma3'}
  assert found == {name: others.get(name, name) for name in tiny.FAMILIES}


@pytest.mark.parametrize('name, change', [
    ('gemma2', {}), ('gemma2', dict(query_scale=0.0, pattern='wwg')),
    ('gemma3_text', dict(query_scale=0.0)), ('smollm3', {}),
    ('qwen3', dict(qk_norm='all')), ('qwen2', dict(embed_factor=2.0)),
    ('olmo2', dict(norm_place='both')), ('phi3', dict(logits_cap=3.0)),
    ('gpt2', dict(act='gelu'))])
def test_what_llama_cpp_does_otherwise_is_refused(tmp_path, name, change):
  cfg = dataclasses.replace(tiny.FAMILIES[name], **change)
  with tiny.refused('--form=gguf', *cfg.rare, '--form=unrolled'):
    save(tmp_path / 'out', cfg)
  assert not (tmp_path / 'out').exists()


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
  cfg = CFGS['llama']
  values = tiny.variables(cfg)
  values['params']['embed']['embedding'][3] = 1e6
  with tiny.refused('1e+06', 'float16 cannot hold'):
    gguf_form.save(tmp_path / 'out', cfg, values, dtype='float16')
  assert not (tmp_path / 'out').exists()
