"""Tiny models made on the spot: ours from a ModelConfig, and Hugging Face's.

Programs are compiled without optimisation: tiny ones take far longer to
optimise than to run, and no law depends on it.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib

import chex
import jax
import numpy as np
import pytest

import recursive_tx as rtx
from recursive_tx import files, model
from recursive_tx.errors import UserError
from recursive_tx.files import paths

_COMPILER = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
}
_SIZES = dict(V=29, D=16, F=24, N=4, layers_per_loop=6)

# One vanilla model of each family, with all that sets the family apart.
FAMILIES = {
    'llama': rtx.ModelConfig(
        **_SIZES, K=2, H=6, attention_bias=True, mlp_bias=True, tied=False,
        norm_eps=1e-5),
    'mistral': rtx.ModelConfig(**_SIZES, K=1, H=4, window=5, tied=False),
    'gemma': rtx.ModelConfig(
        **_SIZES, K=1, H=8, norm='rms+1', act='gelu_tanh', embed_scale=True),
    'gpt_neox': rtx.ModelConfig(
        **_SIZES, K=4, H=4, norm='layer', act='gelu', gated=False,
        parallel=True, attention_bias=True, mlp_bias=True, rope_fraction=0.5,
        tied=False),
    'gpt2': rtx.ModelConfig(
        **_SIZES, K=4, H=4, norm='layer', act='gelu_tanh', gated=False,
        attention_bias=True, mlp_bias=True, norm_eps=1e-5, positions=64,
        pattern='n'),
    'qwen2': rtx.ModelConfig(
        **_SIZES, K=2, H=6, qkv_bias=True, tied=False),
    'qwen3': rtx.ModelConfig(**_SIZES, K=2, H=6, qk_norm='head', tied=False),
    'olmo2': rtx.ModelConfig(
        **_SIZES, K=2, H=4, norm_place='post', qk_norm='all', norm_eps=1e-5,
        tied=False),
    'granite': rtx.ModelConfig(
        **_SIZES, K=2, H=6, embed_factor=3.0, residual_scale=0.4,
        query_scale=0.2, logits_scale=0.5, tied=False),
    'gemma2': rtx.ModelConfig(
        **_SIZES, K=1, H=8, norm='rms+1', act='gelu_tanh', embed_scale=True,
        norm_place='both', window=5, pattern='wg', attention_cap=2.0,
        logits_cap=1.5, query_scale=0.25),
    # No block of 2 or 3 layers fits the pattern.
    'gemma3_text': rtx.ModelConfig(
        **_SIZES, K=1, H=8, norm='rms+1', act='gelu_tanh', embed_scale=True,
        norm_place='both', qk_norm='head', window=5, pattern='wwwg',
        window_theta=100.0, rope_scaling=(2.5,), query_scale=0.25),
    'phi3': rtx.ModelConfig(
        **_SIZES, K=2, H=4, rope_fraction=0.5, norm_eps=1e-5, tied=False,
        long_rope=(4.0, 1.2, 1.5, 3.0)),
    'smollm3': rtx.ModelConfig(**_SIZES, K=2, H=6, pattern='ggn'),
}
# Each; the later ones where it takes long, but for that with most of its own.
EACH_FAMILY = [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ('gpt2', 'qwen2', 'qwen3', 'olmo2', 'granite', 'gemma2', 'phi3',
                'smollm3')
    else name for name in FAMILIES]
# What llama.cpp does whatever a file says, where a family may do otherwise.
LLAMA_CPP = {
    'qwen2': dict(H=4),
    'gemma2': dict(query_scale=0.0),
    'gemma3_text': dict(
        query_scale=0.0, pattern='wwwwwg', window_theta=10_000.0),
    'smollm3': dict(pattern='gggn')}
# A looped model with a bit of everything.
MIXED = rtx.ModelConfig(
    V=29, D=16, F=24, N=4, K=2, H=6, layers_per_loop=2, loops=2, prelude=1,
    coda=1, rank='q2+k9+o3+mlp4', window=4, attention_bias=True, tied=False)

# {name: (model_type, arguments of its transformers config)}
_HF_SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48,
                 num_hidden_layers=3, num_attention_heads=4)
HF = {
    'llama_mha': ('llama', dict(
        num_key_value_heads=4, rms_norm_eps=1e-3)),
    'llama_gqa': ('llama', dict(
        num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True)),
    'llama_mqa': ('llama', dict(
        num_key_value_heads=1, head_dim=12, rope_parameters=dict(
            rope_type='linear', rope_theta=1e3, factor=2.5))),
    # 16 dimensions at this length have wavelengths of all three kinds.
    'llama_3': ('llama', dict(
        num_key_value_heads=2, head_dim=16, rope_parameters=dict(
            rope_type='llama3', rope_theta=5e5, factor=8.0,
            low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64))),
    'mistral': ('mistral', dict(num_key_value_heads=2, sliding_window=100)),
    'gemma': ('gemma', dict(num_key_value_heads=1, head_dim=16)),
    'qwen2': ('qwen2', dict(num_key_value_heads=2)),
    'qwen3': ('qwen3', dict(num_key_value_heads=2, head_dim=16)),
    'olmo2': ('olmo2', dict(num_key_value_heads=2)),
    'granite': ('granite', dict(
        num_key_value_heads=2, embedding_multiplier=3.0, logits_scaling=2.0,
        residual_multiplier=0.4, attention_multiplier=0.2)),
    'gemma2': ('gemma2', dict(
        num_key_value_heads=2, head_dim=16, sliding_window=100,
        query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5)),
    'gemma3': ('gemma3_text', dict(
        num_key_value_heads=2, head_dim=16, sliding_window=100,
        query_pre_attn_scalar=9, layer_types=[
            'sliding_attention', 'full_attention', 'sliding_attention'],
        rope_parameters=dict(
            full_attention=dict(rope_type='linear', rope_theta=1e4, factor=2.5),
            sliding_attention=dict(rope_type='default', rope_theta=100.0)))),
    'phi3': ('phi3', dict(
        num_key_value_heads=2, sliding_window=100, pad_token_id=0,
        rope_parameters=dict(rope_type='default', rope_theta=1e4,
                             partial_rotary_factor=0.75))),
    # 4 of 8 dimensions are rotated, with factors for two lengths.
    'phi3_long': ('phi3', dict(
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=1024,
        original_max_position_embeddings=64, partial_rotary_factor=0.5,
        rope_parameters=dict(
            rope_type='longrope', rope_theta=1e3, short_factor=[1.25, 1.5],
            long_factor=[2.0, 7.0]))),
    'smollm3': ('smollm3', dict(
        num_key_value_heads=2, no_rope_layer_interval=2, pad_token_id=0)),
    'gpt2': ('gpt2', dict(
        n_embd=32, n_layer=3, n_head=4, n_positions=700,
        **dict.fromkeys(('hidden_size', 'intermediate_size',
                         'num_hidden_layers', 'num_attention_heads')))),
    'gpt_neox': ('gpt_neox', dict(rope_parameters=dict(
        rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5))),
    'gpt_neox_serial': ('gpt_neox', dict(
        use_parallel_residual=False, hidden_act='relu', attention_bias=False,
        rope_parameters=dict(
            rope_type='default', rope_theta=500.0,
            partial_rotary_factor=1.0))),
}
TORCH = 'compares with torch and transformers, which are not installed'
TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
REAL = ROOT.parent / 'shared' / 'models'


def jit(function):
  """jax.jit that compiles quickly."""
  return jax.jit(function, compiler_options=_COMPILER)


@functools.cache
def decoder(cfg: rtx.ModelConfig, run: rtx.Run | None = None,
            method: str | None = None):
  """Decoder(cfg, run).apply, compiled once for each config in the session."""
  module = rtx.Decoder(cfg, run=run or rtx.Run())
  return jit(functools.partial(module.apply, method=method))


def variables(cfg: rtx.ModelConfig, seed: int = 0) -> dict:
  """Random fp32 values of every parameter; none is at its neutral start."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, shape in model.flat_shapes(cfg).items():
    *_, name, leaf = path.split('/')
    value = rng.normal(size=shape).astype(np.float32)
    if leaf == 'scale':
      value = 0.2 * value + (cfg.norm != 'rms+1')
    elif leaf == 'bias':
      value *= 0.2
    elif name in cfg.kernels:
      value *= cfg.in_out(name)[0] ** -0.5 * (0.5 if leaf in 'ab' else 1)
    else:
      value *= cfg.D ** -0.5
    paths.put(params, path, value.astype(np.float32))
  return {'params': params}


