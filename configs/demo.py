"""The model that ships in recursive_tx/demo, pretrained from scratch.

Its text is the standard library of the Python that runs it:

  python -m recursive_tx.demo.corpus --output=runs/text
  recursive-tx train --config=demo --workdir=runs/demo
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common

# A Llama of 2.75 M parameters: 5.5 MB in bfloat16.
MODEL = dict(
    V=1024, D=192, F=384, N=6, K=2, H=32, layers_per_loop=8, norm_eps=1e-5)


def get_config(arg: str | None = None) -> ConfigDict:
  """`text` is the directory that demo.corpus wrote; `steps` as optim.steps."""
  args = common.parse(arg, text='runs/text', steps=1600)
  config = common.base(MODEL)
  config.tokenizer = 'recursive_tx/demo'
  config.data.tasks.python = text(args.text)
  config.data.update(batch=8, seq_len=512)
  config.optim.update(steps=args.steps, lr=3e-3, min_ratio=0.05)
  config.optim.warmup = min(100, args.steps // 10)
  config.checkpoint.every = 400
  config.eval.every = 800
  config.run.unroll = True
  return config


def text(directory: str) -> ConfigDict:
  """The data task of the standard library's text."""
  return common.task(kind='jsonl', train=f'{directory}/train.jsonl',
                     heldout=f'{directory}/heldout.jsonl')
