"""Generation equals choosing from full forwards, one token at a time."""

import numpy as np
import pytest
import tiny

import recursive_tx as rtx


def _by_full_forwards(cfg, variables, prompt, steps):
  tokens = list(prompt)
  for _ in range(steps):
    padded = np.zeros((1, 24), np.int32)
    padded[0, :len(tokens)] = tokens
    logits_BTV = tiny.decoder(cfg)(variables, padded)
    tokens.append(int(np.argmax(logits_BTV[0, len(tokens) - 1])))
  return tokens[len(prompt):]


@pytest.mark.parametrize('cfg', [tiny.MIXED, tiny.FAMILIES['gpt_neox']])
def test_greedy_equals_full_forwards_for_prompts_of_any_length(cfg):
  variables = tiny.variables(cfg)
  prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]
  news = rtx.generate(cfg, variables, prompts, max_new_tokens=6)
  assert news == [_by_full_forwards(cfg, variables, prompt, 6)
                  for prompt in prompts]


def test_eos_ends_a_row_and_is_not_returned():
  cfg = tiny.MIXED
  variables = tiny.variables(cfg)
  whole, = rtx.generate(cfg, variables, [[3, 1, 4]], max_new_tokens=8)
  eos = whole[3]
  cut, = rtx.generate(
      cfg, variables, [[3, 1, 4]], max_new_tokens=8, eos_id=eos)
  assert cut == whole[:whole.index(eos)]


def test_draws_are_a_function_of_the_seed():
  cfg, sampler = tiny.MIXED, rtx.Sampler(temperature=2.0)
  variables = tiny.variables(cfg)
  def draw(seed):
    return rtx.generate(
        cfg, variables, [[1], [2]], max_new_tokens=8, sampler=sampler,
        seed=seed)
  assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize('prompts', [[], [[]], [[1], []], [[29]], [[-1]]])
def test_bad_prompts_are_refused(prompts):
  with pytest.raises(ValueError, match='empty prompt|outside'):
    rtx.generate(tiny.MIXED, tiny.variables(tiny.MIXED), prompts)
