"""What llama.cpp computes, and its tensors: ours by name, both ways.

Families map to architectures of llama.cpp by what they compute; what none of
them computes is refused. Most hold a model unrolled; `nanbeige` runs its layers
several times, so that a recursive model without adapters keeps its block once.
Values are those of llama.cpp's own conversion: kernels [out, in], the heads of
q and k of some architectures with rotated pairs side by side, Gemma's norms
plus one.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import model
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store import looped

_NAMES = {'attn_norm': 'attn_norm', 'mlp_norm': 'ffn_norm',
          'attn_post_norm': 'post_attention_norm',
          'mlp_post_norm': 'post_ffw_norm', 'q_norm': 'attn_q_norm',
          'k_norm': 'attn_k_norm', 'q': 'attn_q', 'k': 'attn_k',
          'v': 'attn_v', 'o': 'attn_output', 'gate': 'ffn_gate',
          'up': 'ffn_up', 'down': 'ffn_down'}
_QKV, _GATE_UP = ('q', 'k', 'v'), ('gate', 'up')
_FUSED_NAMES = {_QKV: 'attn_qkv', _GATE_UP: 'ffn_up'}
_LLAMA = dict(norm='rms', gated=True, parallel=False, embed_scale=False,
              act='silu', rope_fraction=1.0)
_BARE = dict(_LLAMA, loops=1, attention_bias=False, mlp_bias=False, window=0)
_GEMMA = dict(_BARE, norm='rms+1', embed_scale=True, act='gelu_tanh', tied=True)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One of llama.cpp's.

  Attributes:
    name: general.architecture.
    fixed: values, or tuples of them, that fields of ModelConfig must have.
    rare: fields of config.RARE that the file says; those that are not fixed
      either must be neutral.
    permuted: dimensions i and i + H / 2 of q and k, which rotate together,
      lie side by side.
    square: its heads together are as wide as the model.
    fused: kernels that are one tensor, one after the other.
    complete: the head and the biases of attention must be there: a tied head
      is written as a copy, a bias that the model lacks as zeros.
    rope_factors: it reads a divisor for each rotary frequency.
  """
  name: str
  fixed: dict[str, Any]
  rare: tuple[str, ...] = ()
  permuted: bool = False
  square: bool = False
  fused: tuple[tuple[str, ...], ...] = ()
  complete: bool = False
  rope_factors: bool = False


def _without(fixed: dict[str, Any], *free: str) -> dict[str, Any]:
  return {key: value for key, value in fixed.items() if key not in free}


NANBEIGE = Architecture(
    'nanbeige', _without(_BARE, 'loops'), permuted=True, rope_factors=True)
ARCHITECTURES = (
    NANBEIGE,
    Architecture('llama', dict(_LLAMA, loops=1), permuted=True,
                 rope_factors=True),
    Architecture('qwen2', dict(_BARE, qkv_bias=True), square=True),
    Architecture('qwen3', dict(_BARE, qk_norm='head')),
    Architecture('olmo2', dict(_BARE, norm_place='post', qk_norm='all'),
                 square=True),
    Architecture('granite', _BARE, (
        'query_scale', 'residual_scale', 'logits_scale', 'embed_factor'),
                 permuted=True),
    # Every fourth layer is without rotary positions, whatever the file says.
    Architecture('smollm3', dict(_BARE, pattern='gggn'),
                 permuted=True),
    Architecture('phi3', _without(_BARE, 'window', 'rope_fraction'),
                 ('long_rope',), square=True, fused=(_QKV, _GATE_UP)),
    Architecture('gemma', _without(_GEMMA, 'window')),
    # Windows in every other layer, or five in six, with a theta of 10,000;
    # queries are scaled by H ** -0.5.
    Architecture('gemma2', dict(
        _without(_GEMMA, 'window'), norm_place='both', pattern='wg'), (
            'attention_cap', 'logits_cap')),
    Architecture('gemma3', dict(
        _without(_GEMMA, 'window'), norm_place='both', pattern='wwwwwg',
        qk_norm='head', window_theta=10_000.0)),
    Architecture('gpt2', dict(
        loops=1, norm='layer', gated=False, parallel=False, embed_scale=False,
        act='gelu_tanh', attention_bias=True, mlp_bias=True, pattern='n'),
                 ('positions',), square=True, fused=(_QKV,)),
    # It computes the tanh form of GELU for both.
    Architecture('gptneox', dict(
        loops=1, norm='layer', gated=False, embed_scale=False, mlp_bias=True,
        act=('gelu', 'gelu_tanh'), window=0), square=True,
                 fused=(_QKV,), complete=True))


