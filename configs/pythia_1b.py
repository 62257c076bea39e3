"""Pythia 1B, uptrained as a recursive model with the paper's recipe.

  python -m recursive_tx train --workdir=DIR \
      --config=configs/pythia_1b.py:loops=2,rank=64,teacher \
      --config.init_from=PYTHIA_DIR --config.teacher=PYTHIA_DIR
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, dict(
      V=50_304, D=2048, F=8192, N=8, K=8, H=256, layers_per_loop=16,
      norm='layer', norm_eps=1e-5, act='gelu', gated=False, parallel=True,
      attention_bias=True, mlp_bias=True, rope_fraction=0.25, tied=False,
  ))
