"""The start from data, unless one of the paper's is nearer to the original."""

from collections.abc import Callable
import dataclasses
import math
import pathlib
import shutil
from typing import Any

from absl import logging
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.tying import kernels
from recursive_tx.tying.fit import align, distance, matrices, moments, ranks
from recursive_tx.tying.fit.layers import Read
from recursive_tx.tying.fit.refit import fits_bias, fits_norms, refit, refitted
from recursive_tx.tying.fit.share import factors, share, spectra

# How much more a loop's error counts than the next one's, which read what it
# gives. Without factors errors are so large that the gradients do not tell:
# of three models one was nearest with 1, two with 3.
_EARLIER = (1.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Start:
  """What a recursive model begins with.

  Attributes:
    init: 'fit', or the rival that was nearer.
    rcfg: the config, with the ranks that were chosen.
    read: the layers of a vanilla model that computes what the original does.
    rule: init whose layers give norms and biases, where loops share them.
    kernel: the shared kernels and factors.
  """
  init: str
  rcfg: config_lib.ModelConfig
  read: Read
  rule: str
  kernel: kernels.Kernel


def nearest(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig, read: Read,
    rivals: dict[str, kernels.Kernel], token_NT: np.ndarray,
    folder: pathlib.Path, *, seed: int, report: Callable[[float], Any],
) -> Start:
  """Makes every start, and keeps the one that is nearest to the original.

  Args:
    cfg, read: the original.
    rcfg: of the recursive model. One rank for all is taken as a budget: the
      fit spreads its parameters over the kernels.
    rivals: other starts, by the init that also gives norms and biases.
    token_NT: calibration tokens; an eighth is kept apart, to choose by.
    folder: empty, and left with what the start reads.
    seed: of what is drawn.
    report: given the share of the work done since it was last told.
  """
  kept = max(1, len(token_NT) // 8)
  (folder / 'moments').mkdir()
  measured = moments.measure(
      cfg, read, token_NT[:-kept], folder / 'moments', seed=seed,
      report=lambda share: report(share / 4))
  final_NTD = distance.final(cfg, read, token_NT[-kept:])

  def nearer(best, start, store, where):
    nats = distance.divergence(cfg, read, final_NTD, distance.final(
        cfg, kernels.unrolled(start.rcfg, start.read, start.rule, store),
        token_NT[-kept:]))
    logging.info('%s: KL %.4f nats a token on %d tokens kept apart',
                 where.name, nats, token_NT[-kept:].size)
    if best is None:
      return nats, start, where
    won, lost = sorted((best, (nats, start, where)), key=lambda row: row[0])
    shutil.rmtree(lost[2])
    return won

  # Factors that hold everything hold each layer as it is.
  aligned = align.Aligned(read, measured, {} if ranks.is_full(rcfg) else (
      align.orders(rcfg, read, measured)))
  best, weights = None, (1.0,) if any(rcfg.ranks.values()) else _EARLIER
  for earlier in weights:
    where = folder / f'fit{earlier:g}'
    store = kernels.Store(where, rcfg.loops)
    start = _fitted(cfg, rcfg, aligned, store, earlier,
                    lambda share: report(share * 9 / 16 / len(weights)))
    best = nearer(best, start, store, where)
  shutil.rmtree(folder / 'moments')
  for init, rival in rivals.items():
    store = kernels.Store(folder / init, rcfg.loops)
    for name in rcfg.kernels:
      for place in range(rcfg.layers_per_loop):
        store.put(name, place, *rival(name, place))
    report(3 / 16 / len(rivals))
    best = nearer(best, Start(init, rcfg, read, init, store.kernel), store,
                  folder / init)
  return best[1]


def _fitted(cfg, rcfg, aligned, store, earlier, report) -> Start:
  """What is best by the moments, and then for the inputs it really gets."""
  exact = ranks.is_full(rcfg)  # The original itself, as it is.
  if ranks.may_differ(rcfg):
    rcfg = ranks.spread(rcfg, {
        name: sum(spectra(*_tied(rcfg, aligned, earlier, name, place))
                  for place in range(rcfg.layers_per_loop))
        for name in rcfg.kernels})
    logging.info('Ranks %s', rcfg.rank)
  later = [] if exact else refitted(rcfg)
  sizes = {name: math.prod(rcfg.in_out(name)) for name in rcfg.kernels}
  for name in rcfg.kernels:
    for place in range(rcfg.layers_per_loop):
      store.put(name, place, *_shared(
          rcfg, _tied(rcfg, aligned, earlier, name, place), name,
          name not in later))
      report(0.5 * sizes[name] / sum(sizes.values()) / rcfg.layers_per_loop)
  norms = {}
  if later or fits_norms(rcfg) and not exact:
    norms = refit(
        cfg, rcfg, aligned,
        kernels.unrolled(rcfg, aligned.read, 'average', store), store,
        lambda x: report(x / 2))
  else:
    report(0.5)

  def fitted(path, layer):
    return norms[path, layer] if (path, layer) in norms else aligned.read(
        path, layer)

  return Start('fit', rcfg, fitted, 'average', store.kernel)


def _shared(rcfg, tied, name, with_factors):
  """Shared kernel, and factors if they are wanted."""
  rank, rows = rcfg.ranks[name], []
  shared = share(*tied, rank)
  for original, seen, moved in zip(*tied, strict=True) if (
      rank and with_factors) else ():
    rows.append(kernels.kept(rcfg, name, original - shared, *factors(
        original, shared, seen, moved, rank)))
  letters = ''.join(config_lib.split(rcfg.kernels[name]))
  return shared.reshape(rcfg.shape(letters)), rows


def _tied(rcfg, aligned, earlier, name, place):
  """The kernels that share, and second moments of inputs and outputs; the
  latter carry how much each loop's error counts."""
  tied = kernels.virtual(rcfg, place)
  return ([kernels.matrix(rcfg, aligned.read, name, layer) for layer in tied],
          [_seen(rcfg, aligned, name, layer) for layer in tied],
          [aligned.output(name, layer) * earlier**-loop
           for loop, layer in enumerate(tied)])


def _seen(rcfg, aligned, name, layer):
  """Second moment of a kernel's input; about its mean where a loop's own bias
  makes up for the mean."""
  moment = aligned.input(name, layer)
  return matrices.centred(moment, aligned.mean(name, layer)) if (
      fits_bias(rcfg, name)) else moment
