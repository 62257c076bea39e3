"""An engine gives the tokens and depths of a script."""

from benchmarks import throughput
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import exits
from recursive_tx.text import tokenizer as tokenizer_lib


@pytest.mark.slow
def test_a_script_is_followed(sentencepiece_dir):
  cfg = tiny.MIXED
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, cfg.V, size).tolist() for size in (3, 1, 5)]
  lengths = [4, 6, 3]
  scripts = [(rng.integers(0, cfg.V, size).tolist(),
              rng.integers(1, cfg.loops + 1, size).tolist())
             for size in lengths]
  engine = rtx.Engine(cfg, tiny.variables(cfg), slots=2, max_len=16, steps=3,
                      exit=exits.static(1, cfg.loops))
  tokenizer = tokenizer_lib.load(sentencepiece_dir)
  engine = throughput.scripted(engine, tokenizer, prompts, lengths, scripts)
  for _ in range(2):  # Compiled once, it is called like any other.
    served = throughput.serve(engine, tokenizer, prompts, lengths)
    assert [*zip(served.tokens, served.depths, strict=True)] == scripts
