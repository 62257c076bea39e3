"""Tokenizer files as models have them: the ids are those of their library.

`tokenizers` on tokenizer.json; SentencePiece on a bare tokenizer.model, with
added tokens; transformers' AutoTokenizer where it reads the same file.
"""

import dataclasses
import json

import pytest
import sentencepiece
import tiny
from tiny_tokenizers import copy, train, write
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import recursive_tx as rtx
from recursive_tx.errors import UserError
from recursive_tx.store import native
from recursive_tx.text import tokenizer

SPECIAL = ('<s>', '</s>', '<unk>', '[INST]', '[/INST]')
TEXTS = (
    'the cat sat', 'the  cat\n', '日本 the', '<s>[INST] the cat [/INST] a</s>',
    '[INST]the[/INST]cat', '<|im_start|>user\nthe cat<|im_end|>\n<s>', 'x<unk>')
CHATML = {'<|im_start|>': 290, '<|im_end|>': 291}


@pytest.fixture(scope='module')
def mistral(tmp_path_factory):
  """SentencePiece with control tokens, as of Mistral-7B-Instruct-v0.3."""
  return train(tmp_path_factory.mktemp('spm'), bos_id=1, eos_id=2, unk_id=0,
               control_symbols=['[INST]', '[/INST]'])


def _as_json(model_file, scheme, added=(), bos=True, unigram=False):
  """The same pieces as a tokenizer of the `tokenizers` library."""
  own = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
  pieces = [own.id_to_piece(i) for i in range(own.vocab_size())]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  merges = [(piece[:i], piece[i:]) for piece in sorted(
      pieces, key=lambda piece: -own.get_score(vocab[piece]))
            for i in range(1, len(piece)) if not own.is_byte(vocab[piece])
            and piece[:i] in vocab and piece[i:] in vocab]
  model = tokenizers.Tokenizer(
      models.Unigram([(p, own.get_score(i)) for p, i in vocab.items()],
                     unk_id=0, byte_fallback=True) if unigram else
      models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True,
                 byte_fallback=True))
  model.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme=scheme, split=False)
  model.decoder = decoders.Sequence([
      decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
      *([] if scheme == 'never' else [decoders.Strip(' ', 1, 0)])])
  model.add_special_tokens([piece for i, piece in enumerate(pieces)
                            if own.is_control(i) or own.is_unknown(i)])
  model.add_tokens([tokenizers.AddedToken(x, normalized=False)
                    for x in added])
  if bos:
    model.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
  return model


def _plain(model, text):
  return model.encode(text, add_special_tokens=False).ids


# tokenizer.json.


@pytest.mark.parametrize('beside', [False, True])
@pytest.mark.parametrize('scheme', ['first', 'always', 'never'])
def test_tokenizer_json_is_what_its_library_makes_of_it(
    mistral, tmp_path, scheme, beside):
  """Also beside a tokenizer.model, which is then not read."""
  library = _as_json(mistral / 'tokenizer.model', scheme)
  library.save(str(tmp_path / 'tokenizer.json'))
  if beside:
    (tmp_path / 'tokenizer.model').write_bytes(b'not read')
  write(tmp_path, 'config.json', {'eos_token_id': 2})
  ours = tokenizer.load(tmp_path)
  for text in TEXTS:
    assert ours.encode(text) == _plain(library, text)
    assert ours.encode(text, special=True) == _plain(library, text)
    assert ours.opening + ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == library.decode(
        _plain(library, text), skip_special_tokens=False)
  assert ours.encode('[INST]') == [ours.encode('[INST]')[0]]


def test_control_tokens_of_mistrals_files_are_one_id(mistral, tmp_path):
  """tokenizer.model and tokenizer.json, as they are published together."""
  library = _as_json(mistral / 'tokenizer.model', 'first')
  library.save(str(copy(mistral, tmp_path) / 'tokenizer.json'))
  write(tmp_path, 'config.json', {'eos_token_id': 2})
  ours = tokenizer.load(tmp_path)
  one, two = (library.token_to_id(x) for x in ('[INST]', '[/INST]'))
  ids = ours.encode('<s>[INST] the[/INST]', special=True)
  assert [ids[0], ids[1], ids[-1]] == [1, one, two]


