"""A tokenizer in a GGUF file: what is written, and what is refused.

That llama.cpp cuts the same tokens is shown by `launch/interop.sh`.
"""

import json

import pytest
import tiny
import tiny_tokenizers

from recursive_tx.store import gguf_tokenizer
from recursive_tx.text import tokenizer as tokenizer_lib

gguf = pytest.importorskip(
    'gguf', reason='pip install gguf; it writes the files')


def written(directory, V, tmp_path):
  """{key after 'tokenizer.': value} of a file without tensors."""
  writer = gguf.GGUFWriter(tmp_path / 'file', 'llama')
  gguf_tokenizer.add(writer, directory, V)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  writer.close()
  reader = gguf.GGUFReader(tmp_path / 'file')
  return {name.removeprefix('tokenizer.'): field.contents()
          for name, field in reader.fields.items()
          if name.startswith('tokenizer.')}


def test_a_sentencepiece_model(sentencepiece_dir, tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  tiny_tokenizers.copy(sentencepiece_dir, folder)
  tiny_tokenizers.write(folder, 'tokenizer_config.json', {
      'chat_template': '{{ messages }}', 'added_tokens_decoder': {
          '290': {'content': '<|end|>', 'special': True},
          '291': {'content': 'zzz', 'special': False}}})
  tiny_tokenizers.write(folder, 'generation_config.json',
                        {'eos_token_id': [2, 290]})
  found = written(folder, 300, tmp_path)
  ours = tokenizer_lib.load(folder)
  import sentencepiece
  pieces = sentencepiece.SentencePieceProcessor(
      model_file=str(folder / 'tokenizer.model'))
  assert found['ggml.model'] == 'llama' and found['ggml.pre'] == 'default'
  assert found['ggml.tokens'][:290] == [
      pieces.id_to_piece(i) for i in range(290)]
  assert found['ggml.scores'][:290] == pytest.approx(
      [pieces.get_score(i) for i in range(290)])
  kinds = found['ggml.token_type']
  assert [kinds[i] for i in (0, 1, 2, 3, 289)] == [2, 3, 3, 6, 1]
  assert found['ggml.tokens'][290:293] == ['<|end|>', 'zzz', '[PAD292]']
  assert kinds[290:293] == [3, 4, 5]
  assert len({*found['ggml.tokens']}) == 300
  assert found['ggml.bos_token_id'] == ours.bos_id == 1
  assert found['ggml.eos_token_id'] == 2
  assert found['ggml.eot_token_id'] == 290
  assert found['ggml.unknown_token_id'] == 0
  assert found['ggml.add_bos_token'] is True
  assert found['ggml.add_space_prefix'] is True
  assert found['chat_template'] == '{{ messages }}'


def test_a_byte_level_bpe(byte_level_dir, tmp_path):
  found = written(byte_level_dir, 310, tmp_path)
  model = json.loads((byte_level_dir / 'tokenizer.json').read_text())['model']
  assert found['ggml.model'] == 'gpt2' and found['ggml.pre'] == 'gpt-2'
  assert found['ggml.merges'] == [' '.join(m) for m in model['merges']]
  assert {text: i for i, text in enumerate(found['ggml.tokens'])
          if i < 300}.items() >= model['vocab'].items()
  assert found['ggml.token_type'][:3] == [3, 3, 1]
  assert found['ggml.add_bos_token'] is False
  assert found['ggml.eos_token_id'] == 0


def edited(source, folder, change):
  folder.mkdir()
  for path in source.iterdir():
    if path.is_file():
      (folder / path.name).write_bytes(path.read_bytes())
  found = json.loads((folder / 'tokenizer.json').read_text())
  change(found)
  (folder / 'tokenizer.json').write_text(json.dumps(found))
  return folder


LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}


def _steps(*steps):
  return {'type': 'Sequence', 'pretokenizers': [*steps]}


@pytest.mark.parametrize('steps, whole, name', [
    (_steps({'type': 'Digits', 'individual_digits': True},
            LEVEL | {'use_regex': True}), False, 'smollm'),
    (_steps({'type': 'Split', 'behavior': 'Isolated', 'invert': False,
             'pattern': {'Regex': (
                 "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
                 '\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|'
                 '\\s+(?!\\S)|\\s+')}}, LEVEL | {'use_regex': False}),
     True, 'llama-bpe')])
def test_pre_tokenizers_that_llama_cpp_knows(
    byte_level_dir, tmp_path, steps, whole, name):
  def change(found):
    found['pre_tokenizer'] = steps
    found['model']['ignore_merges'] = whole

  folder = edited(byte_level_dir, tmp_path / 'model', change)
  assert written(folder, 300, tmp_path)['ggml.pre'] == name


@pytest.mark.parametrize('change, said', [
    (lambda t: t.update(pre_tokenizer=LEVEL | {'add_prefix_space': True}),
     'ByteLevel'),
    (lambda t: t.update(pre_tokenizer={'type': 'Whitespace'}), 'Whitespace'),
    (lambda t: t.update(pre_tokenizer=_steps(
        {'type': 'Digits', 'individual_digits': False}, LEVEL)), 'Digits'),
    (lambda t: t.update(pre_tokenizer=_steps(
        {'type': 'Split', 'behavior': 'Isolated', 'invert': False,
         'pattern': {'Regex': '\\w+'}}, LEVEL)), 'no name there'),
    (lambda t: t['model'].update(ignore_merges=True), 'ignore_merges'),
    (lambda t: t.update(normalizer={'type': 'Lowercase'}), 'Lowercase'),
    (lambda t: t['model'].update(end_of_word_suffix='</w>'), 'byte-level')])
def test_what_llama_cpp_does_not_know_is_refused(
    byte_level_dir, tmp_path, change, said):
  folder = edited(byte_level_dir, tmp_path / 'model', change)
  with tiny.refused(said, 'llama.cpp does not know', '--form=recursive'):
    written(folder, 300, tmp_path)


def test_a_normaliser_or_a_unigram_of_sentencepiece_is_refused(tmp_path):
  for how, said in ((dict(normalization_rule_name='nmt_nfkc'), 'nmt_nfkc'),
                    (dict(remove_extra_whitespaces=True),
                     'remove_extra_whitespaces'),
                    (dict(model_type='unigram', vocab_size=300), 'BPE')):
    folder = tmp_path / said
    folder.mkdir()
    tiny_tokenizers.train(
        folder, bos_id=1, eos_id=2, unk_id=0,
        hard_vocab_limit=False, **how)
    with tiny.refused(said, 'llama.cpp does not know'):
      written(folder, 300, tmp_path)


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
  assert written(tmp_path, 300, tmp_path) == {'ggml.model': 'none'}
