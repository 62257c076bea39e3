"""A bare SentencePiece model as the files that transformers reads as we do.

Given `tokenizer.model` alone, transformers 5 makes a tokenizer of its own of
it: without BOS, without the space before a text, with other pieces. So an
export gets `tokenizer.json`, with the same vocabulary and the same rules, and
a `tokenizer_config.json` that has it read as it is.
"""

import json
import pathlib
from typing import Any

from recursive_tx.errors import UserError
from recursive_tx.text import tokenizer as tokenizer_lib

_SPACE = '▁'
# Types of pieces: sentencepiece_model.proto, ModelProto.SentencePiece.Type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_BESIDE = ('tokenizer.json', 'tokenizer_config.json', 'added_tokens.json')


def add_tokenizer_json(directory: pathlib.Path) -> None:
  """Writes both files beside a tokenizer.model that stands alone.

  Leaves a directory as it is that has either, or added tokens, or a model
  that cannot be used (no end of text) or whose rules `tokenizers` lacks
  (words, characters, user-defined pieces).
  """
  path = directory / 'tokenizer.model'
  if not path.is_file() or any((directory / n).exists() for n in _BESIDE):
    return
  from sentencepiece import sentencepiece_model_pb2

  try:
    ours = tokenizer_lib.load(directory)
  except UserError:
    return
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  kinds = {piece.type for piece in proto.pieces}
  if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or (
      _USER_DEFINED in kinds or proto.trainer_spec.treat_whitespace_as_suffix):
    return
  made = _made(proto, ours.bos_id)
  pieces = [piece.piece for piece in proto.pieces]
  unknown = next(p.piece for p in proto.pieces if p.type == _UNKNOWN)
  settings = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'add_bos_token': ours.bos_id is not None, 'add_eos_token': False,
      'clean_up_tokenization_spaces': False, 'unk_token': unknown,
      'eos_token': pieces[ours.eos_id]}
  if ours.bos_id is not None:
    settings['bos_token'] = pieces[ours.bos_id]
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(
      json.dumps(settings, indent=2, ensure_ascii=False) + '\n', 'utf-8')


def _made(proto, bos_id: int | None) -> Any:
  """The `tokenizers.Tokenizer` of a SentencePiece model."""
  import tokenizers
  from tokenizers import decoders, normalizers, pre_tokenizers, processors

  spec = proto.normalizer_spec
  steps = []
  if spec.precompiled_charsmap:
    steps += [normalizers.Precompiled(spec.precompiled_charsmap)]
  if spec.remove_extra_whitespaces:
    # With a prefix, a first space is the prefix.
    edge = ' $' if spec.add_dummy_prefix else '^ | $'
    steps += [normalizers.Replace(tokenizers.Regex(' {2,}'), ' '),
              normalizers.Replace(tokenizers.Regex(edge), '')]
  steps += [normalizers.Replace(' ', _SPACE)]
  made = tokenizers.Tokenizer(_model(proto))
  made.normalizer = normalizers.Sequence(steps)
  joined = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(),
            decoders.Fuse()]
  if spec.add_dummy_prefix:
    # A space before the text, but not after a special token. Where spaces
    # count, also before one: as that is _SPACE by now, the first step does
    # not take it for the space it puts there.
    first = _SPACE if spec.remove_extra_whitespaces else ' '
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(first, 'first', split=False),
        pre_tokenizers.Metaspace(_SPACE, 'never', split=False)])
    joined += [decoders.Strip(' ', 1, 0)]
  made.decoder = decoders.Sequence(joined)
  made.add_special_tokens([
      tokenizers.AddedToken(piece.piece, special=True, normalized=False)
      for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)])
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
