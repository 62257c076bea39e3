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
         'the cat sat on the mat')
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


def test_files_that_are_there_stay(sentencepiece_dir, tmp_path):
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model',
                  tmp_path / 'tokenizer.model')
  (tmp_path / 'tokenizer_config.json').write_text('{"legacy": false}')
  sentencepiece_json.add_tokenizer_json(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
      'tokenizer.model', 'tokenizer_config.json']
  assert (tmp_path / 'tokenizer_config.json').read_text() == (
      '{"legacy": false}')
