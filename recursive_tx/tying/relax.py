"""relax(): a vanilla model becomes a looped one with adapters.

Decides which layers are shared, how the shared block is initialised, and
where each residual goes. Relaxed Recursive Transformers, section 2; the
initialisation from data is in `fit`.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import model, tying
from recursive_tx.errors import UserError, one_of
from recursive_tx.files import paths
from recursive_tx.model import adapters
from recursive_tx.tying import fit, kernels
from recursive_tx.tying.fit import Read

INITS = (*tying.INITS, 'fit')
# A fit is kept only where none of these is nearer to the original.
_RIVALS = ('stepwise', 'average', 'lower')

# (path, leading indices, fp32 array) of every part of a relaxed model.
Parts = Iterator[tuple[str, tuple[int, ...], np.ndarray]]


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
      'q64+k32+v32+o64+mlp128'. An int is a budget for 'fit': the parameters
      of so much rank everywhere, spread over the kernels by what they gain.
    init: of the shared block: 'stepwise' (the paper's choice without
      adapters), 'average' (with them), 'lower' or 'random'; or 'fit', the
      shared kernels and factors that change the model's predictions on the
      calibration tokens least, unless one of the paper's first three is
      nearer to the original on an eighth of them kept apart.
    loop_norms: keep each loop's own norm scales and biases, without which no
      rank restores the original; False is the paper's tying.
    prelude, coda: first and last layers that stay out of the loops.
    lora: 'svd' of each layer's residual, or 'zero', as if tied.
    calibration: for 'fit': token ids, an integer array [Q, T] or an iterable
      of such batches; None samples some from the model.
    seed: of 'random', of directions without residual, and of what 'fit'
      draws.

  Returns:
    The new config and its variables, fp32 numpy.

  Raises:
    UserError: loops that do not divide the layers, a bad rank or init, or
      calibration tokens that are none of the model's or too few.
  """
  rcfg = target(cfg, loops=loops, rank=rank, init=init, lora=lora,
                loop_norms=loop_norms, prelude=prelude, coda=coda)
  token_QT = tokens(cfg, init, calibration, lambda: variables, seed)
  def read(path, layer):
    return np.asarray(
        paths.get(variables['params'], path)[() if layer is None else layer])
  with initialised(cfg, rcfg, read, init=init, lora=lora, seed=seed,
             token_QT=token_QT) as (rcfg, _, found):
    return rcfg, {'params': _gathered(rcfg, found)}


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
  one_of('init', init, INITS)
  one_of('lora', lora, ('svd', 'zero'))
  if (init, lora) == ('fit', 'zero'):
    raise UserError("lora='zero' leaves nothing to fit but the shared block; "
                     "expected lora='svd' with init='fit'")
  if cfg.loops > 1 or cfg.prelude or cfg.coda or any(cfg.ranks.values()):
    raise UserError(
        f'the model already has loops={cfg.loops}, rank={cfg.rank}, and '
        f'loops={loops}, rank={rank} is asked for; ask for what it has, or '
        f'merge it (or export it) before relaxing it anew')
  middle = cfg.num_layers - prelude - coda
  if prelude < 0 or coda < 0 or middle < 1:
    raise UserError(f'prelude={prelude} and coda={coda} leave {middle} of '
                     f'{cfg.num_layers} layers to loop; at least 1 must stay')
  if loops < 1 or middle % loops:
    fit = [n for n in range(1, middle + 1) if middle % n == 0]
    raise UserError(
        f'loops={loops} does not divide {middle} layers; {fit} do, or take '
        f'layers out of the loops with prelude and coda')
  return dataclasses.replace(
      cfg, loops=loops, layers_per_loop=middle // loops, rank=str(rank),
      loop_norms=loop_norms, prelude=prelude, coda=coda)


def tokens(
    cfg: config_lib.ModelConfig, init: str, calibration: Iterable | None,
    variables: Callable[[], dict], seed: int,
) -> np.ndarray | None:
  """The tokens to fit to, token_QT; None for other inits.

  Args:
    cfg: the vanilla model.
    init, calibration, seed: as for `relax`.
    variables: gives the model's; called where tokens are sampled from it.
  """
  if init == 'fit':
    return (fit.sample(cfg, variables(), seed=seed) if calibration is None
            else fit.checked(cfg, calibration))
  if calibration is not None:
    raise UserError(f"init={init!r} takes no calibration; leave it out, or "
                     f"give init='fit'")
  return None