# (the files beside tokenizer.json, transformers' class)
JSON_FILES = [
    ({}, None),
    ({'tokenizer_config.json': {'bos_token': '<s>', 'eos_token': '</s>'}},
     'PreTrainedTokenizerFast'),
    ({'tokenizer_config.json': {'add_bos_token': False, 'eos_token': '</s>'}},
     'PreTrainedTokenizerFast'),
    ({'tokenizer_config.json': {'add_bos_token': True}},
     'PreTrainedTokenizerFast'),
    # A piece of the vocabulary that only the file beside makes special.
    ({'special_tokens_map.json': {'eos_token': {'content': 't'}}},
     'PreTrainedTokenizerFast'),
    ({'added_tokens.json': CHATML}, 'PreTrainedTokenizerFast'),
    ({'tokenizer_config.json': {'additional_special_tokens': [*CHATML],
                                'added_tokens_decoder': {
        str(id): {'content': text, 'special': True, 'rstrip': True}
        for text, id in CHATML.items()}}}, 'PreTrainedTokenizerFast'),
]


@pytest.mark.parametrize('bos', [True, False])
@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte_level'])
@pytest.mark.parametrize('files, name', JSON_FILES)
def test_special_tokens_are_those_of_autotokenizer(
    mistral, byte_level_dir, tmp_path, files, name, kind, bos):
  """BOS too: the file's post-processor adds it, whatever add_bos_token is."""
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  if kind == 'byte_level':
    library = tokenizers.Tokenizer.from_file(
        str(byte_level_dir / 'tokenizer.json'))
    library.add_special_tokens(['<s>', '</s>'])
    if bos:
      library.post_processor = processors.TemplateProcessing(
          single='<s> $A', special_tokens=[('<s>', library.token_to_id('<s>'))])
    shift = library.get_vocab_size() - 290
  else:
    library = _as_json(mistral / 'tokenizer.model', 'first', bos=bos,
                       unigram=kind == 'unigram')
    shift = 0
  library.save(str(tmp_path / 'tokenizer.json'))
  write(tmp_path, 'config.json', {'model_type': 'llama', 'eos_token_id': 2})
  write(tmp_path, 'tokenizer_config.json', {'tokenizer_class': name})
  text = json.dumps(files)
  for old in CHATML.values():  # They follow those of the file.
    text = text.replace(str(old), str(old + shift))
  for path, value in json.loads(text).items():
    write(tmp_path, path, value | (
        {'tokenizer_class': name} if path == 'tokenizer_config.json' else {}))
  theirs, ours = (transformers.AutoTokenizer.from_pretrained(tmp_path),
                  tokenizer.load(tmp_path))
  if name is None and kind != 'byte_level':  # LlamaTokenizer, see below.
    return
  for text in TEXTS:
    ids = theirs(text, add_special_tokens=False)['input_ids']
    assert ours.encode(text, special=True) == ids, text
    assert ours.opening + ids == theirs(text)['input_ids']
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Plain text is the library's alone, but for tokens that are no special.
    if 'added_tokens.json' not in files:
      assert ours.encode(text) == _plain(library, text)
  assert ours.vocab_size == len(theirs)


# tokenizer.model.


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_a_bare_model_is_read_as_sentencepiece_reads_it(tmp_path, kind):
  train(tmp_path, bos_id=1, eos_id=2, unk_id=0, model_type=kind,
        vocab_size=290 if kind == 'bpe' else 276,
        control_symbols=['[INST]', '[/INST]'])
  own = sentencepiece.SentencePieceProcessor(
      model_file=str(tmp_path / 'tokenizer.model'))
  ours = tokenizer.load(tmp_path)
  for text in (*TEXTS, '', ' the', '  '):
    assert ours.encode(text) == own.encode(text)
    assert ours.decode(own.encode(text)) == own.decode(own.encode(text))
  assert ours.opening == [1] and ours.end_ids == (2,)


# The files beside tokenizer.model; which of them are special.
MODEL_FILES = [
    {}, {'added_tokens.json': CHATML},
    {'added_tokens.json': CHATML, 'special_tokens_map.json': {
        'eos_token': '<|im_end|>',
        'additional_special_tokens': ['<|im_start|>']}},
    {'tokenizer_config.json': {'added_tokens_decoder': {
        str(id): {'content': text, 'special': True}
        for text, id in CHATML.items()}}},
]


