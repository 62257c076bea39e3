"""A saved directory to a stock Hugging Face directory."""

import os

import ml_dtypes
import numpy as np

from recursive_tx.errors import one_of
from recursive_tx.store import hf, native, opening

_DTYPES = {'float32': np.float32, 'float16': np.float16,
           'bfloat16': ml_dtypes.bfloat16}


def export(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *,
    dtype: str = '',
) -> None:
  """Unrolls and merges a saved model into the architecture it came from.

  Args:
    checkpoint: a directory of any kind that `opening.open` opens.
    output: appears whole or not at all.
    dtype: of the tensors; '' is that of the model it came from, else fp32.

  Raises:
    UserError: not a saved model, or an unknown dtype.
  """
  model = opening.open(checkpoint)
  source = native.read_source(model.companions) or {}
  dtype = dtype or source.pop('dtype_on_disk', 'float32')
  source.pop('dtype_on_disk', None)
  one_of('dtype', dtype, _DTYPES)
  hf.save_hf(output, model.config, model.variables, hf=source or None,
             dtype=_DTYPES[dtype], companions=model.companions)
