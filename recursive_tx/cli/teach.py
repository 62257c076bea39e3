"""teach: run the teacher before its students, and save its top-k logits.

  python -m recursive_tx teach \\
    --config=configs/gemma_2b.py:loops=3,rank=512,teacher \\
    --config.tokenizer=DIR --config.teacher=MODEL --best=64 --output=DIR
  python -m recursive_tx train \\
    --config=configs/gemma_2b.py:loops=3,rank=512,teacher \\
    --config.tokenizer=DIR --config.teacher=DIR --workdir=...

Runs over the batches that `train` will read, so data, seed and tokenizer must
be the same there; model, losses, optimizer and machine may differ. Writes
seq_len * batch * best * 8 bytes a step. The same command resumes an
interrupted one. Takes several processes as `train` does.
"""

from absl import flags
import jax
from tqdm import tqdm

from recursive_tx import data, files, machine
from recursive_tx.cli import arguments, configs, processes
from recursive_tx.errors import UserError, in_range
from recursive_tx.store import opening
from recursive_tx.text import tokenizer
from recursive_tx.train import state, step, teacher_cache

_CONFIG = configs.define()
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory on a disk that all processes share.')
_BEST = flags.DEFINE_integer(
    'best', 64, 'Ids saved at every position, in [1, inf); the rest of the'
    ' teacher\'s probability is one outcome more.')
_LAST = flags.DEFINE_integer(
    'last', 0, 'Steps to save, from the first, in [0, inf); 0:'
    ' config.optim.steps.')
_JOIN = processes.define()


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, config=_CONFIG.value, output=_OUTPUT.value)
  in_range('--best', _BEST.value, '[1, inf)', int)
  in_range('--last', _LAST.value, '[0, inf)', int)
  if '://' in _OUTPUT.value:
    raise UserError(f'--output={_OUTPUT.value} is not on disk; save the top-k'
                    ' logits on a disk that all processes share')
  output = files.check_workdir(_OUTPUT.value)
  config = configs.typed(_CONFIG.value)
  _JOIN()
  if not config.teacher:
    raise UserError(
        'There is no teacher; name its directory with --config.teacher=')
  if teacher_cache.is_saved(config.teacher):
    raise UserError(f'{config.teacher} holds top-k logits; expected a model.')
  ids = opening.load_tokenizer(config.tokenizer_from)
  tokenizer.check_vocab(ids, config.model.V)
  about = teacher_cache.facts(
      config.data, ids, V=config.model.V, best=_BEST.value,
      teacher=config.teacher)
  mesh = machine.make_mesh(config.mesh)
  rows = machine.local_rows(mesh, config.data.batch)
  steps = range(1, 1 + (_LAST.value or config.optim.steps))
  with jax.set_mesh(mesh), tqdm(
      total=len(steps), desc='teach', unit=' steps', delay=0.5,
      disable=not machine.is_main()) as bar:
    cfg, variables = state.load_teacher(config, mesh, ids)
    top_k = jax.jit(
        step.make_top_k(config, cfg, mesh, _BEST.value),
        out_shardings=machine.rows(mesh))
    teacher_cache.save(
        output, about, data.Stream(config.data, ids, rows=rows),
        lambda batch: top_k(variables, machine.place_rows(batch, mesh)),
        rows=rows, steps=steps, progress=lambda at: bar.update(at - bar.n))
  if machine.is_main():
    print(f'{_OUTPUT.value}; train with --config.teacher={_OUTPUT.value}')
