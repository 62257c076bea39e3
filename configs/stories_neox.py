"""A small GPT-NeoX with a head of its own, for `tests/benchmarks/init.py`.

  recursive-tx train --config=stories_neox:text=FILE \
    --config.tokenizer=HF_DIR --workdir=DIR

DIR/model is then a model to relax. FILE is TinyStories, stories between lines
<|endoftext|>; HF_DIR has a tokenizer of 512 tokens. Another text's tokenizer
wants its own size: `--config.model.V=1024`.
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common

# 12 layers that 2, 3 and 4 loops divide; biases everywhere.
MODEL = dict(
    V=512, D=128, F=512, N=4, K=4, H=32, layers_per_loop=12, norm='layer',
    norm_eps=1e-5, act='gelu', gated=False, parallel=True, attention_bias=True,
    mlp_bias=True, rope_fraction=0.25, tied=False)


def get_config(arg: str | None = None) -> ConfigDict:
  """`text`: files; `steps` as optim.steps."""
  args = common.parse(arg, text='', steps=1200)
  config = common.base(MODEL)
  config.data.tasks.stories = common.task(
      kind='text', train=args.text, document='<|endoftext|>')
  config.data.update(batch=8, seq_len=256, heldout_fraction=0.02)
  config.optim.update(steps=args.steps, lr=2e-3, warmup=100, min_ratio=0.05)
  config.checkpoint.every = 200
  config.eval.every = 400
  config.run.unroll = True
  return config
