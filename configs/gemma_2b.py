"""Gemma 2B, uptrained as a recursive model with the paper's recipe.

  python -m recursive_tx train --workdir=DIR \
      --config=configs/gemma_2b.py:loops=3,rank=512,teacher \
      --config.init_from=GEMMA_DIR --config.teacher=GEMMA_DIR
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, dict(
      V=256_000, D=2048, F=16_384, N=8, K=1, H=256, layers_per_loop=18,
      norm='rms+1', norm_eps=1e-6, act='gelu_tanh', embed_scale=True,
  ))
