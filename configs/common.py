"""What config files share: the argument parser, the sections, the recipe.

A config file is `get_config(arg)`, where `arg` is what follows the colon in
`--config=gemma_2b:loops=3,rank=512`. It sets a few things at once;
every single value can be set after it, `--config.optim.lr=1e-4`.
"""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from recursive_tx import train
from recursive_tx.config import ModelConfig
from recursive_tx.data import DataConfig, Task
from recursive_tx.errors import UserError, in_range, one_of
from recursive_tx.train.optim import OptimConfig

# (pattern, learning rate, weight decay) by parameter. Decaying the adapters'
# factors would pull every layer back to the tied mean.
TABLE = (
    ('adapters/exit/.*', 1.0, 0.0),
    ('adapters/.*/[ab]', 1.0, 0.0),
    ('.*/(scale|bias)', 1.0, 0.0),
    ('embed/.*', 1.0, 0.0),
    ('.*/kernel', 1.0, 1.0))
# The paper decays factors like kernels.
PAPER_TABLE = (TABLE[0], ('adapters/.*/[ab]', 1.0, 1.0), *TABLE[2:])

# What `data=` chooses: one task each, the files to be named on the command
# line, --config.data.tasks.NAME.train=gs://BUCKET/*.jsonl, if not here.
TASKS = {
    name: dict(
        kind='jsonl', train=f'data/{name}/train/**/*.jsonl*',
        heldout=f'data/{name}/validation/**/*.jsonl*',
    ) for name in ('slimpajama', 'pile')
} | {
    'c4': dict(
        kind='tfds', dataset='c4/en:3.1.0', train='train',
        heldout='validation'),
    'text': dict(
        kind='text', train='data/text/train/**/*.txt',
        heldout='data/text/validation/**/*.txt')}
BASELINES = ('full', 'reduced', 'random')
_UNSET = -(1 << 31)  # Loops that no argument names.


def parse(
    arg: str | None, alone: dict[str, str] | None = None, **defaults: Any
) -> ConfigDict:
  """Reads 'loops=3,rank=512,paper' into values of the defaults' types.

  Args:
    arg: the argument of a config file, None or '' where there is none.
    alone: what a name without a value stands for, where it is not True.
    **defaults: every known name and its value where it is not given.

  Raises:
    UserError: an unknown name (names the nearest), a value of another type, a
      name given twice.
  """
  values, given = dict(defaults), set()
  for part in filter(None, (arg or '').split(',')):
    name, equals, text = (piece.strip() for piece in part.partition('='))
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
      raise UserError(
          f'Unknown config argument {name!r}; did you mean {near[0]!r}? Known:'
          f' {", ".join(defaults)}.')
    if name in given:
      raise UserError(f'Config argument {name!r} is given twice in {arg!r}.')
    given.add(name)
    if not equals:
      text = (alone or {}).get(name, 'true')
    values[name] = _value(name, defaults[name], text)
  return ConfigDict(values)


def base(model: dict[str, Any], *, gaps: bool = False) -> ConfigDict:
  """All sections with the program's defaults, for a model.

  `data.tasks` is filled by the caller: a task's fields under its name.

  Args:
    model: fields of ModelConfig.
    gaps: the other fields are gaps, to be filled by --config.init_from=,
      rather than ModelConfig's defaults.
  """
  fields = {f.name: f for f in dataclasses.fields(train.Config)}
  config = ConfigDict()
  for name in ('seed', 'init_from', 'init', 'lora', 'tokenizer', 'teacher'):
    config[name] = fields[name].default
  config.model = section(ModelConfig, gaps=gaps, **model)
  config.data = section(DataConfig, tasks=ConfigDict())
  config.optim = section(OptimConfig, table=TABLE)
  for name in ('losses', 'mesh', 'checkpoint', 'log', 'eval', 'run'):
    config[name] = section(fields[name].type)
  return config


def section(
    kind: type, /, *, gaps: bool = False, **values: Any
) -> ConfigDict:
  """The fields of a dataclass: `values`, else its defaults, else a typed gap.

  A gap is to be filled by the config file or on the command line. With `gaps`
  there are no defaults.
  """
  config = ConfigDict()
  for field in dataclasses.fields(kind):
    if field.name in values:
      config[field.name] = values.pop(field.name)
    elif not gaps and field.default is not dataclasses.MISSING:
      config[field.name] = field.default
    else:
      config[field.name] = ml_collections.config_dict.placeholder(
          typing.get_origin(field.type) or field.type)
  assert not values, f'{kind.__name__} has no {values}.'
  return config


def task(**values: Any) -> ConfigDict:
  """One of `data.tasks`, with all that the command line may set of it."""
  config = section(Task, **{'name': '', 'heldout': '', **values})
  del config.name  # That is its key.
  return config


