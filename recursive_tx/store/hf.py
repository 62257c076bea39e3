"""Hugging Face directories <-> (cfg, variables), through a family's rules.

Needs neither torch nor transformers. Every tensor on disk is claimed by a rule
or is a known buffer, or it is an error.
"""

from collections.abc import Callable, Mapping
import fnmatch
import math
import os
import pathlib
import re
import shutil
from typing import Any

import einops
import numpy as np
from numpy.typing import DTypeLike

from recursive_tx import config as config_lib
from recursive_tx import files, model, tying
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store import config_json, families, sentencepiece_json

_SHARD_BYTES = 5 << 30
# What goes with the weights unchanged: tokenizer, templates, terms of use. In
# lower case, as names are compared.
_COMPANIONS = (
    'tokenizer*', 'special_tokens_map.json', 'added_tokens.json',
    'vocab.json', 'merges.txt', 'chat_template*', 'additional_chat_templates',
    'generation_config.json', 'licen[cs]e*', 'copying*', 'notice*', 'readme*',
    'third_party*', '*policy*', 'responsible*use*', 'terms*', 'citation*',
    'authors*')


class Source:
  """A vanilla Hugging Face model on disk, whose leaves are read on demand.

  Attributes:
    hf: config.json as read.
    cfg: its ModelConfig.
    dtype: numpy dtype that most of its parameters have.
    dtypes: {tensor: numpy dtype} of those that have another.
  """

  def __init__(
      self, directory: str | os.PathLike, *,
      weights: str | os.PathLike | None = None):
    """Reads headers and accounts for every tensor.

    Args:
      directory: of config.json.
      weights: of the tensors, on disk or in a bucket; None is `directory`.

    Raises:
      UserError: whatever is missing, extra, misshapen or not implemented.
    """
    self.hf, self.cfg, self._family = read_config(directory)
    self._reader = files.Reader(weights or directory)
    # Saved without its head, a model lacks the prefix of all other names.
    whole = any(name.startswith(self._family.base)
                for name in self._reader.shapes)
    self._prefix = '' if whole else self._family.base
    self._rules = {}
    for name, leaves, pattern, layer in families.tensors(
        self._family, self.cfg):
      for part, leaf in enumerate(leaves):
        self._rules[leaf, layer] = (name, leaves, pattern, part)
    self._fused = (None, None)
    self._account()
    claimed = {rule[0] for rule in self._rules.values()}
    dtypes = {name: self._reader.dtypes[self._on_disk(name)]
              for name in sorted(claimed)}
    sizes = {}
    for name, dtype in dtypes.items():
      sizes[dtype] = sizes.get(dtype, 0) + math.prod(
          self._reader.shapes[self._on_disk(name)])
    self.dtype = max(sizes, key=sizes.get)
    self.dtypes = {
        name: dtype for name, dtype in dtypes.items() if dtype != self.dtype}

  def read(self, path: str, layer: int | None = None) -> np.ndarray:
    """One layer of a leaf of the vanilla tree, in the dtype on disk.

    Args:
      path: such as 'block/layers/attn/q/kernel' or 'embed/embedding'.
      layer: which, for leaves of the block.
    """
    name, leaves, pattern, part = self._rules[path.removeprefix('block/'),
                                              layer]
    if self._fused[0] != name:  # q, k and v of one fused tensor in turn.
      array = self._reader.read(self._on_disk(name))
      if len(leaves) == 1:
        return _rearrange(array, pattern, self.cfg)
      self._fused = (name, _apart(array, leaves, pattern, self.cfg))
    return self._fused[1][part]

  def _on_disk(self, name: str) -> str:
    return name.removeprefix(self._prefix)

  def _account(self) -> None:
    expected = {
        name: _shape_on_disk(self.cfg, leaves, pattern) for name, leaves,
        pattern, _ in families.tensors(self._family, self.cfg)}
    head, embed = (
        next(name for leaves, name, _ in self._family.rules
             if leaves[0] == leaf)
        for leaf in ('head/kernel', 'embed/embedding'))
    found = {name if name == head else self._prefix + name: shape
             for name, shape in self._reader.shapes.items()}
    found = {name: shape for name, shape in found.items()
             if not families.is_buffer(self._family, name)}
    found = self._without_tied_head(found, head, embed)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing == [head] and not extra:
      raise UserError(
          f'{head!r} is not there, and config.json does not tie the head to'
          ' the embedding; copy the weights with their head, or set'
          ' tie_word_embeddings to true if they were trained so')
    if missing or extra:
      raise UserError(
          f'the tensors do not match config.json: {len(missing)} missing '
          f'{_few(missing)}, {len(extra)} not claimed {_few(extra)}')
    for name, shape in expected.items():
      if found[name] != shape:
        raise UserError(f'tensor {name!r} has shape {found[name]}; '
                        f'config.json says {shape}')

  def _without_tied_head(self, found, head, embed):
    """Drops a head that a tied model stores as a copy of its embedding."""
    if self.cfg.tied and head in found and embed in found:
      if not np.array_equal(
          self._reader.read(head).view(np.uint8),
          self._reader.read(self._on_disk(embed)).view(np.uint8)):
        raise UserError(
            f'config.json ties the head to the embedding, but {head!r} '
            f'differs from {embed!r}; set tie_word_embeddings to false')
      found = {k: v for k, v in found.items() if k != head}
    return found


