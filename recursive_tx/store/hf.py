"""Hugging Face directories <-> (cfg, variables), through a family's rules.

Reads safetensors and JSON itself: no torch, no transformers. Every tensor on
disk is claimed by a rule or is a known buffer, or it is an error.
"""

import os
import pathlib
import shutil
from typing import Any

import einops
import numpy as np
from numpy.typing import DTypeLike

from recursive_tx import config as config_lib
from recursive_tx import files, model, tying
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store import families

_SHARD_BYTES = 5 << 30
# What a directory's model is used with, carried along unchanged.
_COMPANIONS = (
    'tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja',
    'generation_config.json',
    'LICENSE', 'LICENSE.md', 'LICENSE.txt', 'NOTICE', 'README.md')


class Source:
  """A vanilla Hugging Face model on disk, whose leaves are read on demand.

  Attributes:
    hf: config.json as read.
    cfg: its ModelConfig.
    dtype: numpy dtype that most of its parameters have.
  """

  def __init__(self, directory: str | os.PathLike):
    """Reads headers and accounts for every tensor.

    Raises:
      UserError: whatever is missing, extra, misshapen or not implemented.
    """
    self.hf, self.cfg, self._family = read_config(directory)
    self._reader = files.Reader(directory)
    self._rules = {}
    for name, leaves, pattern, layer in families.tensors(
        self._family, self.cfg):
      for part, leaf in enumerate(leaves):
        self._rules[leaf, layer] = (name, len(leaves), pattern, part)
    self._fused = (None, None)
    self._account()
    claimed = {rule[0] for rule in self._rules.values()}
    sizes = {}
    for name in claimed:
      dtype = self._reader.dtypes[name]
      sizes[dtype] = sizes.get(dtype, 0) + np.prod(self._reader.shapes[name])
    self.dtype = max(sizes, key=sizes.get)

  def read(self, path: str, layer: int | None = None) -> np.ndarray:
    """One layer of a leaf of the vanilla tree, in the dtype on disk.

    Args:
      path: such as 'block/layers/attn/q/kernel' or 'embed/embedding'.
      layer: which, for leaves of the block.
    """
    name, parts, pattern, part = self._rules[path.removeprefix('block/'),
                                             layer]
    if self._fused[0] == name:  # q, k and v of one fused tensor in turn.
      return self._fused[1][part]
    array = _rearrange(self._reader.read(name), pattern, self.cfg)
    if parts == 1:
      return array
    self._fused = (name, array)
    return array[part]

  def _account(self) -> None:
    expected = {}
    shapes = model.flat_shapes(self.cfg)
    for (leaf, layer), (name, parts, pattern, _) in self._rules.items():
      shape = shapes[leaf if layer is None else f'block/{leaf}']
      shape = shape if layer is None else shape[1:]
      stacked = np.broadcast_to(np.int8(0), (parts, *shape)[parts == 1:])
      expected[name] = _rearrange(
          stacked, _reverse(pattern), self.cfg).shape
    found = {name: shape for name, shape in self._reader.shapes.items()
             if not families.is_buffer(self._family, name)}
    found = self._without_tied_head(found, expected)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
      raise UserError(
          f'the tensors do not match config.json: {len(missing)} missing '
          f'{_few(missing)}, {len(extra)} not claimed {_few(extra)}')
    for name, shape in expected.items():
      if found[name] != shape:
        raise UserError(f'tensor {name!r} has shape {found[name]}; '
                         f'config.json says {shape}')

  def _without_tied_head(self, found, expected):
    """Drops a head that a tied model stores as a copy of its embedding."""
    head, embed = (
        next(name for leaves, name, _ in self._family.rules
             if leaves[0] == leaf)
        for leaf in ('head/kernel', 'embed/embedding'))
    if self.cfg.tied and head in found and embed in found:
      if not np.array_equal(self._reader.read(head).view(np.uint8),
                            self._reader.read(embed).view(np.uint8)):
        raise UserError(
            f'config.json ties the head to the embedding, but {head!r} '
            f'differs from {embed!r}; set tie_word_embeddings to false')
      found = {k: v for k, v in found.items() if k != head}
    return found


def read_config(
    directory: str | os.PathLike
) -> tuple[dict[str, Any], config_lib.ModelConfig, families.Family]:
  """config.json as read, the ModelConfig it says, and the family.

  Raises:
    UserError: there is none, or one that is not implemented.
  """
  path = pathlib.Path(directory) / 'config.json'
  if not path.is_file():
    raise UserError(
        f'{directory} has no config.json; expected the directory of a model:'
        ' of Hugging Face, of convert, or the workdir of a run')
  found = files.read_json(path)
  family, cfg = families.read_config(found)
  return found, cfg, family


