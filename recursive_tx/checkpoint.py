"""Checkpoints of a run, and when a run may go on from one.

`workdir/checkpoints/STEP/` holds three items: `state` (parameters, optimizer,
step), `data` (the position in the stream, one file per process) and `config`
(the run's settings as JSON). Orbax writes them beside their final place and
renames, in the background.

Knows trees, bytes and nested dictionaries. Does not know what they mean.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

# What may differ between a run and its continuation: how it is executed and
# watched. All else decides the result.
FREE = ('mesh', 'checkpoint', 'log', 'eval', 'run')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save.

  Attributes:
    every: steps between checkpoints; 0 saves only at the end.
    keep: how many of the latest to keep; 0 keeps all.
  """

  every: int = 1000
  keep: int = 2


def open_manager(
    workdir: str, config: CheckpointConfig | None = None
) -> ocp.CheckpointManager:
  """The manager of a run's checkpoints; close it, which waits for the last.

  `manager.latest_step()` is None where there are none.
  """
  return ocp.CheckpointManager(
      _folder(workdir).absolute(),
      options=ocp.CheckpointManagerOptions(
          max_to_keep=config and (config.keep or None), create=True
      ),
      item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'data': _PositionHandler(),
          'config': ocp.JsonCheckpointHandler(),
      },
  )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    state: Any,
    position: bytes,
    settings: Mapping[str, Any],
) -> None:
  """Saves in the background; the arrays may be donated as soon as it returns.

  Args:
    manager: of `open_manager`.
    step: updates done.
    state: a tree of arrays.
    position: of this process's data stream.
    settings: JSON values by section, what `check_same` will compare.
  """
  manager.save(
      step,
      args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=_PositionSave(position),
          config=ocp.args.JsonSave(dict(settings)),
      ),
  )


def restore(
    manager: ocp.CheckpointManager, abstract_state: Any
) -> tuple[Any, bytes]:
  """The latest state, placed by the target's shardings, and data position.

  Args:
    manager: of `open_manager`.
    abstract_state: ShapeDtypeStructs with shardings, like the saved tree.
  """
  items = manager.restore(
      manager.latest_step(),
      args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract_state),
          data=_PositionRestore(),
      ),
  )
  return items['state'], items['data']


def check_same(
    manager: ocp.CheckpointManager, settings: Mapping[str, Any], workdir: str
) -> None:
  """Refuses to continue a run under settings that would change its result.

  Raises:
    ValueError: a section outside FREE differs from the latest checkpoint's.
  """
  stored = _settings(manager)
  different = _differences(stored, _as_json(settings))
  if different:
    raise ValueError(
        f'{workdir} holds a run with other settings: {"; ".join(different)}.'
        ' Continue it with its own, or start another --workdir from its'
        f' weights with --config.init_from={workdir}'
    )


def latest_step(workdir: str) -> int | None:
  """Step of the latest finished checkpoint, if any; creates nothing."""
  if not is_workdir(workdir):
    return None
  with open_manager(workdir) as manager:
    return manager.latest_step()


def is_workdir(directory: str) -> bool:
  """Whether a directory holds a run's checkpoints."""
  return _folder(directory).is_dir()


def load_params(workdir: str) -> tuple[dict[str, Any], Any]:
  """Settings and parameters (numpy, whole) of a run's latest checkpoint.

  Raises:
    ValueError: the directory holds no finished checkpoint.
  """
  with open_manager(workdir) as manager:
    step = manager.latest_step()
    if step is None:
      raise ValueError(
          f'{workdir} holds no finished checkpoint; expected one in'
          f' {_folder(workdir)}.'
      )
    settings = _settings(manager)
  logging.info('Reading the parameters of %s at step %d.', workdir, step)
  with ocp.PyTreeCheckpointer() as reader:
    item = _folder(workdir).absolute() / str(step) / 'state'
    tree = reader.metadata(item).item_metadata.tree
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        {'params': tree['params']},
    )
    restored = reader.restore(
        item,
        args=ocp.args.PyTreeRestore(
            item=shapes,
            restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
            ),
            partial_restore=True,
        ),
    )
  return settings, restored['params']


def _folder(workdir: str) -> epath.Path:
  return epath.Path(workdir) / 'checkpoints'


def _settings(manager: ocp.CheckpointManager) -> dict[str, Any]:
  return manager.restore(
      manager.latest_step(),
      args=ocp.args.Composite(config=ocp.args.JsonRestore()),
  )['config']


def _differences(stored: Any, wanted: Any) -> list[str]:
  """'model.rank 64 -> 128' for every value that differs, outside FREE."""
  stored, wanted = _flat(stored), _flat(wanted)
  keys = [*stored, *(key for key in wanted if key not in stored)]
  return [
      f'{key} {stored.get(key, "(none)")!r} -> {wanted.get(key, "(none)")!r}'
      for key in keys
      if key.split('.')[0] not in FREE and stored.get(key) != wanted.get(key)
  ]


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}.{key}' if prefix else str(key))
  return flat


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
  """As it would be read back: tuples are lists."""
  return json.loads(json.dumps(settings))


class _PositionHandler(ocp.CheckpointHandler):
  """Bytes of every process, one file each."""

  def save(self, directory: epath.Path, args: '_PositionSave') -> None:
    (directory / _file()).write_bytes(args.position)

  def restore(self, directory: epath.Path, args: '_PositionRestore') -> bytes:
    del args
    path = directory / _file()
    if not path.exists():
      raise ValueError(
          f'{path} does not exist: the checkpoint was written by another'
          ' number of processes.'
      )
    return path.read_bytes()


@ocp.args.register_with_handler(_PositionHandler, for_save=True)
@dataclasses.dataclass
class _PositionSave(ocp.args.CheckpointArgs):
  position: bytes


@ocp.args.register_with_handler(_PositionHandler, for_restore=True)
@dataclasses.dataclass
class _PositionRestore(ocp.args.CheckpointArgs):
  pass


def _file() -> str:
  return f'process_{jax.process_index()}_of_{jax.process_count()}'
