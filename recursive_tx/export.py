"""A saved directory to a stock Hugging Face directory."""

import os
import pathlib

import ml_dtypes
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import hf, saved

_DTYPES = {'float32': np.float32, 'float16': np.float16,
           'bfloat16': ml_dtypes.bfloat16}


def export(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *,
    dtype: str = '',
) -> None:
  """Unrolls and merges a saved model into the architecture it came from.

  Args:
    checkpoint: directory that `save`, convert or train made.
    output: appears whole or not at all.
    dtype: of the tensors; '' is that of the model it came from, else fp32.

  Raises:
    ValueError: not a saved model, or an unknown dtype.
  """
  checkpoint = pathlib.Path(checkpoint)
  cfg, variables = saved.restore(checkpoint)
  source = saved.read_source(checkpoint) or {}
  dtype = dtype or source.pop('dtype_on_disk', 'float32')
  source.pop('dtype_on_disk', None)
  config_lib.one_of('dtype', dtype, _DTYPES)
  hf.save_hf(output, cfg, variables, hf=source or None, dtype=_DTYPES[dtype],
             companions=checkpoint)
