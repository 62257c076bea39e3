"""Pythia 410M, uptrained as a recursive model with the paper's recipe.

  python -m recursive_tx train --workdir=DIR \
      --config=configs/pythia_410m.py:loops=2,teacher \
      --config.init_from=PYTHIA_DIR --config.teacher=PYTHIA_DIR

The paper's ablation of the starts (its appendix F), on the Pile.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, dict(
      V=50_304, D=1024, F=4096, N=16, K=16, H=64, layers_per_loop=24,
      norm='layer', norm_eps=1e-5, act='gelu', gated=False, parallel=True,
      attention_bias=True, mlp_bias=True, rope_fraction=0.25, tied=False,
  ), data='pile')