def tokens(cfg: rtx.ModelConfig, B: int = 2, T: int = 12,
           seed: int = 0) -> np.ndarray:
  """token_BT, random."""
  return np.random.default_rng(seed).integers(
      0, cfg.V, (B, T)).astype(np.int32)


def distance(one, other) -> float:
  """Largest difference, as a share of max(1, the largest of `other`)."""
  one, other = np.asarray(one), np.asarray(other)
  assert one.shape == other.shape
  assert np.isfinite(one).all()
  return float(abs(one - other).max() / max(1, abs(other).max()))


def assert_same_tree(one: dict, other: dict) -> None:
  """Same paths, dtypes and bits."""
  chex.assert_trees_all_equal_dtypes(one, other)
  chex.assert_trees_all_equal(one, other)


@contextlib.contextmanager
def refused(*parts):
  """The block raises a ValueError whose one line holds all the parts."""
  with pytest.raises(UserError) as caught:
    yield caught
  message = str(caught.value)
  assert '\n' not in message
  for part in parts:
    assert str(part) in message, message


def make_hf(directory: pathlib.Path, name: str, dtype: str = 'float32'):
  """Saves a row of HF, norms and biases perturbed; returns it in fp32."""
  torch = pytest.importorskip('torch', reason=TORCH)
  transformers = pytest.importorskip('transformers', reason=TORCH)
  model_type, arguments = HF[name]
  torch.manual_seed(0)
  arguments = {key: value for key, value in {
      **_HF_SIZES, **arguments}.items() if value is not None}
  made = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(model_type, **arguments)).eval()
  with torch.no_grad():
    for parameter in made.parameters():
      noise = torch.randn_like(parameter)
      if parameter.ndim == 1:
        parameter.add_(0.2 * noise)
      else:
        parameter.copy_(noise / parameter.shape[-1] ** 0.5)
  made.to(getattr(torch, dtype)).save_pretrained(directory)
  # Read anew: casting rounded the rotary frequencies too.
  return load_hf(directory)


