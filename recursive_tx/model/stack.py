"""One walk through a run of layers, and the loops that repeat it."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import adapters, kv_cache
from recursive_tx.model.layer import Context, Layer

_REMATS = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
  """A run of layers, looped; the prelude and the coda run once.

  Attributes:
    layers: how many, each with its own parameters.
    loops: how often they run, parameters shared.
    first: number of the first virtual layer.
    own_vectors: norms and biases are parameters here, shared by the loops;
      otherwise they come with the adapters.
  """
  cfg: config_lib.ModelConfig
  run: config_lib.Run
  layers: int
  loops: int = 1
  first: int = 0
  own_vectors: bool = True

  def setup(self):
    self.scanned = nn.scan(
        self._layer(), variable_axes={'params': 0},
        split_rngs={'params': True}, in_axes=(0, nn.broadcast, 0),
        length=self.layers, metadata_params={nn.PARTITION_NAME: 'layers'})(
            self.cfg, self.run, name='layers')
    if self.own_vectors:
      self.vectors = adapters.stacked((('layers', self.layers),))(
          self.cfg, adapters.vector_table(self.cfg))

  def __call__(self, x_BTD, adapters_L, context: Context, depth_BT=None):
    """Every loop over whole sequences.

    Args:
      x_BTD: what goes in.
      adapters_L: values [loops, layers, ...] by name.
      context: of all loops; its `first` and `exited_BT` are set here.
      depth_BT: after how many loops each token exits; None is none.

    Returns:
      x_BTD and each loop's output x_LBTD.
    """
    keys = kv_cache.of_first_loop(self.cfg, x_BTD, self.layers, self.loops)
    if self.run.unroll and not self.is_initializing():
      # Without a scan, which would stack what backward needs.
      apart_M, x_LBTD = self._apart(), []
      for loop, values in enumerate(_unstack(adapters_L, self.loops)):
        x_BTD, keys = self.walk(
            x_BTD, values, loop, context.at(loop, depth_BT), keys,
            apart_M=apart_M)
        x_LBTD.append(x_BTD)
      return x_BTD, jnp.stack(x_LBTD)

    def body(stack, carry, values, loop):
      carry = stack.walk(
          carry[0], values, loop, context.at(loop, depth_BT), carry[1])
      return carry, carry[0]

    # Unrolled, the loops' own scans stay: what backward needs of one would be
    # copied into that of the other, which took a third of a step on a GPU.
    (x_BTD, _), x_LBTD = nn.scan(
        body, variable_broadcast='params', split_rngs={'params': False},
        in_axes=0, length=self.loops, unroll=self.loops)(
            self, (x_BTD, keys), adapters_L, jnp.arange(self.loops))
    return x_BTD, x_LBTD

  def walk(
      self, x_BTD, values, loop, context: Context, keys=None, *,
      method='__call__', apart_M=None,
  ):
    """One run of the layers.

    Args:
      x_BTD: what goes in; with a cache, rows may be at different loops.
      values: what the adapters hold for this loop: leaves [layers, ...] by
        name, or a list of those of each layer.
      loop: which one this is, from 0: an int, or int32 [] or, with a cache,
        [B, 1].
      context: what the layers share.
      keys: None, `kv_cache.Shared` of every layer [layers, ...], or
        `kv_cache.Cached` with the place of the first layer.
      method: of Layer: what to do in each.
      apart_M: of `_apart`, where several loops share one.

    Returns:
      x_BTD, and the keys after these layers.
    """
    cached = isinstance(keys, kv_cache.Cached)
    kind = adapters.kinds(self.cfg, self.first, self.loops, self.layers)
    if kind is not None:
      kind = jnp.asarray(kind)[loop]
    # A scan would copy the cache that it carries.
    if self.is_initializing() or not (cached or self.run.unroll):
      vectors = self.vectors() if self.own_vectors else {}
      return self.scanned(
          x_BTD, adapters.layer_values(self.cfg, vectors, values, kind=kind),
          context, keys)
    layer = self._layer()(self.cfg, self.run, parent=None)
    values_M, own_M = _list(values, self.layers), []
    keys_M = None if cached else _list(keys, self.layers)
    for i, (kernels, vectors) in enumerate(apart_M or self._apart()):
      x_BTD, own = layer.apply(
          {'params': kernels}, x_BTD,
          adapters.layer_values(
              self.cfg, vectors, values_M[i],
              kind=None if kind is None else kind[..., i]), context,
          keys.layer(i) if cached else keys_M[i], method=method)
      if cached:
        keys = keys._replace(cache=own.cache)
      own_M.append(own)
    if not cached:
      keys = jax.tree.map(lambda *own: jnp.stack(own), *own_M)
    return x_BTD, keys

  def _apart(self) -> list[tuple[dict, dict]]:
    """Each layer's kernels and vectors."""
    params = self.variables['params']
    vectors_M = [{}] * self.layers
    if self.own_vectors:
      vectors_M = _list(params['vectors'], self.layers)
    return list(zip(
        _list(params['layers'], self.layers), vectors_M, strict=True))

  def _layer(self):
    if self.run.remat == 'none':
      return Layer
    return nn.remat(Layer, policy=_REMATS[self.run.remat],
                    prevent_cse=self.run.unroll)


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
