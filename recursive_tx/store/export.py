"""A saved directory to a stock Hugging Face directory."""

from collections.abc import Callable
import os
from typing import Any

import ml_dtypes
import numpy as np

from recursive_tx import files
from recursive_tx.errors import one_of
from recursive_tx.store import hf, native, opening
from recursive_tx.store.convert import difference

_DTYPES = {'float32': np.float32, 'float16': np.float16,
           'bfloat16': ml_dtypes.bfloat16}


def export(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *,
    dtype: str = '', check: bool = False,
    progress: Callable[[str, int, int], Any] = lambda what, total, done: None,
) -> dict[str, float] | None:
  """Unrolls and merges a saved model into the architecture it came from.

  Args:
    checkpoint: a directory of any kind that `opening.open` opens.
    output: appears whole or not at all.
    dtype: of the tensors; '' is that of the model it came from, else fp32.
    check: compare the export with the checkpoint, see `convert.difference`;
      needs memory for both.
    progress: called with 'export' and bytes, then 'check' and parameters:
      those there are, and those just done.

  Returns:
    What the check found, None without one.

  Raises:
    UserError: not a saved model, an unknown dtype or one that cannot hold the
      values, or an output that cannot be written.
  """
  if dtype:
    one_of('dtype', dtype, _DTYPES)
  files.check_directory(output)
  cfg, variables = opening.load(checkpoint)
  companions = opening.companions(checkpoint)
  source = native.read_source(companions) or {}
  own, others = (source.pop(key, default) for key, default in (
      ('dtype_on_disk', 'float32'), ('dtypes_on_disk', {})))
  dtypes = {} if dtype else others
  dtype = dtype or own
  one_of('dtype', dtype, _DTYPES)
  hf.save_hf(output, cfg, variables, hf=source or None,
             dtype=_DTYPES[dtype], dtypes=dtypes, companions=companions,
             progress=lambda total, done: progress('export', total, done))
  if not check:
    return None
  return difference(
      checkpoint, os.path.expanduser(output),
      progress=lambda total, done: progress('check', total, done))
