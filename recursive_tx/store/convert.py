"""Converts a directory to a directory, layer by layer, and reports.

What a user chooses ranks by: the share of each residual's energy that the
rank keeps, and parameters by part. The model never lies in memory whole.
"""

from collections.abc import Callable, Iterable
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import files, model
from recursive_tx.errors import UserError
from recursive_tx.store import check as check_lib
from recursive_tx.store import native, opening
from recursive_tx.text.columns import columns
from recursive_tx.tying.relax import initialised, target, tokens

# Fitting takes about so many times as long as all else.
_FIT_WORK = 9


def convert(
    source: str | os.PathLike, output: str | os.PathLike, *, loops: int,
    rank: int | str = 0, init: str = 'average', loop_norms: bool = True,
    prelude: int = 0, coda: int = 0, lora: str = 'svd',
    calibration: Iterable | None = None, seed: int = 0,
    check: bool = False, overwrite: bool = False,
    progress: Callable[[int, float], Any] = lambda total, written: None,
) -> dict[str, Any]:
  """`relax` from a Hugging Face directory to a saved directory.

  Args:
    source: Hugging Face model directory.
    output: appears whole or not at all; must not exist, unless `overwrite`.
    loops, rank, init, loop_norms, prelude, coda, lora, calibration, seed: as
      for `relax`. To sample calibration tokens from the model, it lies in
      memory whole.
    check: compare with the source, see `difference`; needs memory for both.
    overwrite: replace what is there.
    progress: called with the work there is, and what was just done of it:
      parameters written, and several times as many to fit them.

  Returns:
    The report, which is also stored as report.json in `output`.

  Raises:
    UserError: anything wrong with the source or the arguments.
  """
  files.check_directory(output, overwrite=overwrite)
  origin = opening.source(source)
  if os.path.realpath(os.path.expanduser(output)) == os.path.realpath(
      origin.directory):
    raise UserError(f'{output} is the source itself; name another output')
  cfg = origin.cfg
  rcfg = target(
      cfg, loops=loops, rank=rank, init=init, lora=lora,
      loop_norms=loop_norms, prelude=prelude, coda=coda)
  token_QT = tokens(
      cfg, init, calibration, lambda: opening.load(source)[1], seed)
  energy = {}
  count = parameters(rcfg)['total']
  fitting = _FIT_WORK * count if init == 'fit' else 0
  with files.new_directory(
      output, overwrite=overwrite, size=4 * count) as new:
    with initialised(
        cfg, rcfg, origin.read, init=init, lora=lora, seed=seed,
        energy=energy, token_QT=token_QT, scratch=new.parent,
        report=lambda share: progress(count + fitting, fitting * share),
    ) as (rcfg, kept, parts):
      report = {
          'init': init, 'kept': kept, 'lora': lora, 'loops': loops,
          'rank': rcfg.rank, 'parameters': parameters(rcfg),
          'original': parameters(cfg)}
      shapes = model.flat_shapes(rcfg)
      tensors = {name: (shape, np.float32) for name, shape in shapes.items()}
      # Ranks that were chosen may come to a few parameters less.
      work = count / report['parameters']['total']
      with files.Writer(new / 'model.safetensors', tensors) as writer:
        for path, at, array in parts:
          writer.write(path, array, at)
          progress(count + fitting, array.size * work)
    native.describe(new, rcfg, origin.companions)
    report['energy_kept'] = _shares(rcfg, energy)
    if check:
      report['check'] = difference(source, new)
    files.write_json(new / 'report.json', report)
  return report


def parameters(cfg: config_lib.ModelConfig) -> dict[str, int]:
  """Number of unique parameters by part, and 'total'."""
  counts = {}
  for path, shape in model.flat_shapes(cfg).items():
    part = path.split('/')[0]
    counts[part] = counts.get(part, 0) + int(np.prod(shape))
  return {**counts, 'total': sum(counts.values())}


def difference(
    source: str | os.PathLike, output: str | os.PathLike, *, length: int = 512,
    progress: Callable[[int, int], Any] = lambda total, done: None,
) -> dict[str, float]:
  """How far a model is from its source, on a long prompt, fp32.

  Args:
    source, output: directories, of `convert` or of `export`.
    length: tokens of the prompt, drawn uniformly from the vocabulary, so that
      no tokenizer is needed.
    progress: called with the parameters there are in both, and with those of
      a model that was run.

  Returns:
    'max_logit_difference', 'max_logit' (of the source) and 'kl', the mean
    KL(source || converted) in nats a token.
  """
  both, sizes = [], [parameters(opening.config(directory))['total']
                     for directory in (source, output)]
  for directory, size in zip((source, output), sizes, strict=True):
    cfg, variables = opening.load(directory)
    token_BT = np.random.default_rng(0).integers(0, cfg.V, (1, length))
    both.append(check_lib.logits(cfg, variables)(token_BT))
    del variables
    progress(sum(sizes), size)
  ours, theirs = (jax.nn.log_softmax(logits) for logits in both[::-1])
  kl_BT = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
  return {
      'max_logit_difference': float(jnp.abs(both[0] - both[1]).max()),
      'max_logit': float(jnp.abs(both[0]).max()), 'kl': float(kl_BT.mean())}


def table(report: dict[str, Any]) -> str:
  """The report as text."""
  new, old = report['parameters'], report['original']
  lines = []
  if report['kept'] != report['init']:
    lines += [f'init: {report["kept"]}, which was nearer to the original '
              f'than {report["init"]}']
  if report['rank'] != '0':
    lines += [f'rank: {report["rank"]}']
  lines += [columns([('parameters', 'original', 'new'), *(
      (part, f'{old.get(part, 0):,}', f'{new.get(part, 0):,}')
      for part in {**old, **new})])]
  if report['energy_kept']:
    loops = [f'loop {loop + 1}' for loop in range(report['loops'])]
    lines += ['', "share of each residual's energy kept (1 where none was)",
              columns([('kernel', 'rank', *loops), *(
                  (kernel, str(row['rank']),
                   *(f'{share:.4f}' for share in row['share']))
                  for kernel, row in report['energy_kept'].items())])]
  if 'check' in report:
    lines += [check_table(report['check'])]
  return '\n'.join(lines)


def check_table(found: dict[str, float]) -> str:
  """The result of `difference` as text."""
  return '\n'.join(f'{name}: {value:.3g}' for name, value in found.items())


def _shares(rcfg, energy) -> dict[str, Any]:
  rows = {}
  for kernel, rank in rcfg.ranks.items():
    pairs = [energy[kernel, loop] for loop in range(rcfg.loops)
             if (kernel, loop) in energy]
    if pairs:
      rows[kernel] = {'rank': rank, 'share': [
          kept / total if total else 1.0 for kept, total in pairs]}
  return rows
