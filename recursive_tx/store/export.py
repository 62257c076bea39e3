"""A directory of any kind to one of the forms that other programs load.

  unrolled   a stock model of the source's architecture: loops unrolled,
             adapters merged
  recursive  a PyTorch model with its own code: the block once, see compact.py
  gguf       one file for llama.cpp, see gguf_form.py
  nanbeige   a Llama whose layers run several times, see looped.py
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import files
from recursive_tx.errors import one_of
from recursive_tx.store import (
  card,
  compact,
  gguf_form,
  hf,
  looped,
  native,
  opening,
)
from recursive_tx.store import check as check_lib

FORMS = ('unrolled', 'recursive', 'gguf', 'nanbeige')
_NUMPY = {'float32': np.float32, 'float16': np.float16,
          'bfloat16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Source:
  """What is exported, with all that goes with it."""
  cfg: config_lib.ModelConfig
  variables: dict
  companions: pathlib.Path
  hf_config: dict[str, Any]
  dtype: str
  dtypes: dict[str, str]
  name: str


def export(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *,
    form: str = 'unrolled', dtype: str = '', check: bool = False,
    progress: Callable[[str, int, int], Any] = lambda what, total, done: None,
) -> dict[str, float] | None:
  """Writes a model in a form that others load, with a card.

  Args:
    checkpoint: a directory of any kind that `opening.open` opens.
    output: appears whole or not at all.
    form: one of FORMS.
    dtype: of the tensors; '' is that of the model it came from, else fp32.
      'q8_0' is of the form 'gguf' alone.
    check: compare the export with the checkpoint, see `check.difference`,
      and keep the result in check.json; needs memory for both.
    progress: called with 'export' and bytes, then 'check' and tokens: those
      there are, and those just done.

  Returns:
    What the check found, None without one.

  Raises:
    UserError: not a saved model, an unknown form or dtype, one that cannot
      hold the model or its values, or an output that cannot be written.
  """
  one_of('form', form, FORMS)
  dtypes = gguf_form.DTYPES if form == 'gguf' else _NUMPY
  if dtype:
    one_of(f'dtype of --form={form}', dtype, dtypes)
  if form == 'gguf':
    gguf_form.package()
  if check and form == 'recursive':
    check_lib.check_transformers()
  files.check_directory(output)
  source = _opened(checkpoint, dtype)
  one_of('dtype', source.dtype, dtypes)
  with files.new_directory(output) as new:
    _SAVE[form](new, source,
                lambda total, done: progress('export', total, done))
    found = None
    if check:
      found = check_lib.difference(
          source.cfg, source.variables, _LOGITS[form](new, source),
          progress=lambda total, done: progress('check', total, done))
      files.write_json(new / 'check.json', {
          'form': form, 'dtype': source.dtype, **found})
    card.write(
        new, form=form, dtype=source.dtype, cfg=source.cfg,
        hf_config=source.hf_config, found=found,
        report=card.report(pathlib.Path(opening.weights(checkpoint))))
  return found


def _opened(checkpoint, dtype: str) -> _Source:
  cfg, variables = opening.load(checkpoint)
  companions = opening.companions(checkpoint)
  hf_config = native.read_source(companions) or {}
  own, others = (hf_config.pop(key, default) for key, default in (
      ('dtype_on_disk', 'float32'), ('dtypes_on_disk', {})))
  return _Source(
      cfg, variables, companions, hf_config, dtype or own,
      {} if dtype else others, os.path.basename(
          os.path.abspath(os.path.expanduser(checkpoint))))


def _save_unrolled(new, source: _Source, progress) -> None:
  hf.save_hf(new, source.cfg, source.variables, hf=source.hf_config or None,
             dtype=_NUMPY[source.dtype], dtypes=source.dtypes,
             companions=source.companions, progress=progress)


def _save_recursive(new, source: _Source, progress) -> None:
  cfg, variables = looped.without_exits(source.cfg, source.variables)
  compact.save(new, cfg, variables, hf_config=source.hf_config,
               dtype=_NUMPY[source.dtype], companions=source.companions,
               progress=progress)


def _save_gguf(new, source: _Source, progress) -> None:
  gguf_form.save(new, source.cfg, source.variables,
                 hf_config=source.hf_config, dtype=source.dtype,
                 companions=source.companions, name=source.name,
                 progress=progress)


def _save_nanbeige(new, source: _Source, progress) -> None:
  looped.save(new, source.cfg, source.variables, hf_config=source.hf_config,
              dtype=_NUMPY[source.dtype], dtypes=source.dtypes,
              companions=source.companions, progress=progress)


_SAVE = {'unrolled': _save_unrolled, 'recursive': _save_recursive,
         'gguf': _save_gguf, 'nanbeige': _save_nanbeige}
# {form: (directory, source) -> its logits}, of what was written.
_LOGITS = {
    'unrolled': lambda new, source: check_lib.logits(*hf.load_hf(new)),
    'recursive': lambda new, source: check_lib.transformers_logits(new),
    'gguf': lambda new, source: check_lib.logits(
        *gguf_form.load(new, source.cfg)),
    'nanbeige': lambda new, source: check_lib.logits(*looped.load(new))}
