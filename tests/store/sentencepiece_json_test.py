"""A bare SentencePiece model, exported, is tokenised as it is here."""

import shutil

import pytest
import sentencepiece
import tiny
import tiny_tokenizers

import recursive_tx as rtx
from recursive_tx.store import sentencepiece_json

TEXTS = ('Hello world', '  two  spaces ', 'a\nb', 'é😀', 'once upon a time',
         '', ' x', 'a  b   c', '\t tab', ' ', '日本語 text', 'ﬁ Ⅷ',
         'the cat sat on the mat', 'a \nb', ' \n c  \n')
KINDS = {
    'bpe': {}, 'unigram': dict(model_type='unigram', hard_vocab_limit=False),
    'nfkc': dict(normalization_rule_name='nmt_nfkc',
                 remove_extra_whitespaces=True),
    'no_prefix': dict(add_dummy_prefix=False),
    'no_bytes': dict(byte_fallback=False, hard_vocab_limit=False)}


def _same_ids(directory):
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  ours = rtx.load_tokenizer(directory)
  sentencepiece_json.add_tokenizer_json(directory)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  again = rtx.load_tokenizer(directory)
  for text in TEXTS:
    ids = ours.encode(text)
    assert theirs(text)['input_ids'] == ours.opening + ids, text
    assert again.opening + again.encode(text) == ours.opening + ids, text
    if 0 not in ids:  # SentencePiece has a sign for what is unknown.
      assert theirs.decode(ids) == ours.decode(ids), text
  assert theirs.eos_token_id == ours.eos_id


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_give_the_ids_of_sentencepiece(kind, tmp_path):
  text = tmp_path / 'text'
  text.write_text('the cat sat on the mat\n  and the dog ate it\n' * 9)
  sentencepiece.SentencePieceTrainer.train(**{**dict(
      input=str(text), model_prefix=str(tmp_path / 'tokenizer'),
      vocab_size=290, model_type='bpe', byte_fallback=True, minloglevel=2,
      normalization_rule_name='identity', remove_extra_whitespaces=False),
      **KINDS[kind]})
  tiny_tokenizers.write(tmp_path, 'config.json', {'model_type': 'llama'})
  _same_ids(tmp_path)


@pytest.mark.parametrize('name', ['stories260K', 'stories3M'])
def test_transformers_give_the_ids_of_real_models(name, tmp_path):
  if not (tiny.REAL / name).exists():
    pytest.skip(f'the model {name} is not beside this repository')
  for file in ('tokenizer.model', 'config.json'):
    shutil.copyfile(tiny.REAL / name / file, tmp_path / file)
  _same_ids(tmp_path)


def test_special_tokens_have_no_space_after_them(sentencepiece_dir, tmp_path):
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model',
                  tmp_path / 'tokenizer.model')
  tiny_tokenizers.write(tmp_path, 'config.json', {'model_type': 'llama'})
  sentencepiece_json.add_tokenizer_json(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  pieces = theirs.convert_ids_to_tokens(theirs('the</s>the')['input_ids'])
  after = ''.join(pieces[pieces.index('</s>') + 1:])
  assert pieces[:2] == ['<s>', '▁the'] and after == 'the'


CHATML = {'<|im_start|>': 290, '<|im_end|>': 291}
TABLE = {str(id): {'content': text, 'special': True, 'rstrip': True}
         for text, id in CHATML.items()}
# What lies beside tokenizer.model, as models are published.
BESIDE = {
    'config': {'tokenizer_config.json': {
        'tokenizer_class': 'LlamaTokenizer', 'legacy': False,
        'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': 'x'}},
    'no_bos': {'tokenizer_config.json': {'add_bos_token': False}},
    'legacy': {'tokenizer_config.json': {
        'tokenizer_class': 'LlamaTokenizer', 'legacy': True}},
    'added': {'added_tokens.json': CHATML},
    'map': {'added_tokens.json': CHATML, 'special_tokens_map.json': {
        'eos_token': '<|im_end|>',
        'additional_special_tokens': ['<|im_start|>']}},
    'decoder': {'tokenizer_config.json': {
        'tokenizer_class': 'LlamaTokenizer', 'added_tokens_decoder': TABLE,
        'eos_token': '<|im_end|>'}}}
CHAT = '<|im_start|>the cat<|im_end|>a<s> the</s>dog'


@pytest.mark.parametrize('name', BESIDE)
def test_added_tokens_and_settings_go_along(
    name, sentencepiece_dir, tmp_path):
  """transformers give our ids, also of text between special tokens."""
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model',
                  tmp_path / 'tokenizer.model')
  tiny_tokenizers.write(tmp_path, 'config.json', {'model_type': 'llama'})
  for file, value in BESIDE[name].items():
    tiny_tokenizers.write(tmp_path, file, value)
  ours = rtx.load_tokenizer(tmp_path)
  ids = ours.encode(CHAT, special=True)
  _same_ids(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs(CHAT, add_special_tokens=False)['input_ids'] == ids
  assert theirs(CHAT)['input_ids'] == ours.opening + ids
  again = rtx.load_tokenizer(tmp_path)
  assert again.encode(CHAT, special=True) == ids
  assert (again.opening, again.eos_id, again.end_ids) == (
      ours.opening, ours.eos_id, ours.end_ids)
  assert theirs.chat_template == BESIDE[name].get(
      'tokenizer_config.json', {}).get('chat_template')


def test_ids_that_do_not_follow_the_pieces_are_left_alone(
    sentencepiece_dir, tmp_path):
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model',
                  tmp_path / 'tokenizer.model')
  tiny_tokenizers.write(tmp_path, 'added_tokens.json', {'<x>': 300})
  before = sorted(tmp_path.iterdir())
  sentencepiece_json.add_tokenizer_json(tmp_path)
  assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_json_that_is_there_stays(sentencepiece_dir, tmp_path):
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model',
                  tmp_path / 'tokenizer.model')
  (tmp_path / 'tokenizer.json').write_text('{}')
  sentencepiece_json.add_tokenizer_json(tmp_path)
  assert (tmp_path / 'tokenizer.json').read_text() == '{}'
  assert not (tmp_path / 'tokenizer_config.json').exists()
