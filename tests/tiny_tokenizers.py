"""Tokenizers trained on the spot, of both kinds."""

from collections.abc import Iterable
import json
import pathlib

import pytest
import sentencepiece
import tokenizers


@pytest.fixture(scope='session')
def sentencepiece_dir(tmp_path_factory) -> pathlib.Path:
  return train(tmp_path_factory.mktemp('spm'), bos_id=1, eos_id=2, unk_id=0)


@pytest.fixture(scope='session')
def byte_level_dir(tmp_path_factory) -> pathlib.Path:
  """GPT-NeoX's kind: byte-level BPE, no BOS, end-of-text is id 0."""
  directory = tmp_path_factory.mktemp('bpe')
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<|endoftext|>', '<bos>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  model.train_from_iterator(['the cat sat on the mat'] * 9, trainer)
  model.save(str(directory / 'tokenizer.json'))
  write(directory, 'config.json', {'bos_token_id': 0, 'eos_token_id': 0})
  return directory


def letters(directory: pathlib.Path, pieces: Iterable[str]) -> None:
  """Saves a tokenizer of one id a character; texts open with BOS.

  Args:
    directory: where tokenizer.json and tokenizer_config.json go.
    pieces: in the order of their ids; '<bos>' and '<eos>' are among them.
  """
  vocab = {piece: i for i, piece in enumerate(pieces)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  model.decoder = tokenizers.decoders.Fuse()
  model.post_processor = tokenizers.processors.TemplateProcessing(
      single='<bos> $A', special_tokens=[('<bos>', vocab['<bos>'])])
  model.save(str(directory / 'tokenizer.json'))
  write(directory, 'tokenizer_config.json',
        {'bos_token': '<bos>', 'eos_token': '<eos>'})


def train(directory: pathlib.Path, **how) -> pathlib.Path:
  text = directory / 'text'
  text.write_text('the cat sat on the mat\n  and the dog ate it\n' * 9)
  sentencepiece.SentencePieceTrainer.train(**{
      'input': str(text), 'model_prefix': str(directory / 'tokenizer'),
      'vocab_size': 290, 'model_type': 'bpe', 'byte_fallback': True,
      'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False, 'minloglevel': 2, **how})
  return directory


def write(directory: pathlib.Path, name: str, value: object) -> None:
  (directory / name).write_text(json.dumps(value))


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  for path in source.glob('tokenizer.[mj]*'):
    (target / path.name).write_bytes(path.read_bytes())
  return target