def architecture(cfg: config_lib.ModelConfig) -> Architecture:
  """The one that computes a model, vanilla or looped.

  Raises:
    UserError: none does.
  """
  for found in ARCHITECTURES:
    if (found is NANBEIGE) == (cfg.loops > 1) and _fits(found, cfg):
      return found
  if cfg.rare:
    raise UserError(
        '--form=gguf: no architecture of llama.cpp has all of '
        + ', '.join(f'model.{k}={v!r}' for k, v in cfg.rare.items())
        + '; use --form=unrolled')
  raise UserError(
      'no architecture of llama.cpp computes this model'
      f' (norm={cfg.norm}, act={cfg.act}, gated={cfg.gated},'
      f' tied={cfg.tied}, attention_bias={cfg.attention_bias},'
      f' rope_scaling={cfg.rope_scaling}); use --form=recursive or'
      ' --form=unrolled')


def loops_fit(cfg: config_lib.ModelConfig) -> bool:
  """Whether llama.cpp loops the block of a recursive model as it is."""
  return cfg.loops > 1 and looped.obstacle(cfg) is None and _fits(
      NANBEIGE, cfg)


def _fits(architecture: Architecture, cfg) -> bool:
  rope = architecture.rope_factors or len(cfg.rope_scaling) != 4
  square = not architecture.square or cfg.N * cfg.H == cfg.D
  square &= cfg.norm != 'layer' or cfg.K == cfg.N
  # A scale of the queries that says what it would be without it is neutral.
  rare = set(cfg.rare) - {*architecture.rare, *architecture.fixed}
  if math.isclose(cfg.score_scale, cfg.H**-0.5):
    rare -= {'query_scale'}
  return not rare and rope and square and all(
      getattr(cfg, field) in (value if isinstance(value, tuple) else (value,))
      for field, value in architecture.fixed.items())


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of the file.

  Attributes:
    name: its name in the file.
    leaves: ours, side by side along the first axis; () are zeros, or what
      `constant` holds.
    layer: their leading index, None where they have none.
    kinds: of each leaf: 'plain'; the einsum letters of a kernel, in and out
      with a space between; 'row', all its dimensions as one.
    permuted: of each leaf: its heads, whose halves are interleaved, or 0.
    offset: added to what is stored here.
    constant: its value, where it comes from no leaf.
  """
  name: str
  leaves: tuple[str, ...]
  layer: int | None
  kinds: tuple[str, ...] = ('plain',)
  permuted: tuple[int, ...] = (0,)
  offset: float = 0.0
  constant: tuple[float, ...] = ()

  def shape(self, cfg: config_lib.ModelConfig) -> tuple[int, ...]:
    """Of the tensor in the file, as NumPy has it."""
    if not self.leaves:
      return (len(self.constant),)
    shapes = model.flat_shapes(cfg)
    parts = [_encoded_shape(
        shapes[leaf][self.layer is not None:], kind)
             for leaf, kind in zip(self.leaves, self.kinds, strict=True)]
    return (sum(part[0] for part in parts), *parts[0][1:])

  def value(self, cfg: config_lib.ModelConfig, params: dict) -> np.ndarray:
    """The tensor, fp32."""
    if not self.leaves:
      return np.asarray(self.constant, np.float32)
    parts = []
    for leaf, kind, heads in zip(
        self.leaves, self.kinds, self.permuted, strict=True):
      value = np.asarray(paths.get(params, leaf), np.float32)
      value = value if self.layer is None else value[self.layer]
      if kind != 'plain':
        value = value.reshape(_encoded_shape(value.shape, kind)[::-1]).T
      if heads:
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(
            1, 2).reshape(value.shape)
      parts.append(value + np.float32(self.offset))
    return np.concatenate(parts)

  def read(
      self, cfg: config_lib.ModelConfig, value: np.ndarray
  ) -> list[tuple[str, np.ndarray]]:
    """Our leaves of one layer from the tensor: the inverse of `value`."""
    shapes, found, start = model.flat_shapes(cfg), [], 0
    for leaf, kind, heads in zip(
        self.leaves, self.kinds, self.permuted, strict=True):
      shape = shapes[leaf][self.layer is not None:]
      rows = _encoded_shape(shape, kind)[0]
      part = value[start:start + rows] - np.float32(self.offset)
      start += rows
      if heads:
        part = part.reshape(heads, -1, 2, *part.shape[1:]).swapaxes(
            1, 2).reshape(part.shape)
      found.append((leaf, (part if kind == 'plain' else part.T).reshape(shape)))
    return found


def _encoded_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
  """A leaf's shape in the file."""
  if kind == 'plain':
    return shape
  if kind == 'row':
    return (math.prod(shape),)
  inner = len(kind.split()[0])
  return math.prod(shape[inner:]), math.prod(shape[:inner])


