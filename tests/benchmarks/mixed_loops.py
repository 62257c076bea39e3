"""Adapters for a batch whose rows are at different loops: three ways.

  python tests/benchmarks/mixed_loops.py [--json=FILE]

Times x A B of a D x D kernel in one call, every row with the factors of its
own loop, and beside it the kernel itself:

- gathered: each row's factors are copied out, then multiplied.
- masked: the factors of all loops side by side, and a mask between A and B
  (mixed_loops.py, what the product does).
- grouped: rows sorted by loop, `jax.lax.ragged_dot`, and back.

Ways run in turns; figures are medians over the rounds, in microseconds.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

CASES = [(D, B, L, R) for D in (256, 1024) for B in (8, 32)
         for L, R in ((2, 16), (2, 128), (3, 64))]
CALLS = 20


def kernel(w_DD, a_LDR, b_LRD, loop_B):
  del a_LDR, b_LRD, loop_B
  return lambda x_BD: x_BD @ w_DD


def gathered(w_DD, a_LDR, b_LRD, loop_B):
  del w_DD

  def apply(x_BD):
    y_BR = jnp.einsum('BD,BDR->BR', x_BD, a_LDR[loop_B])
    return jnp.einsum('BR,BRD->BD', y_BR, b_LRD[loop_B])

  return apply


def masked(w_DD, a_LDR, b_LRD, loop_B):
  del w_DD
  L, D, R = a_LDR.shape
  a_DX = jnp.moveaxis(a_LDR, 0, 1).reshape(D, L * R)
  b_XD = b_LRD.reshape(L * R, D)
  mask_BX = jnp.repeat(jax.nn.one_hot(loop_B, L), R, axis=1)
  return lambda x_BD: (x_BD @ a_DX * mask_BX) @ b_XD


def grouped(w_DD, a_LDR, b_LRD, loop_B):
  del w_DD

  def apply(x_BD):
    order_B = jnp.argsort(loop_B)
    sizes_L = jnp.bincount(loop_B, length=len(a_LDR)).astype(jnp.int32)
    y_BR = lax.ragged_dot(x_BD[order_B], a_LDR, sizes_L)
    y_BD = lax.ragged_dot(y_BR, b_LRD, sizes_L)
    return jnp.zeros_like(y_BD).at[order_B].set(y_BD)

  return apply


WAYS = (kernel, gathered, masked, grouped)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--json', help='file for the rows')
  args = parser.parse_args()
  print('   D rows loops rank' + ''.join(f'{w.__name__:>10}' for w in WAYS))
  rows = []
  for D, B, L, R in CASES:
    rng = np.random.default_rng(0)
    shapes = ((B, D), (D, D), (L, D, R), (L, R, D))
    arrays = [jnp.array(rng.normal(size=shape) / D**0.5, jnp.float32)
              for shape in shapes]
    x_BD, *arrays = arrays
    arrays = [x_BD, jnp.array(rng.integers(0, L, B)), *arrays]
    results = [np.asarray(many(way)(*arrays)) for way in WAYS[1:]]
    for result in results:
      np.testing.assert_allclose(result, results[0], atol=1e-4)
    functions = {way.__name__: many(way) for way in WAYS}
    seconds = {name: [] for name in functions}
    for i in range(args.rounds + 1):
      for name, function in functions.items():
        begin = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        if i:  # The first compiles.
          seconds[name].append((time.perf_counter() - begin) / CALLS)
    row = {name: 1e6 * statistics.median(each)
           for name, each in seconds.items()}
    rows.append({'D': D, 'rows': B, 'loops': L, 'rank': R, **row})
    print(f'{D:4}{B:5}{L:6}{R:5}' + ''.join(
        f'{value:10.0f}' for value in row.values()), flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')


def many(way):
  """CALLS of it, each reading what the one before made."""

  @jax.jit
  def run(x_BD, loop_B, *arrays):
    def once(_, carry):
      # Rows move on, so that nothing of them is made once for all calls.
      x_BD, loop_B = carry
      apply = way(*arrays, loop_B)
      return jnp.tanh(apply(x_BD)), (loop_B + 1) % arrays[1].shape[0]

    return lax.fori_loop(0, CALLS, once, (x_BD, loop_B))[0]

  return run


if __name__ == '__main__':
  main()
