"""Where the first state and the teacher come from, onto the mesh."""

from collections.abc import Iterable
import re
from typing import Any

from flax.linen import meta
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from recursive_tx import model
from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError
from recursive_tx.files import paths
from recursive_tx.store import opening
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.tokenizer import Tokenizer
from recursive_tx.train import step, teacher_cache
from recursive_tx.train.config import Config
from recursive_tx.train.step import TrainState

# '<s>', '<|im_start|>', '[INST]' and their like, perhaps among other text.
_SPECIAL = re.compile(r'<[^<>\s]+>|\[[^\[\]\s]+\]')


def first_state(
    config: Config, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
  """The state before the first step: from init_from, else random."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  if config.init_from:
    parts = opening.parts_as(
        opening.source(config.init_from), config.model, init=config.init,
        lora=config.lora, seed=config.seed)
    params = place_parts(parts, abstract.params, jnp.float32)
  else:
    decoder = model.Decoder(config.model)
    params = jax.jit(
        lambda key: meta.unbox(
            decoder.init(key, jnp.zeros((1, 2), jnp.int32))['params']),
        out_shardings=shardings.params,
    )(jax.random.key(config.seed))
  return jax.jit(
      lambda params: TrainState(jnp.int32(0), params, tx.init(params)),
      donate_argnums=0, out_shardings=shardings,
  )(params)


def num_bytes(abstract: Any) -> int:
  """Of all arrays of a tree together."""
  return sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def load_teacher(
    config: Config, mesh: Mesh, tokenizer: Tokenizer
) -> tuple[ModelConfig | None, Any]:
  """The teacher's model and its variables, in the run's dtype.

  Args:
    config: the run.
    mesh: where it runs.
    tokenizer: the run's.

  Returns:
    (None, None) where there is no teacher, or only its saved top-k logits.

  Raises:
    UserError: a directory that `opening.source` refuses, or a teacher of
      another vocabulary or tokenizer.
  """
  if not config.teacher or teacher_cache.is_saved(config.teacher):
    return None, None
  origin = opening.source(config.teacher)
  if origin.cfg.V != config.model.V:
    raise UserError(
        f'The teacher {config.teacher} has a vocabulary of {origin.cfg.V}, the'
        f' model of {config.model.V}; distillation needs the same.')
  if tokenizer_lib.has_tokenizer(origin.companions):
    check_tokenizers(
        tokenizer, tokenizer_lib.load(origin.companions), config.teacher)
  abstract = step.abstract_params(config, origin.cfg, mesh)
  params = place_parts(opening.parts(origin), abstract, config.run.dtype)
  return origin.cfg, {'params': params}


def check_tokenizers(own: Tokenizer, other: Tokenizer, teacher: str) -> None:
  """Checks that a teacher's ids mean what the run's do.

  Every piece of either vocabulary, as text, must have the same ids in both.
  Their files may differ: SentencePiece and `tokenizers` may hold one
  vocabulary, and special tokens, on which kinds of files disagree, are left
  out.

  Raises:
    UserError: a piece has other ids.
  """
  if own.digest == other.digest:
    return
  pieces = sorted({
      one.decode([i]) for one in (own, other) for i in range(one.vocab_size)})
  pieces = [piece for piece in pieces if not _SPECIAL.search(piece)]
  differ = [
      found for found in zip(
          pieces, own.encode_batch(pieces), other.encode_batch(pieces),
          strict=True)
      if found[1] != found[2]]
  if differ:
    text, mine, theirs = differ[0]
    raise UserError(
        f'The teacher {teacher} has another tokenizer: {len(differ)} of'
        f' {len(pieces)} pieces have other ids, such as {text!r}, which is'
        f' {mine} for the run and {theirs} for the teacher; name a teacher of'
        ' the same tokenizer, or the teacher\'s with --config.tokenizer=')


def place_parts(
    parts: Iterable[opening.Part], abstract: Any, dtype: Any
) -> dict[str, Any]:
  """Puts parameters onto the mesh as they come, and keeps no others.

  A process holds its own devices' shares and the part at hand, so that no
  host holds a model whole.

  Args:
    parts: those of one leaf need not follow each other.
    abstract: shapes and shardings.
    dtype: of the arrays.
  """
  params, leaves = {}, {
      path: _Leaf(x, dtype) for path, x in paths.items(abstract)}
  for path, at, array in parts:
    if leaves[path].take(at, array):
      paths.put(params, path, leaves.pop(path).place())
  assert not leaves, sorted(leaves)
  return params


class _Leaf:
  """This process's shares of an array, until all of it has come."""

  def __init__(self, abstract: jax.ShapeDtypeStruct, dtype: Any):
    self._abstract, self._dtype = abstract, dtype
    self._left = abstract.size
    self._shares = None

  def take(self, at: tuple[int, ...], array: np.ndarray) -> bool:
    """Takes what is at leading indices. Returns whether that was the last."""
    if self._shares is None:
      held = self._abstract.sharding.addressable_devices_indices_map(
          self._abstract.shape)
      self._shares = {
          bounds: np.empty([stop - start for start, stop in bounds],
                           self._dtype)
          for bounds in {self._bounds(index) for index in held.values()}}
    assert array.shape == self._abstract.shape[len(at):]
    for bounds, share in self._shares.items():
      inside = zip(at, bounds, strict=False)
      if all(start <= i < stop for i, (start, stop) in inside):
        place = tuple(
            i - start for i, (start, _) in zip(at, bounds, strict=False))
        share[place] = array[tuple(slice(*b) for b in bounds[len(at):])]
    self._left -= array.size
    return not self._left

  def place(self) -> jax.Array:
    """The array, on the mesh."""
    return jax.make_array_from_callback(
        self._abstract.shape, self._abstract.sharding,
        lambda index: self._shares[self._bounds(index)])

  def _bounds(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop along each dimension."""
    return tuple(
        part.indices(size)[:2]
        for part, size in zip(index, self._abstract.shape, strict=True))
