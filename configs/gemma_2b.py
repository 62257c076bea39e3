"""Gemma 2B, uptrained as a recursive model with the paper's recipe.

  recursive-tx train --config=gemma_2b:loops=3,rank=512,teacher \
      --config.init_from=DIR --workdir=DIR
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common, published


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, published.GEMMA_2B)
