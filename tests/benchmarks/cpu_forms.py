"""What each form of model/cpu.py gains over the plain one, on this device.

  python tests/benchmarks/cpu_forms.py [--json=docs/results/cpu_forms.json]

Shapes are of SmolLM2-135M, fp32. Both forms are compiled in one process and
run turn by turn; the table gives medians.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import recursive_tx as rtx
from recursive_tx.model import cpu

D, F, N, H, V = 576, 1536, 9, 64, 49_152
LAYOUTS = ('plain', 'cpu')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', help='where the figures are written')
  args = parser.parse_args()
  rows = []
  for name, make, shapes in CASES:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32)
              for shape in shapes]
    ways = {layout: jax.jit(functools.partial(make, rtx.Run(layout=layout)))
            for layout in LAYOUTS}
    times = {layout: [] for layout in LAYOUTS}
    for _ in range(1 + args.rounds):  # The first compiles.
      for layout, way in ways.items():
        start = time.perf_counter()
        jax.block_until_ready(way(*arrays))
        times[layout].append(time.perf_counter() - start)
    plain, other = (
        1e3 * statistics.median(times[layout][1:]) for layout in LAYOUTS)
    rows.append({'what': name, 'plain_ms': plain, 'cpu_ms': other,
                 'gain': plain / other})
    print(f'{name:50} {plain:9.2f} {other:9.2f} {plain / other:6.2f}',
          flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + '\n')


def gradients(run, x, kernel, pull, *, spec):
  """Both gradients of a product, with the activation's that surrounds it."""
  def loss(x, kernel):
    return jnp.sum(pull * jax.nn.silu(
        cpu.product(run, spec, x, kernel, x.dtype)))
  return jax.value_and_grad(loss, (0, 1))(x, kernel)


def product(spec, run, x, kernel):
  return cpu.product(run, spec, x, kernel, x.dtype)


def head(run, h_BD, table_VD, table_DV):
  """Of the model's table, or of that which the engine transposes once."""
  if cpu.chosen(run):
    return cpu.product(run, 'TD,DV->TV', h_BD, table_DV, jnp.float32)
  return cpu.product(run, 'TD,VD->TV', h_BD, table_VD, jnp.float32)


CASES = [
    ('gradients of an MLP kernel, 4 x 512 tokens',
     functools.partial(gradients, spec='BTD,DF->BTF'),
     [(4, 512, D), (D, F), (4, 512, F)]),
    ('gradients of the head, 512 tokens',
     functools.partial(gradients, spec='TD,VD->TV'),
     [(512, D), (V, D), (512, V)]),
    ('output kernel of attention, 8 tokens',
     functools.partial(product, 'BTNH,NHD->BTD'), [(8, 1, N, H), (N, H, D)]),
    ('head, 8 tokens', head, [(8, D), (V, D), (D, V)]),
    ('argmax of 32 tokens', cpu.argmax, [(32, V)]),
]

if __name__ == '__main__':
  main()
