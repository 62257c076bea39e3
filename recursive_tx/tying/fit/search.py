"""The initialisation from data, unless one of the paper's is nearer to the
original."""

from collections.abc import Callable
import dataclasses
import itertools
import math
import pathlib
import shutil
from typing import Any

from absl import logging
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx.files import paths
from recursive_tx.tying import kernels
from recursive_tx.tying.fit import (
  align,
  distance,
  layers,
  matrices,
  moments,
  ranks,
)
from recursive_tx.tying.fit.layers import Read
from recursive_tx.tying.fit.polish import polish, polishes
from recursive_tx.tying.fit.refit import fits_bias, fits_norms, refit, refitted
from recursive_tx.tying.fit.share import factors, share, spectra

# How much more a loop's error counts than that of the next one, which reads
# its output. Without factors errors are so large that the gradients, taken at
# the original, do not show it: of three models one was nearest with 1, two
# with 3.
_EARLIER = (1.0, 3.0)
# Tokens at most: to measure moments on, evenly spaced sequences; and to choose
# by.
_MEASURED, _KEPT = 6144, 1024


@dataclasses.dataclass(frozen=True)
class Initialisation:
  """What a recursive model is made of.

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
    rivals: dict[str, kernels.Kernel], token_QT: np.ndarray,
    folder: pathlib.Path, *,
    params: Callable[[Initialisation], dict], seed: int,
    report: Callable[[float], Any],
) -> Initialisation:
  """Makes every candidate, and keeps the one nearest to the original.

  An example of one kernel, 1 x 1, in two tied layers: W = 1 and W = 3, whose
  inputs have second moments C = 1 and C = 3, without factors, all gradients
  alike. The shared M with the least sum of C (M - W)^2 is the weighted mean
  (1 * 1 + 3 * 3) / (1 + 3) = 2.5, of error 3.0; `average`, M = 2, has 4.0 and
  `stepwise`, M = 1, has 12.0. Where the first loop's error counts three times
  as much (_EARLIER), its weight is 3 as well, and M = 2. All these models then
  read the tokens that were kept apart, and the one with the least KL divergence
  from the original is returned: the error above is only its local estimate.
  That one is distilled as a whole (`polish`), and stays as it was if this
  brought it no nearer.

  Args:
    cfg, read: the original.
    rcfg: of the recursive model. One rank for all is taken as a budget: the
      fit spreads its parameters over the kernels.
    rivals: other candidates, by the init that also gives norms and biases.
    token_QT: calibration tokens; an eighth, at most 1,024 tokens, is kept
      apart, to choose by.
    folder: empty; keeps the files that the result reads.
    params: gives the parameters of a candidate.
    seed: of what is drawn.
    report: given the share of the work done since the last report.
  """
  last = polishes(rcfg) and not ranks.is_full(rcfg)
  before = 0.6 if last else 1.0  # Share of the work.
  kept = _rows(token_QT, len(token_QT) // 8, _KEPT)
  given_QT = token_QT[:-kept]
  stride = -(-len(given_QT) // _rows(token_QT, len(given_QT), _MEASURED))
  (folder / 'moments').mkdir()
  measured = moments.measure(
      cfg, read, given_QT[::stride], folder / 'moments', seed=seed,
      report=lambda share: report(before * share / 4))
  final_QTD = distance.final(
      cfg, read, token_QT if last else token_QT[-kept:])

  def nats_of(made, store):
    nats = distance.divergence(cfg, read, final_QTD[-kept:], distance.final(
        cfg, kernels.unrolled(made.rcfg, made.read, made.rule, store),
        token_QT[-kept:]))
    logging.info('%s: KL %.4f nats a token on %d tokens kept apart',
                 store.directory.name, nats, token_QT[-kept:].size)
    return nats

  # Factors of full rank represent each layer as it is.
  aligned = align.Aligned(read, measured, {} if ranks.is_full(rcfg) else (
      align.orders(rcfg, read, measured)))
  found, weights = [], (1.0,) if any(rcfg.ranks.values()) else _EARLIER
  for earlier in weights:
    store = kernels.Store(folder / f'fit{earlier:g}', rcfg.loops)
    made = _fitted(
        cfg, rcfg, aligned, store, earlier,
        lambda share: report(before * share * 9 / 16 / len(weights)))
    found.append((nats_of(made, store), made))
  shutil.rmtree(folder / 'moments')
  for init, rival in rivals.items():
    store = kernels.Store(folder / init, rcfg.loops)
    for name, place in _places(rcfg):
      store.put(name, place, *_nearly(rcfg, read, init, name, place))
    made = Initialisation(init, rcfg, read, init, rival)
    found.append((nats_of(made, store), made))
    shutil.rmtree(folder / init)
    report(before * 3 / 16 / len(rivals))
  nats, best = min(found, key=lambda row: row[0])
  if last:
    store = kernels.Store(folder / 'polished', rcfg.loops)
    made = _polished(cfg, best, polish(
        best.rcfg, params(best), given_QT, final_QTD[:-kept], seed=seed,
        report=lambda share: report((1 - before) * share)), store)
    if nats_of(made, store) < nats:
      return made
  return best


def _rows(token_QT, rows, tokens):
  """So many sequences, if they are no more than so many tokens; at least 1."""
  return max(1, min(rows, tokens // token_QT.shape[1]))


def _places(rcfg):
  """Every kernel of the block: its name and its layer's place."""
  return itertools.product(rcfg.kernels, range(rcfg.layers_per_loop))


