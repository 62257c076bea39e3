"""relax(): a vanilla model becomes a looped one with adapters.

Says which layers are shared, how the shared block starts, and where each
residual goes. Relaxed Recursive Transformers, section 2; the start from data
is of `fit`.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
import numpy as np

from recursive_tx import adapters, fit, model, tree, tying
from recursive_tx import config as config_lib
from recursive_tx.fit.layers import Read

INITS = (*tying.INITS, 'fit')
# A fit is kept only where none of these is nearer to the original.
_RIVALS = ('stepwise', 'average', 'lower')

# (kernel's name, place in the block) -> the shared kernel, and for every loop
# its factors a [*in, R] and b [R, *out], the residual's energy that they keep,
# and that there was; no factors at rank 0.
Kernel = Callable[[str, int], tuple[np.ndarray, list[tuple]]]


def relax(
    cfg: config_lib.ModelConfig, variables: dict, *, loops: int,
    rank: int | str = 0, init: str = 'average', loop_norms: bool = True,
    prelude: int = 0, coda: int = 0, lora: str = 'svd',
    calibration: Iterable | None = None, seed: int = 0,
) -> tuple[config_lib.ModelConfig, dict]:
  """Makes a vanilla model recursive (rank 0) or relaxed recursive.

  Args:
    cfg, variables: a vanilla model, as `load_hf` returns it.
    loops: how often the shared block runs; divides the layers that are left
      between prelude and coda.
    rank: of every loop's adapters: an int, 'full', or per kernel such as
      'q64+k32+v32+o64+mlp128'.
    init: of the shared block: 'stepwise' (the paper's choice without
      adapters), 'average' (with them), 'lower' or 'random'; or 'fit', the
      shared kernels and factors that change least what the model says of the
      calibration tokens, unless one of the paper's first three is nearer to
      the original on an eighth of them kept apart.
    loop_norms: keep each loop's own norm scales and biases, without which no
      rank restores the original; False is the paper's tying.
    prelude, coda: first and last layers that stay out of the loops.
    lora: 'svd' of each layer's residual, or 'zero': start as if tied.
    calibration: for 'fit': token ids, an integer array [N, T] or an iterable
      of such batches; None has the model say some itself.
    seed: of 'random', of directions without residual, and of what 'fit'
      draws.

  Returns:
    The new config and its variables, fp32 numpy.

  Raises:
    ValueError: loops that do not divide the layers, a bad rank or init, or
      calibration tokens that are none of the model's or too few.
  """
  rcfg = target(cfg, loops=loops, rank=rank, init=init, lora=lora,
                loop_norms=loop_norms, prelude=prelude, coda=coda)
  token_NT = tokens(cfg, init, calibration, lambda: variables, seed)
  params = {}
  for path, shape in model.flat_shapes(rcfg).items():
    tree.put(params, path, np.empty(shape, np.float32))
  def read(path, layer):
    return np.asarray(
        tree.get(variables['params'], path)[() if layer is None else layer])
  for path, at, array in parts(cfg, rcfg, read, init=init, lora=lora,
                               seed=seed, token_NT=token_NT):
    tree.get(params, path)[at] = array
  return rcfg, {'params': params}


def reduce(
    cfg: config_lib.ModelConfig, variables: dict, *, loops: int,
    prelude: int = 0, coda: int = 0,
) -> tuple[config_lib.ModelConfig, dict]:
  """The stepwise layers once, without looping: the reduced-size baseline.

  Args:
    cfg, variables: a vanilla model.
    loops: the model has as many layers as the block of a recursive one with
      this many loops.
    prelude, coda: as for `relax`.

  Returns:
    A vanilla config and its variables, fp32 numpy.
  """
  rcfg, rvars = relax(cfg, variables, loops=loops, init='stepwise',
                      loop_norms=False, prelude=prelude, coda=coda)
  return tying.merge(dataclasses.replace(rcfg, loops=1), rvars)


def target(
    cfg: config_lib.ModelConfig, *, loops: int, rank: int | str, init: str,
    loop_norms: bool, prelude: int, coda: int, lora: str,
) -> config_lib.ModelConfig:
  """The config that `relax` makes of a vanilla one; checks its arguments."""
  config_lib.one_of('init', init, INITS)
  config_lib.one_of('lora', lora, ('svd', 'zero'))
  if (init, lora) == ('fit', 'zero'):
    raise ValueError("lora='zero' leaves nothing to fit but the shared block; "
                     "expected lora='svd' with init='fit'")
  if cfg.loops > 1 or cfg.prelude or cfg.coda or any(cfg.ranks.values()):
    raise ValueError(
        f'the model already has loops={cfg.loops}, rank={cfg.rank}; merge it '
        f'(or export it) before relaxing it anew')
  middle = cfg.num_layers - prelude - coda
  if prelude < 0 or coda < 0 or middle < 1:
    raise ValueError(f'prelude={prelude} and coda={coda} leave {middle} of '
                     f'{cfg.num_layers} layers to loop; at least 1 must stay')
  if loops < 1 or middle % loops:
    fit = [n for n in range(1, middle + 1) if middle % n == 0]
    raise ValueError(
        f'loops={loops} does not divide {middle} layers; {fit} do, or take '
        f'layers out of the loops with prelude and coda')
  return dataclasses.replace(
      cfg, loops=loops, layers_per_loop=middle // loops, rank=str(rank),
      loop_norms=loop_norms, prelude=prelude, coda=coda)


def tokens(
    cfg: config_lib.ModelConfig, init: str, calibration: Iterable | None,
    variables: Callable[[], dict], seed: int,
) -> np.ndarray | None:
  """The tokens to fit to, token_NT; None for other inits.

  Args:
    cfg: the vanilla model.
    init, calibration, seed: as for `relax`.
    variables: gives the model's, called where it has to say tokens itself.
  """
  if init == 'fit':
    return (fit.sample(cfg, variables(), seed=seed) if calibration is None
            else fit.checked(cfg, calibration))
  if calibration is not None:
    raise ValueError(f"init={init!r} takes no calibration; leave it out, or "
                     f"give init='fit'")
  return None


def parts(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig, read: Read, *,
    init: str, lora: str = 'svd', seed: int = 0,
    energy: dict | None = None, token_NT: np.ndarray | None = None,
    scratch: str | os.PathLike | None = None,
    tell: Callable[[float], Any] = lambda share: None,
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
  """Every part of the relaxed model, one layer of one leaf at a time.

  Args:
    cfg, rcfg: the vanilla config and its `target`.
    read: gives one layer of a leaf of the vanilla tree.
    init, lora, seed: as for `relax`.
    energy: gathers {(kernel, loop): [kept, total]} of the residuals' squared
      singular values, summed over the block's layers.
    token_NT: for 'fit', see `tokens`.
    scratch: where 'fit' has a directory of moments and starts for a while;
      None is the system's.
    tell: told, for 'fit', the share of the work before the first part that
      was done since.

  Yields:
    (path, leading indices, fp32 array) until the whole tree is covered.

  Raises:
    ValueError: 'fit' without tokens.
  """
  if init != 'fit':
    kernel = functools.partial(_paper_kernel, rcfg, read, init, lora, seed)
    yield from _parts(cfg, rcfg, read, init, kernel, seed, energy)
    return
  if token_NT is None:
    raise ValueError("init='fit' needs calibration tokens; convert the model "
                     "with --init=fit first, and start from that")
  with tempfile.TemporaryDirectory(prefix='.fit.', dir=scratch) as folder:
    rule, kernel = _fitted(
        cfg, rcfg, read, token_NT, pathlib.Path(folder), seed, tell)
    yield from _parts(cfg, rcfg, read, rule, kernel, seed, energy)


def _parts(cfg, rcfg, read, init, kernel, seed, energy):
  """Parts of what the init's rule says of vectors, and `kernel` of kernels."""
  after = rcfg.num_layers - rcfg.coda
  for path in model.flat_shapes(cfg):
    if not path.startswith('block/'):
      yield path, (), read(path, None).astype(np.float32)
      continue
    leaf = path.removeprefix('block/')
    for layer in range(rcfg.prelude):
      yield f'prelude/{leaf}', (layer,), read(path, layer)
    for layer in range(rcfg.coda):
      yield f'coda/{leaf}', (layer,), read(path, after + layer)
    if leaf.startswith('vectors/'):
      yield from _vector_parts(rcfg, path, read, init)
    else:
      yield from _kernel_parts(rcfg, path, kernel, energy)
  for path, value in adapters.fresh_exits(rcfg, seed).items():
    yield f'adapters/{path}', (), value


