"""A SentencePiece model as the files that transformers reads as we do.

Given `tokenizer.model`, transformers 5 makes a tokenizer of its own of it:
without BOS, without the space before a text, with other pieces. So an export
gets `tokenizer.json`, with the same vocabulary, the same rules and the added
tokens on top, and a `tokenizer_config.json` that has it read as it is.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from recursive_tx.errors import UserError
from recursive_tx.files import read_json, write_json
from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.special import Added, Files

_SPACE = '▁'
# Types of pieces: sentencepiece_model.proto, ModelProto.SentencePiece.Type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


def add_tokenizer_json(directory: pathlib.Path) -> None:
  """Writes both files beside a tokenizer.model that has no tokenizer.json.

  What tokenizer_config.json says stays, but for the class and BOS. Leaves a
  directory as it is whose model cannot be used (no end of text) or has rules
  that `tokenizers` lacks (words, characters, user-defined pieces, added tokens
  whose ids do not follow the pieces).
  """
  path = directory / 'tokenizer.model'
  if not path.is_file() or (directory / 'tokenizer.json').exists():
    return
  from sentencepiece import sentencepiece_model_pb2

  try:
    ours, files = tokenizer_lib.load(directory), Files(directory)
  except UserError:
    return
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  kinds = {piece.type for piece in proto.pieces}
  if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or (
      _USER_DEFINED in kinds or proto.trainer_spec.treat_whitespace_as_suffix):
    return
  size = len(proto.pieces)
  added = {id: token for id, token in files.added.items()
           if id >= size or proto.pieces[id].piece != token.content}
  if list(added) != list(range(size, size + len(added))):
    return
  legacy = files.settings.get('legacy') is True
  made = _made(proto, ours.bos_id, list(added.values()), legacy)
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(
      json.dumps(_settings(proto, ours, files), indent=2, ensure_ascii=False)
      + '\n', 'utf-8')


def name_class(directory: pathlib.Path) -> None:
  """Names a class for tokenizer.json, where the files name none.

  AutoTokenizer goes by the model_type, and knows those of its own only.
  """
  path = directory / 'tokenizer_config.json'
  found = read_json(path) if path.is_file() else {}
  if (directory / 'tokenizer.json').is_file() and (
      'tokenizer_class' not in found):
    write_json(path, {**found, 'tokenizer_class': 'PreTrainedTokenizerFast'})


def _settings(proto, ours: tokenizer_lib.Tokenizer, files: Files) -> dict:
  """tokenizer_config.json: that of the directory, read as a fast tokenizer."""
  unknown = next(p.piece for p in proto.pieces if p.type == _UNKNOWN)
  named = {'unk_token': unknown}
  for name, id in (('bos_token', ours.bos_id), ('eos_token', ours.eos_id)):
    # What ends a document need not end a generated text.
    ends = name == 'bos_token' or id in ours.end_ids
    if id is not None and id < len(proto.pieces) and ends:
      named[name] = proto.pieces[id].piece
  return {
      'clean_up_tokenization_spaces': False, **named, **files.settings,
      **files.named, 'tokenizer_class': 'PreTrainedTokenizerFast',
      'add_bos_token': ours.bos_id is not None, 'add_eos_token': False}


def _made(
    proto, bos_id: int | None, added: Sequence[Added], legacy: bool
) -> Any:
  """The `tokenizers.Tokenizer` of a SentencePiece model."""
  import tokenizers
  from tokenizers import decoders, normalizers, pre_tokenizers, processors

  spec = proto.normalizer_spec
  steps = []
  if spec.precompiled_charsmap:
    steps += [normalizers.Precompiled(spec.precompiled_charsmap)]
  if spec.remove_extra_whitespaces:
    # With a prefix, a first space is the prefix. ^ and $ are edges of lines.
    edge = r' \z' if spec.add_dummy_prefix else r'\A | \z'
    steps += [normalizers.Replace(tokenizers.Regex(' {2,}'), ' '),
              normalizers.Replace(tokenizers.Regex(edge), '')]
  steps += [normalizers.Replace(' ', _SPACE)]
  made = tokenizers.Tokenizer(_model(proto))
  made.normalizer = normalizers.Sequence(steps)
  decoding = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(),
            decoders.Fuse()]
  if spec.add_dummy_prefix:
    # A space before the text, but not after a special token, unless `legacy`.
    # Where spaces count, also before one: as that is _SPACE by now, the first
    # step does not take it for the space it puts there.
    first = _SPACE if spec.remove_extra_whitespaces else ' '
    where = 'always' if legacy else 'first'
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(first, where, split=False),
        pre_tokenizers.Metaspace(_SPACE, 'never', split=False)])
    decoding += [decoders.Strip(' ', 1, 0)]
  made.decoder = decoders.Sequence(decoding)
  made.add_special_tokens([
      tokenizers.AddedToken(piece.piece, special=True, normalized=False)
      for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)])
  for token in added:
    made.add_tokens([tokenizers.AddedToken(
        token.content, special=token.special, lstrip=token.lstrip,
        rstrip=token.rstrip, normalized=False)])
  if bos_id is not None:
    bos = proto.pieces[bos_id].piece
    made.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', pair=f'{bos} $A {bos} $B',
        special_tokens=[(bos, bos_id)])
  return made


def _model(proto) -> Any:
  """Its vocabulary, and the merges that its scores stand for."""
  from tokenizers import models

  kinds = {piece.type for piece in proto.pieces}
  if proto.trainer_spec.model_type == _UNIGRAM:
    unknown = next(i for i, piece in enumerate(proto.pieces)
                   if piece.type == _UNKNOWN)
    return models.Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces], unknown,
        _BYTE in kinds)
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  texts = {piece.piece: piece.score for piece in proto.pieces
           if piece.type not in (_UNKNOWN, _CONTROL, _BYTE)}
  merges = []
  for text, score in texts.items():
    pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
    merges += [(-score, *pair) for pair in pairs
               if pair[0] in texts and pair[1] in texts]
  merges.sort(key=lambda row: (row[0], ids[row[1]], ids[row[2]]))
  unknown = next(p.piece for p in proto.pieces if p.type == _UNKNOWN)
  return models.BPE(
      vocab=ids, merges=[row[1:] for row in merges], unk_token=unknown,
      fuse_unk=True, byte_fallback=_BYTE in kinds)
