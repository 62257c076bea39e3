"""A vanilla model run one layer at a time, with what its kernels see and give.

Layers are read when their turn comes, so that the model is never held whole.
"""

from collections.abc import Callable, Iterator
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from recursive_tx import config as config_lib
from recursive_tx import model
from recursive_tx.files import paths
from recursive_tx.model import attention
from recursive_tx.model.layer import rope_tables
from recursive_tx.model.linear import Linear

# One layer of a leaf of the vanilla tree, such as 'block/layers/mlp/up/kernel'.
Read = Callable[[str, int | None], np.ndarray]

# Kernels that multiply the same input share its name.
INPUT = {'q': 'q', 'k': 'q', 'v': 'q', 'o': 'o', 'gate': 'up', 'up': 'up',
         'down': 'down'}

# Tokens that are run at once, unless one sequence is longer.
_TOKENS = 2048
# Bytes of fp32 logits at once, unless those of one sequence are more.
_LOGITS = 512 << 20


def leaves(cfg: config_lib.ModelConfig) -> list[str]:
  """Paths of the leaves that every layer has one of."""
  return [path for path in model.flat_shapes(cfg)
          if path.startswith('block/')]


def read_layer(cfg: config_lib.ModelConfig, read: Read, layer: int) -> dict:
  """'layers' (kernels) and 'vectors' of one layer, fp32."""
  values = {}
  for path in leaves(cfg):
    paths.put(values, path.removeprefix('block/'),
             read(path, layer).astype(np.float32))
  return values


def ends(cfg: config_lib.ModelConfig, read: Read) -> dict:
  """Variables of what lies around the layers, fp32, where JAX computes."""
  params = {}
  for path in model.flat_shapes(cfg):
    if not path.startswith('block/'):
      paths.put(params, path, read(path, None).astype(np.float32))
  return jax.device_put({'params': params})


def batches(token_NT: np.ndarray, row_bytes: int = 0) -> Iterator[slice]:
  """Rows to run at once; `row_bytes`: of the logits of one, if they are made.
  """
  N, T = token_NT.shape
  rows = max(1, _TOKENS // T)
  if row_bytes:
    rows = max(1, min(rows, _LOGITS // row_bytes))
  for begin in range(0, N, rows):
    yield slice(begin, begin + rows)


def embed(
    cfg: config_lib.ModelConfig, variables: dict, token_NT: np.ndarray
) -> np.ndarray:
  """What the first layer reads, [N, T, D] fp32."""
  enter = jax.jit(lambda values, token: model.Decoder(cfg).apply(
      values, token, None, None, method='enter')[0])
  return np.concatenate([
      enter(variables, token_NT[rows]) for rows in batches(token_NT)])


def stream(
    cfg: config_lib.ModelConfig, read: Read, variables: dict,
    token_NT: np.ndarray,
) -> Iterator[np.ndarray]:
  """What every layer reads, and last what comes out, [N, T, D] fp32.

  Args:
    cfg, read: a vanilla model.
    variables: its `ends`.
    token_NT: int32 token ids.
  """
  x_NTD = embed(cfg, variables, token_NT)
  for layer in range(cfg.num_layers):
    yield x_NTD
    # Once a layer: a call with NumPy's arrays copies them.
    values = jax.device_put(read_layer(cfg, read, layer))
    x_NTD = np.concatenate([
        forward(cfg, values, x_NTD[rows]) for rows in batches(token_NT)])
  yield x_NTD


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, values, x_BTD):
  """One layer's output, [B, T, D]."""
  return _run(cfg, values, x_BTD, lambda linear, y, inputs: y)


@functools.partial(jax.jit, static_argnums=0)
def backward(cfg, values, x_BTD, d_BTD):
  """What the layer does to a gradient, and what its kernels see.

  Returns:
    The gradient in the layer's input; the inputs of its kernels by the names
    of INPUT, [tokens, rows]; gradients in their outputs, [tokens, columns].
  """
  inputs = {}

  def outputs_moved(x_BTD, moves):
    def move(linear, y, x):
      if INPUT[linear] == linear:
        inputs[linear] = x
      return y + moves[linear].reshape(y.shape)
    y_BTD = _run(cfg, values, x_BTD, move)
    return y_BTD, dict(inputs)

  tokens = x_BTD.shape[0] * x_BTD.shape[1]
  still = {name: jnp.zeros((tokens, cfg.in_out(name)[1]))
           for name in cfg.kernels}
  _, pull, seen = jax.vjp(outputs_moved, x_BTD, still, has_aux=True)
  d_BTD, d_outputs = pull(d_BTD)
  return d_BTD, {name: x.reshape(tokens, -1)
                 for name, x in seen.items()}, d_outputs


@functools.partial(jax.jit, static_argnums=(0, 5))
def seen(cfg, values, ours, x_BTD, y_BTD, name):
  """What a kernel of one layer reads, and of the same layer in another model.

  Args:
    cfg, values: the layer, which reads x_BTD.
    ours: the other model's layer, which reads y_BTD.
    name: of the kernel.

  Returns:
    Its inputs in `values` and in `ours`, [tokens, rows]; and how much more the
    former have in the stream that it adds to, [tokens, D], None if to none.
  """
  inputs, attended = [], []

  def watch(linear, y, x):
    if linear == name:
      inputs.append(x.reshape(-1, cfg.in_out(name)[0]))
    if linear == 'o':
      attended.append(y)
    return y

  for z_BTD, layer in ((x_BTD, values), (y_BTD, ours)):
    _run(cfg, layer, z_BTD, watch)
  if name not in ('o', 'down'):
    return *inputs, None
  more_BTD = x_BTD - y_BTD
  if name == 'down':
    more_BTD += attended[0] - attended[1]
  return *inputs, more_BTD.reshape(-1, cfg.D)


@functools.partial(jax.jit, static_argnums=0)
def logprobs(cfg, variables, x_BTD):
  """Log-probabilities [B, T, V] of what comes out of the last layer."""
  def head(decoder, x_BTD):
    return decoder.logits(decoder.leave(x_BTD, None, None)[0])
  return jax.nn.log_softmax(
      model.Decoder(cfg).apply(variables, x_BTD, method=head))


def _run(cfg, values, x_BTD, change):
  """The layer; `change(kernel's name, output, input)` stands for outputs."""
  def watch(inner, args, kwargs, context):
    y = inner(*args, **kwargs)
    if isinstance(context.module, Linear) and (
        context.method_name == '__call__'):
      y = change(context.module.kernel, y, args[0])
    return y

  place_1T = jnp.arange(x_BTD.shape[1])[None]
  context = {
      'mask_BTS': attention.visible(
          place_1T, place_1T, window=cfg.window, segment_BT=None),
      'segment_BT': None,
      'rope': rope_tables(cfg, jnp.broadcast_to(place_1T, x_BTD.shape[:2]))}
  with nn.intercept_methods(watch):
    return model.Layer(cfg, config_lib.Run()).apply(
        {'params': values['layers']}, x_BTD, values['vectors'], context)[0]
