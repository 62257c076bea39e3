"""The recursive form: a PyTorch model of its own that holds the block once.

Its code, which goes with the weights, is in `compact/`: transformers loads it
with trust_remote_code=True. It computes what a ModelConfig says, whatever the
family; vLLM serves it through its transformers backend.
"""

from collections.abc import Callable
import math
import os
import pathlib
import shutil
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from recursive_tx import config as config_lib
from recursive_tx import files
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.model import adapters
from recursive_tx.store import fields, hf, sentencepiece_json

CODE = pathlib.Path(__file__).parent / 'compact'
_MODULES = ('configuration_recursive', 'modeling_recursive')
# What is kept of the config.json of a model's source: tokens, lengths.
KEPT = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range',
        'max_position_embeddings')
_ACTS = {'gelu_tanh': 'gelu_pytorch_tanh'}


def save(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig,
    variables: dict, *, hf_config: dict[str, Any] | None = None,
    dtype: DTypeLike = np.float32,
    companions: str | os.PathLike | None = None,
    progress: Callable[[int, int], Any] = lambda total, written: None,
) -> None:
  """Writes the model with each kernel of the block once.

  Args:
    directory: must not exist, or be empty; appears whole or not at all.
    cfg, variables: any model of this library whose loops have keys of their
      own; what only early exits use must have been dropped.
    hf_config: config.json of the model it came from.
    dtype: of every tensor.
    companions: a directory whose tokenizer, licence and card go along.
    progress: called with the bytes there are, and those just written.

  Raises:
    UserError: loops that share keys, a field that the modelling file does not
      have, or a value that `dtype` cannot hold.
  """
  hf.check_shapes(cfg, variables)
  if cfg.loops > 1 and not cfg.loop_keys:
    raise UserError(
        'model.loop_keys=False: the attention of transformers and vLLM has a'
        ' cache for every layer; train it with config.model.loop_keys=True to'
        ' export it')
  if cfg.rare:
    raise UserError(
        '--form=recursive: its modelling file does not have '
        + ', '.join(f'model.{k}={v!r}' for k, v in cfg.rare.items())
        + '; use --form=unrolled')
  params, dtype = variables['params'], np.dtype(dtype)
  leaves = tensors(cfg)
  layout = {name: (_shape(cfg, params, *row), dtype)
            for name, row in leaves.items()}

  def tensor(name):
    value = hf.cast(name, _value(cfg, params, *leaves[name]), dtype)
    return np.ascontiguousarray(value)

  size = sum(math.prod(shape) * dtype.itemsize
             for shape, _ in layout.values())
  with files.new_directory(directory, size=size) as new:
    files.write_json(
        new / 'config.json', config_json(cfg, hf_config or {}, dtype))
    for name in _MODULES:
      shutil.copyfile(CODE / f'{name}.py.txt', new / f'{name}.py')
    hf.write_shards(new, layout, tensor, lambda done: progress(size, done))
    if companions is not None:
      hf.copy_companions(pathlib.Path(companions), new)
      sentencepiece_json.add_tokenizer_json(new)
      sentencepiece_json.name_class(new)


def config_json(
    cfg: config_lib.ModelConfig, hf_config: dict[str, Any], dtype: np.dtype
) -> dict[str, Any]:
  """config.json of the recursive form.

  Args:
    cfg: what the model computes.
    hf_config: config.json of the model it came from.
    dtype: of the tensors.
  """
  rope = {'rope_type': 'default', **(
      fields.write_scaling(cfg) or {}),
      'rope_theta': cfg.rope_theta}
  if cfg.rope_fraction != 1:
    rope['partial_rotary_factor'] = cfg.rope_fraction
  return {
      'architectures': ['RecursiveForCausalLM'],
      # vLLM loads them in this order.
      'auto_map': {
          'AutoConfig': 'configuration_recursive.RecursiveConfig',
          'AutoModel': 'modeling_recursive.RecursiveModel',
          'AutoModelForCausalLM': 'modeling_recursive.RecursiveForCausalLM'},
      'model_type': 'recursive_tx', 'vocab_size': cfg.V, 'hidden_size': cfg.D,
      'intermediate_size': cfg.F, 'num_hidden_layers': cfg.num_layers,
      'num_attention_heads': cfg.N, 'num_key_value_heads': cfg.K,
      'head_dim': cfg.H, 'num_loops': cfg.loops,
      'num_prelude_layers': cfg.prelude, 'num_coda_layers': cfg.coda,
      'adapter_ranks': {k: rank for k, rank in cfg.ranks.items() if rank},
      'loop_norms': cfg.has_loop_vectors, 'norm_type': cfg.norm,
      'norm_eps': cfg.norm_eps, 'hidden_act': _ACTS.get(cfg.act, cfg.act),
      'gated_mlp': cfg.gated, 'parallel_residual': cfg.parallel,
      'attention_bias': cfg.attention_bias, 'mlp_bias': cfg.mlp_bias,
      'rope_parameters': rope, 'sliding_window': cfg.window or None,
      'scale_embeddings': cfg.embed_scale, 'tie_word_embeddings': cfg.tied,
      'torch_dtype': str(dtype),
      **{key: hf_config[key] for key in KEPT if key in hf_config}}