def _nearly(rcfg, read, init, name, place):
  """A rival's kernels, its factors to some per cent: enough to compare."""
  rank, shared = rcfg.ranks[name], kernels.folded(rcfg, read, init, name, place)
  flat = shared.reshape(rcfg.in_out(name))
  ones = [np.ones(size) for size in rcfg.in_out(name)]
  return shared, [
      (*kernels.shaped(rcfg, name, *factors(
          kernels.matrix(rcfg, read, name, layer), flat, *ones, rank)), 0, 0)
      for layer in kernels.virtual(rcfg, place) if rank]


def _polished(cfg, made, params, store) -> Initialisation:
  """The candidate with other parameters."""
  rcfg, changed = made.rcfg, {}
  M, after = rcfg.layers_per_loop, rcfg.num_layers - rcfg.coda
  for path in layers.leaves(cfg):
    leaf = path.removeprefix('block/')
    for part, first in (('prelude', 0), ('coda', after)):
      for layer in range(getattr(rcfg, part)):
        changed[path, first + layer] = paths.get(
            params, f'{part}/{leaf}')[layer]
    if leaf.startswith('vectors/'):
      for layer in range(rcfg.loops * M):
        loop, place = divmod(layer, M)
        changed[path, rcfg.prelude + layer] = paths.get(
            params['adapters'], leaf.removeprefix('vectors/'))[
                loop, place] if rcfg.has_loop_vectors else paths.get(
                    params, path)[place]
  for name, rank in rcfg.ranks.items():
    rows, columns = rcfg.in_out(name)
    for place in range(M):
      shared = paths.get(params, kernels.path(name))[place]
      store.put(name, place, shared, [
          kernels.kept(
              rcfg, name, kernels.matrix(rcfg, made.read, name, layer)
              - shared.reshape(rows, columns), a.reshape(rows, rank),
              b.reshape(rank, columns))
          for layer, a, b in zip(kernels.virtual(rcfg, place), *(
              params['adapters'][name][factor][:, place] for factor in 'ab'),
              strict=True)] if rank else [])
  return Initialisation(
      'fit', rcfg, lambda *at: changed[at] if at in changed else made.read(*at),
      made.rule, store.kernel)


def _fitted(cfg, rcfg, aligned, store, earlier, report) -> Initialisation:
  """The best by the moments, fitted again for the inputs it really gets."""
  exact = ranks.is_full(rcfg)  # The original itself, as it is.
  sizes = {name: math.prod(rcfg.in_out(name)) for name in rcfg.kernels}
  work = 0.5 / sum(sizes.values()) / rcfg.layers_per_loop
  if ranks.may_differ(rcfg):
    gains = dict.fromkeys(rcfg.kernels, 0)
    for name, place in _places(rcfg):
      gains[name] += spectra(*_tied(rcfg, aligned, earlier, name, place))
      report(work / 4 * sizes[name])
    rcfg, work = ranks.spread(rcfg, gains), 3 / 4 * work
    logging.info('Ranks %s', rcfg.rank)
  later = [] if exact else refitted(rcfg)
  for name, place in _places(rcfg):
    store.put(name, place, *_shared(
        rcfg, _tied(rcfg, aligned, earlier, name, place), name,
        name not in later))
    report(work * sizes[name])
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

  return Initialisation('fit', rcfg, fitted, 'average', store.kernel)


def _shared(rcfg, tied, name, with_factors):
  """Shared kernel, and factors if they are wanted."""
  rank, rows = rcfg.ranks[name], []
  shared = share(*tied, rank)
  for original, input_moment, output_moment in zip(*tied, strict=True) if (
      rank and with_factors) else ():
    rows.append(kernels.kept(rcfg, name, original - shared, *factors(
        original, shared, input_moment, output_moment, rank)))
  letters = ''.join(config_lib.split(rcfg.kernels[name]))
  return shared.reshape(rcfg.shape(letters)), rows


def _tied(rcfg, aligned, earlier, name, place):
  """The kernels that share, and second moments of their inputs and of their
  output gradients; the latter are scaled by each loop's weight."""
  tied = kernels.virtual(rcfg, place)
  return ([kernels.matrix(rcfg, aligned.read, name, layer) for layer in tied],
          [_input_moment(rcfg, aligned, name, layer) for layer in tied],
          [aligned.output(name, layer) * earlier**-loop
           for loop, layer in enumerate(tied)])


def _input_moment(rcfg, aligned, name, layer):
  """Second moment of a kernel's input; about its mean where a loop's own bias
  keeps the mean of the output."""
  moment = aligned.input(name, layer)
  return matrices.centred(moment, aligned.mean(name, layer)) if (
      fits_bias(rcfg, name)) else moment
