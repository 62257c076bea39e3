"""train: pretrain, uptrain or distil a model; the same command resumes.

  python -m recursive_tx train \\
    --config=configs/gemma_2b.py:loops=3,rank=512,teacher \\
    --config.init_from=DIR --config.teacher=DIR --workdir=DIR

The same command on every host of a TPU pod, and in every task that Slurm or
Open MPI starts, is one run. Elsewhere --coordinator, --processes and --process
name the processes. SIGTERM saves the run and ends it with status 0.
"""

from absl import flags

from recursive_tx import files, train
from recursive_tx.cli import arguments, configs, processes

_CONFIG = configs.define()
_WORKDIR = flags.DEFINE_string(
    'workdir', None,
    'Where checkpoints, metrics and the final model go. A directory that'
    ' holds the same run is resumed.')
_JOIN = processes.define()


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, workdir=_WORKDIR.value)
  workdir = files.check_workdir(_WORKDIR.value)
  config = configs.typed(_CONFIG.value)
  _JOIN()
  train.train(config, workdir)
