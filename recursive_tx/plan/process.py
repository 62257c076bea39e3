"""A plan, in a process of its own where the TPU compiler takes part.

The compiler ends its process on what it does not expect. There its end is an
error message.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from recursive_tx.errors import UserError
from recursive_tx.plan.costs import costs
from recursive_tx.plan.largest import largest
from recursive_tx.plan.report import gib
from recursive_tx.plan.topology import devices_of, is_tpu
from recursive_tx.train.config import Config, from_json

_CHILD = 'from recursive_tx.plan import process; process.main()'


def plan(
    config: Config, topology: str, *, search: bool = False,
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
  """Compiles a run's step for a topology.

  Args:
    config: the run. Where its losses need a teacher, that is the full-size
      model of the same shapes, in `run.dtype`.
    topology: such as 'v5e:4x4', or 'h100:8' for as many GPUs.
    search: also find the largest batch that fits.
    report: given a line at each step.

  Returns:
    Figures of one step, JSON values; bytes and FLOPs are those of one chip.
    `peak_bytes_per_chip` and `fits`, `bytes` by part, `model_flops`,
    `compiled_flops`, `sent_bytes` by kind of collective, `seconds` and `mfu`
    (estimates), ... What is read off the compiled program is missing where
    there is none: for GPUs, and where the compiler ran out of memory.

  Raises:
    UserError: an unknown topology, a mesh or batch that it does not fit, or
      the compiler ended itself.
  """
  if is_tpu(topology):
    return _elsewhere(config, topology, search, report)
  return _here(config, topology, search, report)


def _here(config, topology, search, report) -> dict[str, Any]:
  devices, chip = devices_of(topology)
  report(f'plan: {len(devices)} x {chip.name} of {gib(chip.hbm_bytes)} GiB')
  found = costs(config, devices, chip, report)
  if search:
    found['largest_batch'] = largest(
        config, devices, chip, found['peak_bytes_per_chip'], report)
  return found


def _elsewhere(config, topology, search, report) -> dict[str, Any]:
  """The same by a child, which sends lines of JSON: [kind, value]."""
  package = str(pathlib.Path(__file__).parents[2])
  # The child's files go with this folder, however the child ends.
  with tempfile.TemporaryDirectory() as folder, open(
      f'{folder}/stderr', 'w+', errors='replace') as stderr:
    child = subprocess.Popen(
        [sys.executable, '-c', _CHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env={
            **os.environ, 'TMPDIR': folder, 'PYTHONPATH': os.pathsep.join(
                [package, *filter(None, [os.environ.get('PYTHONPATH')])])})
    with child:
      try:
        request = [dataclasses.asdict(config), topology, search]
        child.stdin.write(json.dumps(request).encode() + b'\n')
        child.stdin.flush()
        for line in child.stdout:
          kind, value = json.loads(line)
          if kind == 'report':
            report(value)
          elif kind == 'error':
            raise UserError(value)
          else:
            return value
        child.wait()  # It has closed its end, and may still be ending.
      finally:
        child.kill()
    stderr.seek(0)
    raise _ended(topology, child.returncode, stderr.read())


def _ended(topology, status, text) -> Exception:
  """What to raise where a child ended without a result."""
  if status >= 0:
    return RuntimeError(f'plan: the compiling process failed:\n{text}')
  reason = re.search(r'^F\d{4} .*?\] (.*)$', text, re.MULTILINE)
  return UserError(
      f'topology {topology!r}: the compiler ended by'
      f' {signal.Signals(-status).name}'
      f'{f" ({reason[1].strip()})" if reason else ""}; try another topology,'
      ' another mesh, or run.attention=blocks')


def main() -> None:
  """The child: plans what it reads from stdin."""
  # Whatever libraries print goes to stderr.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  request, topology, search = json.loads(sys.stdin.buffer.readline())
  config = from_json(Config, request)
  threading.Thread(target=_end_with_parent, daemon=True).start()

  def send(kind, value):
    print(json.dumps([kind, value]), file=out, flush=True)

  try:
    send('found', _here(config, topology, search,
                        lambda line: send('report', line)))
  except UserError as error:
    send('error', str(error))


def _end_with_parent() -> None:
  sys.stdin.buffer.read()  # Ends when the parent does.
  os._exit(1)
