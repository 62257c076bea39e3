"""A vanilla model run one layer at a time, with its kernels' activations.

A layer is read when it runs, so that the model is never in memory whole.
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
from recursive_tx.model import adapters
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
  """'layers' (kernels), 'vectors' and 'kind' of one layer, fp32."""
  kinds = adapters.kinds(cfg, 0, 1, cfg.num_layers)
  values = {'kind': None if kinds is None else kinds[0, layer]}
  for path in leaves(cfg):
    paths.put(values, path.removeprefix('block/'),
             read(path, layer).astype(np.float32))
  return values


def ends(cfg: config_lib.ModelConfig, read: Read) -> dict:
  """Variables of embedding, final norm and head, fp32, on the device."""
  params = {}
  for path in model.flat_shapes(cfg):
    if not path.startswith('block/'):
      paths.put(params, path, read(path, None).astype(np.float32))
  return jax.device_put({'params': params})


def batches(token_QT: np.ndarray, row_bytes: int = 0) -> Iterator[slice]:
  """Rows to run at once; `row_bytes`: of one row's logits, 0 without them."""
  Q, T = token_QT.shape
  rows = max(1, _TOKENS // T)
  if row_bytes:
    rows = max(1, min(rows, _LOGITS // row_bytes))
  for begin in range(0, Q, rows):
    yield slice(begin, begin + rows)


def embed(
    cfg: config_lib.ModelConfig, variables: dict, token_QT: np.ndarray
) -> np.ndarray:
  """The input of the first layer, [Q, T, D] fp32."""
  return np.concatenate([
      _enter(cfg, variables, token_QT[rows]) for rows in batches(token_QT)])


@functools.partial(jax.jit, static_argnums=0)
def _enter(cfg, variables, token_BT):
  return model.Decoder(cfg).apply(
      variables, token_BT, model.whole(cfg, token_BT.shape),
      method='enter')[0]


def stream(
    cfg: config_lib.ModelConfig, read: Read, variables: dict,
    token_QT: np.ndarray,
) -> Iterator[np.ndarray]:
  """The input of every layer, then the output of the last, [Q, T, D] fp32.

  Args:
    cfg, read: a vanilla model.
    variables: its `ends`.
    token_QT: int32 token ids.
  """
  x_QTD = embed(cfg, variables, token_QT)
  for layer in range(cfg.num_layers):
    yield x_QTD
    # Once a layer: a call with NumPy's arrays copies them.
    values = jax.device_put(read_layer(cfg, read, layer))
    x_QTD = np.concatenate([
        forward(cfg, values, x_QTD[rows]) for rows in batches(token_QT)])
  yield x_QTD


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, values, x_BTD):
  """One layer's output, [B, T, D]."""
  return _run(cfg, values, x_BTD, lambda linear, y, inputs: y)


@functools.partial(jax.jit, static_argnums=0)
def backward(cfg, values, x_BTD, d_BTD):
  """Backpropagation through one layer.

  Args:
    d_BTD: gradient in the layer's output.

  Returns:
    The gradient in the layer's input; the inputs of its kernels by the names
    of INPUT, [tokens, rows]; gradients in their outputs, [tokens, columns].
  """
  inputs = {}

  # Gradients in outputs are those in zeros that are added to them.
  def shifted(x_BTD, shifts):
    def shift(linear, y, x):
      if INPUT[linear] == linear:
        inputs[linear] = x
      return y + shifts[linear].reshape(y.shape)
    y_BTD = _run(cfg, values, x_BTD, shift)
    return y_BTD, dict(inputs)

  tokens = x_BTD.shape[0] * x_BTD.shape[1]
  zeros = {name: jnp.zeros((tokens, cfg.in_out(name)[1]))
           for name in cfg.kernels}
  _, vjp, inputs = jax.vjp(shifted, x_BTD, zeros, has_aux=True)
  d_BTD, d_outputs = vjp(d_BTD)
  return d_BTD, {name: x.reshape(tokens, -1)
                 for name, x in inputs.items()}, d_outputs


@functools.partial(jax.jit, static_argnums=(0, 5))
def both_inputs(cfg, values, ours, x_BTD, y_BTD, name):
  """The inputs of a kernel in one layer, and in the same of another model.

  Args:
    cfg, values: the layer, whose input is x_BTD.
    ours: the other model's layer, whose input is y_BTD.
    name: of the kernel.

  Returns:
    The kernel's inputs in `values` and in `ours`, [tokens, rows]; and the
    residual stream that its output is added to, in `values` less in `ours`,
    [tokens, D]; None for kernels that do not write to the stream as they are.
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
  if name not in ('o', 'down') or cfg.norm_place != 'pre' or (
      cfg.residual_scale != 1):
    return *inputs, None
  more_BTD = x_BTD - y_BTD
  if name == 'down':
    more_BTD += attended[0] - attended[1]
  return *inputs, more_BTD.reshape(-1, cfg.D)


@functools.partial(jax.jit, static_argnums=0)
def logprobs(cfg, variables, x_BTD):
  """Log-probabilities [B, T, V] by the output of the last layer, x_BTD."""
  def head(decoder, x_BTD):
    return decoder.logits(decoder.finish(x_BTD)[0])
  return jax.nn.log_softmax(
      model.Decoder(cfg).apply(variables, x_BTD, method=head))


def _run(cfg, values, x_BTD, change):
  """The layer; `change(kernel's name, output, input)` replaces outputs."""
  def watch(inner, args, kwargs, context):
    y = inner(*args, **kwargs)
    if isinstance(context.module, Linear) and (
        context.method_name == '__call__'):
      y = change(context.module.kernel, y, args[0])
    return y

  with nn.intercept_methods(watch):
    return model.Layer(cfg, config_lib.Run()).apply(
        {'params': values['layers']}, x_BTD,
        adapters.layer_values(
            cfg, values['vectors'], kind=values['kind']),
        model.whole(cfg, x_BTD.shape[:2]))[0]