def uptrain(
    arg: str | None, published: dict[str, Any] | None = None,
    data: str = 'slimpajama',
) -> ConfigDict:
  """The paper's recipe (its appendix E) for a pretrained vanilla model.

  Fields of the model that no argument sets are those of --config.init_from=,
  else those of `published` at 2 loops and rank 0.

  Args:
    arg: see `parse`; `loops` and `rank` of the recursive model, `init` of its
      shared layers ('' takes 'stepwise' at rank 0, else 'average', the
      paper's best), `tokens` in billions, in (0, inf), `data` of TASKS, and
      `teacher`: distil the final loop from the full-size model, which
      --config.teacher= names where init_from is not that model.
      `exits`: losses on the earlier loops, see `exit_losses`.
      `gate`: hidden width, in [0, inf), of an exit gate that is trained too
      (0: none). With
      --config.optim.table='(("adapters/exit/.*", 1, 0), (".*", 0, 0))' it is
      trained alone.
      `paper`: tie norms and decay factors as the paper does.
      `baseline`: what the paper compares with. 'full', the vanilla model
      uptrained; 'reduced', one loop's layers from random weights; 'random',
      the looped model from random weights. The last two want a
      --config.tokenizer= and no init_from.
    published: the vanilla model's fields, where they are known.
    data: the default of `data`.

  Raises:
    UserError: a bad argument, or loops that do not divide the layers.
  """
  args = parse(
      arg, alone={'exits': '0.1'}, loops=_UNSET, rank='', init='', tokens=15.0,
      data=data, teacher=False, exits='', gate=0, paper=False,
      baseline='')
  one_of('data', args.data, TASKS)
  in_range('Config argument tokens', args.tokens, '(0, inf)')
  in_range('Config argument gate', args.gate, '[0, inf)', int)
  given, loops = _given(args, published)
  config = base({}, gaps=True)
  config.model.update(given)
  if published:
    rest = dict(loops=loops, layers_per_loop=_block(published, loops))
    config.published = ConfigDict({**published, **rest})
  config.init = args.init or (
      'stepwise' if args.rank in ('', '0') else 'average')
  if args.baseline == 'random':
    config.init = 'random'

  config.data.tasks[args.data] = task(**TASKS[args.data])
  config.data.update(batch=1024, seq_len=2048)

  # 2M tokens a step, and warm-up over 2.8 % of them.
  config.optim.steps = round(args.tokens * 1e9 / (1024 * 2048))
  config.optim.update(lr=2e-4, warmup=round(200 * args.tokens / 15))
  if args.paper:
    config.optim.table = PAPER_TABLE
  config.losses.update(exit_losses(args.exits, loops))
  if args.gate:
    config.losses.gate = (1.0,) * (loops - 1) + (0.0,)
  if args.teacher:
    config.losses.distill = (1.0,)

  config.eval.update(every=500, max_tokens=1 << 20)
  config.run.update(dtype='bfloat16', remat='full')
  return config


def _given(
    args: ConfigDict, published: dict[str, Any] | None
) -> tuple[dict[str, Any], int]:
  """The model's fields that the arguments set, and its loops (0: unknown)."""
  given = {}
  loops = args.loops
  if loops == _UNSET:
    loops = 2 if published else 0
  else:
    given['loops'] = loops
  if args.rank:
    given['rank'] = args.rank
  if args.paper:
    given['loop_norms'] = False
  if args.baseline:
    one_of('baseline', args.baseline, BASELINES)
    if not published:
      raise UserError(
          f'baseline={args.baseline} wants the config of a published model,'
          ' such as gemma_2b')
    if args.rank not in ('', '0'):
      raise UserError(
          f'baseline={args.baseline} has no adapters; leave out rank='
          f'{args.rank}.')
    block = _block(published, loops)
    if args.baseline == 'full':
      loops, block = 1, published['layers_per_loop']
    elif args.baseline == 'reduced':
      loops = 1
    given.update(loops=loops, layers_per_loop=block)
  if args.gate:
    if loops < 2:
      raise UserError(
          f'gate={args.gate} with a model of one loop, which has no earlier'
          ' exit; give loops=2 or more, or leave it out.')
    given['exit_gate'] = args.gate
  return given, loops


def _block(published: dict[str, Any], loops: int) -> int:
  """Layers of a loop, where the loops divide a published model's."""
  layers = published['layers_per_loop']
  if loops < 1 or layers % loops:
    fits = [n for n in range(1, layers + 1) if layers % n == 0]
    raise UserError(
        f'loops={loops} does not divide the {layers} layers; use one of'
        f' {fits}.')
  return layers // loops


def exit_losses(exits: str, loops: int) -> dict[str, tuple[float, ...]]:
  """Loss weights that train every loop's output (the paper's section 3.7).

  A number c is Aggressive(c): 1 for the final loop and c for each earlier
  one; 'weighted' is i / (1 + ... + loops) for loop i. Earlier loops also
  learn, with the same weight, the final loop's distribution, for which the
  paper gives no weight; --config.losses.self_distill="()" leaves that out.
  """
  if not exits:
    return {}
  if not loops:
    raise UserError(
        f'exits={exits} has a weight for every loop; give loops=N as well.')
  if loops < 2:
    raise UserError(
        f'exits={exits} with a model of one loop, which has no earlier exit;'
        ' give loops=2 or more, or leave it out.')
  if exits == 'weighted':
    total = loops * (loops + 1) / 2
    weights = tuple(i / total for i in range(1, loops + 1))
  else:
    try:
      c = float(exits)
    except ValueError:
      c = 0.0
    if not 0 < c < float('inf'):
      raise UserError(
          f'exits is {exits!r}; expected exits alone (0.1), exits=weighted or'
          ' a weight above 0, such as exits=0.3.')
    weights = (c,) * (loops - 1) + (1.0,)
  return dict(next_token=weights, self_distill=(*weights[:-1], 0.0))


def _value(name: str, default: Any, text: str) -> Any:
  if isinstance(default, bool):
    if text.lower() not in ('true', 'false'):
      raise UserError(
          f'Config argument {name} is {text!r}; expected {name} alone, true or'
          ' false.')
    return text.lower() == 'true'
  try:
    if text in ('', 'true'):
      raise ValueError  # As the types themselves do.
    return type(default)(text)
  except ValueError:
    raise UserError(
        f'Config argument {name} is {text!r}; expected'
        f' {name}={type(default).__name__.upper()}, such as {name}='
        f'{default if default != "" else "..."}.'
    ) from None
