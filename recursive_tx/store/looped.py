"""Models whose block other runtimes can loop as well.

llama.cpp and mlx-lm compute `nanbeige`: a Llama whose layers run `num_loops`
times, with keys of each loop's own, and with `skip_loop_final_norm` nothing
between the loops. That is a recursive Llama which has nothing of its own in a
loop.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from absl import logging
from numpy.typing import DTypeLike

from recursive_tx import config as config_lib
from recursive_tx import files
from recursive_tx.errors import UserError
from recursive_tx.model import adapters
from recursive_tx.store import compact, hf, sentencepiece_json

WANTED = ('loops have no adapters, norms or biases of their own, and there is'
          ' no prelude or coda: convert with --rank=0 --noloop_norms'
          ' --prelude=0 --coda=0')


def save(
    directory: str | os.PathLike, cfg: config_lib.ModelConfig,
    variables: dict, *, hf_config: dict[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
    companions: str | os.PathLike | None = None,
    progress: Callable[[int, int], Any] = lambda total, written: None,
) -> None:
  """Writes a nanbeige directory: a Llama's tensors, the block's once.

  Args: as of `hf.save_hf`.

  Raises:
    UserError: the loops have something of their own, or the block is no
      Llama's.
  """
  why = obstacle(cfg)
  if why is not None:
    raise UserError(f'--form=nanbeige: {why}; it is exact where {WANTED}')
  cfg, variables = without_exits(cfg, variables)
  block = _once(cfg)
  with files.new_directory(directory) as new:
    hf.save_hf(new, block, variables, dtype=dtype, dtypes=dtypes,
               companions=companions, progress=progress)
    sentencepiece_json.name_class(new)
    found = files.read_json(new / 'config.json')
    if found['model_type'] != 'llama':
      raise UserError(
          f'--form=nanbeige: the block is of {found["model_type"]}, no'
          " Llama's; use --form=recursive or --form=unrolled")
    hf_config = hf_config or {}
    files.write_json(new / 'config.json', {
        **found, 'architectures': ['NanbeigeForCausalLM'],
        'model_type': 'nanbeige', 'num_loops': cfg.loops,
        'skip_loop_final_norm': True,
        **{key: hf_config[key] for key in compact.KEPT if key in hf_config}})


def load(
    directory: str | os.PathLike
) -> tuple[config_lib.ModelConfig, dict]:
  """The looped model of a directory that `save` wrote."""
  directory = pathlib.Path(directory).resolve()
  found = files.read_json(directory / 'config.json')
  loops = found.pop('num_loops')
  found.pop('skip_loop_final_norm')
  with tempfile.TemporaryDirectory() as view:
    files.write_json(pathlib.Path(view) / 'config.json', {
        **found, 'model_type': 'llama',
        'architectures': ['LlamaForCausalLM']})
    for path in directory.glob('*.safetensors*'):
      (pathlib.Path(view) / path.name).symlink_to(path)
    block, variables = hf.load_hf(view)
  return dataclasses.replace(
      block, loops=loops, loop_norms=False), variables


def _once(cfg: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The block as a vanilla model, whose parameters are the same."""
  return dataclasses.replace(cfg, loops=1, loop_norms=True)


def obstacle(cfg: config_lib.ModelConfig) -> str | None:
  """What a loop has of its own that such runtimes lack; None: nothing."""
  found = {
      'loops share keys (loop_keys=False)': not cfg.loop_keys,
      f'there are adapters (rank={cfg.rank})': any(cfg.ranks.values()),
      'loops have norms of their own (loop_norms=True)': (
          cfg.has_loop_vectors),
      f'there is a prelude or a coda ({cfg.prelude}, {cfg.coda})': (
          cfg.prelude or cfg.coda)}
  return next((why for why, is_so in found.items() if is_so), None)


def without_exits(
    cfg: config_lib.ModelConfig, variables: dict
) -> tuple[config_lib.ModelConfig, dict]:
  """The model without what only early exits use, with a line for each."""
  params = dict(variables['params'])
  own = dict(params.get('adapters', {}))
  for name, what in (('head', 'adapter of the head'), ('exit', 'exit gate')):
    if own.pop(name, None):
      logging.warning('Dropped the %s: it is for early exits.', what)
  params.pop('adapters', None)
  if own:
    params['adapters'] = own
  return plain(cfg), {'params': params}


def plain(cfg: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The config without what only early exits use."""
  rank = cfg.rank
  if adapters.head_rank(cfg):
    rank = '+'.join(part for part in rank.split('+')
                    if not part.startswith(config_lib.HEAD)) or '0'
  return dataclasses.replace(cfg, rank=rank, exit_gate=0)
