"""A tokenizer as llama.cpp reads it from a GGUF file.

SentencePiece's BPE is its 'llama', byte-level BPE its 'gpt2', with the name of
one of the ways to cut a text into words before that are built into it. What it
would read as something else is refused.
"""

import json
import pathlib
from typing import Any

from recursive_tx.errors import UserError
from recursive_tx.text import chat
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.special import Files

# Types of pieces: sentencepiece_model.proto and llama.cpp agree.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BPE = 2
_ADDED_SCORE = -1000.0
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = (r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# {the steps of tokenizer.json's pre-tokenizer: (its name in llama.cpp,
# whether a word of the vocabulary is kept whole)}; the last step, ByteLevel,
# cuts words itself as GPT-2 does, or not.
PRE_TOKENIZERS = {
    ('ByteLevel cuts',): ('gpt-2', False),
    ('Digits', 'ByteLevel cuts'): ('smollm', False),
    (_WORDS + r'\p{N}{1,3}|' + _REST, 'ByteLevel'): ('llama-bpe', True),
    (_WORDS + r'\p{N}|' + _REST, 'ByteLevel'): ('qwen2', False)}


def add(writer: Any, directory: pathlib.Path, V: int) -> None:
  """Writes a directory's tokenizer and chat template into a GGUF file.

  Args:
    writer: a gguf.GGUFWriter.
    directory: where the tokenizer's files are; without any, the file holds
      no tokenizer.
    V: ids of the model; those that the tokenizer lacks are unused.

  Raises:
    UserError: llama.cpp would cut texts into other tokens.
  """
  if not tokenizer_lib.has_tokenizer(directory):
    writer.add_tokenizer_model('none')
    return
  tokenizer, beside = tokenizer_lib.load(directory), Files(directory)
  if (directory / 'tokenizer.model').is_file():
    rows = _sentencepiece(writer, directory / 'tokenizer.model')
  else:
    rows = _byte_level(writer, directory / 'tokenizer.json')
  for id, token in beside.added.items():
    known = rows.get(id)
    if known is None or known[0] == token.content:
      score = _ADDED_SCORE if known is None else known[2]
      rows[id] = (token.content,
                  _CONTROL if token.special else _USER_DEFINED, score)
  texts, types, scores = zip(*(
      rows.get(id, (f'[PAD{id}]', _UNUSED, _ADDED_SCORE))
      for id in range(V)), strict=True)
  writer.add_token_list(list(texts))
  writer.add_token_types(list(types))
  writer.add_token_scores(list(scores))
  _add_special(writer, tokenizer)
  talk = chat.Chat(directory, tokenizer)
  if talk.has_template:
    writer.add_chat_template(talk.source())


def _add_special(writer, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Ids of special tokens, and whether a text opens with BOS."""
  bos = tokenizer.bos_id
  if bos is None:
    bos = tokenizer.model.to_id(tokenizer.names.get('bos_token', ''))
  if bos is not None:
    writer.add_bos_token_id(bos)
  writer.add_add_bos_token(tokenizer.bos_id is not None)
  writer.add_eos_token_id(tokenizer.eos_id)
  for id in tokenizer.end_ids:
    if id != tokenizer.eos_id:  # The file has room for one more.
      writer.add_eot_token_id(id)
      break
  unknown = tokenizer.model.to_id(tokenizer.names.get('unk_token', ''))
  if unknown is not None:
    writer.add_unk_token_id(unknown)
  if tokenizer.pad_id is not None:
    writer.add_pad_token_id(tokenizer.pad_id)


def _sentencepiece(writer, path: pathlib.Path) -> dict[int, tuple]:
  """{id: (text, type, score)} of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  rules = proto.normalizer_spec
  if proto.trainer_spec.model_type != _BPE:
    raise _unknown(path, 'no BPE', 'SentencePiece of type BPE')
  if rules.precompiled_charsmap:
    raise _unknown(
        path, f'the normaliser {rules.name!r}', "the normaliser 'identity'")
  if rules.remove_extra_whitespaces:
    raise _unknown(path, 'remove_extra_whitespaces',
                   'a model that keeps all white space')
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_add_space_prefix(rules.add_dummy_prefix)
  return {id: (piece.piece, piece.type, piece.score)
          for id, piece in enumerate(proto.pieces)}


def _byte_level(writer, path: pathlib.Path) -> dict[int, tuple]:
  """{id: (text, type, score)} of a byte-level BPE in tokenizer.json."""
  found = json.loads(path.read_text('utf-8-sig'))
  bpe = found['model']
  if bpe.get('type') != 'BPE' or any(bpe.get(key) for key in (
      'byte_fallback', 'continuing_subword_prefix', 'end_of_word_suffix')):
    raise _unknown(
        path, f'the model is no byte-level BPE ({bpe.get("type")})',
        'byte-level BPE, or a tokenizer.model')
  normalizer = found.get('normalizer') or {}
  # Texts are in NFC nearly always; llama.cpp leaves them as they are.
  if normalizer.get('type', 'NFC') != 'NFC':
    raise _unknown(path, f'the normaliser {normalizer["type"]}', 'none')
  steps = _steps(path, found.get('pre_tokenizer'))
  name, whole = PRE_TOKENIZERS.get(steps, (None, None))
  if name is None or whole != bool(bpe.get('ignore_merges')):
    raise _unknown(
        path, 'a pre-tokenizer (or ignore_merges) that has no name there',
        'that of ' + ', '.join(name for name, _ in PRE_TOKENIZERS.values()))
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(name)
  writer.add_token_merges([
      merge if isinstance(merge, str) else ' '.join(merge)
      for merge in bpe['merges']])
  rows = {id: (text, _NORMAL, 0.0) for text, id in bpe['vocab'].items()}
  for token in found.get('added_tokens', ()):
    rows[token['id']] = (
        token['content'], _CONTROL if token['special'] else _USER_DEFINED,
        _ADDED_SCORE)
  return rows


def _steps(path: pathlib.Path, found: dict | None) -> tuple[str, ...]:
  """The steps of a pre-tokenizer as PRE_TOKENIZERS has them."""
  found = found or {'type': None}
  several = found.get('pretokenizers', [found])
  steps = []
  for step in several:
    kind = step['type']
    if kind == 'ByteLevel' and not step.get('add_prefix_space'):
      steps.append(
          'ByteLevel cuts' if step.get('use_regex', True) else 'ByteLevel')
    elif kind == 'Digits' and step.get('individual_digits'):
      steps.append('Digits')
    elif kind == 'Split' and step.get('behavior') == 'Isolated' and (
        not step.get('invert')):
      steps.append(step['pattern'].get('Regex', ''))
    else:
      raise _unknown(path, f'the pre-tokenizer {kind}', 'another')
  return tuple(steps)


def _unknown(path: pathlib.Path, found: str, wanted: str) -> UserError:
  return UserError(
      f'{path}: {found}, which llama.cpp does not know; expected {wanted}; use'
      ' --form=recursive or --form=unrolled')
