"""A decoder: a scan over loops of a scan over layers.

The outer scan broadcasts the block's parameters (the recursion) and slices
the adapters (the relaxation); one loop is a vanilla model. Relaxed Recursive
Transformers, equations 1 to 3. Knows nothing of families or files.
"""

import functools
import math

import chex
from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from recursive_tx import config as config_lib
from recursive_tx.model import (
  adapters,
  embedding,
  kv_cache,
  mixed_loops,
)
from recursive_tx.model.cpu import product
from recursive_tx.model.layer import Context, normalize, rope_tables, whole
from recursive_tx.model.stack import Stack


class Decoder(nn.Module):
  """Tokens to logits."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run = config_lib.Run()

  def setup(self):
    cfg = self.cfg
    init = nn.with_logical_partitioning(
        initializers.normal(cfg.D**-0.5), ('V', 'D'))
    self.embed = Table(cfg, 'embedding', init, cfg.positions)
    self.head = None if cfg.tied else Table(cfg, 'kernel', init)
    self.norm = adapters.Leaves(cfg, adapters.norm_leaves(cfg))
    self.adapters = adapters.Adapters(cfg)
    stack = functools.partial(Stack, cfg, self.run)
    self.prelude = stack(cfg.prelude) if cfg.prelude else None
    self.block = stack(cfg.layers_per_loop, loops=cfg.loops, first=cfg.prelude,
                       own_vectors=not cfg.has_loop_vectors)
    self.coda = stack(
        cfg.coda, first=cfg.num_layers - cfg.coda) if cfg.coda else None

  def __call__(self, token_BT, segment_BT=None, position_BT=None):
    """Logits of the last loop.

    Args:
      token_BT: int32 token ids.
      segment_BT: document of each token; tokens see only their own. None is
        one document a row.
      position_BT: place of each token in its document; None counts from 0.

    Returns:
      logits_BTV, fp32.
    """
    context = whole(self.cfg, token_BT.shape, segment_BT, position_BT)
    x_BTD, _ = self.enter(token_BT, context)
    x_BTD, _ = self.block(x_BTD, self.adapters(), context)
    h_BTD, _ = self.finish(x_BTD, context)
    if self.is_initializing() and self.cfg.exit_gate:
      self.gate(h_BTD, 0)
    return self.logits(h_BTD)

  def hidden(
      self, token_BT, segment_BT=None, position_BT=None, depth_BT=None,
      mask_BTS=None,
  ):
    """What the head multiplies, for every loop: h_LBTD, compute dtype.

    Each loop's output goes through the coda and the final norm, as an exit
    after that loop would. A token that exits after depth_BT loops keeps that
    hidden state; later loops compute its keys and values from it. With None no
    token exits.

    mask_BTS, bool, is which tokens each token sees, in place of what segments
    and the window allow; it must be causal. Only the 'plain' attention reads
    all of it, and 'blocks' where the model has no window.
    """
    return self._every_loop(
        token_BT, segment_BT, position_BT, depth_BT, mask_BTS)[1]

  def hidden_and_gates(
      self, token_BT, segment_BT=None, position_BT=None, depth_BT=None
  ):
    """`hidden`, and gate_EBT: the exit gate's logits, but the final loop's."""
    x_LBTD, h_LBTD = self._every_loop(
        token_BT, segment_BT, position_BT, depth_BT)
    gate_EBT = jnp.stack([
        self.gate(normalize(self.cfg, x_BTD, self.norm()), loop)
        for loop, x_BTD in enumerate(x_LBTD[:-1])])
    return h_LBTD, gate_EBT

  def gate(self, h, loop):
    """Whether tokens may exit: fp32 logits [...] of the exit gates.

    Args:
      h: outputs [..., D] of a loop before the coda, through the final norm.
        No gradient reaches them: a gate does not change its input.
      loop: which loop's, from 0: an int, or int32 [...] where they differ;
        the final one has no gate, and its result no meaning.
    """
    h = jax.lax.stop_gradient(h.astype(jnp.float32))
    leaves = self.adapters(gate=True)
    if isinstance(loop, int):
      leaves = {name: value[loop:loop + 1] for name, value in leaves.items()}
    # All gates at once are one matmul; to gather them by row would copy them.
    inner = jax.nn.gelu(
        jnp.einsum('...D,EDW->...EW', h, leaves['a']) + leaves['a_bias'])
    gate = jnp.einsum('...EW,EW->...E', inner, leaves['b']) + leaves['b_bias']
    if isinstance(loop, int):
      return gate[..., 0]
    return jnp.take_along_axis(gate, loop[..., None], -1, mode='clip')[..., 0]

  def logits(self, h, loop=None, head_DV=None):
    """The head: h[..., D] to fp32 logits[..., V].

    Args:
      h: hidden states.
      loop: which loop's, from 0, so that its head's factors are added: an
        int, or int32 of h's leading shape; None is the final loop, which has
        none.
      head_DV: the head's table transposed, where that is faster; None is the
        model's own.
    """
    if h.ndim == 3:
      h = nn.with_logical_constraint(h, ('B_head', 'T', 'D'))
    h_TD = h.reshape(-1, h.shape[-1])
    if head_DV is None:
      table = self.embed() if self.head is None else self.head()
      logits = product(self.run, 'TD,VD->TV', h_TD, table.astype(h.dtype),
                       jnp.float32)
    else:
      logits = product(self.run, 'TD,DV->TV', h_TD, head_DV, jnp.float32)
    exits = self.cfg.loops - 1
    loop = exits if loop is None else loop
    is_exit = not isinstance(loop, int) or loop != exits
    if adapters.head_rank(self.cfg) and (is_exit or self.is_initializing()):
      factors = self.adapters(head=True)
      a, b = (factors[leaf].astype(h.dtype) for leaf in 'ab')
      # Two thin matmuls: their product has the size of the table.
      if isinstance(loop, int):
        loop = 0 if self.is_initializing() else loop
        thin = product(self.run, 'TD,DR->TR', h_TD, a[loop], h.dtype)
        logits += product(self.run, 'TR,RV->TV', thin, b[loop], jnp.float32)
      else:
        own_TE = jax.nn.one_hot(loop.reshape(-1), exits, dtype=h.dtype)
        thin = jnp.einsum('TD,EDR,TE->TER', h_TD, a, own_TE)
        logits += jnp.einsum('TER,ERV->TV', thin, b,
                             preferred_element_type=jnp.float32)
    if self.cfg.logits_scale != 1:
      logits *= self.cfg.logits_scale
    if self.cfg.logits_cap:
      logits = self.cfg.logits_cap * jnp.tanh(logits / self.cfg.logits_cap)
    logits = logits.reshape(*h.shape[:-1], -1)
    if h.ndim == 3:
      logits = nn.with_logical_constraint(logits, ('B_head', 'T', 'V'))
    return logits

  def decode(self, token_BT, position_BT, row_B, cache, mixed_M=None,
             head_DV=None):
    """Logits of new tokens, whose predecessors' keys are in the cache.

    Args:
      token_BT: new tokens; rows may be padded on the right, since a later
        call overwrites what padding writes at its positions.
      position_BT: their positions, below the cache's length.
      row_B: the cache's row of each row here.
      cache: of `cache.init` or an earlier call.
      mixed_M, head_DV: of `loop` and `logits`.

    Returns:
      logits_BTV, fp32, and the cache with these tokens in it.
    """
    keys = kv_cache.Cached(cache, kv_cache.Place(
        row_B[:, None], position_BT, jnp.zeros_like(row_B[:, None])))
    x_BTD, keys = self.enter(token_BT, keys=keys)
    for loop in range(self.cfg.loops):
      x_BTD, keys = self.loop(x_BTD, loop, keys=keys, mixed_M=mixed_M)
    h_BTD, keys = self.finish(x_BTD, keys=keys)
    return self.logits(h_BTD, head_DV=head_DV), keys.cache

  def enter(self, token_BT, context=None, keys=None):
    """What the first loop reads, x_BTD, and the keys after the prelude.

    Args:
      token_BT: int32 token ids.
      context: of `whole`, for a pass over whole sequences.
      keys: instead of it, `kv_cache.Cached`, where the tokens' predecessors
        are; of its place row_BT and position_BT are read.
    """
    chex.assert_rank(token_BT, 2)
    x_BTD = embedding.lookup(self.embed(), token_BT, self.run.dtype)
    if self.cfg.positions:
      held = context if keys is None else keys.place
      # Past the table a take gives NaN, and not the last row.
      x_BTD += jnp.take(self.embed.positions, held.position_BT, axis=0).astype(
          x_BTD.dtype)
    x_BTD = nn.with_logical_constraint(x_BTD, ('B', 'T', 'D'))
    if self.cfg.embed_scale:
      x_BTD *= jnp.asarray(math.sqrt(self.cfg.D), x_BTD.dtype)
    if self.cfg.embed_factor != 1:
      x_BTD *= self.cfg.embed_factor
    return self._once(self.prelude, 0, x_BTD, context, keys)

  def loop(
      self, x_BTD, loop, context=None, keys=None, method='__call__',
      mixed_M=None
  ):
    """One run of the block: x_BTD and the keys.

    Args:
      x_BTD: what goes in.
      loop: which loop it is, from 0: an int, or int32 [B, 1], one for each
        row; for 'fill' without adapters also [B, L], several.
      context: see `enter`; `at` this loop.
      keys: see `enter`; for whole sequences `kv_cache.of_first_loop`.
      method: of Layer; 'fill' writes keys and values only.
      mixed_M: of `mixed_loops.mixed`; None computes it.
    """
    cfg = self.cfg
    if mixed_M is None and isinstance(loop, int):
      values = jax.tree.map(lambda leaf: leaf[loop], self.adapters())
    else:
      if mixed_M is None:
        mixed_M = mixed_loops.mixed(cfg, self.adapters())
      values = mixed_loops.at(cfg, mixed_M, loop)
    if isinstance(keys, kv_cache.Cached):
      context, place = _step(cfg, keys), keys.place
      loop_BT = jnp.full_like(place.row_BT, loop) if isinstance(
          loop, int) else loop
      if cfg.loop_keys:
        place = place._replace(
            virtual_BT=cfg.prelude + loop_BT * cfg.layers_per_loop)
      else:
        place = place._replace(
            virtual_BT=jnp.full_like(loop_BT, cfg.prelude),
            writes_BT=loop_BT == 0)
      keys = keys._replace(place=place)
    return self.block.walk(
        x_BTD, values, loop, context, keys, method=method)

  def finish(self, x_BTD, context=None, keys=None):
    """What the head multiplies, h_BTD, and the keys after the coda.

    Args:
      x_BTD: the output of a loop.
      context, keys: see `enter`.
    """
    x_BTD, keys = self._once(
        self.coda, self.cfg.key_layers - self.cfg.coda, x_BTD, context, keys)
    return normalize(self.cfg, x_BTD, self.norm()), keys

  def _once(self, stack, first: int, x_BTD, context, keys):
    """A run of prelude or coda, whose first virtual layer is `first`."""
    if stack is None:
      return x_BTD, keys
    if keys is not None:
      context, place = _step(self.cfg, keys), keys.place
      keys = keys._replace(place=place._replace(
          virtual_BT=jnp.full_like(place.row_BT, first), writes_BT=None))
    return stack.walk(x_BTD, {}, 0, context, keys)

  def _every_loop(
      self, token_BT, segment_BT, position_BT, depth_BT, mask_BTS=None
  ):
    """Each loop's output, x_LBTD, and what the head reads of it, h_LBTD."""
    context = whole(
        self.cfg, token_BT.shape, segment_BT, position_BT, mask_BTS)
    x_BTD, _ = self.enter(token_BT, context)
    _, x_LBTD = self.block(x_BTD, self.adapters(), context, depth_BT)
    return x_LBTD, jnp.stack(
        [self.finish(x_BTD, context)[0] for x_BTD in x_LBTD])