def _fitted(cfg, rcfg, read, token_NT, folder, seed, tell):
  """The rule of vectors and the kernels that are nearest to the original.

  Each start in turn is stored, and only the nearest so far is kept.
  """
  kept = max(1, len(token_NT) // 8)
  (folder / 'moments').mkdir()
  moments = fit.measure(
      cfg, read, token_NT[:-kept], folder / 'moments', seed=seed,
      tell=lambda share: tell(share / 4))
  final_NTD = fit.final(cfg, read, token_NT[-kept:])
  best = None
  for init in ('fit', *_RIVALS):
    kernel, rule = functools.partial(
        _paper_kernel, rcfg, read, init, 'svd', seed), init
    if init == 'fit':
      kernel, rule = functools.partial(
          _fitted_kernel, rcfg, read, moments, seed), 'average'
    stored = _stored(rcfg, kernel, folder / init,
                     lambda share: tell(share * 3 / 16))
    nats = fit.divergence(
        cfg, read, final_NTD, fit.final(
            cfg, _unrolled(rcfg, read, rule, stored), token_NT[-kept:]))
    logging.info('%s: KL %.4f nats a token on %d tokens kept apart', init,
                 nats, token_NT[-kept:].size)
    if best is None or nats < best[0]:
      best, loser = (nats, init, rule, stored), best and best[1]
    else:
      loser = init
    if loser:
      shutil.rmtree(folder / loser)
    if init == 'fit':
      shutil.rmtree(folder / 'moments')
  return best[2:]


def _stored(rcfg, kernel, folder, tell) -> Kernel:
  """The same kernels, made now, and read from files from now on."""
  folder.mkdir()
  for name in rcfg.kernels:
    for place in range(rcfg.layers_per_loop):
      shared, factors = kernel(name, place)
      columns = zip(*factors, strict=True)
      np.savez(folder / f'{name}.{place}.npz', shared,
               *(np.stack(column) for column in columns))
      tell(1 / len(rcfg.kernels) / rcfg.layers_per_loop)

  def read(name, place):
    with np.load(folder / f'{name}.{place}.npz') as arrays:
      shared, *columns = (arrays[key] for key in arrays.files)
    return shared, list(zip(*columns, strict=True))
  return read


def _unrolled(rcfg, read, init, kernel) -> Read:
  """The relaxed model's layers as those of a vanilla one."""
  K = rcfg.layers_per_loop

  def unrolled(path, layer):
    if layer is None:
      return read(path, None)
    loop, place = divmod(layer - rcfg.prelude, K)
    if not 0 <= loop < rcfg.loops:
      return read(path, layer)
    if path.startswith('block/vectors/'):
      if rcfg.has_loop_vectors:
        return read(path, layer)
      return tying.fold([read(path, rcfg.prelude + i)
                         for i in _sources(rcfg, init)[place]])
    shared, factors = kernel(path.split('/')[3], place)
    if not factors:
      return shared
    a, b = factors[loop][:2]
    rank = len(b)
    return shared + (a.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(
        shared.shape)
  return unrolled


def _vector_parts(rcfg, path, read, init):
  """Norm scales and biases: each loop's own, or shared by the init's rule."""
  K = rcfg.layers_per_loop
  name, leaf = path.split('/')[2:]
  if rcfg.has_loop_vectors:
    for loop in range(rcfg.loops):
      for layer in range(K):
        yield (f'adapters/{name}/{leaf}', (loop, layer),
               read(path, rcfg.prelude + loop * K + layer))
    return
  for layer, taken in enumerate(_sources(rcfg, init)):
    originals = [read(path, rcfg.prelude + i) for i in taken]
    if init == 'random' and not rcfg.loop_norms:
      neutral = leaf == 'scale' and rcfg.norm != 'rms+1'
      originals = [np.full_like(originals[0], neutral)]
    yield path, (layer,), tying.fold(originals)


def _kernel_parts(rcfg, path, kernel, energy):
  """A kernel of the shared block, and its adapters in every loop."""
  name = path.split('/')[3]
  for layer in range(rcfg.layers_per_loop):
    shared, factors = kernel(name, layer)
    yield path, (layer,), shared
    for loop, (a, b, kept, total) in enumerate(factors):
      if energy is not None:
        row = energy.setdefault((name, loop), [0.0, 0.0])
        row[0] += float(kept)
        row[1] += float(total)
      yield f'adapters/{name}/a', (loop, layer), a
      yield f'adapters/{name}/b', (loop, layer), b


def _paper_kernel(rcfg, read, init, lora, seed, name, layer):
  """Kernel: the init's layers' mean, and each residual's truncated SVD."""
  path, rank = _path(name), rcfg.ranks[name]
  rng = np.random.default_rng([seed, list(rcfg.kernels).index(name), layer])
  if init == 'random':
    std = rcfg.in_out(name)[0] ** -0.5
    shape = read(path, rcfg.prelude).shape
    shared = rng.normal(0, std, shape).astype(np.float32)
  else:
    shared = tying.fold([read(path, rcfg.prelude + i)
                         for i in _sources(rcfg, init)[layer]])
  return shared, [
      _adapter(rcfg, name, read(path, virtual), shared, lora, rng)
      for virtual in _virtual(rcfg, layer) if rank]


def _fitted_kernel(rcfg, read, moments, seed, name, layer):
  """Kernel: what is best by the moments of calibration tokens."""
  originals = [read(_path(name), virtual).astype(np.float32)
               for virtual in _virtual(rcfg, layer)]
  matrices = [original.reshape(rcfg.in_out(name)) for original in originals]
  shared, factors = fit.share(
      matrices,
      [moments.input(name, virtual) for virtual in _virtual(rcfg, layer)],
      [moments.output(name, virtual) for virtual in _virtual(rcfg, layer)],
      rcfg.ranks[name], rng=np.random.default_rng(
          [seed, list(rcfg.kernels).index(name), layer]))
  rows = []
  for matrix, (a, b) in zip(matrices, factors, strict=False):
    total = _energy(matrix - shared)
    rows.append((*_shaped(rcfg, name, a, b),
                 max(0.0, total - _energy(matrix - shared - a @ b)), total))
  return shared.reshape(originals[0].shape), rows


def _adapter(rcfg, name, original, shared, lora, rng):
  """Factors a [*in, R] and b [R, *out], energy kept, energy there was."""
  matrix = rcfg.in_out(name)
  original = original.astype(np.float32).reshape(matrix)
  residual = original - shared.reshape(matrix)
  if lora == 'zero':
    residual[...] = 0
  a, b, kept = tying.factor(
      residual, rcfg.ranks[name], scale=float(np.linalg.norm(original)),
      rng=rng)
  return *_shaped(rcfg, name, a, b), kept, _energy(residual)


def _shaped(rcfg, name, a, b):
  inner, outer = config_lib.split(rcfg.kernels[name])
  rank = len(b)
  return (a.reshape(*rcfg.shape(inner), rank),
          b.reshape(rank, *rcfg.shape(outer)))


def _energy(matrix) -> float:
  return float(np.linalg.norm(matrix.astype(np.float64))) ** 2


def _path(name) -> str:
  group = next(group for group, names in config_lib.GROUPS.items()
               if name in names)
  return f'block/layers/{group}/{name}/kernel'


def _virtual(rcfg, layer) -> list[int]:
  """The virtual layers that one layer of the block stands for."""
  return [rcfg.prelude + loop * rcfg.layers_per_loop + layer
          for loop in range(rcfg.loops)]


def _sources(rcfg, init) -> list[list[int]]:
  rule = 'lower' if init == 'random' else init
  return tying.sources(rule, loops=rcfg.loops,
                       layers_per_loop=rcfg.layers_per_loop)
