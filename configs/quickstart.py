"""What `bash launch/quickstart.sh` runs: the shipped model, made smaller.

  python -m recursive_tx.demo.corpus --output=runs/text
  recursive-tx compare --config=quickstart --workdir=DIR

Minutes on two cores, so the budget is small: enough for the order of the
models to show, not for what longer uptraining would reach.
"""

from ml_collections import ConfigDict

from recursive_tx.configs import common, demo


def get_config(arg: str | None = None) -> ConfigDict:
  """`text` is the directory that demo.corpus wrote."""
  args = common.parse(arg, text='runs/text', loops=2, rank='16')
  config = common.base(dict(loops=args.loops, rank=args.rank), gaps=True)
  config.init_from = config.teacher = 'recursive_tx/demo'
  config.data.tasks.python = demo.text(args.text)
  config.data.update(batch=8, seq_len=256)
  config.losses.next_token = (0.0,)
  config.losses.distill = (1.0,)
  config.optim.update(steps=100, lr=1e-3, warmup=10)
  config.eval.update(every=20, max_tokens=16384)
  config.log.update(every=2, tensorboard=False)
  config.checkpoint.every = 1000
  return config
