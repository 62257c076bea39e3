"""The start from data, unless one of the paper's is nearer to the original."""

from collections.abc import Callable
import dataclasses
import pathlib
import shutil
from typing import Any

from absl import logging
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.fit import align, choose, kernels, moments, ranks
from recursive_tx.fit.layers import Read
from recursive_tx.fit.refit import refit, refitted
from recursive_tx.fit.share import factors, share, spectra


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
    folder: pathlib.Path, *, seed: int, tell: Callable[[float], Any],
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
    tell: told the share of the work done since it was last told.
  """
  kept = max(1, len(token_NT) // 8)
  (folder / 'moments').mkdir()
  measured = moments.measure(
      cfg, read, token_NT[:-kept], folder / 'moments', seed=seed,
      tell=lambda share: tell(share / 4))
  final_NTD = choose.final(cfg, read, token_NT[-kept:])
  best = None
  for init in ('fit', *rivals):
    store = kernels.Store(folder / init, rcfg.loops)
    if init == 'fit':
      start = _fitted(cfg, rcfg, read, measured, store, seed,
                      lambda share: tell(share * 9 / 16))
      shutil.rmtree(folder / 'moments')
    else:
      start = Start(init, rcfg, read, init, store.kernel)
      for name in rcfg.kernels:
        for place in range(rcfg.layers_per_loop):
          store.put(name, place, *rivals[init](name, place))
      tell(3 / 16 / len(rivals))
    nats = choose.divergence(cfg, read, final_NTD, choose.final(
        cfg, kernels.unrolled(start.rcfg, start.read, start.rule, store),
        token_NT[-kept:]))
    logging.info('%s: KL %.4f nats a token on %d tokens kept apart', init,
                 nats, token_NT[-kept:].size)
    if best is None or nats < best[0]:
      best, loser = (nats, start), best and best[1].init
    else:
      loser = init
    if loser:
      shutil.rmtree(folder / loser)
  return best[1]


def _fitted(cfg, rcfg, read, measured, store, seed, tell) -> Start:
  """What is best by the moments, and then for the inputs it really gets."""
  rng = np.random.default_rng(seed)
  exact = ranks.is_full(rcfg)  # The original itself, as it is.
  aligned = align.Aligned(read, measured, {} if exact else align.orders(
      rcfg, read, measured))
  if ranks.may_differ(rcfg):
    rcfg = ranks.spread(rcfg, {
        name: sum(spectra(*_tied(rcfg, aligned, name, place))
                  for place in range(rcfg.layers_per_loop))
        for name in rcfg.kernels})
    logging.info('Ranks %s', rcfg.rank)
  later = [] if exact else refitted(rcfg)
  for name in rcfg.kernels:
    for place in range(rcfg.layers_per_loop):
      store.put(name, place, *_shared(
          rcfg, aligned, name, place, name not in later, rng))
      tell(0.5 / len(rcfg.kernels) / rcfg.layers_per_loop)
  if later:
    refit(cfg, rcfg, aligned,
          kernels.unrolled(rcfg, aligned.read, 'average', store), store,
          lambda x: tell(x / 2))
  else:
    tell(0.5)
  return Start('fit', rcfg, aligned.read, 'average', store.kernel)


def _shared(rcfg, aligned, name, place, with_factors, rng):
  """Shared kernel, and factors if they are wanted."""
  rank, weights = rcfg.ranks[name], _tied(rcfg, aligned, name, place)
  shared, rows = share(*weights, rank, rng=rng), []
  for original, seen, moved in zip(*weights, strict=True) if (
      rank and with_factors) else ():
    rows.append(kernels.kept(rcfg, name, original - shared, *factors(
        original, shared, seen, moved, rank)))
  letters = ''.join(config_lib.split(rcfg.kernels[name]))
  return shared.reshape(rcfg.shape(letters)), rows


def _tied(rcfg, aligned, name, place):
  """The kernels that share, and second moments of inputs and outputs."""
  tied = kernels.virtual(rcfg, place)
  return ([kernels.matrix(rcfg, aligned.read, name, layer) for layer in tied],
          [aligned.input(name, layer) for layer in tied],
          [aligned.output(name, layer) for layer in tied])
