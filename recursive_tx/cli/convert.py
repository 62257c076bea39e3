"""convert: make a Hugging Face model recursive (rank 0) or relaxed recursive.

  python -m recursive_tx convert --source=HF_DIR --output=DIR --loops=2 \\
    --rank=64 --init=average

With --init=fit, the shared block and the adapters are those that change the
model's predictions least, on --calibration=TEXT or on text that it samples.
"""

from absl import flags

from recursive_tx.cli import arguments
from recursive_tx.store import convert, opening
from recursive_tx.tying import fit

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
    'kernel such as q64+k32+v32+o64+mlp128; capped at min(in, out). With '
    '--init=fit a number is a budget, spread over the kernels.')
_INIT = flags.DEFINE_string(
    'init', '', 'Initialisation of the shared block: stepwise, average, lower '
    'or random; or fit, from --calibration. Empty: stepwise at rank 0, else '
    'average.')
_CALIBRATION = flags.DEFINE_string(
    'calibration', '', 'Text file that --init=fit fits to. Empty: text '
    'sampled from the model, for which it must fit in memory.')
_TOKENS = flags.DEFINE_integer(
    'calibration_tokens', 24576, 'How many of its tokens, from the start.')
_DOCUMENT = flags.DEFINE_string(
    'document', '', 'What stands between two documents of --calibration, such '
    'as <|endoftext|>. Empty: the file is one document.')
_LORA = flags.DEFINE_string(
    'lora', 'svd', "Initialisation of the adapters: svd of each layer's "
    'residual, or zero.')
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
  calibration = fit.read(
      _CALIBRATION.value, opening.load_tokenizer(_SOURCE.value),
      tokens=_TOKENS.value, document=_DOCUMENT.value,
  ) if _CALIBRATION.value else None
  with arguments.progress('convert', ' parameters') as progress:
    report = convert.convert(
        _SOURCE.value, _OUTPUT.value, loops=_LOOPS.value, rank=_RANK.value,
        init=init, loop_norms=_LOOP_NORMS.value, prelude=_PRELUDE.value,
        coda=_CODA.value, lora=_LORA.value, calibration=calibration,
        seed=_SEED.value, check=_CHECK.value, overwrite=_OVERWRITE.value,
        progress=progress)
  print(convert.table(report))
