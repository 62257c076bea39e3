"""What config files share: the argument parser, the sections, the recipe.

A config file is `get_config(arg)`, where `arg` is what follows the colon in
`--config=configs/gemma_2b.py:loops=3,rank=512`. It sets a few things at once;
every single value can be set after it, `--config.optim.lr=1e-4`.
"""

import dataclasses
import difflib
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from recursive_tx import train
from recursive_tx.config import ModelConfig
from recursive_tx.data import DataConfig
from recursive_tx.optim import OptimConfig

# (pattern, learning rate, weight decay) by parameter. Decaying the adapters'
# factors would pull every layer back to the tied mean.
TABLE = (
    ('adapters/.*/[ab]', 1.0, 0.0),
    ('.*/(scale|bias)', 1.0, 0.0),
    ('embed/.*', 1.0, 0.0),
    ('.*/kernel', 1.0, 1.0),
)
# The paper does not tell factors from kernels.
PAPER_TABLE = (('adapters/.*/[ab]', 1.0, 1.0), *TABLE[1:])


def parse(arg: str | None, **defaults: Any) -> ConfigDict:
  """Reads 'loops=3,rank=512,paper' into values of the defaults' types.

  A name alone is True.

  Args:
    arg: the argument of a config file, None or '' where there is none.
    **defaults: every known name and its value where it is not given.

  Raises:
    ValueError: an unknown name (says the nearest), a value of another type, a
      name given twice.
  """
  values, given = dict(defaults), set()
  for part in filter(None, (arg or '').split(',')):
    name, equals, text = (piece.strip() for piece in part.partition('='))
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
      raise ValueError(
          f'Unknown config argument {name!r}; did you mean {near[0]!r}? Known:'
          f' {", ".join(defaults)}.'
      )
    if name in given:
      raise ValueError(f'Config argument {name!r} is given twice in {arg!r}.')
    given.add(name)
    values[name] = _value(name, defaults[name], text if equals else 'true')
  return ConfigDict(values)


def base(model: dict[str, Any]) -> ConfigDict:
  """All sections with the program's defaults, for a model.

  `data.tasks` is filled by the caller: a task's fields under its name.
  """
  fields = {f.name: f for f in dataclasses.fields(train.Config)}
  config = ConfigDict()
  for name in ('seed', 'init_from', 'init', 'lora', 'tokenizer', 'teacher'):
    config[name] = fields[name].default
  config.model = section(ModelConfig, **model)
  config.data = section(DataConfig, tasks=ConfigDict())
  config.optim = section(OptimConfig, table=TABLE)
  for name in ('losses', 'mesh', 'checkpoint', 'log', 'eval', 'run'):
    config[name] = section(fields[name].type)
  return config


def section(kind: type, **values: Any) -> ConfigDict:
  """The fields of a dataclass: `values`, else its defaults, else a typed gap.

  A gap is to be filled by the config file or on the command line.
  """
  config = ConfigDict()
  for field in dataclasses.fields(kind):
    if field.name in values:
      config[field.name] = values.pop(field.name)
    elif field.default is not dataclasses.MISSING:
      config[field.name] = field.default
    else:
      config[field.name] = ml_collections.config_dict.placeholder(field.type)
  assert not values, f'{kind.__name__} has no {values}.'
  return config


def uptrain(arg: str | None, model: dict[str, Any]) -> ConfigDict:
  """The paper's recipe (its appendix E) for a pretrained vanilla model.

  Args:
    arg: see `parse`; `loops` and `rank` of the recursive model, `init` of its
      shared layers ('' takes 'stepwise' at rank 0, else 'average', the
      paper's best), `tokens` in billions, and `paper`, which ties norms and
      decays factors as the paper does.
    model: the vanilla model's fields.

  Raises:
    ValueError: a bad argument, or loops that do not divide the layers.
  """
  args = parse(arg, loops=2, rank='0', init='', tokens=15.0, paper=False)
  layers = model['layers_per_loop']
  if args.loops < 1 or layers % args.loops:
    fits = [n for n in range(1, layers + 1) if layers % n == 0]
    raise ValueError(
        f'loops={args.loops} does not divide the {layers} layers; use one of'
        f' {fits}.'
    )
  config = base(model)
  config.model.update(
      loops=args.loops, layers_per_loop=layers // args.loops, rank=args.rank,
      loop_norms=not args.paper,
  )
  config.init = args.init or ('stepwise' if args.rank == '0' else 'average')

  config.data.tasks.slimpajama = dict(
      kind='jsonl',
      train='data/slimpajama/train/**/*.jsonl',
      heldout='data/slimpajama/validation/**/*.jsonl',
  )
  config.data.update(batch=1024, seq_len=2048)

  # 2M tokens a step, and warm-up over 2.8 % of them.
  config.optim.steps = round(args.tokens * 1e9 / (1024 * 2048))
  config.optim.update(lr=2e-4, warmup=round(200 * args.tokens / 15))
  if args.paper:
    config.optim.table = PAPER_TABLE
  if args.loops > 1:
    # The teacher is the full-size model: --config.teacher=DIRECTORY.
    config.losses.distill = (1.0,)

  config.eval.update(every=500, max_tokens=1 << 20)
  config.run.update(dtype='bfloat16', remat='full')
  return config


def _value(name: str, default: Any, text: str) -> Any:
  if isinstance(default, bool):
    if text.lower() not in ('true', 'false'):
      raise ValueError(
          f'Config argument {name} is {text!r}; expected {name} alone, true or'
          ' false.'
      )
    return text.lower() == 'true'
  try:
    if text in ('', 'true'):
      raise ValueError
    return type(default)(text)
  except ValueError:
    raise ValueError(
        f'Config argument {name} is {text!r}; expected'
        f' {name}={type(default).__name__.upper()}, such as {name}='
        f'{default if default != "" else "..."}.'
    ) from None
