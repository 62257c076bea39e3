"""TinyLlama 1.1B, uptrained as a recursive model with the paper's recipe.

  python -m recursive_tx train --workdir=DIR \
      --config=configs/tinyllama_1b.py:loops=2,rank=64,teacher \
      --config.init_from=TINYLLAMA_DIR --config.teacher=TINYLLAMA_DIR
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
  """See `common.uptrain` for the arguments."""
  return common.uptrain(arg, dict(
      V=32_000, D=2048, F=5632, N=32, K=4, H=64, layers_per_loop=22,
      norm='rms', norm_eps=1e-5, act='silu', tied=False,
  ))