def read_config(
    directory: str | os.PathLike
) -> tuple[dict[str, Any], config_lib.ModelConfig, families.Family]:
  """config.json as read, its ModelConfig, and the family.

  Raises:
    UserError: there is none, or one that is not implemented.
  """
  path = pathlib.Path(directory) / 'config.json'
  if not path.is_file():
    raise UserError(
        f'{directory} has no config.json; expected the directory of a model:'
        ' of Hugging Face, of convert, or the workdir of a run')
  found = files.read_json(path)
  family, cfg = config_json.read(found)
  return found, cfg, family


def load_hf(
    directory: str | os.PathLike, *, weights: str | os.PathLike | None = None
) -> tuple[config_lib.ModelConfig, dict]:
  """Loads a Hugging Face model directory.

  Args:
    directory, weights: as of `Source`.

  Returns:
    Its vanilla ModelConfig and variables, numpy in the dtypes on disk.

  Raises:
    UserError: anything that is missing, extra, misshapen, not finite or not
      implemented, by name.
  """
  source = Source(directory, weights=weights)
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
    dtypes: Mapping[str, DTypeLike] | None = None,
    companions: str | os.PathLike | None = None,
    progress: Callable[[int, int], Any] = lambda total, written: None,
) -> None:
  """Writes a stock Hugging Face model: loops unrolled, adapters merged.

  Args:
    directory: must not exist, or be empty; appears whole or not at all.
    cfg, variables: any model whose unrolled form a family computes.
    hf: config.json of the model it came from: what this library does not
      use (token ids, lengths) is kept from it.
    dtype: of the tensors; None keeps each leaf's own.
    dtypes: {tensor: dtype} of those that get another.
    companions: a directory whose tokenizer, licence and card go along.
    progress: called with the bytes there are, and those just written.

  Raises:
    UserError: no family computes what this model does, or a value is not
      finite in `dtype`.
  """
  check_shapes(cfg, variables)
  cfg, variables = tying.merge(cfg, variables)
  family = families.of(cfg, hf and hf.get('model_type'))
  params = variables['params']
  rows = {name: (leaves, pattern, layer) for name, leaves, pattern, layer
          in families.tensors(family, cfg)}

  def leaf_of(name, leaf):
    layer = rows[name][2]
    value = paths.get(params, leaf if layer is None else f'block/{leaf}')
    return value if layer is None else value[layer]

  def tensor(name):
    leaves, pattern, _ = rows[name]
    values = [cast(name, np.asarray(leaf_of(name, leaf)), dtype_of(name))
              for leaf in leaves]
    return _together(values, pattern, cfg)

  def dtype_of(name):
    wanted = (dtypes or {}).get(name, dtype)
    return np.dtype(wanted) if wanted is not None else np.result_type(
        *(leaf_of(name, leaf).dtype for leaf in rows[name][0]))

  layout = {name: (_shape_on_disk(cfg, leaves, pattern), dtype_of(name))
            for name, (leaves, pattern, _) in rows.items()}
  size = sum(_num_bytes(*entry) for entry in layout.values())
  embedding = next(name for name, (leaves, *_) in rows.items()
                   if leaves[0] == 'embed/embedding')
  with files.new_directory(directory, size=size) as new:
    files.write_json(new / 'config.json', _config_json(
        family, cfg, hf, dtype_of(embedding)))
    write_shards(new, layout, tensor, lambda done: progress(size, done))
    if companions is not None:
      copy_companions(pathlib.Path(companions), new)
      sentencepiece_json.add_tokenizer_json(new)


