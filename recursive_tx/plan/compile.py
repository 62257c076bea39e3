"""A compiled step: the memory that it needs, and what its program does."""

from collections.abc import Callable
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from recursive_tx.plan import hlo


def compiled(
    lowered: Any, report: Callable[[str], Any]
) -> tuple[float, dict[str, Any]]:
  """Compiles a program and reads the result.

  Args:
    lowered: a jax.stages.Lowered for devices of a topology.
    report: given a line at each step.

  Returns:
    Bytes of one chip at the peak; `compiled_flops`, `kernel_flops`,
    `sent_bytes` and `largest_arrays`, or nothing where the compiler ran out
    of the chip's memory.
  """
  start = time.monotonic()
  try:
    program, text = compile_text(lowered)
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error))
    if needed is None:
      raise
    report('plan: the compiler ran out of the chip\'s memory')
    return needed, {}
  report(f'plan: compiled in {time.monotonic() - start:.0f} s')
  memory = program.memory_analysis()
  peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes
          + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  account = hlo.account(text)
  return peak, {
      'compiled_flops': account.flops, 'kernel_flops': account.kernel_flops,
      'sent_bytes': account.bytes,
      'largest_arrays': [name for _, name in account.largest]}


def needed_bytes(message: str) -> float | None:
  """What a program needed, by the compiler's message where it was too much."""
  needed = re.search(
      r'(?:Used |HLO temporaries \()([\d.]+)([MG])', message)
  if 'RESOURCE_EXHAUSTED' not in message or not needed:
    return None
  return float(needed[1]) * {'M': 2**20, 'G': 2**30}[needed[2]]


def compile_text(lowered: Any) -> tuple[Any, str]:
  """The compiled program, and its text in XLA's format."""
  with tempfile.TemporaryDirectory() as folder:
    # The compiler writes its program to a file, since its text may be newer
    # than what `compiled.as_text()` can read.
    program = lowered.compile(compiler_options={
        'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    path = next(pathlib.Path(folder).glob('*.after_codegen.txt'))
    return program, path.read_text()
