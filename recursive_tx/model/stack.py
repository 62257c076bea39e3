"""A scan over loops of a scan over layers, and one pass with a cache."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import adapters
from recursive_tx.model.layer import Layer

_REMATS = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
  """A run of layers, looped; the prelude and the coda run once.

  Attributes:
    layers: how many, each with its own parameters.
    loops: how often they run, parameters shared.
    own_vectors: norms and biases are parameters here, shared by the loops;
      otherwise they come with the adapters.
  """
  cfg: config_lib.ModelConfig
  run: config_lib.Run
  layers: int
  loops: int = 1
  own_vectors: bool = True

  @nn.compact
  def __call__(self, x_BTD, adapters_L, context):
    """Returns x_BTD and each loop's output h_LBTD."""
    if self.own_vectors:
      vectors = adapters.stacked((('layers', self.layers),))(
          self.cfg, adapters.vector_table(self.cfg), name='vectors')()
      shared_L = jax.tree.map(
          lambda v: jnp.broadcast_to(v, (self.loops, *v.shape)), vectors)
      adapters_L = adapters.overlay(shared_L, adapters_L)
    layer = Layer
    if self.run.remat != 'none':
      layer = nn.remat(Layer, policy=_REMATS[self.run.remat],
                       prevent_cse=self.run.unroll)

    if self.run.unroll and not self.is_initializing():
      return self._unrolled(layer, x_BTD, adapters_L, context)

    def loop(stack, carry, adapter, index):
      x_BTD, keys_N = carry
      scan = nn.scan(
          layer, variable_axes={'params': 0}, split_rngs={'params': True},
          in_axes=(0, nn.broadcast), length=stack.layers,
          metadata_params={nn.PARTITION_NAME: 'layers'})
      carry = scan(stack.cfg, stack.run, name='layers')(
          x_BTD, with_keys(adapter, keys_N), _at_loop(context, index))
      return carry, carry[0]

    loops = nn.scan(
        loop, variable_broadcast='params', split_rngs={'params': False},
        in_axes=0, length=self.loops)
    (x_BTD, _), h_LBTD = loops(
        self, (x_BTD, no_keys(self.cfg, x_BTD, self.layers, self.loops)),
        adapters_L, jnp.arange(self.loops))
    return x_BTD, h_LBTD

  def _unrolled(self, layer, x_BTD, adapters_L, context):
    """The same without a scan, which would stack what backward needs."""
    layer = layer(self.cfg, self.run, parent=None)
    params = _unstack(self.variables['params']['layers'], self.layers)
    h_LBTD, keys_N = [], no_keys(self.cfg, x_BTD, self.layers, self.loops)
    for index, adapter in enumerate(_unstack(adapters_L, self.loops)):
      now, keys = _at_loop(context, index), []
      for leaves, values in zip(params, _unstack(
          with_keys(adapter, keys_N), self.layers), strict=True):
        x_BTD, own = layer.apply({'params': leaves}, x_BTD, values, now)
        keys.append(own)
      keys_N = jax.tree.map(lambda *own: jnp.stack(own), *keys)
      h_LBTD.append(x_BTD)
    return x_BTD, jnp.stack(h_LBTD)

  def once(self, x_BTD, adapters_N, context, cache, place, method='__call__'):
    """One pass of the layers over tokens whose earlier ones are in the cache.

    Args:
      x_BTD: what goes in; rows may be at different loops.
      adapters_N: a dictionary of values for every layer, of `mixed_loops.at`.
      context: of `Decoder._context`.
      cache, place: see kv_cache.py; `place` is that of the first layer.
      method: of Layer: what to do in each.

    Returns:
      x_BTD and the cache with these tokens in it.
    """
    params = self.variables['params']
    layer = Layer(self.cfg, self.run, parent=None)
    layers_N = _list(params['layers'], self.layers)
    vectors_N = [{}] * self.layers
    if self.own_vectors:
      vectors_N = _list(params['vectors'], self.layers)
    for i in range(self.layers):
      x_BTD, cache = layer.apply(
          {'params': layers_N[i]}, x_BTD,
          adapters.overlay(vectors_N[i], adapters_N[i]), context, cache,
          place._replace(virtual_BT=place.virtual_BT + i), method=method)
    return x_BTD, cache


def no_keys(cfg, x_BTD, layers: int, loops: int) -> dict | None:
  """Zeros in place of the first loop's keys; None if none are shared.
  """
  if cfg.loop_keys or loops == 1:
    return None
  keys = nn.with_logical_constraint(
      jnp.zeros((layers, *x_BTD.shape[:2], cfg.K, cfg.H), x_BTD.dtype),
      ('layers', 'B', 'T', 'K', 'H'))
  return {'k': keys, 'v': keys}


def with_keys(adapter: dict, keys_N: dict | None) -> dict:
  """One loop's values for its layers, and the keys that it shares."""
  return adapter if keys_N is None else {**adapter, 'keys': keys_N}


def _at_loop(context: dict, loop) -> dict:
  """What layers share, with the tokens that exited before this loop."""
  context = {**context, 'first': loop == 0}
  depth_BT = context.pop('depth_BT', None)
  if depth_BT is not None:
    context['exited_BT'] = depth_BT <= loop
  return context


def _list(tree, size: int) -> list:
  """Trees of the leading slices; the engine has them apart already."""
  return tree if isinstance(tree, list) else _unstack(tree, size)


def _unstack(tree, size: int) -> list:
  """`size` trees of the leading slices; the gradient is one concatenation."""
  leaves, structure = jax.tree.flatten(tree)
  parts = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * size)]
           for leaf in leaves]
  return [structure.unflatten([part[i] for part in parts])
          for i in range(size)]
