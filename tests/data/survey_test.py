"""What the verb `data` counts and shows, by hand."""

import json

import numpy as np
import tiny_tokenizers

from recursive_tx import data
from recursive_tx.data import survey
from recursive_tx.text import tokenizer

LETTERS = 'abcdefghijklmnopqrstuvwxyz: \n'


def test_counts_rows_and_the_picture_are_those_of_the_data(tmp_path):
  tiny_tokenizers.letters(tmp_path, [*LETTERS, '<bos>', '<eos>'])
  tok = tokenizer.load(tmp_path)
  texts = ['a' * n for n in (3, 5, 40)]
  chat = [{'role': 'user', 'content': 'hi'},
          {'role': 'assistant', 'content': 'yes'}]
  (tmp_path / 'a').write_text(''.join(
      json.dumps({'text': text}) + '\n' for text in texts) + 'no\n')
  (tmp_path / 'b').write_text(json.dumps({'messages': chat}) + '\n')
  (tmp_path / 'train').write_text(json.dumps({'text': 'b'}) + '\n')
  config = data.DataConfig(
      (data.Task('text', 'jsonl', f'{tmp_path}/train', f'{tmp_path}/a'),
       data.Task('chat', 'jsonl', f'{tmp_path}/b', f'{tmp_path}/c',
                 document='chat')),
      seq_len=32, batch=2, shards=1)
  (tmp_path / 'c').write_text((tmp_path / 'b').read_text())
  ticks = []
  found = {(each.task, each.split): each for each in survey.documents(
      config, tok, most=0, progress=lambda *tick: ticks.append(tick))}
  text = found['text', 'heldout']
  assert sorted(text.lengths) == [5, 7, 42] and text.learnt == 51
  assert text.num_bytes == 48 and text.is_all
  assert text.faults == {'not_json': 1, 'long': 1}
  # ' yes', the end of the line and EOS.
  assert found['chat', 'train'].learnt == 6
  assert len(ticks) == 7
  part = survey.documents(config, tok, most=1)
  assert [each.is_all for each in part] == [True, True, False, True]
  batches = survey.batches(config, tok, count=3, rows=4)
  assert batches.slots == 3 * 2 * 32 >= batches.used >= batches.learnt > 0
  shown = ' ‖ '.join(batches.rows).split(' ‖ ')
  assert len(batches.rows) == 4 and set(shown) == {
      '<bos>⟦b<eos>⟧',
      '<bos>user: hi\nassistant:⟦ yes\n<eos>⟧'}
  path = tmp_path / 'lengths.png'
  survey.histogram(list(found.values()), config.seq_len, str(path))
  from matplotlib import image

  assert np.asarray(image.imread(path)).std() > 0
