"""Chats: the loss is on the assistant's tokens alone."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny
from tiny_data import pieces_of
from tiny_tokenizers import copy, write
import tokenizers

from recursive_tx import data
from recursive_tx.data.chats import Chats
from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

T = 64
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + "
    "m['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA_2 = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")
GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|im_start|>{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}")
# The day is Llama's, whenever a stream is read.
DATED = "{{ strftime_now('%d %b %Y') }}: " + CHATML
ANSWERS = ['the cat sät on 日本', 'a dog ate\nit']
TURNS = [
    {'role': 'user', 'content': 'the mat'},
    {'role': 'assistant', 'content': ANSWERS[0]},
    {'role': 'user', 'content': 'and the cat sat'},
    {'role': 'assistant', 'content': ANSWERS[1]}]


@pytest.fixture(params=['tokenizers', 'sentencepiece'])
def directory(request, byte_level_dir, sentencepiece_dir, tmp_path):
  """A tokenizer of either library, with tokens that open and end a turn."""
  turns = ('<|im_start|>', '<|im_end|>')
  if request.param == 'sentencepiece':
    copy(sentencepiece_dir, tmp_path)
    write(tmp_path, 'tokenizer_config.json', {
        'bos_token': '<s>', 'eos_token': '</s>', 'added_tokens_decoder': {
            str(290 + i): {'content': turn, 'special': True}
            for i, turn in enumerate(turns)}})
    return tmp_path
  model = tokenizers.Tokenizer.from_file(str(byte_level_dir / 'tokenizer.json'))
  model.add_special_tokens(['<s>', '</s>', *turns])
  model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  model.save(str(tmp_path / 'tokenizer.json'))
  write(tmp_path, 'config.json', {'model_type': 'llama'})
  write(tmp_path, 'tokenizer_config.json', {
      'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>',
      'eos_token': '</s>'})
  return tmp_path


def with_template(directory: pathlib.Path, template: str):
  (directory / 'chat_template.jinja').write_text(template)
  return tokenizer.load(directory)


def task_of(path, **changes) -> data.Task:
  task = data.Task('t', 'jsonl', str(path), heldout=str(path), document='chat')
  return dataclasses.replace(task, **changes)


def config_of(*tasks, **changes) -> data.DataConfig:
  config = data.DataConfig(
      tasks, seq_len=T, batch=4, shards=2, shuffle=16, heldout_fraction=1e-9)
  return dataclasses.replace(config, **changes)


def held_of(tmp_path, tok, *chats) -> data.Heldout:
  path = tmp_path / 'chats.jsonl'
  path.write_text(''.join(
      json.dumps({'messages': messages}) + '\n' for messages in chats))
  return data.heldout(config_of(
      task_of(path), seq_len=400, batch=1, shards=1), tok)


def learnt_of(batches, tok) -> list[str]:
  """The texts of the runs of targets that are learnt, in order."""
  runs = []
  for batch in batches:
    for target_T, weight_T in zip(
        batch['target_BT'], batch['weight_BT'], strict=True):
      last = 0
      for t in np.flatnonzero(weight_T):
        runs += [[]] if t != last + 1 or not runs else []
        runs[-1].append(target_T[t])
        last = t
  return [tok.decode(run) for run in runs]


@pytest.mark.parametrize(('template', 'want'), [
    (CHATML, [f'{answer}<|im_end|>' for answer in ANSWERS]),
    (LLAMA_2, [f' {answer} </s>' for answer in ANSWERS]),
    (GENERATION, [f'{answer}<|im_end|>' for answer in ANSWERS]),
    (DATED, [f'{answer}<|im_end|>' for answer in ANSWERS]),
])
def test_what_is_learnt_is_what_the_assistant_wrote(
    directory, tmp_path, template, want
):
  """And the end of each turn; all the rest is read."""
  tok = with_template(directory, template)
  held = held_of(tmp_path, tok, TURNS)
  # SentencePiece decodes its own control tokens to nothing.
  assert [text.removesuffix('</s>').strip()
          for text in learnt_of(held.batches, tok)] == [
              text.removesuffix('</s>').strip() for text in want]
  if template == LLAMA_2:
    batch, = held.batches
    learnt = batch['target_BT'][batch['weight_BT'] > 0]
    assert (learnt == tok.eos_id).sum() == len(want)
  assert held.num_bytes == len(''.join(want).encode())
  batch, = held.batches
  assert held.num_tokens == batch['weight_BT'].sum() < (
      batch['segment_BT'] > 0).sum()


@pytest.mark.parametrize('template', [CHATML, LLAMA_2, GENERATION])
def test_ids_and_mask_are_those_of_transformers(directory, tmp_path, template):
  """Whose mask is of {% generation %} alone; tokenizer.json is read alike."""
  if (directory / 'tokenizer.model').exists():
    pytest.skip('transformers read a bare tokenizer.model otherwise')
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  tok = with_template(directory, template)
  held = held_of(tmp_path, tok, TURNS)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  found = theirs.apply_chat_template(
      TURNS, return_dict=True, return_assistant_tokens_mask=True)
  ids, = held.documents
  assert ids.tolist() == found['input_ids']
  if template == GENERATION:
    batch, = held.batches
    n = len(ids) - 1
    assert batch['weight_BT'][0, :n].tolist() == found['assistant_masks'][1:]


def test_the_day_is_fixed(directory, tmp_path):
  tok = with_template(directory, DATED)
  ids, = held_of(tmp_path, tok, TURNS).documents
  assert '26 Jul 2024: ' in tok.decode(ids)


def test_without_a_template_a_chat_is_a_document_of_lines(
    sentencepiece_dir, tmp_path
):
  tok = tokenizer.load(sentencepiece_dir)
  held = held_of(tmp_path, tok, TURNS)
  ids, = held.documents
  assert ids.tolist() == [1, *tok.encode(
      f'user: the mat\nassistant: {ANSWERS[0]}\nuser: and the cat sat\n'
      f'assistant: {ANSWERS[1]}\n'), 2]
  one, two = learnt_of(held.batches, tok)
  assert one.strip() == ANSWERS[0] and two.strip() == ANSWERS[1]


def chats_of(count: int) -> list[list[dict]]:
  return [[{'role': 'user', 'content': f'q{i} {"the " * (i % 9)}'},
           {'role': 'assistant', 'content': f'a{i} {"cat " * (i % 7)}'}]
          for i in range(count)]


@pytest.fixture
def corpus(directory, tmp_path):
  """40 chats, and a chat of every fault."""
  records = [{'messages': chat} for chat in chats_of(40)]
  user = {'role': 'user', 'content': 'q'}
  for bad in ({}, {'messages': 'text'}, {'messages': []},
              {'messages': [user]}, {'messages': ['text']},
              {'messages': [user, {'role': 'assistant', 'content': None}]},
              {'messages': [user, {'role': 'assistant', 'content': ' '}]},
              {'messages': [{'content': 'q'}]},
              {'messages': [user, user, {'role': 'assistant', 'content': 'a'}]}
              ):
    records.insert(5, bad)
  path = tmp_path / 'corpus.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def test_a_chat_that_is_none_is_counted_with_its_place(
    directory, corpus, caplog
):
  tok = with_template(directory, LLAMA_2)
  held = data.heldout(config_of(task_of(corpus)), tok)
  assert held.num_documents == 40
  assert held.faults['t/not_chat'] == 9
  warned, = (r.getMessage() for r in caplog.records if 'left out' in
             r.getMessage())
  assert f'{corpus}:6: the model\'s chat template refuses the mess' in warned


def test_packed_chats_do_not_see_each_other(directory, corpus):
  """Each has a segment of its own, in which positions begin at 0."""
  tok = with_template(directory, LLAMA_2)
  config = config_of(task_of(corpus, heldout=()), seq_len=256)
  batches = [next(stream) for stream in [data.Stream(config, tok)]
             for _ in range(20)]
  pieces = pieces_of(batches, is_all_learnt=False)
  texts = {tok.decode(piece) for piece in pieces}
  whole = {tok.decode(encoded(tok, chat)) for chat in chats_of(40)}
  assert texts == whole
  assert len(pieces) > 2 * sum(len(batch['token_BT']) for batch in batches)


def encoded(tok, chat) -> np.ndarray:
  chats = Chats(tok)
  ids, _ = chats.encode(chats.render(chat))
  return np.where(ids < 0, -1 - ids, ids)


def test_a_stream_of_chats_resumes_exactly_and_in_halves(directory, corpus):
  tok = with_template(directory, CHATML)
  config = config_of(task_of(corpus, heldout=()))
  stream = data.Stream(config, tok)
  for _ in range(7):
    next(stream)
  position = stream.save()
  want = [next(stream) for _ in range(15)]
  for rows in (range(4), [1, 3]):
    other = data.Stream(config, tok, rows=rows)
    other.restore(position)
    for batch in want:
      for name, value in next(other).items():
        np.testing.assert_array_equal(value, batch[name][list(rows)])
  other = with_template(directory, DATED)
  with pytest.raises(UserError, match='saved with data.template='):
    data.Stream(config, other).restore(position)


def test_a_cache_of_chats_gives_the_same_batches(
    directory, corpus, tmp_path
):
  from recursive_tx.data import cache_writer

  tok = with_template(directory, CHATML)
  config = config_of(task_of(corpus, heldout=()), heldout_fraction=0.3)
  cache_writer.write(
      config, str(directory), str(tmp_path / 'cache'), processes=1)
  cached = dataclasses.replace(config, cache=str(tmp_path / 'cache'))
  one, other = (data.Stream(each, tok) for each in (config, cached))
  for _ in range(30):
    for (name, a), b in zip(
        next(one).items(), next(other).values(), strict=True):
      np.testing.assert_array_equal(a, b, err_msg=name)
  held = [data.heldout(each, tok) for each in (config, cached)]
  assert held[0].num_tokens == held[1].num_tokens > 0
  with pytest.raises(UserError, match='made with template='):
    data.Stream(cached, with_template(directory, LLAMA_2))


def test_a_long_chat_is_cut_and_its_tokens_counted(directory, tmp_path):
  tok = with_template(directory, CHATML)
  path = tmp_path / 'long.jsonl'
  chat = [{'role': 'user', 'content': 'the ' * 50},
          {'role': 'assistant', 'content': 'cat ' * 50}]
  path.write_text(json.dumps({'messages': chat}))
  config = config_of(task_of(path), seq_len=16, batch=1, shards=1)
  held = data.heldout(config, tok)
  whole = held.num_tokens
  assert held.faults == {'t/long': 1} and whole >= 50
  part = data.heldout(config, tok, max_tokens=20)
  assert part.num_tokens == 20 and part.is_cut
  assert part.num_bytes == pytest.approx(held.num_bytes * 20 / whole, rel=0.1)


def test_parquet_holds_chats_too(directory, tmp_path):
  pyarrow = pytest.importorskip('pyarrow', reason='of the extra data')
  import pyarrow.parquet as parquet

  tok = with_template(directory, CHATML)
  parquet.write_table(pyarrow.table({'messages': chats_of(9) + [None]}),
                      tmp_path / 'chats.parquet')
  held = data.heldout(
      config_of(task_of(tmp_path / 'chats.parquet'), seq_len=400), tok)
  assert held.num_documents == 9 and held.faults == {'t/not_chat': 1}
  want = held_of(tmp_path, tok, *chats_of(9))
  assert sorted(map(bytes, held.documents)) == sorted(
      map(bytes, want.documents))


def test_a_template_that_rewrites_earlier_turns_is_refused(
    directory, tmp_path
):
  """As those that drop the reasoning of all answers but the last."""
  tok = with_template(directory, (
      "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or "
      "m.role == 'user' else '...' }}{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}"))
  with pytest.raises(UserError, match='in another way where more follow'):
    held_of(tmp_path, tok, TURNS)
  assert held_of(tmp_path, tok, TURNS[:2]).num_documents == 1


def test_chats_are_records(tmp_path):
  assert task_of(tmp_path).key == 'messages'
  assert data.Task('t', 'jsonl', 'x').key == 'text'
  for kind in ('text', 'tfds'):
    with pytest.raises(UserError, match="'jsonl' also 'chat'"):
      data.Task('t', kind, 'x', document='chat')
