"""Keys and values of every virtual layer, for several requests.

A request has a row. Keys and values are indexed by virtual layer, row and
position, since a token has other keys at another loop. Knows arrays; nothing
of layers or schedules.
"""

from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import attention

# Attention reads this many positions, or two, four, ... times as many: the
# fewest that hold every token of the batch.
_SHORTEST = 64
_FAR = 1 << 30  # A window that holds everything.


LETTERS = ('layers', None, 'K', 'S', 'H')


class Cache(NamedTuple):
  """Keys and values, [virtual layers, rows, K, positions, H]; see LETTERS."""
  k: jax.Array
  v: jax.Array


class Place(NamedTuple):
  """Where the tokens of a batch belong; int32, shapes broadcast to [B, T].

  Attributes:
    row_BT: row of the request; keys of a row beyond the cache's are dropped.
    position_BT: position of each token.
    virtual_BT: number of the virtual layer; rows may be at different loops.
    writes_BT: bool, tokens whose keys are written; those of the others are
      there already. None writes all.
  """
  row_BT: jax.Array
  position_BT: jax.Array
  virtual_BT: jax.Array
  writes_BT: jax.Array | None = None


class Cached(NamedTuple):
  """The keys of tokens whose predecessors' are in a cache.

  Attributes:
    cache: of all virtual layers.
    place: of these tokens, in one layer or the first of several.
  """
  cache: Cache
  place: Place

  def layer(self, index: int) -> 'Cached':
    """For a later layer of the same run of layers."""
    return self._replace(place=self.place._replace(
        virtual_BT=self.place.virtual_BT + index))


class Shared(NamedTuple):
  """The first loop's keys and values, which later loops read."""
  k_BTKH: jax.Array
  v_BTKH: jax.Array


def of_first_loop(
    cfg: config_lib.ModelConfig, x_BTD: jax.Array, layers: int, loops: int
) -> Shared | None:
  """Zeros [layers, ...] for the first loop to replace; None if unshared."""
  if cfg.loop_keys or loops == 1:
    return None
  zeros = nn.with_logical_constraint(
      jnp.zeros((layers, *x_BTD.shape[:2], cfg.K, cfg.H), x_BTD.dtype),
      ('layers', 'B', 'T', 'K', 'H'))
  return Shared(zeros, zeros)


def init(
    cfg: config_lib.ModelConfig, rows: int, length: int, dtype='float32'
) -> Cache:
  """An empty cache of `length` positions a row."""
  shape = (cfg.key_layers, rows, cfg.K, length, cfg.H)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(keys: Cached, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cached:
  """The cache with the keys and values of some tokens in it.

  A token's keys go to several places where T is 1 but the place's is not.
  """
  cache, place = keys
  row_BT = place.row_BT
  if place.writes_BT is not None:
    row_BT = jnp.where(place.writes_BT, row_BT, cache.k.shape[1])
  at = (place.virtual_BT, row_BT, slice(None), place.position_BT)
  return Cached(Cache(*(
      nn.with_logical_constraint(
          leaf.at[at].set(new.astype(leaf.dtype), mode='drop'), LETTERS)
      for leaf, new in zip(cache, (k_BTKH, v_BTKH), strict=True))), place)


def attend(
    cfg: config_lib.ModelConfig, q_BTNH: jax.Array, keys: Cached,
    kind: jax.Array | None,
) -> jax.Array:
  """Softmax attention of tokens to their rows' keys, up to their own.

  All tokens of a row are at one virtual layer, of the `kind` of `LayerValues`.

  Returns:
    Mixed values, BTNH, in q's dtype.
  """
  window = cfg.window
  if kind is not None:
    is_window = jnp.asarray(kind == config_lib.WINDOW)
    window = jnp.where(is_window, window, _FAR).reshape(-1, 1, 1)
  cache, place = keys
  rows, longest = cache.k.shape[1], cache.k.shape[3]
  virtual_B, row_B = place.virtual_BT[:, 0], place.row_BT[:, 0]
  lengths = [longest]
  while lengths[0] > _SHORTEST:
    lengths.insert(0, -(-lengths[0] // 2))

  def within(length):
    def mix(q_BTNH, cache):
      k_BKSH, v_BKSH = (
          leaf.at[virtual_B, row_B, :, :length].get(mode='clip')
          for leaf in cache)
      mask_BTS = attention.visible(
          place.position_BT, jnp.arange(length)[None], window=window)
      return attention.attend_heads(
          q_BTNH, k_BKSH, v_BKSH, mask_BTS,
          scale=cfg.score_scale, cap=cfg.attention_cap)
    return mix

  reach = jnp.where(row_B < rows, place.position_BT.max(axis=1) + 1, 0).max()
  which = jnp.searchsorted(jnp.array(lengths[:-1]), reach)
  return lax.switch(which, [within(n) for n in lengths], q_BTNH, cache)
