"""Reading a run's checkpoints, and when a run may continue from one."""

from collections.abc import Mapping
import functools
import json
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store.checkpoint import layout

# What may differ between a run and its continuation: how it is executed and
# watched. All else decides the result.
FREE = ('mesh', 'checkpoint', 'log', 'eval', 'run', 'optim.max_skips')


def restore(
    workdir: str, step: int, abstract_state: Any
) -> tuple[Any, tuple[bytes, ...]]:
  """A state, and the data positions of all processes that saved it.

  Args:
    workdir: of the run.
    step: of `latest_step`.
    abstract_state: ShapeDtypeStructs with shardings, like the saved tree; on
      any mesh, of any number of processes.

  Raises:
    UserError: it cannot be read.
  """
  folder = layout.folder(workdir).absolute() / str(step)
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      state = reader.restore(
          folder / 'state', args=ocp.args.StandardRestore(abstract_state))
    positions = tuple(
        path.read_bytes()
        for path in sorted((folder / 'data').glob('process_*')))
  except Exception as error:
    raise UserError(
        f'{folder} cannot be read: {layout.in_short(error)}. Move it away, and'
        ' the same command continues from the one before it.'
    ) from error
  return state, positions


def check_same(
    workdir: str, step: int, settings: Mapping[str, Any]
) -> None:
  """Refuses to continue a run under settings that would change its result.

  Raises:
    UserError: a value outside FREE differs from the checkpoint's.
  """
  stored = layout.run(workdir, step)['settings']
  # As it would be read back: tuples are lists.
  different = _differences(stored, json.loads(json.dumps(settings)))
  if different:
    raise UserError(
        f'{workdir} holds a run with other settings: {"; ".join(different)}.'
        ' Continue it with its own, or start another --workdir from its'
        f' weights with --config.init_from={workdir}')


class Latest:
  """A run's latest checkpoint: its settings, and its parameters on demand.

  Processes that read them do not wait for each other.

  Attributes:
    settings: the run's.
  """

  def __init__(self, workdir: str):
    """Reads the settings.

    Raises:
      UserError: the directory holds no finished checkpoint.
    """
    step = layout.latest_step(workdir)
    if step is None:
      raise UserError(
          f'{workdir} holds no finished checkpoint; expected one in'
          f' {layout.folder(workdir)}.')
    logging.info('Reading %s at step %d.', workdir, step)
    self.settings = layout.run(workdir, step)['settings']
    self._folder = layout.folder(workdir).absolute() / str(step) / 'state'

  @functools.cached_property
  def _leaves(self) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, by path."""
    return dict(paths.items(_alone().metadata(self._folder).tree['params']))

  def params(self) -> dict[str, Any]:
    """All parameters, numpy."""
    params = {}
    for path in self._leaves:
      paths.put(params, path, self.read(path))
    return params

  def read(self, path: str) -> np.ndarray:
    """A leaf, whole."""
    leaf = self._leaves[path]
    item, args = {}, {}
    paths.put(item, f'params/{path}',
             jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    paths.put(args, f'params/{path}', ocp.RestoreArgs(restore_type=np.ndarray))
    found = _alone().restore(
        self._folder,
        args=ocp.args.PyTreeRestore(
            item=item, restore_args=args, partial_restore=True))
    return paths.get(found, f'params/{path}')


def _alone() -> ocp.PyTreeCheckpointHandler:
  """A reader that does not wait for other processes."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me},
      barrier_sync_key_prefix=f'process_{me}')
  return ocp.PyTreeCheckpointHandler(multiprocessing_options=options)


def _differences(stored: Any, wanted: Any) -> list[str]:
  """'model.rank 64 -> 128' for every value that differs, outside FREE."""
  stored, wanted = _flat(stored), _flat(wanted)
  keys = [*stored, *(key for key in wanted if key not in stored)]
  return [
      f'{key} {stored.get(key, "(none)")!r} -> {wanted.get(key, "(none)")!r}'
      for key in keys
      if not {key, key.split('.')[0]} & set(FREE)
      and stored.get(key) != wanted.get(key)]


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}.{key}' if prefix else str(key))
  return flat