def _config_json(family, cfg, hf, dtype) -> dict[str, Any]:
  """config.json of a vanilla model; what is not computed is kept from `hf`."""
  written = config_json.write(family, cfg)
  if hf is not None and config_json.read(hf)[1] == cfg:
    written = {**hf, 'architectures': written['architectures']}
  elif hf is not None:
    # Neither dialect of what `written` says anew.
    known = config_json.handled(families.FAMILIES[hf['model_type']])
    written = {**{k: v for k, v in hf.items() if k not in known}, **written}
  return {**{k: v for k, v in written.items() if k != 'dtype'},
          'torch_dtype': str(dtype)}


def cast(name: str, value: np.ndarray, dtype) -> np.ndarray:
  """The value in `dtype`. Raises UserError for infinities."""
  with np.errstate(over='ignore'):
    new = value.astype(dtype)
  if not files.finite(new):
    largest = np.abs(value.astype(np.float32)).max()
    raise UserError(
        f'tensor {name!r} holds values up to {largest:g}, which'
        f' {np.dtype(new.dtype)} cannot hold; export it as bfloat16 or float32'
        if files.finite(value) else
        f'tensor {name!r} holds NaN or infinity; this is no model to export')
  return new


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
  """Copies the tokenizer, chat templates, the licence and the card."""
  for path in sorted(source.iterdir()) if source.is_dir() else ():
    name = path.name.lower()
    if not any(fnmatch.fnmatchcase(name, kind) for kind in _COMPANIONS):
      continue
    if path.is_dir():
      shutil.copytree(path, new / path.name, copy_function=shutil.copyfile)
    elif path.is_file():  # Its bytes; not that it may be read only.
      shutil.copyfile(path, new / path.name)


def write_shards(new: pathlib.Path, layout, tensor, progress) -> None:
  """model.safetensors, or several and their index where they are large."""
  shards, sizes = [[]], [0]
  for name, entry in layout.items():
    size = _num_bytes(*entry)
    if sizes[-1] and sizes[-1] + size > _SHARD_BYTES:
      shards.append([])
      sizes.append(0)
    shards[-1].append(name)
    sizes[-1] += size
  index = {}
  for i, shard in enumerate(shards, 1):
    file = ('model.safetensors' if len(shards) == 1 else
            f'model-{i:05d}-of-{len(shards):05d}.safetensors')
    with files.Writer(
        new / file, {name: layout[name] for name in shard}) as writer:
      for name in shard:
        writer.write(name, tensor(name))
        progress(_num_bytes(*layout[name]))
    index.update(dict.fromkeys(shard, file))
  if len(shards) > 1:
    files.write_json(new / 'model.safetensors.index.json', {
        'metadata': {'total_size': sum(sizes)}, 'weight_map': index})


def _shape_on_disk(cfg, leaves, pattern) -> tuple[int, ...]:
  """A tensor's shape on disk, from those of the leaves of one layer in it."""
  if not isinstance(pattern, str):
    parts = [_shape_on_disk(cfg, (leaf,), own)
             for leaf, own in zip(leaves, pattern, strict=True)]
    return (sum(part[0] for part in parts), *parts[0][1:])
  shapes = model.flat_shapes(cfg)
  leaf = leaves[0]
  shape = shapes[leaf] if leaf in shapes else shapes[f'block/{leaf}'][1:]
  if len(leaves) > 1:
    shape = (len(leaves), *shape)
  disk, ours = pattern.split(' -> ')
  sizes = dict(zip(ours.split(), shape, strict=True))
  return tuple(math.prod(sizes[letter] for letter in group.strip('()').split())
               for group in re.findall(r'\(.*?\)|\S+', disk))


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
  return math.prod(shape) * dtype.itemsize


def _apart(array, leaves, pattern, cfg):
  """One tensor's leaves, in order."""
  if isinstance(pattern, str):
    return _rearrange(array, pattern, cfg)
  sizes = [_shape_on_disk(cfg, (leaf,), own)[0]
           for leaf, own in zip(leaves, pattern, strict=True)]
  parts = np.split(array, np.cumsum(sizes)[:-1])
  return [_rearrange(part, own, cfg)
          for part, own in zip(parts, pattern, strict=True)]


def _together(values, pattern, cfg) -> np.ndarray:
  """The tensor that `_apart` takes apart, or of one leaf."""
  if not isinstance(pattern, str):
    return np.concatenate([
        _rearrange(value, _reverse(own), cfg)
        for value, own in zip(values, pattern, strict=True)])
  value = values[0] if len(values) == 1 else np.stack(values)
  return _rearrange(value, _reverse(pattern), cfg)


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