def load_hf(
    directory: str | os.PathLike
) -> tuple[config_lib.ModelConfig, dict]:
  """Loads a Hugging Face model directory.

  Returns:
    Its vanilla ModelConfig and variables, numpy in the dtypes on disk.

  Raises:
    UserError: anything that is missing, extra, misshapen, not finite or not
      implemented, by name.
  """
  source = Source(directory)
  params, stacks = {}, {}
  for path, shape in model.flat_shapes(source.cfg).items():
    if path.startswith('block/'):
      stacks[path] = shape
    else:
      paths.put(params, path, source.read(path))
  for layer in range(source.cfg.num_layers):
    for path, shape in stacks.items():
      value = source.read(path, layer)
      if layer == 0:
        paths.put(params, path, np.empty(shape, value.dtype))
      paths.get(params, path)[layer] = value
  return source.cfg, {'params': params}


def save_hf(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig,
    variables: dict, *, hf: dict[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    companions: str | os.PathLike | None = None,
) -> None:
  """Writes a stock Hugging Face model: loops unrolled, adapters merged.

  Args:
    directory: must not exist, or be empty; appears whole or not at all.
    cfg, variables: any model whose unrolled form a family computes.
    hf: config.json of the model it came from: what this library does not
      use (token ids, lengths) is kept from it.
    dtype: of the tensors; None keeps each leaf's own.
    companions: a directory whose tokenizer, licence and card go along.

  Raises:
    UserError: no family computes what this model does.
  """
  check_shapes(cfg, variables)
  cfg, variables = tying.merge(cfg, variables)
  family = families.of(cfg, hf and hf.get('model_type'))
  written = families.write_config(family, cfg)
  if hf is not None:
    same = families.read_config(hf)[1] == cfg
    written = dict(hf) if same else {**hf, **written}
  rows = {name: (leaves, pattern, layer) for name, leaves, pattern, layer
          in families.tensors(family, cfg)}

  def tensor(name):
    leaves, pattern, layer = rows[name]
    values = []
    for leaf in leaves:
      path = leaf if layer is None else f'block/{leaf}'
      value = paths.get(variables['params'], path)
      values.append(np.asarray(value if layer is None else value[layer]))
    value = values[0] if len(values) == 1 else np.stack(values)
    value = value if dtype is None else value.astype(dtype)
    return _rearrange(value, _reverse(pattern), cfg)

  embedding = paths.get(variables['params'], 'embed/embedding')
  written.pop('dtype', None)
  written['torch_dtype'] = str(np.dtype(dtype or embedding.dtype))
  with files.new_directory(directory) as new:
    files.write_json(new / 'config.json', written)
    _write_shards(new, list(rows), tensor)
    if companions is not None:
      copy_companions(pathlib.Path(companions), new)


def check_shapes(cfg: config_lib.ModelConfig, variables: dict) -> None:
  """Raises UserError, naming a leaf, unless the variables fit the config."""
  expected = model.flat_shapes(cfg)
  found = {path: np.shape(v) for path, v in paths.items(variables['params'])}
  for path in sorted({*expected, *found}):
    if expected.get(path) != found.get(path):
      raise UserError(
          f'parameter {path!r} has shape {found.get(path)}; the config says '
          f'{expected.get(path)} (None: it does not exist)')


def copy_companions(source: pathlib.Path, new: pathlib.Path) -> None:
  """Copies the tokenizer, the licence and the card."""
  for name in _COMPANIONS:
    if (source / name).is_file():
      shutil.copy(source / name, new / name)


def _write_shards(new: pathlib.Path, names, tensor) -> None:
  """model.safetensors, or several and their index where they are large."""
  shards, sizes, total = [[]], [0], 0
  for name in names:
    size = tensor(name).nbytes
    if sizes[-1] and sizes[-1] + size > _SHARD_BYTES:
      shards.append([])
      sizes.append(0)
    shards[-1].append(name)
    sizes[-1] += size
    total += size
  index = {}
  for i, shard in enumerate(shards, 1):
    file = ('model.safetensors' if len(shards) == 1 else
            f'model-{i:05d}-of-{len(shards):05d}.safetensors')
    values = {name: tensor(name) for name in shard}
    with files.Writer(new / file, {
        k: (v.shape, v.dtype) for k, v in values.items()}) as writer:
      for name, value in values.items():
        writer.write(name, value)
    index.update(dict.fromkeys(shard, file))
  if len(shards) > 1:
    files.write_json(new / 'model.safetensors.index.json', {
        'metadata': {'total_size': total}, 'weight_map': index})


def _reverse(pattern: str) -> str:
  left, right = pattern.split(' -> ')
  return f'{right} -> {left}'


def _rearrange(array, pattern: str, cfg) -> np.ndarray:
  sizes = {letter: getattr(cfg, letter) for letter in 'NKH'
           if letter in pattern.split(' -> ')[0].replace('(', ' ').replace(
               ')', ' ').split()}
  return np.ascontiguousarray(einops.rearrange(array, pattern, **sizes))


def _few(names: list[str]) -> str:
  shown = ', '.join(names[:4])
  return f'({shown}{", ..." if len(names) > 4 else ""})' if names else ''