@contextlib.contextmanager
def initialised(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig, read: Read, *,
    init: str, lora: str = 'svd', seed: int = 0,
    energy: dict | None = None, token_QT: np.ndarray | None = None,
    scratch: str | os.PathLike | None = None,
    report: Callable[[float], Any] = lambda share: None,
) -> Iterator[tuple[config_lib.ModelConfig, str, Parts]]:
  """The relaxed config, the init that was kept, and `parts`.

  Use as a context manager, within which the parts can be read.

  Args:
    cfg, rcfg, read, init, lora, seed, energy: as for `parts`. Where 'fit'
      chooses ranks, the config is another.
    token_QT: for 'fit', see `tokens`.
    scratch: where 'fit' makes a temporary directory of moments and
      candidates; None is the system's.
    report: called, for 'fit', with the share of the work before the first
      part that was done since the last call.
  """
  if init != 'fit':
    yield rcfg, init, parts(cfg, rcfg, read, init=init, lora=lora, seed=seed,
                            energy=energy)
    return
  rivals = {name: functools.partial(_paper_kernel, rcfg, read, name, lora,
                                    seed) for name in _RIVALS}

  def parts_of(made, energy):
    return _parts(cfg, made.rcfg, made.read, made.rule, made.kernel, seed,
                  energy)

  with tempfile.TemporaryDirectory(prefix='.fit.', dir=scratch) as folder:
    # Accelerators would multiply fp32 numbers of 8 or 11 bits else.
    with jax.default_matmul_precision('highest'):
      best = fit.nearest(
          cfg, rcfg, read, rivals, token_QT, pathlib.Path(folder),
          params=lambda made: _gathered(made.rcfg, parts_of(made, None)),
          seed=seed, report=report)
    yield best.rcfg, best.init, parts_of(best, energy)


def parts(
    cfg: config_lib.ModelConfig, rcfg: config_lib.ModelConfig, read: Read, *,
    init: str, lora: str = 'svd', seed: int = 0, energy: dict | None = None,
) -> Parts:
  """Every part of the relaxed model, one layer of one leaf at a time.

  Args:
    cfg, rcfg: the vanilla config and its `target`.
    read: gives one layer of a leaf of the vanilla tree.
    init, lora, seed: as for `relax`.
    energy: gathers {(kernel, loop): [kept, total]} of the residuals' squared
      singular values, summed over the block's layers.

  Yields:
    (path, leading indices, fp32 array) until the whole tree is covered.

  Raises:
    UserError: 'fit', which needs tokens.
  """
  if init == 'fit':
    raise UserError("init='fit' needs calibration tokens; convert the model "
                     "with --init=fit first, and start from that")
  kernel = functools.partial(_paper_kernel, rcfg, read, init, lora, seed)
  yield from _parts(cfg, rcfg, read, init, kernel, seed, energy)


def _gathered(rcfg, found):
  """A tree of all the parts."""
  params = {}
  for path, shape in model.flat_shapes(rcfg).items():
    paths.put(params, path, np.empty(shape, np.float32))
  for path, at, array in found:
    paths.get(params, path)[at] = array
  return params


def _parts(cfg, rcfg, read, init, kernel, seed, energy):
  """Parts: vectors by the init's rule, kernels by `kernel`."""
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


def _vector_parts(rcfg, path, read, init):
  """Norm scales and biases: each loop's own, or shared by the init's rule."""
  M = rcfg.layers_per_loop
  name, leaf = path.split('/')[2:]
  if rcfg.has_loop_vectors:
    for loop in range(rcfg.loops):
      for layer in range(M):
        yield (f'adapters/{name}/{leaf}', (loop, layer),
               read(path, rcfg.prelude + loop * M + layer))
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
  path, rank = kernels.path(name), rcfg.ranks[name]
  rng = np.random.default_rng([seed, list(rcfg.kernels).index(name), layer])
  if init == 'random':
    std = rcfg.in_out(name)[0] ** -0.5
    shape = read(path, rcfg.prelude).shape
    shared = rng.normal(0, std, shape).astype(np.float32)
  else:
    shared = kernels.folded(rcfg, read, init, name, layer)
  return shared, [
      _adapter(rcfg, name, read(path, virtual), shared, lora, rng)
      for virtual in kernels.virtual(rcfg, layer) if rank]


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
  return *kernels.shaped(rcfg, name, a, b), kept, kernels.energy(residual)


def _sources(rcfg, init) -> list[list[int]]:
  rule = 'lower' if init == 'random' else init
  return tying.sources(rule, loops=rcfg.loops,
                       layers_per_loop=rcfg.layers_per_loop)
