"""generate: continue prompts.

  python -m recursive_tx generate --checkpoint=DIR --prompt='Once upon a time'
  python -m recursive_tx generate --checkpoint=DIR --prompts=FILE --show_depth

One prompt is shown with what follows it as that comes; several in their order,
each under its number. --show_depth colours each token by the loop after which
it exited.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import sys

from absl import flags

from recursive_tx import engine
from recursive_tx.cli import arguments, exits, replicas
from recursive_tx.engine import sampling
from recursive_tx.errors import UserError
from recursive_tx.text.stream import TextStream

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None,
    'Saved model directory, a Hugging Face one, or the workdir of a run.')
_PROMPT = flags.DEFINE_multi_string(
    'prompt', [], 'Text to continue; give it again for several at once.')
_PROMPTS = flags.DEFINE_string(
    'prompts', '', 'File of prompts in UTF-8, one a line, or (.jsonl) in the'
    ' field "prompt" or "text" of each line; - reads lines from standard'
    ' input. Lines end at a line feed and nowhere else.')
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 64, 'Most tokens to add; at least 1.')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Divides the logits; at least 0. 0 takes the likeliest'
    ' token.')
_TOP_K = flags.DEFINE_integer(
    'top_k', 0, 'Draw among this many likeliest tokens; 0 among all.')
_TOP_P = flags.DEFINE_float(
    'top_p', 1.0, 'Draw among the fewest tokens of this probability; above 0,'
    ' at most 1.')
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Of the draws; plus the number of the prompt.')
_STOP = flags.DEFINE_multi_string(
    'stop', [], 'Text that ends a continuation, and is not shown.')
_SLOTS = flags.DEFINE_integer(
    'slots', 32, 'Prompts continued at once; at least 1.')
_SHOW_DEPTH = flags.DEFINE_bool(
    'show_depth', False, 'Colour each token by the loop that it exited at.')
flags.DEFINE_alias('show-depth', 'show_depth')
_COLOR = flags.DEFINE_enum(
    'color', 'auto', ['auto', 'always', 'never'],
    'Whether to colour; auto: where the output is a terminal.')
_EXIT, _REPLICAS = exits.define(), replicas.define()

# Backgrounds from blue to red, of xterm's 256.
_COLORS = (24, 30, 64, 136, 130, 124)


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  arguments.at_least(1, _MAX_NEW_TOKENS, _SLOTS)
  count = _REPLICAS()
  sampler = sampling.Sampler(
      temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
      seed=_SEED.value)
  if not all(_STOP.value):
    raise UserError('--stop is empty; give the text to stop at')
  texts = prompts()
  model = arguments.opened(_CHECKPOINT.value)
  cfg, tokenizer = model.config, model.tokenizer
  exit, fill = _EXIT(model)
  ids = [tokenizer.encode(text) for text in texts]
  longest = len(tokenizer.opening) + max(map(len, ids)) + _MAX_NEW_TOKENS.value
  arguments.warn_beyond(
      longest, arguments.context(model), f'{longest} tokens of the longest'
      ' prompt and --max_new_tokens')
  served = replicas.make(
      count, min(_SLOTS.value, len(ids)), lambda slots, device: engine.Engine(
          cfg, model.variables, slots=slots, exit=exit, fill=fill,
          device=device, known_V=tokenizer.known(cfg.V),
          # Compiled once for each multiple of 64, not for each length.
          max_len=-(-longest // 64) * 64, eos_id=tokenizer.end_ids))
  requests = [
      engine.Request(tokenizer.opening + prompt, _MAX_NEW_TOKENS.value,
                     dataclasses.replace(sampler, seed=sampler.seed + i))
      for i, prompt in enumerate(ids)]
  streams = [TextStream(tokenizer, prompt, _STOP.value) for prompt in ids]
  colors = _SHOW_DEPTH.value and (
      _COLOR.value == 'always'
      or _COLOR.value == 'auto' and sys.stdout.isatty())
  try:
    _show(texts, continuations(served, requests, streams), cfg.loops, colors)
  except BrokenPipeError:  # Whoever read it has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prompts() -> list[str]:
  """The prompts of all flags; one that is empty where there is none.

  Raises:
    UserError: a file that cannot be read, or holds none.
  """
  path, texts = _PROMPTS.value, list(_PROMPT.value)
  if path:
    try:
      content = (sys.stdin.buffer.read() if path == '-' else
                 pathlib.Path(path).read_bytes())
      # Without a byte order mark. Python's own lines end at a form feed, too.
      lines = [line.removesuffix('\r')
               for line in content.decode('utf-8-sig').split('\n')]
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'--prompts={path} cannot be read ({error})') from None
    records = path.endswith('.jsonl')
    texts += [_record(path, i, line) if records else line
              for i, line in enumerate(lines, 1) if line.strip()]
    if not texts:
      raise UserError(f'--prompts={path} holds no prompt; write one a line')
  return texts or ['']


def continuations(
    served: engine.Engine | engine.Replicas,
    requests: list[engine.Request],
    streams: list[TextStream],
) -> Iterator[tuple[int, str, int, bool]]:
  """(number of the prompt, text, loops it took, whether it is the last)."""
  numbers = {served.submit(request): i for i, request in enumerate(requests)}
  while served.pending:
    for event in served.poll():
      i = numbers[event.id]
      stream = streams[i]
      if stream.stopped:
        continue
      text = '' if event.finish == 'stop' else stream.push(event.token)
      if event.finish:
        text += stream.finish()
      elif stream.stopped:
        served.cancel(event.id)
      yield i, text, event.depth, bool(event.finish) or stream.stopped


def _show(texts: list[str], pieces, loops: int, colors: bool) -> None:
  """Prints continuations in the order of their prompts."""
  def paint(text, depth):
    if not colors:
      return text
    # Line by line, or a terminal colours the rest of the line as well.
    code = f'\x1b[97;48;5;{_color(depth, loops)}m'
    return '\n'.join(
        line and f'{code}{line}\x1b[0m' for line in text.split('\n'))

  if colors:
    print('loops taken:', *(paint(f' {depth} ', depth)
                            for depth in range(1, loops + 1)))
  shown, ready, ended = 0, {i: '' for i in range(len(texts))}, set()

  def begin(i):
    number = f'[{i + 1}]\n' if len(texts) > 1 else ''
    print(number + texts[i], end='', flush=True)

  if len(texts) == 1:
    begin(0)
  for i, text, depth, last in pieces:
    if text and len(texts) == 1:
      print(paint(text, depth), end='', flush=True)
    elif text:
      ready[i] += paint(text, depth)
    if last:
      ended.add(i)
    while shown in ended:
      if len(texts) > 1:
        begin(shown)
      print(ready.pop(shown), flush=True)
      shown += 1


def _color(depth: int, loops: int) -> int:
  return _COLORS[(len(_COLORS) - 1) * (depth - 1) // max(1, loops - 1)]


def _record(path: str, number: int, line: str) -> str:
  try:
    found = json.loads(line)
    text = found.get('prompt', found.get('text'))
    if isinstance(text, str):
      return text
  except (ValueError, AttributeError):
    pass
  raise UserError(f'{path}:{number} has no string "prompt" or "text"')
