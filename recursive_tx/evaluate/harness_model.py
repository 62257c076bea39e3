"""A model as lm-evaluation-harness asks it: texts in, scores and texts out.

Follows the harness's `hf` backend in what it leaves to a backend:

  BOS opens a text where the tokenizer adds it, unless the text starts with it;
  special tokens within a text stand for themselves;
  an empty context is `bos_token`, else the end of a document, also where the
  tokenizer never adds it, and rolling windows begin with it;
  contexts are cut at their beginning.

The only module that imports lm_eval when it is imported; it is itself imported
where a task runs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
  handle_stop_sequences,
  normalize_gen_kwargs,
  postprocess_generated_text,
)

from recursive_tx import exits
from recursive_tx.config import ModelConfig, Run
from recursive_tx.engine import Engine
from recursive_tx.engine import Request as Prompt
from recursive_tx.engine.sampling import Sampler
from recursive_tx.errors import UserError
from recursive_tx.evaluate import answers as answers_lib
from recursive_tx.evaluate.loglikelihood import Request, Scorer
from recursive_tx.text import TextStream, Tokenizer

_NEW_TOKENS = 256  # Where a task does not say how many, as `hf` has it.
_SLOTS = 32
# What a task may ask of generation.
_SETTINGS = ('do_sample', 'temperature', 'top_k', 'top_p')


class HarnessModel(TemplateLM):
  """Answers requests; those answered before are looked up.

  Attributes:
    loop: whose output is scored, from 1; with `exits` it may be set between
      two evaluations, and all loops are scored at once.
  """

  def __init__(
      self, cfg: ModelConfig, variables: dict, tokenizer: Tokenizer, *,
      answers: answers_lib.Answers, max_length: int, run: Run, exits: bool,
      progress: Callable[[Sequence], Iterable],
  ):
    """Nothing is computed yet.

    Args:
      cfg, variables, tokenizer: the model.
      answers: what this model answered before.
      max_length: most tokens that the model reads.
      run: how it is executed.
      exits: score every loop.
      progress: is given what is done one by one and iterates over it.
    """
    super().__init__()
    self.loop = cfg.loops
    self._cfg, self._variables, self._tokens = cfg, variables, tokenizer
    self._answers, self._max_length, self._run = answers, max_length, run
    self._exits, self._progress = exits, progress
    self._scorer: Scorer | None = None
    named = tokenizer.names.get('bos_token')
    named = tokenizer.encode(named, special=True) if named else []
    bos = named[0] if len(named) == 1 else tokenizer.bos_id
    self._prefix = tokenizer.eos_id if bos is None else bos
    self._prefix_text = _special_text(tokenizer, self._prefix)

  @property
  def eot_token_id(self) -> int:
    return self._tokens.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._prefix

  def tok_encode(
      self, string: str, add_special_tokens: bool | None = None
  ) -> list[int]:
    ids = self._tokens.encode(string, special=True)
    if add_special_tokens is None:
      add_special_tokens = not (
          self._prefix_text and string.startswith(self._prefix_text))
    return [*self._tokens.opening, *ids] if add_special_tokens else ids

  def loglikelihood(self, requests, disable_tqdm=True):
    return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

  def _loglikelihood_tokens(self, requests, disable_tqdm=True):
    del disable_tqdm
    return self._scored([Request(context, continuation)
                         for _, context, continuation in requests])

  def loglikelihood_rolling(self, requests, disable_tqdm=True):
    del disable_tqdm
    windows, owners = [], []
    for number, request in enumerate(requests):
      for pair in utils.get_rolling_token_windows(
          token_list=self.tok_encode(request.args[0]),
          prefix_token=self.prefix_token_id, max_seq_len=self._max_length,
          context_len=1):
        windows.append(Request(*utils.make_disjoint_window(pair)))
        owners.append(number)
    sums = [0.0] * len(requests)
    for number, (log_p, _) in zip(owners, self._scored(windows), strict=True):
      sums[number] += log_p
    return sums

  def generate_until(self, requests, disable_tqdm=True):
    del disable_tqdm
    loop = self.loop if self._exits else self._cfg.loops
    keys = [answers_lib.key('generate', loop, *request.args)
            for request in requests]
    new = {name: request.args for name, request in
           zip(keys, requests, strict=True) if name not in self._answers}
    if new:
      self._generate(new, loop)
    return [self._answers[name] for name in keys]

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes beside its results."""
    return {'max_length': self._max_length, 'dtype': self._run.dtype,
            'loops': self._cfg.loops, 'num_layers': self._cfg.num_layers}

  def _scored(self, requests: list[Request]) -> list[tuple[float, bool]]:
    keys = [answers_lib.key('score', *request) for request in requests]
    new = {name: request for name, request in
           zip(keys, requests, strict=True) if name not in self._answers}
    if new:
      if self._scorer is None:
        self._scorer = Scorer(
            self._cfg, self._variables, run=self._run, exits=self._exits,
            max_length=self._max_length)
      names = list(new)
      for numbers, scores in self._scorer.stream(
          list(new.values()), progress=self._progress):
        self._answers.add(
            (names[number], [log_p_L.tolist(), greedy_L.tolist()])
            for number, log_p_L, greedy_L in zip(
                numbers, scores.log_p_LQ.T, scores.greedy_LQ.T, strict=True))
    at = self.loop - 1 if self._exits else -1
    return [(log_p_L[at], greedy_L[at])
            for log_p_L, greedy_L in (self._answers[name] for name in keys)]

  def _generate(self, new: dict[str, tuple[str, dict]], loop: int) -> None:
    """Continues contexts until one of their stops, and stores the texts."""
    prompts, streams, ends = {}, {}, {}
    for name, (context, settings) in new.items():
      prompts[name], ends[name] = self._prompt(context, settings)
      streams[name] = TextStream(
          self._tokens, (), [stop for stop in ends[name] if stop])
    longest = max(len(prompt.prompt) + prompt.max_new_tokens
                  for prompt in prompts.values())
    last = loop == self._cfg.loops
    engine = Engine(
        self._cfg, self._variables, slots=min(_SLOTS, len(new)), run=self._run,
        max_len=-(-longest // 64) * 64, eos_id=self._tokens.end_ids,
        exit=exits.Exit() if last else exits.static(loop, self._cfg.loops),
        known_V=self._tokens.known(self._cfg.V))
    names = {engine.submit(prompt): name for name, prompt in prompts.items()}
    found: dict[str, list[int]] = {name: [] for name in new}
    for name in self._progress(list(new)):
      while name not in self._answers:
        done = []
        for event in engine.poll():
          of = names[event.id]
          if of in done:
            continue
          if event.finish != 'stop':
            found[of].append(event.token)
            streams[of].push(event.token)
          if event.finish or streams[of].stopped:
            done.append(of)
            engine.cancel(event.id)
        self._answers.add((of, postprocess_generated_text(
            self._tokens.decode(found[of]), ends[of], None)) for of in done)

  def _prompt(self, context: str, settings: dict) -> tuple[Prompt, list[str]]:
    """What the engine is given, and the texts that end an answer."""
    settings = normalize_gen_kwargs(settings, _NEW_TOKENS)
    stops = handle_stop_sequences(
        settings.pop('until', None),
        eos=_special_text(self._tokens, self._tokens.eos_id))
    most = settings.pop('max_gen_toks')
    odd = sorted(set(settings) - set(_SETTINGS))
    if odd:
      raise UserError(
          f'the task sets {odd[0]}={settings[odd[0]]!r} for generation, which'
          f' is not implemented; expected until, max_gen_toks,'
          f' {", ".join(_SETTINGS)}')
    room = self._max_length - most
    if room < 1:
      raise UserError(
          f'the task generates up to {most} tokens, but the model reads'
          f' {self._max_length} in all; give a larger --max_length')
    ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
    drawn = bool(settings.get('do_sample'))
    sampler = Sampler(
        temperature=settings.get('temperature', 1.0),
        top_k=settings.get('top_k', 0), top_p=settings.get('top_p', 1.0)
    ) if drawn else Sampler()
    return Prompt(ids, most, sampler), stops


def _special_text(tokenizer: Tokenizer, id: int) -> str:
  """The text that stands for a special token, '' where there is none."""
  for text in tokenizer.names.values():
    if tokenizer.encode(text, special=True) == [id]:
      return text
  return ''
