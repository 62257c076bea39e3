"""The engine continues as the whole pass does, for every family."""

import dataclasses

import numpy as np
import pytest
import tiny

from recursive_tx import engine
from recursive_tx.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_it_says_what_the_whole_pass_says(name):
  cfg = dataclasses.replace(
      tiny.FAMILIES[name], layers_per_loop=3, loops=2, rank='2')
  values = tiny.variables(cfg)
  prompts = [tiny.tokens(cfg, 1, T, seed=T)[0] for T in (3, 8)]
  eng = engine.Engine(cfg, values, slots=2, max_len=16)
  for prompt in prompts:
    eng.submit(engine.Request(prompt.tolist(), 6, ignore_eos=True))
  found = [[], []]
  while eng.pending:
    for event in eng.poll():
      found[event.id].append(event.token)
  for prompt, tokens in zip(prompts, found, strict=True):
    whole = np.concatenate([prompt, tokens])[None].astype(np.int32)
    logits_BTV = tiny.decoder(cfg.opened_for(16))(values, whole)
    best_T = np.argmax(logits_BTV[0], -1)
    assert best_T[len(prompt) - 1:-1].tolist() == tokens


def test_learned_positions_end():
  cfg = tiny.FAMILIES['gpt2']
  values = tiny.variables(cfg)
  with pytest.raises(UserError, match='65 tokens are more than the 64'):
    engine.Engine(cfg, values, max_len=65)
  # A pass that goes further shows it.
  token_BT = tiny.tokens(cfg, 1, 65)
  logits_BTV = np.asarray(tiny.decoder(cfg)(values, token_BT))
  assert np.isnan(logits_BTV[0, 64]).all()
  assert np.isfinite(logits_BTV[0, :64]).all()
