"""serve: an HTTP server that OpenAI's clients understand.

  python -m recursive_tx serve --checkpoint=DIR
  curl http://127.0.0.1:8000/v1/completions \\
    -H 'content-type: application/json' \\
    -d '{"prompt": "Once upon a time", "max_tokens": 64}'

/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics for
Prometheus, and at / a page to try it. Needs the extra [serve]. There is no
password: whoever reaches --host may ask. SIGTERM or Ctrl-C lets running
requests finish and ends with status 0.
"""

import pathlib
import sys

from absl import flags

from recursive_tx import engine
from recursive_tx.cli import arguments, exits, replicas
from recursive_tx.config import Run
from recursive_tx.errors import UserError
from recursive_tx.text.chat import Chat

_LONGEST, _UNKNOWN = 8192, 2048

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, a Hugging Face one, or the workdir of a run.')
_HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'Address to listen at; 0.0.0.0 is all of them.')
_PORT = flags.DEFINE_integer(
    'port', 8000, 'Port to listen at, up to 65535; 0 takes any that is free.')
_NAME = flags.DEFINE_string(
    'name', '', "Of the model, to clients. Empty: the directory's.")
_SLOTS = flags.DEFINE_integer(
    'slots', 32, 'Tokens computed at once; at least 1.')
_MAX_LEN = flags.DEFINE_integer(
    'max_len', None, 'Most tokens of a prompt and its answer; at least 2.'
    f' Default: what the model was trained with, at most {_LONGEST} since the'
    f' cache is allocated whole; {_UNKNOWN} where that is unknown.')
_QUEUE = flags.DEFINE_integer(
    'queue', 256, 'Requests that may wait, at least 0; beyond them the answer'
    ' is 429.')
_MAX_BODY = flags.DEFINE_integer(
    'max_body', 2**20, 'Bytes of a request; at least 0.')
_DRAIN = flags.DEFINE_float(
    'drain', 30.0, 'Seconds for running requests after SIGTERM; at least 0.')
_WARM_UP = flags.DEFINE_integer(
    'warm_up', 512, 'Longest prompt, in tokens, to compile for before the first'
    ' request; at least 1.')
_DTYPE = flags.DEFINE_string(
    'dtype', 'float32', 'Of the computation: float32 or bfloat16.')
_EXIT, _REPLICAS = exits.define(), replicas.define()


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  count = _REPLICAS()
  try:
    from recursive_tx import serve
  except ModuleNotFoundError as error:
    raise UserError(f'there is no {error.name}; install the extra:'
                     " pip install 'recursive_tx[serve]'") from None
  arguments.at_least(0, _QUEUE, _MAX_BODY, _DRAIN, _PORT)
  arguments.at_least(1, _SLOTS, _WARM_UP)
  if _MAX_LEN.value is not None:
    arguments.at_least(2, _MAX_LEN)
  run = Run(dtype=_DTYPE.value)
  sock = serve.bind(_HOST.value, _PORT.value)
  model = arguments.opened(_CHECKPOINT.value)
  cfg, tokenizer = model.config, model.tokenizer
  exit, fill = _EXIT(model)
  trained = arguments.context(model)
  max_len = _MAX_LEN.value or min(trained or _UNKNOWN, _LONGEST)
  arguments.warn_beyond(max_len, trained, f'--max_len={max_len} tokens')
  service = serve.Service(
      serve.Worker(replicas.make(
          count, _SLOTS.value, lambda slots, device: engine.Engine(
              cfg, model.variables, slots=slots, max_len=max_len, exit=exit,
              fill=fill, eos_id=tokenizer.end_ids,
              known_V=tokenizer.known(cfg.V), device=device, run=run))),
      tokenizer, Chat(model.companions, tokenizer),
      serve.Limits(max_len, _QUEUE.value, _MAX_BODY.value),
      _NAME.value or pathlib.Path(_CHECKPOINT.value).resolve().name,
      cfg.loops, cfg.V)
  sys.exit(serve.run(service, sock, drain=_DRAIN.value,
                     warm_up=_WARM_UP.value))
