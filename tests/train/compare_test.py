"""The comparison: its table, its picture, and the whole of it, small."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.demo import corpus
from recursive_tx.train import compare
from recursive_tx.tying.relax import reduce

ROWS = [
    dict(model=name, loops=loops, parameters=1000 * loops, before=2.0,
         after=1.5, seconds=3.0, curve=[] if name == 'original' else [
             {'step': 0, f'eval/loop{loops}/bits_per_byte': 2.0},
             {'step': 1, 'train/loss': 0.5},
             {'step': 2, f'eval/loop{loops}/bits_per_byte': 1.5}])
    for name, loops in zip(compare.NAMES, (1, 1, 2, 2), strict=True)]


def test_table_has_a_line_for_each_model():
  lines = compare.table(ROWS).splitlines()
  assert [line.split()[0] for line in lines[1:]] == list(compare.NAMES)
  assert len({len(line) for line in lines}) == 1
  assert '2,000' in lines[-1] and '1.5000' in lines[-1]


def test_curves_are_a_picture(tmp_path):
  compare.draw(ROWS, tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_reduced_is_the_stepwise_layers_once():
  cfg = tiny.FAMILIES['gpt_neox']
  values = tiny.variables(cfg)
  smaller, params = reduce(cfg, values, loops=2)
  assert (smaller.loops, smaller.num_layers) == (1, 3)
  for leaf in (('layers', 'mlp', 'up', 'kernel'),
               ('vectors', 'attn_norm', 'bias')):
    old, new = values['params']['block'], params['params']['block']
    for name in leaf:
      old, new = old[name], new[name]
    # round(linspace(0, 5, 3)) with Python's rounding.
    np.testing.assert_array_equal(new, old[[0, 2, 5]])
  rtx.Decoder(smaller).apply(params, tiny.tokens(cfg))


@pytest.mark.slow
def test_the_whole_of_it_through_the_command_line(tmp_path):
  corpus.write(tmp_path / 'text')
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', 'compare',
       f'--config=configs/quickstart.py:text={tmp_path}/text',
       f'--workdir={tmp_path}/run', '--config.optim.steps=4',
       '--config.optim.warmup=1', '--config.eval.max_tokens=2048'],
      cwd=tiny.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'run' / 'table.json').read_text())
  assert [row['model'] for row in rows] == list(compare.NAMES)
  original, reduced, recursive, relaxed = rows
  assert recursive['parameters'] < relaxed['parameters'] < (
      original['parameters'])
  for row in (reduced, recursive, relaxed):
    assert original['after'] < row['after'] < row['before']
  assert "continues 'def read_'" in done.stdout
