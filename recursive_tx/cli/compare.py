"""compare: a model reduced, looped and relaxed, uptrained alike, in a table.

  python -m recursive_tx compare --config=configs/quickstart.py --workdir=DIR
"""

import pathlib

from absl import flags

from recursive_tx import engine, files
from recursive_tx.cli import arguments, configs
from recursive_tx.engine import sampling
from recursive_tx.train import compare

_CONFIG = configs.define()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, "Gets each model's run, table.json and curves.png.")
_PROMPT = flags.DEFINE_string(
    'prompt', 'def read_', 'What the relaxed model continues at the end.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, workdir=_WORKDIR.value)
  folder = pathlib.Path(files.check_workdir(_WORKDIR.value))
  config = configs.typed(_CONFIG.value)
  rows = compare.compare(config, str(folder))
  print('\n' + compare.table(rows))
  print(f'\n{folder}/table.json, {folder}/curves.png')
  model = arguments.opened(str(folder / 'relaxed'))
  tokenizer = model.tokenizer
  prompt = tokenizer.encode(_PROMPT.value)
  new, = engine.generate(
      model.config, model.variables, [tokenizer.opening + prompt],
      max_new_tokens=150,
      sampler=sampling.Sampler(temperature=0.7, top_p=0.95),
      eos_id=tokenizer.end_ids,
      known_V=tokenizer.known(model.config.V))
  print(f'\nThe relaxed model continues {_PROMPT.value!r}:\n')
  print(tokenizer.decode(prompt + new))
