"""Tokenizers: lossless round trips, special ids, refusals."""

import pathlib
import subprocess
import sys

import pytest
import sentencepiece
from tiny_tokenizers import copy, train, write
import tokenizers

from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer

TEXTS = (
    'Once upon a time',
    '',
    ' leading and trailing ',
    'def f(x):\n\n  if x:\n\treturn  1\r\n',
    'naïve 漢字 🎉 \u0000 \u200b',
    '<s> </s> <unk>',
)


@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('kind', ['sentencepiece_dir', 'byte_level_dir'])
def test_decode_inverts_encode(kind, text, request):
  tok = tokenizer.load(request.getfixturevalue(kind))
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert all(0 <= i < tok.vocab_size for i in ids)
  assert tok.encode_batch([text, 'a', text]) == [ids, tok.encode('a'), ids]


def test_sentencepiece_is_encoded_as_its_own_library_does(sentencepiece_dir):
  own = sentencepiece.SentencePieceProcessor(
      model_file=str(sentencepiece_dir / 'tokenizer.model')
  )
  tok = tokenizer.load(sentencepiece_dir)
  for text in TEXTS:
    assert tok.encode(text) == own.encode(text)
  assert tok.vocab_size == own.vocab_size() == 290


def test_encode_adds_no_special_token(tmp_path, byte_level_dir):
  directory = copy(byte_level_dir, tmp_path)
  add_template(directory)
  write(directory, 'config.json', {'eos_token_id': 0})
  tok = tokenizer.load(directory)
  plain = tokenizer.load(byte_level_dir)
  assert tok.encode('the cat') == plain.encode('the cat')
  assert tok.encode('') == []


def add_template(directory: pathlib.Path) -> None:
  """Llama 3's post-processor: BOS before every text."""
  path = str(directory / 'tokenizer.json')
  model = tokenizers.Tokenizer.from_file(path)
  model.post_processor = tokenizers.processors.TemplateProcessing(
      single='<bos> $A', special_tokens=[('<bos>', 1)]
  )
  model.save(path)


# What the JSON files say, and the BOS and EOS that follow. The SentencePiece
# model has <s> = 1 and </s> = 2.
SENTENCEPIECE_IDS = [
    ({}, 1, 2),
    ({'config.json': {'bos_token_id': 3, 'eos_token_id': [4, 5]}}, 3, 4),
    ({'config.json': {'bos_token_id': None, 'eos_token_id': 2}}, None, 2),
    ({'tokenizer_config.json': {'add_bos_token': False}}, None, 2),
    (
        {
            'tokenizer_config.json': {
                'add_bos_token': True,
                'bos_token': {'content': '</s>'},
                'eos_token': '<s>',
            },
            'config.json': {'bos_token_id': 3, 'eos_token_id': 4},
        },
        2,
        1,
    ),
    ({'source.json': {'bos_token_id': 3, 'eos_token_id': 4}}, 3, 4),
    ({'config.json': {'V': 290}, 'source.json': {'bos_token_id': 3}}, 3, 2),
]


@pytest.mark.parametrize('files, bos_id, eos_id', SENTENCEPIECE_IDS)
def test_special_ids_of_sentencepiece(
    files, bos_id, eos_id, sentencepiece_dir, tmp_path
):
  directory = copy(sentencepiece_dir, tmp_path)
  for name, value in files.items():
    write(directory, name, value)
  tok = tokenizer.load(directory)
  assert (tok.bos_id, tok.eos_id) == (bos_id, eos_id)


def test_sentencepiece_without_bos_piece_adds_none(tmp_path):
  directory = train(tmp_path, bos_id=-1, eos_id=1, unk_id=0)
  write(directory, 'config.json', {'bos_token_id': 1, 'eos_token_id': 1})
  assert tokenizer.load(directory).bos_id is None


def test_bos_of_tokenizer_json_is_what_its_post_processor_adds(
    tmp_path, byte_level_dir
):
  assert tokenizer.load(byte_level_dir).bos_id is None
  assert tokenizer.load(byte_level_dir).eos_id == 0
  directory = copy(byte_level_dir, tmp_path)
  write(directory, 'tokenizer_config.json', {'eos_token': '<|endoftext|>'})
  add_template(directory)
  assert tokenizer.load(directory).bos_id == 1
  # As transformers have it since version 5.
  for adds in (False, True):
    for template, bos_id in ((False, None), (True, 1)):
      copy(byte_level_dir, directory)
      if template:
        add_template(directory)
      write(directory, 'tokenizer_config.json',
            {'eos_token': '<|endoftext|>', 'add_bos_token': adds})
      assert tokenizer.load(directory).bos_id == bos_id


def test_digest_tells_tokenizers_apart(sentencepiece_dir, byte_level_dir):
  digest = tokenizer.load(sentencepiece_dir).digest
  assert digest == tokenizer.load(sentencepiece_dir).digest
  assert digest != tokenizer.load(byte_level_dir).digest


def test_check_vocab(sentencepiece_dir):
  tok = tokenizer.load(sentencepiece_dir)
  tokenizer.check_vocab(tok, 290)
  with pytest.raises(UserError, match='290 ids but the model embeds only 289'):
    tokenizer.check_vocab(tok, 289)


@pytest.mark.parametrize(
    'files, message',
    [
        ({}, 'holds no tokenizer: expected tokenizer.json'),
        ({'tokenizer.model': 'garbage'}, 'tokenizer.model cannot be read'),
        ({'tokenizer.json': '{}'}, 'tokenizer.json cannot be read'),
        ({'config.json': '{'}, 'config.json cannot be read'),
        ({'config.json': '[]'}, 'config.json cannot be read'),
    ],
)
def test_unreadable_directories(files, message, tmp_path):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    tokenizer.load(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'config, message',
    [
        ({'eos_token_id': 300}, 'eos_token_id 300 is outside the 290'),
        ({'bos_token_id': 300}, 'bos_token_id 300 is outside the 290'),
        ({'eos_token_id': None}, 'add eos_token_id to config.json'),
        ({'eos_token_id': '2'}, "eos_token_id is '2', expected a token id"),
    ],
)
def test_absurd_special_ids(config, message, sentencepiece_dir, tmp_path):
  directory = copy(sentencepiece_dir, tmp_path)
  write(directory, 'config.json', config)
  with pytest.raises(UserError, match=message):
    tokenizer.load(directory)


def test_add_bos_token_without_a_token(tmp_path):
  directory = train(tmp_path, bos_id=-1, eos_id=1, unk_id=0)
  write(directory, 'tokenizer_config.json', {'add_bos_token': True})
  with pytest.raises(UserError, match='add bos_token_id to config.json'):
    tokenizer.load(directory)


def test_imports_no_tensorflow():
  program = (
      'import sys, recursive_tx.text, recursive_tx.data\n'
      'bad = {"tensorflow", "seqio", "sentencepiece"} & set(sys.modules)\n'
      'assert not bad, bad'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