@pytest.mark.parametrize('files', MODEL_FILES)
def test_special_and_added_tokens_on_top_of_a_model(mistral, tmp_path, files):
  """As the same pieces in tokenizer.json: a space at the start alone."""
  directory = copy(mistral, tmp_path)
  for name, value in files.items():
    write(directory, name, value)
  library = _as_json(mistral / 'tokenizer.model', 'first',
                     added=CHATML if files else ())
  ours = tokenizer.load(directory)
  for text in TEXTS:
    ids = _plain(library, text)
    assert ours.encode(text, special=True) == ids, text
    assert ours.decode(ids) == library.decode(
        [i for i in ids if not 0 < i < 5], skip_special_tokens=False).replace(
            '<unk>', ' ⁇ ')
  assert ours.vocab_size == 290 + 2 * bool(files)
  # Control tokens are no part of plain text; added tokens are, unless special.
  assert 1 not in ours.encode('<s>the')
  assert (290 in ours.encode('the<|im_start|>')) == (
      files == MODEL_FILES[1])


def test_legacy_encodes_every_part_as_a_text_of_its_own(mistral, tmp_path):
  directory = copy(mistral, tmp_path)
  for legacy, scheme in ((True, 'always'), (False, 'first')):
    write(directory, 'tokenizer_config.json', {'legacy': legacy})
    library = _as_json(mistral / 'tokenizer.model', scheme)
    ours = tokenizer.load(directory)
    for text in ('<s>the cat</s>', 'a[INST]the[/INST]cat</s>'):
      assert ours.encode(text, special=True) == _plain(library, text)


def test_stripping_tokens_take_the_space_around_them(mistral, tmp_path):
  directory = copy(mistral, tmp_path)
  for lstrip, rstrip in ((0, 0), (1, 0), (0, 1), (1, 1)):
    write(directory, 'tokenizer_config.json', {'added_tokens_decoder': {
        '290': {'content': '<x>', 'special': True, 'lstrip': bool(lstrip),
                'rstrip': bool(rstrip)}}})
    ours = tokenizer.load(directory)
    same = f'the{" " * (not lstrip)}<x>{" " * (not rstrip)}cat'
    assert ours.encode('the <x> cat', special=True) == ours.encode(
        same, special=True)


def test_where_autotokenizer_reads_a_bare_model_otherwise():
  """The first row of the table in docs/data.md."""
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  directory = tiny.REAL / 'stories260K'
  if not directory.is_dir():
    pytest.skip('the small models are not there')
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  ours = tokenizer.load(directory)
  assert ours.opening + ours.encode('Hello') == [1, 346, 306, 414]
  assert theirs('Hello')['input_ids'] == [440, 411, 306, 414]  # H e ll o


def test_llamas_class_replaces_the_files_own_pre_tokenizer(mistral, tmp_path):
  """The second row of the table in docs/data.md."""
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  library = _as_json(mistral / 'tokenizer.model', 'always')
  library.save(str(tmp_path / 'tokenizer.json'))
  write(tmp_path, 'config.json', {'model_type': 'llama', 'eos_token_id': 2})
  write(tmp_path, 'tokenizer_config.json', {
      'tokenizer_class': 'LlamaTokenizer', 'legacy': False})
  theirs, ours = (transformers.AutoTokenizer.from_pretrained(tmp_path),
                  tokenizer.load(tmp_path))
  text = '</s>the'
  assert ours.encode(text) == _plain(library, text)
  assert theirs(text, add_special_tokens=False)['input_ids'] == _plain(
      _as_json(mistral / 'tokenizer.model', 'first'), text)


# Ends of text.


