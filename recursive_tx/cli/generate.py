"""generate: continue a prompt.

  python -m recursive_tx generate --checkpoint=DIR --prompt='Once upon a time'
"""

import pathlib

from absl import flags

from recursive_tx import engine, sampling, saved
from recursive_tx import tokenizer as tokenizer_lib
from recursive_tx.cli import arguments

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Saved model directory, or a Hugging Face one.')
_PROMPT = flags.DEFINE_multi_string(
    'prompt', [], 'Text to continue; give it again for several at once.')
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 64, 'Most tokens to add.')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Divides the logits; 0 takes the likeliest token.')
_TOP_K = flags.DEFINE_integer(
    'top_k', 0, 'Draw among this many likeliest tokens; 0 among all.')
_TOP_P = flags.DEFINE_float(
    'top_p', 1.0, 'Draw among the fewest tokens of this probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')


def main(argv: list[str]) -> None:
  """Runs the verb."""
  arguments.check(argv, checkpoint=_CHECKPOINT.value)
  sampler = sampling.Sampler(
      temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
      seed=_SEED.value)
  directory = pathlib.Path(_CHECKPOINT.value)
  cfg, variables = saved.load(directory)
  tokenizer = tokenizer_lib.load(directory)
  tokenizer_lib.check_vocab(tokenizer, cfg.V)
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  prompts = [start + tokenizer.encode(text) for text in _PROMPT.value or ['']]
  news = engine.generate(
      cfg, variables, prompts, max_new_tokens=_MAX_NEW_TOKENS.value,
      sampler=sampler, eos_id=tokenizer.eos_id)
  for prompt, new in zip(prompts, news, strict=True):
    print(tokenizer.decode(prompt[len(start):] + new))
