"""Any supported checkpoint, uptrained as a recursive model.

  recursive-tx train --config=uptrain:loops=2,rank=64,teacher \
      --config.init_from=DIR --workdir=DIR

Sizes and family come from DIR; of one that is converted already, loops, ranks
and norms too. Hyperparameters are those of the paper's recipe.
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg)