@pytest.mark.parametrize('config, generation, named, ends', [
    ({}, {}, None, (2,)),
    ({'eos_token_id': 2}, {}, None, (2,)),
    ({'eos_token_id': [4, 5]}, {}, None, (4, 5)),
    ({'eos_token_id': [4, 5]}, {'eos_token_id': 6}, None, (6,)),
    ({'eos_token_id': 4}, {'eos_token_id': [6, 7, 6]}, None, (6, 7)),
    ({'eos_token_id': 4}, {'eos_token_id': None}, None, (4,)),
    ({'eos_token_id': [4, 5]}, {'temperature': 1}, '</s>', (4, 5, 2)),
    ({'eos_token_id': [2, 5]}, {'eos_token_id': 7}, '</s>', (7, 2)),
])
def test_ends_of_text(mistral, tmp_path, config, generation, named, ends):
  directory = copy(mistral, tmp_path)
  write(directory, 'config.json', config)
  write(directory, 'generation_config.json', generation)
  if named:
    write(directory, 'tokenizer_config.json', {'eos_token': named})
  assert tokenizer.load(directory).end_ids == ends


@pytest.mark.parametrize('value', [[], '2', [2, '5'], 2.0, True, [-1]])
@pytest.mark.parametrize('name', ['config.json', 'generation_config.json'])
def test_ends_that_are_no_ids(mistral, tmp_path, name, value):
  directory = copy(mistral, tmp_path)
  write(directory, name, {'eos_token_id': value})
  with pytest.raises(UserError, match=f'correct {name}'):
    tokenizer.load(directory)


# Ids beyond, and bytes.


@pytest.mark.parametrize('kind', ['model', 'json'])
def test_unknown_ids_decode_to_nothing(mistral, tmp_path, kind):
  directory = copy(mistral, tmp_path)
  # The ids between are of nothing.
  write(directory, 'tokenizer_config.json', {'added_tokens_decoder': {
      '293': {'content': '<x>', 'special': True}}})
  if kind == 'json':
    library = _as_json(mistral / 'tokenizer.model', 'first')
    library.save(str(directory / 'tokenizer.json'))
    write(directory, 'config.json', {'eos_token_id': 2})
  ours = tokenizer.load(directory)
  ids = ours.encode('the cat')
  last = ours.vocab_size
  assert ours.decode([ids[0], last, *ids[1:], 2**31, -1]) == 'the cat'
  assert ours.token_bytes(last) == ours.token_bytes(-1) == b''
  known = ours.known(last + 5)
  assert len(known) == last + 5 and not known[last:].any()
  if kind == 'model':
    assert ours.decode([291]) == '' and list(~known[290:293]) == [True] * 3
    assert ours.decode([*ids, 293]) == 'the cat<x>'
  assert known[:290].all() and known[last - 1]


@pytest.mark.parametrize('kind', ['model', 'json', 'byte_level'])
def test_bytes_of_tokens_make_the_text(mistral, byte_level_dir, tmp_path, kind):
  directory = byte_level_dir if kind == 'byte_level' else copy(
      mistral, tmp_path)
  if kind == 'json':
    _as_json(mistral / 'tokenizer.model', 'first').save(
        str(directory / 'tokenizer.json'))
    write(directory, 'config.json', {'eos_token_id': 2})
  ours = tokenizer.load(directory)
  for text in ('the cat', 'naïve 漢字 🎉', '\n\t \x7f ÿ'):
    made = b''.join(map(ours.token_bytes, ours.encode(text)))
    assert made == (b'' if kind == 'byte_level' else b' ') + text.encode()


def test_a_list_of_ends_survives_conversion_and_export(mistral, tmp_path):
  """In config.json and in generation_config.json."""
  cfg = dataclasses.replace(tiny.FAMILIES['llama'], V=290)
  source = tmp_path / 'source'
  tiny.make_ours(source, cfg)
  copy(mistral, source)
  tiny.edit_config(source, lambda hf: hf.update(eos_token_id=[4, 5]))
  write(source, 'generation_config.json', {'eos_token_id': [6, 7]})
  model = rtx.open(source)
  rtx.save(tmp_path / 'saved', *model[:2], companions=source)
  hf = native.read_source(tmp_path / 'saved')
  del hf['dtype_on_disk']
  rtx.save_hf(tmp_path / 'export', *model[:2], hf=hf,
              companions=tmp_path / 'saved')
  for name in ('source', 'saved', 'export'):
    assert tokenizer.load(tmp_path / name).end_ids == (6, 7)
  found = json.loads((tmp_path / 'export' / 'config.json').read_text())
  assert found['eos_token_id'] == [4, 5]
