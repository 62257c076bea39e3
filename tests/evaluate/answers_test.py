"""Answers survive a kill, and no model reads those of another."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from recursive_tx.evaluate.answers import Answers, fingerprint, key

CFG = tiny.FAMILIES['llama']


def test_answers_are_read_again(tmp_path):
  path = tmp_path / 'made' / 'answers.jsonl'
  first = Answers(path)
  assert 'a' not in first
  first.add([('a', [[-1.5], [True]]), ('b', 'text\n')])
  first.add([('c', None)])
  for answers in (first, Answers(path)):
    assert answers['a'] == [[-1.5], [True]] and answers['b'] == 'text\n'
    assert 'c' in answers and 'd' not in answers


def test_a_line_that_was_cut_short_is_no_answer(tmp_path):
  path = tmp_path / 'answers.jsonl'
  Answers(path).add([('a', -1.25), ('b', -2.5)])
  path.write_bytes(path.read_bytes()[:-3])
  answers = Answers(path)
  assert answers['a'] == -1.25 and 'b' not in answers
  answers.add([('b', -2.5), ('c', -4.0)])
  answers = Answers(path)
  assert [answers[name] for name in 'abc'] == [-1.25, -2.5, -4.0]


def test_without_a_file_answers_stay_in_memory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  answers = Answers()
  answers.add([('a', 1)])
  assert answers['a'] == 1 and not list(tmp_path.iterdir())


def test_a_directory_in_the_way_is_refused(tmp_path):
  (tmp_path / 'answers').write_text('')
  with tiny.refused('answers', '--cache'):
    Answers(tmp_path / 'answers' / 'x.jsonl').add([('a', 1)])
  (tmp_path / 'x.jsonl').mkdir()
  with tiny.refused('x.jsonl', '--cache'):
    Answers(tmp_path / 'x.jsonl')


def test_the_fingerprint_is_of_the_content():
  variables = tiny.variables(CFG)
  same = fingerprint(CFG, tiny.variables(CFG), 'float32', 17)
  assert fingerprint(CFG, variables, 'float32', 17) == same
  changed = tiny.variables(CFG)
  changed['params']['norm']['scale'][3] += 1e-3
  cast = {'params': {**variables['params'], 'norm': {
      'scale': variables['params']['norm']['scale'].astype(np.float64)}}}
  others = [
      fingerprint(CFG, changed, 'float32', 17),
      fingerprint(CFG, cast, 'float32', 17),
      fingerprint(CFG, variables, 'bfloat16', 17),
      fingerprint(CFG, variables, 'float32', 18),
      # What no parameter shows.
      fingerprint(dataclasses.replace(CFG, rope_theta=9.0), variables,
                  'float32', 17)]
  assert len({same, *others}) == 6


@pytest.mark.parametrize('other', [
    ('score', [1, 2], [4]), ('score', [1], [2, 3]), ('score', [1, 2, 3], []),
    ('generate', [1, 2], [3])])
def test_keys_are_of_all_that_is_asked(other):
  assert key('score', [1, 2], [3]) == key('score', (1, 2), (3,))
  assert key('score', [1, 2], [3]) != key(*other)
  assert json.loads(json.dumps(key(*other))) == key(*other)
