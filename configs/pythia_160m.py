"""Pythia 160M, uptrained as a recursive model with the paper's recipe.

  recursive-tx train --config=pythia_160m:loops=2,teacher \
      --config.init_from=DIR --workdir=DIR

The paper's ablation of initialisations (its appendix F), on the Pile.
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common, published


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, published.PYTHIA_160M, data='pile')
