"""A small model of 3 loops with exits, for `tests/benchmarks/throughput.py`.

First the model, then its exits and their gate (the paper's section 3.7, after
uptraining), and keys that all loops share, on stories of one kind:

  recursive-tx train --config=exits:text=FILE \
    --config.tokenizer=HF_DIR --workdir=DIR/body
  recursive-tx train --config=exits:text=FILE,exits=1 \
    --config.init_from=DIR/body/model --workdir=DIR/exits

1,000 and 1,400 steps (steps=1000, steps=1400) made the model of
docs/results.md. FILE is TinyStories, stories between lines <|endoftext|>;
HF_DIR has a tokenizer of 512 tokens, which makes the head small beside a loop.
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common

# Vectors shared by the loops, no adapters: a token that exits fills the next
# loops with the same keys, and every loop has the same head.
MODEL = dict(
    V=512, D=256, F=704, N=8, K=2, H=32, layers_per_loop=4, loops=3,
    loop_norms=False, norm_eps=1e-5)


def get_config(arg: str | None = None) -> ConfigDict:
  """`text`: files; `exits`: their weight, which trains them and a gate."""
  args = common.parse(arg, text='', exits='', steps=3000)
  config = common.base(dict(MODEL, exit_gate=64 if args.exits else 0))
  config.data.tasks.stories = common.task(
      kind='text', train=args.text, document='<|endoftext|>')
  config.data.update(batch=8, seq_len=256, heldout_fraction=0.02)
  config.optim.update(steps=args.steps, lr=2e-3, warmup=100, min_ratio=0.05)
  if args.exits:
    config.optim.lr = 1e-3
    config.losses.update(common.exit_losses(args.exits, MODEL['loops']))
    config.losses.gate = (1.0, 1.0, 0.0)
    config.model.loop_keys = False
  config.checkpoint.every = 200
  config.eval.every = 500
  config.run.unroll = True
  return config
