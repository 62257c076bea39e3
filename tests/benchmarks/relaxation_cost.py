"""What relaxing costs in arithmetic: FLOPs of Gemma 2B's block on TPUs.

  python tests/benchmarks/relaxation_cost.py [--output=FILE]

The block's training step (3 loops, remat, gradients; no head, teacher or
optimizer) is compiled for v5e:4x4 without a TPU, recursive and relaxed at rank
512, and its products are counted over the optimised program, loops as often
as they run. By hand: adding a @ b to a kernel on the shard costs each chip
r / (16 x tokens) of a product, in the forward pass, in its recomputation and
twice in the backward pass. Beside it what two thin products would cost.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp

import recursive_tx as rtx
from recursive_tx import losses, machine, plan, train
from recursive_tx.data import DataConfig, Task
from recursive_tx.plan import hlo
from recursive_tx.train import optim, step

T, CHIPS, RANK = 2048, 16, 512
# A vocabulary of nothing, so that only the block counts.
CFG = rtx.ModelConfig(
    V=256, D=2048, F=16_384, N=8, K=1, H=256, layers_per_loop=6, loops=3,
    norm='rms+1', act='gelu_tanh', embed_scale=True, loop_norms=False)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output')
  args = parser.parse_args()
  print('sequences/chip  recursive TFLOP  relaxed TFLOP  ratio  by hand  thin')
  rows = []
  for sequences in (4, 16):
    plain = count(CFG, sequences)
    relaxed = count(dataclasses.replace(CFG, rank=str(RANK)), sequences)
    row = {'sequences_per_chip': sequences, 'recursive': plain,
           'relaxed': relaxed, 'ratio': relaxed / plain,
           **by_hand(sequences)}
    rows.append(row)
    print(f'{sequences:14}{plain / 1e12:17.2f}{relaxed / 1e12:15.2f}'
          f'{row["ratio"]:7.3f}{row["by_hand"]:9.3f}{row["thin"]:6.3f}',
          flush=True)
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + '\n')


def count(cfg: rtx.ModelConfig, sequences: int) -> float:
  """FLOPs of a chip: matrix products and attention kernels."""
  devices, _ = plan.devices_of('v5e:4x4')
  config = train.Config(
      model=cfg,
      data=DataConfig((Task('t', 'text', ('x',)),), seq_len=T,
                      batch=sequences * CHIPS, shards=1),
      optim=optim.OptimConfig(steps=1, lr=1e-4), losses=losses.LossConfig(),
      run=rtx.Run(dtype='bfloat16', remat='full'))
  mesh = machine.make_mesh(config.mesh, devices)
  params = step.abstract_params(config, cfg, mesh)
  forward = step.forward(config, cfg, mesh)

  def loss(params, batch):
    h_LBTD, *_ = forward({'params': params}, batch)
    return jnp.sum(h_LBTD[-1].astype(jnp.float32) ** 2)

  with jax.set_mesh(mesh):
    lowered = jax.jit(
        jax.grad(loss), out_shardings=jax.tree.map(
            lambda x: x.sharding, params),
    ).lower(params, plan.batch_of(config, mesh))
    found = hlo.account(plan.compile_text(lowered)[1])
  return found.flops + found.kernel_flops


def by_hand(sequences: int) -> dict[str, float]:
  """Ratios to the recursive step of both ways to apply the adapters."""
  cfg = dataclasses.replace(CFG, rank=str(RANK))
  tokens = sequences * T
  plain = merged = thin = 0.0
  for kernel in cfg.kernels:
    rows, columns = cfg.in_out(kernel)
    rank = cfg.ranks[kernel]
    # Forward, again, and two products backward; only `down` is not needed
    # again, since nothing follows it in its layer.
    passes = 3 if kernel == 'down' else 4
    plain += passes * rows * columns * tokens
    merged += passes * rows * columns * rank / CHIPS
    thin += passes * (rows + columns) * rank * tokens
  # Scores and mixing, of half the pairs: twice forward, 7 products backward.
  plain += 11 / 2 * cfg.N * cfg.H * T * tokens
  return {'by_hand': 1 + merged / plain, 'thin': 1 + thin / plain}


if __name__ == '__main__':
  main()
