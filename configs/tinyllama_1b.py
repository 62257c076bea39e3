"""TinyLlama 1.1B, uptrained as a recursive model with the paper's recipe.

  recursive-tx train --config=tinyllama_1b:loops=2,rank=64,teacher \
      --config.init_from=DIR --workdir=DIR
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common, published


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, published.TINYLLAMA_1B)
