"""A decoder: a scan over loops of a scan over layers.

The outer scan broadcasts the block's parameters (the recursion) and slices
the adapters (the relaxation); one loop is a vanilla model. Relaxed Recursive
Transformers, equations 1 to 3. Knows nothing of families or files.
"""

import functools
import math

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from recursive_tx import adapters, attention, depths, embedding
from recursive_tx import cache as cache_lib
from recursive_tx import config as config_lib

_ACTS = {
    'silu': jax.nn.silu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'relu': jax.nn.relu,
}
_REMATS = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nn.Module):
  """One kernel of the alphabet, plus its adapter's `a`, `b` and `bias`."""
  cfg: config_lib.ModelConfig
  kernel: str

  @nn.compact
  def __call__(self, x: jax.Array, adapter: dict) -> jax.Array:
    spec = self.cfg.kernels[self.kernel]
    inner, outer = config_lib.split(spec)
    init = initializers.variance_scaling(
        1.0, 'fan_in', 'normal', in_axis=tuple(range(len(inner))),
        out_axis=tuple(range(len(inner), len(inner + outer))))
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(init, tuple(inner + outer)),
        self.cfg.shape(inner + outer)).astype(x.dtype)
    y = None
    if 'a' in adapter:
      a, b = adapter['a'].astype(x.dtype), adapter['b'].astype(x.dtype)
      rows, columns = self.cfg.in_out(self.kernel)
      # Adding the product to the kernel costs rows * columns a rank, two thin
      # matmuls (rows + columns) * tokens; rows of several loops have no one
      # product.
      mask_B1R = adapter.get('mask')
      if mask_B1R is None and (
          rows * columns < (rows + columns) * x.shape[0] * x.shape[1]):
        kernel += jnp.einsum(f'{inner}R,R{outer}->{inner}{outer}', a, b)
        # Each device adds its part, before the parts are gathered; so does
        # the gradient go: scattered, then to the factors.
        kernel = nn.with_logical_constraint(kernel, tuple(inner + outer))
      else:
        x_letters, y_letters = spec.split(',')[0], spec.split('->')[1]
        y = jnp.einsum(f'{x_letters},{inner}R->BTR', x, a)
        y = y if mask_B1R is None else y * mask_B1R.astype(x.dtype)
        y = jnp.einsum(f'BTR,R{outer}->{y_letters}', y, b)
    base = project(spec, x, kernel, x.dtype)
    y = base if y is None else base + y
    return y + adapter['bias'].astype(x.dtype) if 'bias' in adapter else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(spec: str, x: jax.Array, kernel: jax.Array, dtype) -> jax.Array:
  """einsum(spec, x, kernel) in `dtype`, with gradients ordered for the CPU.

  To multiply, XLA's CPU backend transposes one operand. JAX's own rule has it
  transpose the incoming gradient, fused with whatever made it, which took a
  third of a training step; here it is the smaller of the two.
  """
  return jnp.einsum(spec, x, kernel, preferred_element_type=dtype)


def _project_forward(spec, x, kernel, dtype):
  return project(spec, x, kernel, dtype), (x, kernel)


def _project_backward(spec, dtype, saved, d_y):
  x, kernel = saved
  d_y = d_y.astype(x.dtype)
  letters, y_letters = spec.split('->')
  x_letters, kernel_letters = letters.split(',')
  d_x = jnp.einsum(f'{y_letters},{kernel_letters}->{x_letters}', d_y, kernel)
  pairs = sorted([(x.size, 0, x_letters, x), (d_y.size, 1, y_letters, d_y)])
  (_, _, small_letters, small), (_, _, large_letters, large) = pairs
  d_kernel = jnp.einsum(
      f'{small_letters},{large_letters}->{kernel_letters}', small, large)
  return d_x, d_kernel


project.defvjp(_project_forward, _project_backward)


