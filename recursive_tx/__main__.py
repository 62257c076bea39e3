"""python -m recursive_tx VERB ...: one module of `cli/` per verb."""

import importlib
import os
import signal
import sys
import threading

from absl import flags

from recursive_tx.errors import UserError, one_of
from recursive_tx.machine import libtpu

VERBS = {
    'convert': 'make a pretrained model recursive, or relaxed recursive',
    'data': "what a config's data is: counts, rows, lengths",
    'cache': 'tokenise the data of a config, once for many runs',
    'teach': "save a teacher's top-k logits, for many runs to read",
    'train': 'pretrain, or uptrain with distillation',
    'plan': 'does a run fit a TPU topology, and what does a step cost',
    'compare': 'a model reduced, looped and relaxed, uptrained alike',
    'evaluate': 'held-out loss of every loop, or scores of tasks',
    'calibrate': "exit thresholds that keep to the full depth's tokens",
    'generate': 'continue a prompt',
    'serve': 'answer over HTTP, as OpenAI does',
    'export': 'write a model for transformers, vLLM, llama.cpp or mlx-lm',
}


class _Stopped(BaseException):
  """A signal told the program to stop; what it was making is removed."""


def main(argv: list[str] | None = None) -> int:
  """Runs a verb.

  Returns:
    The exit status: 0 only on success, 1 for an error, and for a signal that
    ended it 128 and the signal's number, as a shell has it. Where a verb ends
    well on a signal (`train` saves, `serve` finishes its requests), 0.
  """
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print('usage: python -m recursive_tx VERB --help\n')
    for verb, what in VERBS.items():
      print(f'  {verb:10}{what}')
    return 0 if argv else 1
  libtpu.leave_out()
  # TensorFlow only feeds text here; its messages at start-up are noise.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  debug = '--debug' in argv
  verb, *words = [word for word in argv if word != '--debug']
  former = _on_signals(_stop)
  try:
    one_of('verb', verb, VERBS)
    module = importlib.import_module(f'recursive_tx.cli.{verb}')
    if '--help' in words or '-h' in words:
      print(f'{module.__doc__}\n\nflags (and --debug, for a traceback):\n'
            f'{flags.FLAGS.module_help(module)}', flush=True)
      return 0
    module.main(flags.FLAGS([verb, *words]))
    sys.stdout.flush()
  except (UserError, flags.Error) as error:
    if debug:
      raise
    print(f'{verb}: {error}', file=sys.stderr)
    return 1
  except BrokenPipeError:
    # The reader of the output has ended, as `head` does; nobody else shall
    # write to it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE
  except KeyboardInterrupt:
    print(f'{verb}: interrupted', file=sys.stderr)
    return 130
  except _Stopped as stopped:
    number = stopped.args[0]
    print(f'{verb}: stopped by {number.name}', file=sys.stderr)
    return 128 + number
  except SystemExit:
    # What sent SIGTERM may send it again, which must not be how this ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise
  finally:
    for number, handler in former.items():
      if signal.getsignal(number) == _stop:
        signal.signal(number, handler)
  return 0


def _on_signals(handler) -> dict:
  """Handles SIGTERM and SIGHUP; returns the handlers that were there.

  A signal that is ignored, as by nohup, stays so; and Python lets only the
  main thread set a handler.
  """
  if threading.current_thread() is not threading.main_thread():
    return {}
  return {number: signal.signal(number, handler)
          for number in (signal.SIGTERM, signal.SIGHUP)
          if signal.getsignal(number) == signal.SIG_DFL}


def _stop(number, frame):
  del frame
  # It may come again, which must not cut the clearing up short.
  signal.signal(number, signal.SIG_IGN)
  raise _Stopped(signal.Signals(number))


if __name__ == '__main__':
  sys.exit(main())