def load_hf(directory: pathlib.Path):
  """What transformers makes of a directory, in fp32.

  With its own attention: torch's has no cap of the scores.
  """
  import torch
  import transformers
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation='eager')


def torch_logits(made, token_BT: np.ndarray) -> np.ndarray:
  """What transformers computes, fp32."""
  import torch
  with torch.no_grad():
    return made(torch.tensor(token_BT).long()).logits.numpy()


def make_ours(directory: pathlib.Path, cfg: rtx.ModelConfig) -> dict:
  """A Hugging Face directory written by this library; returns variables."""
  values = variables(cfg)
  rtx.save_hf(directory, cfg, values)
  return values


def edit_config(directory: pathlib.Path, change) -> None:
  """Applies `change` to the dictionary of config.json, in place."""
  path = directory / 'config.json'
  hf = json.loads(path.read_text())
  change(hf)
  path.write_text(json.dumps(hf))


def edit_tensors(directory: pathlib.Path, change) -> None:
  """Applies `change` to {name: array} of model.safetensors, in place."""
  reader = files.Reader(directory)
  tensors = {name: reader.read(name) for name in reader.shapes}
  change(tensors)
  write_tensors(directory / 'model.safetensors', tensors)


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """One safetensors file."""
  with files.Writer(path, {
      name: (value.shape, value.dtype) for name, value in tensors.items()
  }) as writer:
    for name, value in tensors.items():
      writer.write(name, value)


def truncated(cfg: rtx.ModelConfig, params: dict,
              num_layers: int) -> tuple[rtx.ModelConfig, dict]:
  """The first layers of a vanilla model."""
  assert cfg.loops == 1 and not cfg.prelude and not cfg.coda
  block = jax.tree.map(lambda v: v[:num_layers], params['block'])
  return (dataclasses.replace(cfg, layers_per_loop=num_layers),
          {'params': {**params, 'block': block}})
