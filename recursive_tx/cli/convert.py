"""convert: make a Hugging Face model recursive (rank 0) or relaxed recursive.

  python -m recursive_tx convert --source=HF_DIR --output=DIR --loops=2 \\
    --rank=64 --init=average
"""

from absl import flags
from tqdm import tqdm

from recursive_tx import convert
from recursive_tx.cli import arguments

_SOURCE = flags.DEFINE_string(
    'source', None, 'Hugging Face model directory: config.json, safetensors.')
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory to make; it appears whole or not at all.')
_OVERWRITE = flags.DEFINE_bool(
    'overwrite', False, 'Replace --output where it exists.')
_LOOPS = flags.DEFINE_integer(
    'loops', 2, 'How often the shared block runs; divides the layers.')
_RANK = flags.DEFINE_string(
    'rank', '0', "Rank of every loop's adapters: a number, full, or per "
    'kernel such as q64+k32+v32+o64+mlp128; capped at min(in, out).')
_INIT = flags.DEFINE_string(
    'init', '', 'Start of the shared block: stepwise, average, lower or '
    'random. Empty: stepwise at rank 0, else average.')
_LORA = flags.DEFINE_string(
    'lora', 'svd', "Start of the adapters: svd of each layer's residual, or "
    'zero.')
_LOOP_NORMS = flags.DEFINE_bool(
    'loop_norms', True, 'Each loop keeps its own norm scales and biases; '
    "--noloop_norms is the paper's tying.")
_PRELUDE = flags.DEFINE_integer('prelude', 0, 'First layers left unshared.')
_CODA = flags.DEFINE_integer('coda', 0, 'Last layers left unshared.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of whatever is drawn at random.')
_CHECK = flags.DEFINE_bool(
    'check', False, 'Compare logits with the original on a long prompt; '
    'needs memory for both models.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, source=_SOURCE.value, output=_OUTPUT.value)
  init = _INIT.value or ('stepwise' if _RANK.value == '0' else 'average')
  bar = tqdm(unit=' parameters', unit_scale=True, desc='convert', delay=0.5)

  def progress(total: int, written: int) -> None:
    bar.total = total
    bar.update(written)

  with bar:
    report = convert.convert(
        _SOURCE.value, _OUTPUT.value, loops=_LOOPS.value, rank=_RANK.value,
        init=init, loop_norms=_LOOP_NORMS.value, prelude=_PRELUDE.value,
        coda=_CODA.value, lora=_LORA.value, seed=_SEED.value,
        check=_CHECK.value, overwrite=_OVERWRITE.value, progress=progress)
  print(convert.table(report))