def _step(cfg, keys: kv_cache.Cached) -> Context:
  """Of a pass over tokens whose predecessors are in a cache."""
  position_BT = keys.place.position_BT
  return Context(
      position_BT, None if cfg.mixed_kinds else rope_tables(cfg, position_BT))


class Table(nn.Module):
  """One [V, D] parameter, and perhaps one of learned positions."""
  cfg: config_lib.ModelConfig
  leaf: str
  init: nn.initializers.Initializer
  rows: int = 0

  def setup(self):
    self.table = self.param(self.leaf, self.init, self.cfg.shape('VD'))
    if self.rows:
      self.positions = self.param(
          'positions', nn.with_logical_partitioning(
              initializers.normal(self.cfg.D**-0.5), (None, 'D')),
          (self.rows, self.cfg.D))

  def __call__(self):
    return self.table


@functools.cache
def abstract_params(cfg: config_lib.ModelConfig) -> dict:
  """The parameter tree as boxed ShapeDtypeStructs: nothing is computed."""
  token_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(
      lambda token_BT: Decoder(cfg).init(jax.random.key(0), token_BT),
      token_BT)['params']


def flat_shapes(cfg: config_lib.ModelConfig) -> dict[str, tuple[int, ...]]:
  """{'block/layers/attn/q/kernel': shape, ...} of every parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(
      nn.meta.unbox(abstract_params(cfg)))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
          for path, leaf in leaves}
