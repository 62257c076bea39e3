"""Speed of a training step on this CPU, side by side in one run.

  python tests/benchmarks/train_step.py [--output=FILE]

Vanilla against `transformers` (Llama, sdpa, AdamW) on the same shapes, and
recursive against vanilla. Each round times every step once, in turn, so that
a ratio is of neighbours in time; the table gives medians over the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
THREADS = 2

from flax.linen import meta  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import recursive_tx as rtx  # noqa: E402
from recursive_tx import losses  # noqa: E402

SHAPES = {
    '3 M': dict(V=4096, D=192, F=512, N=6, K=2, H=32, layers_per_loop=6),
    '15 M': dict(V=4096, D=384, F=1024, N=6, K=2, H=64, layers_per_loop=8),
}
B, T = 8, 256


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--output')
  args = parser.parse_args()
  rows = []
  print(f'batch {B} x {T}, fp32, {THREADS} threads, {args.rounds} rounds')
  for size, shape in SHAPES.items():
    half = shape['layers_per_loop'] // 2
    looped = dict(shape, layers_per_loop=half, loops=2)
    rows += measure(size, args.rounds, {
        'transformers': torch_step(shape),
        'vanilla': step(rtx.ModelConfig(**shape)),
        'recursive, 2 loops': step(rtx.ModelConfig(**looped)),
        'relaxed, rank 32': step(rtx.ModelConfig(**looped, rank='32')),
    })
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + '\n')


def measure(size, rounds, steps) -> list[dict]:
  times = {name: [] for name in steps}
  for _ in range(rounds):
    for name, run in steps.items():
      # A step of torch leaves threads spinning, which would slow the next.
      time.sleep(0.5)
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
  rows = []
  for name in steps:
    def ratio(other, name=name):
      pairs = zip(times[name], times[other], strict=True)
      return statistics.median(mine / its for mine, its in pairs)
    seconds = statistics.median(times[name])
    rows.append({
        'size': size, 'step': name, 'seconds': seconds,
        'tokens_per_second': B * T / seconds,
        'time_over_transformers': ratio('transformers'),
        'time_over_vanilla': ratio('vanilla')})
    print(f'{size:5} {name:20} {seconds * 1e3:8.1f} ms '
          f'{B * T / seconds:8,.0f} tokens/s '
          f'{ratio("transformers"):6.2f} x transformers '
          f'{ratio("vanilla"):6.2f} x vanilla', flush=True)
  return rows


def step(cfg: rtx.ModelConfig):
  """One update of ours: loss, gradients, AdamW, all of it compiled once."""
  decoder = rtx.Decoder(cfg, rtx.Run(unroll=True))
  token_BT = _tokens(cfg.V)
  init = jax.jit(lambda key: meta.unbox(decoder.init(key, token_BT[:, :-1])))
  variables = init(jax.random.key(0))
  tx = optax.adamw(1e-4)

  def loss_fn(variables):
    logits_BTV = decoder.apply(variables, token_BT[:, :-1])
    return losses.next_token_nats(logits_BTV, token_BT[:, 1:]).mean()

  def update(variables, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(variables)
    updates, opt_state = tx.update(grads, opt_state, variables)
    return optax.apply_updates(variables, updates), opt_state, loss

  update = jax.jit(update, donate_argnums=(0, 1))
  state = [variables, tx.init(variables)]

  def run():
    *state[:], loss = update(*state)
    return float(loss)

  run()
  return run


def torch_step(shape: dict):
  """One update of `transformers`, same shapes, same optimizer."""
  import torch
  import transformers
  torch.set_num_threads(THREADS)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=shape['V'], hidden_size=shape['D'],
      intermediate_size=shape['F'], num_attention_heads=shape['N'],
      num_hidden_layers=shape['layers_per_loop'],
      num_key_value_heads=shape['K'], head_dim=shape['H'],
      tie_word_embeddings=True, attn_implementation='sdpa', use_cache=False))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
  token_BT = torch.tensor(np.array(_tokens(shape['V'])), dtype=torch.long)

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits = model(token_BT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, shape['V']), token_BT[:, 1:].reshape(-1))
    loss.backward()
    optimizer.step()
    return float(loss)

  run()
  return run


def _tokens(V: int) -> jax.Array:
  return jnp.asarray(
      np.random.default_rng(0).integers(0, V, (B, T + 1)), jnp.int32)


if __name__ == '__main__':
  main()