def tensors(
    architecture: Architecture, cfg: config_lib.ModelConfig
) -> list[Row]:
  """Every tensor of the file, in its order."""
  offset = float(cfg.norm == 'rms+1')
  rows = [Row('token_embd.weight', ('embed/embedding',), None)]
  if cfg.positions:
    rows.append(Row('position_embd.weight', ('embed/positions',), None))
  rows += _norm_rows(cfg, 'output_norm', 'norm', None, offset)
  if not cfg.tied:
    rows.append(Row('output.weight', ('head/kernel',), None))
  elif architecture.complete:
    rows.append(Row('output.weight', ('embed/embedding',), None))
  if len(cfg.rope_scaling) == 4:
    rows.append(Row('rope_freqs.weight', (), None,
                    constant=_rope_factors(cfg)))
  if cfg.long_rope:
    rows += [Row(f'rope_factors_{name}.weight', (), None,
                 constant=cfg.rope_divisors(name == 'long'))
             for name in ('short', 'long')]
  for layer in range(cfg.layers_per_loop):
    for norm in cfg.norms:
      rows += _norm_rows(cfg, f'blk.{layer}.{_NAMES[norm]}',
                         f'block/vectors/{norm}', layer, offset)
    apart = [(name,) for name in cfg.kernels if not any(
        name in group for group in architecture.fused)]
    for group in (*architecture.fused, *apart):
      rows += _linear_rows(architecture, cfg, group, layer)
  return rows


def _norm_rows(cfg, name, leaf, layer, offset) -> list[Row]:
  # Those of all heads as one are a row.
  rows = [Row(f'{name}.weight', (f'{leaf}/scale',), layer, ('row',),
              offset=offset)]
  if cfg.norm == 'layer':
    rows.append(Row(f'{name}.bias', (f'{leaf}/bias',), layer))
  return rows


def _linear_rows(architecture, cfg, group, layer) -> list[Row]:
  """Weight and bias of one kernel, or of several side by side."""
  name = _FUSED_NAMES.get(group) or _NAMES[group[0]]
  heads = {'q': cfg.N, 'k': cfg.K} if architecture.permuted else {}
  permuted = tuple(heads.get(kernel, 0) for kernel in group)
  part = 'attn' if group[0] in config_lib.GROUPS['attn'] else 'mlp'
  rows = [Row(
      f'blk.{layer}.{name}.weight',
      tuple(f'block/layers/{part}/{kernel}/kernel' for kernel in group), layer,
      tuple(' '.join(config_lib.split(cfg.kernels[kernel]))
            for kernel in group), permuted)]
  bias = f'blk.{layer}.{name}.bias'
  if cfg.has_bias(group[0]):
    rows.append(Row(
        bias, tuple(f'block/vectors/{kernel}/bias' for kernel in group), layer,
        ('row',) * len(group), permuted))
  elif architecture.complete:
    size = sum(cfg.in_out(kernel)[1] for kernel in group)
    rows.append(Row(bias, (), layer, constant=(0.0,) * size))
  return rows


def _rope_factors(cfg) -> tuple[float, ...]:
  """Llama 3's divisors of the rotary frequencies; see model/layer.py."""
  factor, low, high, length = cfg.rope_scaling
  pairs = cfg.H // 2
  frequency = cfg.rope_theta ** -(np.arange(pairs) / pairs)
  rotations = length * frequency / (2 * math.pi)
  keep = np.clip((rotations - low) / (high - low), 0, 1)
  return tuple(1 / (keep + (1 - keep) / factor))
