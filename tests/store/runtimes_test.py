"""What other programs compute of the exported forms: our logits, our tokens.

They run in environments of their own, which `launch/interop.sh` makes.
"""

import dataclasses

import numpy as np
import pytest
import runtimes
import tiny
import tiny_tokenizers

from recursive_tx.store import compact, gguf_form, looped
from recursive_tx.text import tokenizer as tokenizer_lib

LENGTH = 256  # The context that llama.cpp is opened for.
_RELAXED = dict(layers_per_loop=2, loops=3, rank='q2+k9+o3+mlp4')
_LLAMA = dataclasses.replace(tiny.FAMILIES['llama'], mlp_bias=False)
_PLAIN = dataclasses.replace(_LLAMA, attention_bias=False)
_TIED = dataclasses.replace(
    _PLAIN, layers_per_loop=2, loops=3, loop_norms=False)
GGUF = {
    'llama': dataclasses.replace(_PLAIN, **_RELAXED),
    'llama_bias': dataclasses.replace(
        tiny.FAMILIES['llama'], **_RELAXED, tied=True),
    'llama_3': dataclasses.replace(
        _PLAIN, **_RELAXED, H=16, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    'linear': dataclasses.replace(
        _PLAIN, **_RELAXED, rope_scaling=(2.5,)),
    'mistral': dataclasses.replace(
        tiny.FAMILIES['mistral'], **_RELAXED, window=64),
    'gemma': dataclasses.replace(tiny.FAMILIES['gemma'], **_RELAXED),
    'gpt_neox': dataclasses.replace(tiny.FAMILIES['gpt_neox'], **_RELAXED),
    'gpt_neox_serial': dataclasses.replace(
        tiny.FAMILIES['gpt_neox'], **_RELAXED, parallel=False, tied=True,
        attention_bias=False),
    **{name: dataclasses.replace(
        tiny.FAMILIES[name], **_RELAXED, **tiny.LLAMA_CPP.get(name, {}))
       for name in ('qwen2', 'qwen3', 'olmo2', 'granite', 'smollm3', 'phi3',
                    'gemma2', 'gemma3_text')},
    'gpt2': dataclasses.replace(
        tiny.FAMILIES['gpt2'], **_RELAXED, positions=LENGTH),
    'looped': _TIED,
    'looped_3': dataclasses.replace(
        _TIED, H=16, tied=True, rope_scaling=(8.0, 1.0, 4.0, 16.0))}
# Its GELU is a table of fp16.
ROUNDING = dict.fromkeys((
    'gemma', 'gemma2', 'gemma3_text', 'gpt2', 'gpt_neox', 'gpt_neox_serial'),
                         5e-3)
TEXTS = ['the cat', '  two spaces\n\nand lines\t\ttabs', "it's 1984, 3.14!",
         'über naïve — ¿qué? 日本語 🙂', '', ' ', 'def f(x):\n    return x']


def greedy(cfg, values, prompts, new):
  """Each token the best of a full forward pass of this library."""
  token_BT = np.asarray(prompts, np.int32)
  start = token_BT.shape[1]
  token_BT = np.pad(token_BT, ((0, 0), (0, new)))
  for t in range(start, start + new):
    logits_BTV = tiny.decoder(cfg)(values, token_BT)
    token_BT[:, t] = np.asarray(logits_BTV[:, t - 1]).argmax(-1)
  return token_BT[:, start:].tolist()


@pytest.mark.parametrize('name', GGUF)
def test_llama_cpp_computes_our_logits(name, tmp_path):
  interpreter = runtimes.needs('llama_cpp')
  cfg = GGUF[name]
  values = tiny.variables(cfg)
  gguf_form.save(tmp_path / 'out', cfg, values,
                 hf_config={'max_position_embeddings': LENGTH})
  cfg = cfg.opened_for(LENGTH)
  token_BT = tiny.tokens(cfg, B=4, T=24)
  found = runtimes.run(
      'llama_cpp', tmp_path / 'out', token_BT.tolist(), interpreter=interpreter,
      logits=tmp_path / 'logits.npy')
  assert tiny.distance(
      np.load(tmp_path / 'logits.npy'),
      tiny.decoder(cfg)(values, token_BT)) < ROUNDING.get(name, 1e-5)
  assert found['tokens'] == greedy(cfg, values, token_BT, 16)


@pytest.mark.parametrize('kind', ['sentencepiece', 'byte_level', 'digits'])
def test_llama_cpp_cuts_our_tokens(
    kind, tmp_path, sentencepiece_dir, byte_level_dir):
  interpreter = runtimes.needs('llama_cpp')
  folder = tmp_path / 'source'
  folder.mkdir()
  tiny_tokenizers.copy(
      sentencepiece_dir if kind == 'sentencepiece' else byte_level_dir, folder)
  if kind != 'sentencepiece':
    tiny_tokenizers.write(
        folder, 'config.json', {'bos_token_id': 0, 'eos_token_id': 0})
  if kind == 'digits':
    import tokenizers
    made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.save(str(folder / 'tokenizer.json'))
  cfg = dataclasses.replace(GGUF['llama'], V=300)
  gguf_form.save(tmp_path / 'out', cfg, tiny.variables(cfg), companions=folder)
  found = runtimes.run('llama_cpp', tmp_path / 'out', [], texts=TEXTS,
                       interpreter=interpreter)
  ours = tokenizer_lib.load(folder)
  assert found['texts'] == [ours.opening + ours.encode(t) for t in TEXTS]


@pytest.mark.parametrize('name', ['looped', 'linear'])
def test_mlx_computes_our_logits(name, tmp_path):
  interpreter = runtimes.needs('mlx')
  cfg = {'looped': _TIED, 'linear': dataclasses.replace(
      _TIED, rope_scaling=(2.5,), tied=True)}[name]
  values = tiny.variables(cfg)
  looped.save(tmp_path / 'out', cfg, values)
  token_BT = tiny.tokens(cfg, B=4, T=24)
  found = runtimes.run(
      'mlx', tmp_path / 'out', token_BT.tolist(), interpreter=interpreter,
      logits=tmp_path / 'logits.npy')
  assert tiny.distance(
      np.load(tmp_path / 'logits.npy'),
      tiny.decoder(cfg)(values, token_BT)) < 1e-5
  assert found['tokens'] == greedy(cfg, values, token_BT, 16)


# Sizes of heads that vLLM has kernels for.
VLLM = {name: dataclasses.replace(cfg, **_RELAXED, D=64, N=2, K=k, H=32)
        for name, k in (('llama', 1), ('mistral', 1), ('gemma', 1),
                        ('gpt_neox', 2)) for cfg in [tiny.FAMILIES[name]]}


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('name', VLLM)
def test_vllm_serves_our_tokens(name, compiled, tmp_path):
  """Without a plugin."""
  interpreter = runtimes.needs('vllm')
  cfg = VLLM[name]
  if compiled and name != 'llama':
    pytest.skip('one family is compiled: its code is that of all')
  values = tiny.variables(cfg)
  compact.save(tmp_path / 'out', cfg, values)
  token_BT = tiny.tokens(cfg, B=20, T=24)
  found = runtimes.run(
      'vllm', tmp_path / 'out', token_BT.tolist(), interpreter=interpreter,
      compiled=compiled)
  assert found['tokens'] == greedy(cfg, values, token_BT, 16)