def normalize(
    cfg: config_lib.ModelConfig, x: jax.Array, leaves: dict
) -> jax.Array:
  """Norm over the last dimension, in fp32; `leaves` holds scale (and bias)."""
  dtype = x.dtype
  x = x.astype(jnp.float32)
  scale = leaves['scale'].astype(jnp.float32)
  if cfg.norm == 'layer':
    x -= jnp.mean(x, axis=-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps)
  x *= 1 + scale if cfg.norm == 'rms+1' else scale
  if cfg.norm == 'layer':
    x += leaves['bias'].astype(jnp.float32)
  return x.astype(dtype)


def rope_tables(
    cfg: config_lib.ModelConfig, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of each rotated pair's angle, [B, T, 1, pairs], fp32."""
  pairs = int(cfg.H * cfg.rope_fraction) // 2
  frequency = cfg.rope_theta ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
  if len(cfg.rope_scaling) == 1:
    frequency /= cfg.rope_scaling[0]
  if len(cfg.rope_scaling) == 4:
    # Llama 3: long wavelengths are stretched by `factor`, short ones are
    # kept, those between are interpolated.
    factor, low, high, length = cfg.rope_scaling
    turns = length * frequency / (2 * math.pi)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency *= keep + (1 - keep) / factor
  angle = position_BT[..., None, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns pairs (i, i + pairs) of the first 2 * pairs dimensions of H."""
  cos, sin = rope
  pairs = cos.shape[-1]
  x = x_BTNH.astype(jnp.float32)
  one, two, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
  turned = [one * cos - two * sin, two * cos + one * sin, rest]
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions and an optional cache."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.q, self.k, self.v, self.o = (
        Linear(self.cfg, kernel) for kernel in config_lib.GROUPS['attn'])

  def __call__(self, x_BTD, adapter, context, cache=None, place=None):
    q_BTNH = rotate(self.q(x_BTD, adapter.get('q', {})), context['rope'])
    k_BSKH, v_BSKH = self.keys(x_BTD, adapter, context)
    if cache is None:
      y_BTNH = attention.attend(
          q_BTNH, k_BSKH, v_BSKH, mask_BTS=context['mask_BTS'],
          segment_BT=context['segment_BT'], window=self.cfg.window,
          implementation=self.run.attention)
    else:
      cache = cache_lib.write(cache, place, k_BSKH, v_BSKH)
      y_BTNH = cache_lib.attend(
          q_BTNH, cache, place, window=self.cfg.window)
    return self.o(y_BTNH, adapter.get('o', {})), cache

  def keys(self, x_BTD, adapter, context):
    """Keys and values, BTKH."""
    k_BTKH = rotate(self.k(x_BTD, adapter.get('k', {})), context['rope'])
    return k_BTKH, self.v(x_BTD, adapter.get('v', {}))


class Mlp(nn.Module):
  """act(gate) * up, or act(up), then down."""
  cfg: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x_BTD, adapter):
    def linear(name, x):
      return Linear(self.cfg, name, name=name)(
            x, adapter.get(name, {}))
    act = _ACTS[self.cfg.act]
    up_BTF = linear('up', x_BTD)
    if self.cfg.gated:
      h_BTF = act(linear('gate', x_BTD)) * up_BTF
    else:
      h_BTF = act(up_BTF)
    h_BTF = nn.with_logical_constraint(h_BTF, ('B', 'T', 'F'))
    return linear('down', h_BTF)


class Layer(nn.Module):
  """One layer; its norms, biases and factors come in as `adapter`."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run

  def setup(self):
    self.attn = Attention(self.cfg, self.run)
    self.mlp = Mlp(self.cfg)

  def __call__(self, x_BTD, adapter, context, cache=None, place=None):
    cfg = self.cfg
    attn, cache = self.attn(
        normalize(cfg, x_BTD, adapter['attn_norm']), adapter, context, cache,
        place)
    residual_BTD = x_BTD if cfg.parallel else x_BTD + attn
    mlp = self.mlp(
        normalize(cfg, residual_BTD, adapter['mlp_norm']), adapter)
    y_BTD = residual_BTD + mlp + (attn if cfg.parallel else 0)
    return nn.with_logical_constraint(y_BTD, ('B', 'T', 'D')), cache

  def fill(self, x_BTD, adapter, context, cache, place):
    """Only leaves keys and values in the cache; x_BTD stays as it is."""
    keys = self.attn.keys(
        normalize(self.cfg, x_BTD, adapter['attn_norm']), adapter, context)
    return x_BTD, cache_lib.write(cache, place, *keys)


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

    def loop(stack, x_BTD, adapter):
      scan = nn.scan(
          layer, variable_axes={'params': 0}, split_rngs={'params': True},
          in_axes=(0, nn.broadcast), length=stack.layers,
          metadata_params={nn.PARTITION_NAME: 'layers'})
      x_BTD, _ = scan(stack.cfg, stack.run, name='layers')(
          x_BTD, adapter, context)
      return x_BTD, x_BTD

    loops = nn.scan(
        loop, variable_broadcast='params', split_rngs={'params': False},
        in_axes=0, length=self.loops)
    return loops(self, x_BTD, adapters_L)

  def _unrolled(self, layer, x_BTD, adapters_L, context):
    """The same without a scan, which would stack what backward needs."""
    layer = layer(self.cfg, self.run, parent=None)
    params = _unstack(self.variables['params']['layers'], self.layers)
    h_LBTD = []
    for adapter in _unstack(adapters_L, self.loops):
      for leaves, values in zip(
          params, _unstack(adapter, self.layers), strict=True):
        x_BTD, _ = layer.apply({'params': leaves}, x_BTD, values, context)
      h_LBTD.append(x_BTD)
    return x_BTD, jnp.stack(h_LBTD)

  def once(self, x_BTD, adapters_N, context, cache, place, method='__call__'):
    """One pass of the layers over tokens whose earlier ones are in the cache.

    Args:
      x_BTD: what goes in; rows may be at different loops.
      adapters_N: a dictionary of values for every layer, as `depths.at` gives.
      context: of `Decoder._context`.
      cache, place: see cache.py; `place` is that of the first layer.
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


def _list(tree, size: int) -> list:
  """Trees of the leading slices; serving has them apart from the start."""
  return tree if isinstance(tree, list) else _unstack(tree, size)


def _unstack(tree, size: int) -> list:
  """`size` trees of the leading slices; the gradient is one concatenation."""
  leaves, structure = jax.tree.flatten(tree)
  parts = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * size)]
           for leaf in leaves]
  return [structure.unflatten([part[i] for part in parts])
          for i in range(size)]


class Decoder(nn.Module):
  """Tokens to logits."""
  cfg: config_lib.ModelConfig
  run: config_lib.Run = config_lib.Run()

  def setup(self):
    cfg = self.cfg
    init = nn.with_logical_partitioning(
        initializers.normal(cfg.D**-0.5), ('V', 'D'))
    self.embed = Table(cfg, 'embedding', init)
    self.head = None if cfg.tied else Table(cfg, 'kernel', init)
    self.norm = adapters.Leaves(cfg, adapters.norm_leaves(cfg))
    self.adapters = adapters.Adapters(cfg)
    stack = functools.partial(Stack, cfg, self.run)
    self.prelude = stack(cfg.prelude) if cfg.prelude else None
    self.block = stack(cfg.layers_per_loop, loops=cfg.loops,
                       own_vectors=not cfg.has_loop_vectors)
    self.coda = stack(cfg.coda) if cfg.coda else None

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
    context = self._context(token_BT, segment_BT, position_BT)
    x_BTD = self._enter(token_BT, context)
    x_BTD = self.block(x_BTD, self.adapters(), context)[0]
    h_BTD = self._leave(x_BTD, context)
    if self.is_initializing() and self.cfg.exit_gate:
      self.gate(h_BTD, 0)
    return self.logits(h_BTD)

  def hidden(self, token_BT, segment_BT=None, position_BT=None):
    """What the head multiplies, for every loop: h_LBTD, compute dtype.

    Each loop's output goes through the coda and the final norm, as an exit
    after that loop would.
    """
    context = self._context(token_BT, segment_BT, position_BT)
    x_BTD = self._enter(token_BT, context)
    x_LBTD = self.block(x_BTD, self.adapters(), context)[1]
    return jnp.stack([self._leave(x_BTD, context) for x_BTD in x_LBTD])

  def hidden_and_gates(self, token_BT, segment_BT=None, position_BT=None):
    """`hidden`, and gate_LBT: the exit gate's logits, but the final loop's."""
    context = self._context(token_BT, segment_BT, position_BT)
    x_BTD = self._enter(token_BT, context)
    x_LBTD = self.block(x_BTD, self.adapters(), context)[1]
    h_LBTD = jnp.stack([self._leave(x_BTD, context) for x_BTD in x_LBTD])
    gate_LBT = jnp.stack([
        self.gate(normalize(self.cfg, x_BTD, self.norm()), loop)
        for loop, x_BTD in enumerate(x_LBTD[:-1])])
    return h_LBTD, gate_LBT

  def gate(self, h, loop):
    """Whether tokens may leave: fp32 logits [...] of the exit gates.

    Args:
      h: outputs [..., D] of a loop before the coda, through the final norm.
        No gradient reaches them: a gate does not change what it watches.
      loop: which loop's, from 0: an int, or int32 [...] where they differ;
        the final one has no gate, and its result no meaning.
    """
    h = jax.lax.stop_gradient(h.astype(jnp.float32))
    leaves = self.adapters(gate=True)
    if isinstance(loop, int):
      leaves = {name: value[loop:loop + 1] for name, value in leaves.items()}
    # All gates at once are one matmul; to gather them by row would copy them.
    inner = jax.nn.gelu(
        jnp.einsum('...D,LDE->...LE', h, leaves['a']) + leaves['a_bias'])
    gate = jnp.einsum('...LE,LE->...L', inner, leaves['b']) + leaves['b_bias']
    if isinstance(loop, int):
      return gate[..., 0]
    return jnp.take_along_axis(gate, loop[..., None], -1, mode='clip')[..., 0]

  def logits(self, h, loop=None):
    """The head: h[..., D] to fp32 logits[..., V].

    Args:
      h: hidden states.
      loop: which loop's, from 0, so that its head's factors are added: an
        int, or int32 of h's leading shape; None is the final loop, which has
        none.
    """
    table = self.embed() if self.head is None else self.head()
    if h.ndim == 3:
      h = nn.with_logical_constraint(h, ('B_head', 'T', 'D'))
    h_TD = h.reshape(-1, h.shape[-1])
    logits = project('TD,VD->TV', h_TD, table.astype(h.dtype), jnp.float32)
    exits = self.cfg.loops - 1
    loop = exits if loop is None else loop
    is_exit = not isinstance(loop, int) or loop != exits
    if adapters.head_rank(self.cfg) and (is_exit or self.is_initializing()):
      factors = self.adapters(head=True)
      a, b = (factors[leaf].astype(h.dtype) for leaf in 'ab')
      # Two thin matmuls: their product has the size of the table.
      if isinstance(loop, int):
        loop = 0 if self.is_initializing() else loop
        thin = project('TD,DR->TR', h_TD, a[loop], h.dtype)
        logits += project('TR,RV->TV', thin, b[loop], jnp.float32)
      else:
        own_TE = jax.nn.one_hot(loop.reshape(-1), exits, dtype=h.dtype)
        thin = jnp.einsum('TD,EDR,TE->TER', h_TD, a, own_TE)
        logits += jnp.einsum('TER,ERV->TV', thin, b,
                             preferred_element_type=jnp.float32)
    logits = logits.reshape(*h.shape[:-1], -1)
    if h.ndim == 3:
      logits = nn.with_logical_constraint(logits, ('B_head', 'T', 'V'))
    return logits

  def decode(self, token_BT, position_BT, row_B, cache):
    """Logits of new tokens, whose predecessors' keys are in the cache.

    Args:
      token_BT: new tokens; rows may be padded on the right, since a later
        call overwrites what padding leaves at its positions.
      position_BT: their positions, below the cache's length.
      row_B: the cache's row of each row here.
      cache: of `cache.init` or an earlier call.

    Returns:
      logits_BTV, fp32, and the cache with these tokens in it.
    """
    place = cache_lib.Place(
        row_B[:, None], position_BT, jnp.zeros_like(row_B[:, None]))
    x_BTD, cache = self.enter(token_BT, cache, place)
    for loop in range(self.cfg.loops):
      x_BTD, cache = self.loop(x_BTD, loop, cache, place)
    h_BTD, cache = self.leave(x_BTD, cache, place)
    return self.logits(h_BTD), cache

  def enter(self, token_BT, cache, place):
    """What the first loop reads, x_BTD, and the cache after the prelude."""
    x_BTD = self._embed(token_BT)
    if self.prelude is None:
      return x_BTD, cache
    return self.prelude.once(
        x_BTD, [{}] * self.cfg.prelude, self._place_context(place), cache,
        place)

  def loop(self, x_BTD, loop, cache, place, method='__call__'):
    """One pass of the block: x_BTD and the cache.

    Args:
      x_BTD: what goes in.
      loop: which loop it is, from 0: an int, or int32 [B, 1], one for each
        row; for 'fill' without adapters also [B, L], several.
      cache, place: see cache.py; place.virtual_BT is not read.
      method: of Layer; 'fill' leaves keys and values only.
    """
    cfg, params = self.cfg, self.variables['params']
    mixed_N = params.get('mixed')  # Serving has made them.
    if mixed_N is None:
      mixed_N = depths.mixed(cfg, params.get('adapters', {}))
    values_N = depths.at(cfg, mixed_N, loop)
    first_BT = cfg.prelude + loop * cfg.layers_per_loop
    if isinstance(loop, int):
      first_BT = jnp.full_like(place.row_BT, first_BT)
    return self.block.once(
        x_BTD, values_N, self._place_context(place), cache,
        place._replace(virtual_BT=first_BT), method)

  def leave(self, x_BTD, cache, place):
    """What the head multiplies, h_BTD, and the cache after the coda."""
    if self.coda is not None:
      first = self.cfg.num_layers - self.cfg.coda
      x_BTD, cache = self.coda.once(
          x_BTD, [{}] * self.cfg.coda, self._place_context(place), cache,
          place._replace(virtual_BT=jnp.full_like(place.row_BT, first)))
    return normalize(self.cfg, x_BTD, self.norm()), cache

  def _place_context(self, place):
    return {'rope': rope_tables(self.cfg, place.position_BT)}

  def _context(self, token_BT, segment_BT, position_BT):
    """What every layer of one call shares."""
    place_1T = jnp.arange(token_BT.shape[1])[None]
    if position_BT is None:
      position_BT = jnp.broadcast_to(place_1T, token_BT.shape)
    mask_BTS = attention.visible(
        place_1T, place_1T, window=self.cfg.window, segment_BT=segment_BT)
    return {'mask_BTS': mask_BTS, 'segment_BT': segment_BT,
            'rope': rope_tables(self.cfg, position_BT)}

  def _embed(self, token_BT):
    x_BTD = embedding.lookup(self.embed(), token_BT, self.run.dtype)
    x_BTD = nn.with_logical_constraint(x_BTD, ('B', 'T', 'D'))
    if self.cfg.embed_scale:
      x_BTD *= jnp.asarray(math.sqrt(self.cfg.D), x_BTD.dtype)
    return x_BTD

  def _enter(self, token_BT, context):
    x_BTD = self._embed(token_BT)
    return x_BTD if self.prelude is None else self.prelude(
        x_BTD, {}, context)[0]

  def _leave(self, x_BTD, context):
    if self.coda is not None:
      x_BTD = self.coda(x_BTD, {}, context)[0]
    return normalize(self.cfg, x_BTD, self.norm())


class Table(nn.Module):
  """One [V, D] parameter."""
  cfg: config_lib.ModelConfig
  leaf: str
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self):
    return self.param(self.leaf, self.init, self.cfg.shape('VD'))


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
