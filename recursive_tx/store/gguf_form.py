"""The GGUF form: one file, model.gguf, for llama.cpp and what reads its files.

What is in it is in `gguf_tensors`; the file itself is written by the package
`gguf`.
"""

from collections.abc import Callable
import dataclasses
import math
import os
import pathlib
from typing import Any

from absl import logging
import ml_dtypes
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import files, model, tying
from recursive_tx.errors import optional
from recursive_tx.files import paths
from recursive_tx.store import gguf_tensors, gguf_tokenizer, hf, looped

FILE = 'model.gguf'
# {--dtype: name in gguf, number of general.file_type}
DTYPES = {'float32': ('F32', 0), 'float16': ('F16', 1), 'q8_0': ('Q8_0', 7),
          'bfloat16': ('BF16', 32)}
_NUMPY = {'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}


def save(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig,
    variables: dict, *, hf_config: dict[str, Any] | None = None,
    dtype: str = 'float32', companions: str | os.PathLike | None = None,
    name: str = 'model',
    progress: Callable[[int, int], Any] = lambda total, written: None,
) -> None:
  """Writes model.gguf, with the tokenizer in it, beside licence and card.

  Args:
    directory: must not exist, or be empty; appears whole or not at all.
    cfg, variables: any model whose loops have keys of their own; the block is
      held once where llama.cpp computes it so, else unrolled.
    hf_config: config.json of the model it came from.
    dtype: of matrices, of DTYPES; vectors are fp32.
    companions: a directory whose tokenizer, licence and card go along.
    name: general.name.
    progress: called with the bytes there are, and those just written.

  Raises:
    UserError: llama.cpp computes no such model, or knows no such tokenizer;
      the package `gguf` is not installed.
  """
  hf.check_shapes(cfg, variables)
  gguf = package()
  cfg, variables = _folded(cfg, variables)
  architecture = gguf_tensors.architecture(cfg)
  rows = gguf_tensors.tensors(architecture, cfg)
  types = {row.name: _type(gguf, row, cfg, dtype) for row in rows}
  sizes = {row.name: _nbytes(gguf, row.shape(cfg), types[row.name])
           for row in rows}
  with files.new_directory(directory, size=sum(sizes.values())) as new:
    writer = gguf.GGUFWriter(None, architecture.name)
    try:
      writer.add_name(name)
      writer.add_file_type(DTYPES[dtype][1])
      _add_sizes(writer, architecture, cfg, hf_config or {})
      if companions is not None:
        gguf_tokenizer.add(writer, pathlib.Path(companions), cfg.V)
      else:
        writer.add_tokenizer_model('none')
      for row in rows:
        writer.add_tensor_info(
            row.name, _bytes_shape(gguf, row.shape(cfg), types[row.name]),
            _stored(types[row.name]), sizes[row.name],
            raw_dtype=types[row.name])
      writer.write_header_to_file(path=new / FILE)
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for row in rows:
        value = row.value(cfg, variables['params'])
        writer.write_tensor_data(
            _quantized(gguf, row.name, value, types[row.name]))
        progress(sum(sizes.values()), sizes[row.name])
    finally:
      writer.close()
    if companions is not None:
      hf.copy_companions(pathlib.Path(companions), new)


def package() -> Any:
  """The package `gguf`. Raises UserError where it is not installed."""
  return optional('gguf', extra='gguf', what='--form=gguf')


def _folded(
    cfg: config_lib.ModelConfig, variables: dict
) -> tuple[config_lib.ModelConfig, dict]:
  """The model as it is written: as it is where that is exact, or unrolled."""
  if cfg.loops == 1:
    return tying.merge(cfg, variables)
  if gguf_tensors.loops_fit(cfg):
    return looped.without_exits(cfg, variables)
  merged = tying.merge(cfg, variables)
  gguf_tensors.architecture(merged[0])  # Refused before anything is said.
  logging.warning(
      'Written unrolled, at the size of %d layers: llama.cpp holds a block'
      " once only of a Llama whose %s.", cfg.num_layers, looped.WANTED)
  return merged


def _add_sizes(writer, architecture, cfg, hf_config) -> None:
  """What llama.cpp reads of the model's sizes."""
  length = cfg.positions or hf_config.get('max_position_embeddings') or 2048
  if cfg.pattern and cfg.window:
    writer.add_sliding_window(cfg.window)
  elif cfg.window:
    logging.warning(
        'llama.cpp has no sliding window here: the context length is set to'
        ' the window, %d, up to which both are equal.', cfg.window)
    length = min(length, cfg.window)
  writer.add_context_length(length)
  writer.add_vocab_size(cfg.V)
  writer.add_embedding_length(cfg.D)
  writer.add_block_count(cfg.layers_per_loop)
  writer.add_feed_forward_length(cfg.F)
  writer.add_head_count(cfg.N)
  writer.add_head_count_kv(cfg.K)
  writer.add_key_length(cfg.H)
  writer.add_value_length(cfg.H)
  if not cfg.positions:
    writer.add_rope_dimension_count(cfg.rotated)
    writer.add_rope_freq_base(cfg.rope_theta)
  if cfg.norm == 'layer':
    writer.add_layer_norm_eps(cfg.norm_eps)
  else:
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
  if architecture.name == 'gptneox':
    writer.add_parallel_residual(cfg.parallel)
  if architecture.name == 'granite':
    writer.add_attention_scale(cfg.score_scale)
    writer.add_embedding_scale(cfg.embed_factor)
    writer.add_residual_scale(cfg.residual_scale)
    writer.add_logit_scale(1 / cfg.logits_scale)
  if cfg.attention_cap:
    writer.add_attn_logit_softcapping(cfg.attention_cap)
  if cfg.logits_cap:
    writer.add_final_logit_softcapping(cfg.logits_cap)
  if cfg.long_rope:
    writer.add_rope_scaling_orig_ctx_len(int(cfg.long_rope[0]))
    writer.add_rope_scaling_attn_factors(cfg.long_rope[1])
  if len(cfg.rope_scaling) == 1:
    writer.add_string(f'{architecture.name}.rope.scaling.type', 'linear')
    writer.add_rope_scaling_factor(cfg.rope_scaling[0])
  if cfg.loops > 1:  # The package has no names for these yet.
    writer.add_uint32(f'{architecture.name}.num_loops', cfg.loops)
    writer.add_bool(f'{architecture.name}.skip_loop_final_norm', True)


def _type(gguf, row: gguf_tensors.Row, cfg, dtype: str):
  """A tensor's type: vectors are fp32, as llama.cpp wants them."""
  types = gguf.GGMLQuantizationType
  shape = row.shape(cfg)
  if len(shape) == 1:
    return types.F32
  if dtype == 'q8_0' and shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
    logging.warning('%s has rows of %d, no multiple of 32: written as fp16.',
                    row.name, shape[-1])
    return types.F16
  return types[DTYPES[dtype][0]]


def _stored(kind) -> Any:
  """The NumPy dtype that the package `gguf` stores a type in."""
  return {'F32': np.float32, 'F16': np.float16}.get(kind.name, np.uint8)


def _bytes_shape(gguf, shape, kind) -> tuple[int, ...]:
  if _stored(kind) is not np.uint8:
    return shape
  return gguf.quant_shape_to_byte_shape(shape, kind)


def _nbytes(gguf, shape, kind) -> int:
  return math.prod(_bytes_shape(gguf, shape, kind)) * np.dtype(
      _stored(kind)).itemsize


def _quantized(gguf, name, value, kind) -> np.ndarray:
  wanted = {'F16': 'float16', 'BF16': 'bfloat16'}.get(kind.name)
  hf.cast(name, value, _NUMPY.get(wanted, np.float32))  # Raises for infinity.
  return gguf.quantize(np.ascontiguousarray(value), kind)


def load(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig
) -> tuple[config_lib.ModelConfig, dict]:
  """The model of a file that `save` wrote, fp32, for comparison.

  Args:
    directory: of `save`.
    cfg: of the model that was given to it.
  """
  cfg = looped.plain(cfg) if gguf_tensors.loops_fit(cfg) else (
      dataclasses.replace(
          cfg, loops=1, prelude=0, coda=0, rank='0', exit_gate=0,
          layers_per_loop=cfg.num_layers))
  reader = package().GGUFReader(pathlib.Path(directory) / FILE)
  found = {tensor.name: tensor for tensor in reader.tensors}
  params = {}
  for path, shape in model.flat_shapes(cfg).items():
    paths.put(params, path, np.empty(shape, np.float32))
  for row in gguf_tensors.tensors(gguf_tensors.architecture(cfg), cfg):
    if not row.leaves:
      continue
    tensor = found[row.name]
    value = package().dequantize(tensor.data, tensor.tensor_type)
    for leaf, part in row.read(cfg, value.reshape(row.shape(cfg))):
      paths.get(params, leaf)[... if row.layer is None else row.layer] = part
  return cfg, {'params': params}
