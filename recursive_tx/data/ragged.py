"""Rows of token ids between Python and tf.data.

A row is a document or a piece of one: its ids, the bytes of text that it
opens (0 on all but a document's first piece), and the code of a fault, 0 for
none. A document that is left out is a row without ids.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

Row = tuple[np.ndarray, int, int]

_TYPES = (tf.int32, tf.int64, tf.int32, tf.int32)


def call(
    function: Callable[..., list[Row]], arguments: list[tf.Tensor]
) -> tf.data.Dataset:
  """An example a row: 'targets' int32 [ids], 'num_bytes', 'fault' int32."""

  def arrays(*arguments: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = function(*arguments)
    ids, num_bytes, faults = zip(*rows, strict=True) if rows else ((),) * 3
    return (
        np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32),
        np.array([len(row) for row in ids], np.int64),
        np.array(num_bytes, np.int32),
        np.array(faults, np.int32))

  found = tf.numpy_function(arrays, arguments, _TYPES, stateful=False)
  for tensor in found:
    tensor.set_shape([None])
  values, lengths, num_bytes, faults = found
  # Slicing a ragged tensor makes TensorFlow warn of types it cannot infer.
  stops = tf.cumsum(lengths)

  @tf.autograph.experimental.do_not_convert
  def row(i: tf.Tensor) -> dict[str, tf.Tensor]:
    ids = values[stops[i] - lengths[i] : stops[i]]
    return {'targets': ids, 'num_bytes': num_bytes[i], 'fault': faults[i]}

  return tf.data.Dataset.range(tf.size(lengths, tf.int64)).map(row)


def left_out(code: int) -> Row:
  """The row of a document with a fault."""
  return np.zeros(0, np.int32), 0, code


def split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
  """The rows of ids that stand one after the other."""
  return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
