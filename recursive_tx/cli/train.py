"""train: pretrain, uptrain or distil a model; the same command resumes.

  python -m recursive_tx train --config=configs/gemma_2b.py:loops=3,rank=512 \\
    --config.init_from=DIR --config.teacher=DIR --workdir=DIR
"""

from absl import flags

from recursive_tx import train
from recursive_tx.cli import arguments, configs

_CONFIG = configs.define()
_WORKDIR = flags.DEFINE_string(
    'workdir', None,
    'Where checkpoints, metrics and the final model go. A directory that'
    ' holds the same run is resumed.',
)


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, workdir=_WORKDIR.value)
  train.train(configs.typed(_CONFIG.value), _WORKDIR.value)