def tensors(
    cfg: config_lib.ModelConfig
) -> dict[str, tuple[str, tuple[int, ...], str]]:
  """{tensor: (our leaf, its leading indices, kind)} of the recursive form.

  A kind is the einsum letters of a kernel, in and out with a space between, or
  '' for what is stored as it is.
  """
  rows = {'model.embed_tokens.weight': ('embed/embedding', (), '')}
  if not cfg.tied:
    rows['lm_head.weight'] = ('head/kernel', (), '')
  rows |= _norm(cfg, 'model.norm', 'norm', ())
  block = virtual = 0
  for part, layers in (('prelude', cfg.prelude),
                       ('block', cfg.layers_per_loop), ('coda', cfg.coda)):
    own = part != 'block' or not cfg.has_loop_vectors
    for i in range(layers):
      rows |= _layer(cfg, f'model.block.{block + i}', part, i, own)
    if part == 'block':
      for loop in range(cfg.loops):
        for i in range(layers):
          rows |= _adapters(cfg, f'model.layers.{virtual}', (loop, i))
          virtual += 1
    else:
      virtual += layers
    block += layers
  return rows


def _layer(cfg, prefix, part, i, own) -> dict:
  """Rows of one layer of the block, the prelude or the coda."""
  rows = {}
  for name in cfg.kernels:
    group = 'attn' if name in config_lib.GROUPS['attn'] else 'mlp'
    rows[f'{prefix}.{name}_proj.weight'] = (
        f'{part}/layers/{group}/{name}/kernel', (i,), _letters(cfg, name))
    if own and cfg.has_bias(name):
      rows[f'{prefix}.{name}_proj.bias'] = (
          f'{part}/vectors/{name}/bias', (i,), '')
  if own:
    for norm in ('attn_norm', 'mlp_norm'):
      rows |= _norm(
          cfg, f'{prefix}.{norm}', f'{part}/vectors/{norm}', (i,))
  return rows


def _adapters(cfg, prefix, at) -> dict:
  """Rows of what one layer of one loop has of its own."""
  rows = {}
  for name, rank in cfg.ranks.items():
    inner, outer = _letters(cfg, name).split()
    if rank:
      rows[f'{prefix}.adapters.{name}.a.weight'] = (
          f'adapters/{name}/a', at, f'{inner} R')
      rows[f'{prefix}.adapters.{name}.b.weight'] = (
          f'adapters/{name}/b', at, f'R {outer}')
    if cfg.has_loop_vectors and cfg.has_bias(name):
      rows[f'{prefix}.biases.{name}'] = (f'adapters/{name}/bias', at, '')
  if cfg.has_loop_vectors:
    for norm in ('attn_norm', 'mlp_norm'):
      rows |= _norm(cfg, f'{prefix}.{norm}', f'adapters/{norm}', at)
  return rows


def _norm(cfg, name, leaf, at) -> dict:
  theirs = {'scale': 'weight', 'bias': 'bias'}
  return {f'{name}.{theirs[own]}': (f'{leaf}/{own}', at, '')
          for own in adapters.norm_leaves(cfg)}


def _letters(cfg, name: str) -> str:
  return ' '.join(config_lib.split(cfg.kernels[name]))


def _value(cfg, params, leaf, at, letters) -> np.ndarray:
  """One tensor: kernels as PyTorch has them, [out, in]."""
  value = np.asarray(paths.get(params, leaf)[at])
  if letters:
    rows = math.prod(value.shape[:len(letters.split()[0])])
    return value.reshape(rows, -1).T
  # A bias of several heads is one row of columns.
  return value.reshape(-1) if leaf.endswith('bias') else value


def _shape(cfg, params, leaf, at, letters) -> tuple[int, ...]:
  shape = np.shape(paths.get(params, leaf))[len(at):]
  if letters:
    inner = len(letters.split()[0])
    return math.prod(shape[inner:]), math.prod(shape[:inner])
  return (math.prod(shape),) if leaf.endswith('bias') else shape
