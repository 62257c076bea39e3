"""config.json of a family: to a ModelConfig and back, every key accounted for.

What each key means is the family's record; see families.py.
"""

from typing import Any

from recursive_tx import config as config_lib
from recursive_tx.errors import UserError, one_of
from recursive_tx.store import fields as fields_lib
from recursive_tx.store.families import FAMILIES, Family

_ACTS = {
    'silu': 'silu', 'swish': 'silu', 'relu': 'relu', 'gelu': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh'}
# Config attributes that do not change what the model computes: of
# transformers, of generation (which older versions kept here), of trainers.
_IRRELEVANT = frozenset('''
    _attn_implementation _attn_implementation_autoset _commit_hash
    _flash_attn_2_enabled _name_or_path architectures attn_implementation
    bos_token_id chunk_size_feed_forward classifier_dropout dtype eos_token_id
    finetuning_task id2label initializer_range is_decoder is_llama_config
    label2id max_position_embeddings model_type name_or_path output_attentions
    output_hidden_states pad_token_id prefix pretraining_tp problem_type
    return_dict sep_token_id task_specific_params tf_legacy_loss
    tokenizer_class torch_dtype transformers.js_config transformers_version
    unk_token_id use_cache

    bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p

    gradient_checkpointing max_sequence_length model_max_length
    neftune_noise_alpha tokenizer_model_max_length tokenizer_padding_side
    trust_remote_code unsloth_fixed unsloth_version use_flash_attention_2
'''.split())
# Config attributes of which one setting is implemented.
_REQUIRED = {
    'add_cross_attention': (False,), 'attention_dropout': (0, None),
    'hidden_dropout': (0, None), 'is_encoder_decoder': (False,),
    'pruned_heads': ({}, None), 'quantization_config': (None,),
    'rope_interleaved': (False,), 'use_bidirectional_attention': (False, None),
    'tie_encoder_decoder': (False,), 'torchscript': (False,),
    'use_bfloat16': (False,)}
# Keys whose null means something else than their absence.
_NULL = {'sliding_window': 0, 'num_key_value_heads': '=num_attention_heads',
         'attn_logit_softcapping': 0.0, 'final_logit_softcapping': 0.0}
# Fields that are sizes, which must be positive integers.
_SIZED = ('V', 'D', 'F', 'N', 'K', 'H', 'layers')
# Fields whose value in config.json is another number that means the same.
_FORMS = {
    'query_pre_attn_scalar': (lambda v: v**-0.5, lambda v: round(v**-2)),
    'logits_scaling': (lambda v: 1 / v, lambda v: 1 / v),
    'attn_logit_softcapping': (lambda v: v or 0.0, lambda v: v or None),
    'final_logit_softcapping': (lambda v: v or 0.0, lambda v: v or None),
}
_LAYER_TYPES = {'w': 'sliding_attention', 'g': 'full_attention',
                'n': 'full_attention'}


def read(
    hf: dict[str, Any]
) -> tuple[Family, config_lib.ModelConfig]:
  """Family and vanilla ModelConfig of a parsed config.json.

  Raises:
    UserError: an unknown model_type, a missing attribute, or an attribute or
      value that the family does not implement.
  """
  kind = hf.get('model_type')
  if str(kind) not in FAMILIES:  # Gemma 4 is no misspelt Gemma.
    raise UserError(
        f'config.json: model_type {kind!r} is not implemented; expected one'
        f' of {", ".join(FAMILIES)}')
  family = FAMILIES[kind]
  _account(hf, family)
  fields_lib.agreed({key: hf.get(key) for key in ('dtype', 'torch_dtype')})
  hf = _flat_rope(hf)
  for key, place in family.overrides:
    hf[place] = fields_lib.agreed({
        name: family.loose.get(str(hf.get(name)), hf.get(name))
        for name in (key, place)})
  fields = dict(family.fixed)
  for key, field, default in family.fields:
    value = _value(hf, key, field, default)
    fields[field] = _FORMS[key][0](value) if key in _FORMS else value
  for field, derive in family.derived.items():
    fields[field] = derive(fields)
  act = str(fields['act'])
  act = family.loose.get(act, act)
  key = next(key for key, field, _ in family.fields if field == 'act')
  one_of(f'config.json: {key}', act, _ACTS)
  layers = fields.pop('layers')
  fields.update(act=_ACTS[act], window=fields.get('window') or 0,
                layers_per_loop=layers)
  if family.kinds:
    fields['pattern'] = _pattern(hf, family, layers)
    if 'w' not in fields['pattern']:
      fields.update(window=0)
  if family.rope:
    fields.update(fields_lib.read_rope(hf, *family.rope, family.theta))
  return family, config_lib.ModelConfig(**fields)


def _flat_rope(hf):
  """With rope_parameters of the global layers, where each kind has its own."""
  rope = hf.get('rope_parameters')
  if not isinstance(rope, dict) or 'full_attention' not in rope:
    return dict(hf)
  local = rope.get('sliding_attention') or {}
  fields_lib.agreed({'rope_parameters.sliding_attention.rope_type':
                     local.get('rope_type', 'default'), 'expected': 'default'})
  theta = fields_lib.agreed({
      'rope_local_base_freq': hf.get('rope_local_base_freq'),
      'rope_parameters.sliding_attention.rope_theta': local.get('rope_theta')})
  return {**hf, 'rope_parameters': rope['full_attention'], **(
      {} if theta is None else {'rope_local_base_freq': theta})}


def _pattern(hf, family: Family, layers: int) -> str:
  """`ModelConfig.pattern` from the lists that name every layer."""
  letters = {name: letter for letter, name in _LAYER_TYPES.items()
             if letter in family.kinds}
  named = hf.get('layer_types')
  for name in named or ():
    one_of('config.json: layer_types', str(name), letters)
  every = hf.get('sliding_window_pattern') or hf.get('_sliding_window_pattern')
  if 'n' in family.kinds:
    interval = hf.get('no_rope_layer_interval', 4)
    uses = hf.get('no_rope_layers') or [
        (i + 1) % interval != 0 for i in range(layers)]
    found = ''.join('g' if rotated else 'n' for rotated in uses)
  elif named is not None:
    found = ''.join(letters[name] for name in named)
  elif every:
    found = ''.join('wg'[(i + 1) % every == 0] for i in range(layers))
  else:
    found = (family.kinds * layers)[:layers]
  if len(found) != layers:
    raise UserError(
        f'config.json: {len(found)} layers are named, and'
        f' num_hidden_layers={layers}; make them agree')
  short = next(n for n in range(1, layers + 1)
               if (found[:n] * layers)[:layers] == found)
  return found[:short]


def write(
    family: Family, cfg: config_lib.ModelConfig
) -> dict[str, Any]:
  """config.json of a vanilla model: what `read` reads as `cfg`."""
  hf = {'architectures': [family.architecture],
        'model_type': family.model_type,
        # The default of some families lies beyond a small vocabulary.
        'pad_token_id': None}
  for key, field, _ in family.fields:
    value = cfg.num_layers if field == 'layers' else getattr(cfg, field)
    hf[key] = _FORMS[key][1](value) if key in _FORMS else value
  # Names of one function differ in transformers by rounding.
  act, usual = next(row[::2] for row in family.fields if row[1] == 'act')
  hf[act] = next(name for name in (usual, *_ACTS) if _ACTS[name] == cfg.act)
  if 'sliding_window' in hf:
    hf['sliding_window'] = cfg.window or None
  if family.rope:
    theta, share, _ = family.rope
    hf[theta] = cfg.rope_theta
    if share:
      hf[share] = cfg.rope_fraction
    hf['rope_scaling'] = fields_lib.write_scaling(cfg)
    if cfg.long_rope:  # Where Phi 3 has it.
      hf['original_max_position_embeddings'] = int(cfg.long_rope[0])
  if family.kinds:
    kinds = [cfg.kind(layer) for layer in range(cfg.num_layers)]
    hf['layer_types'] = [_LAYER_TYPES[kind] for kind in kinds]
    if 'n' in family.kinds:
      hf['no_rope_layers'] = [int(kind != 'n') for kind in kinds]
  for key, place in family.overrides:
    hf[key] = hf[place]
  return hf


def _value(hf, key, field, default):
  """A key's value, else its default; sizes are positive integers."""
  value = hf.get(key)
  if value is None:
    value = _NULL.get(key, default) if key in hf else default
  if value is None:
    raise UserError(f'config.json has no {key!r}, which a '
                     f'{hf["model_type"]} model needs')
  if value == 'hidden_size/num_attention_heads':
    return hf['hidden_size'] // hf['num_attention_heads']
  if value == '4*n_embd':
    return 4 * hf['n_embd']
  if isinstance(value, str) and value.startswith('='):
    return hf[value[1:]]
  if field in _SIZED and (not fields_lib.is_number(value, int) or value < 1):
    raise UserError(f'config.json: {key}={value!r}; expected a size, an '
                     f'integer of at least 1')
  return value


def handled(family: Family) -> set[str]:
  """The keys of config.json that a ModelConfig of the family comes from."""
  rope = {'rope_theta', 'rope_scaling', 'rope_parameters',
          'original_max_position_embeddings', 'partial_rotary_factor',
          *family.rope[:2]} if family.rope else set()
  return rope | {key for key, _, _ in family.fields} | {
      key for key, _ in family.overrides} | (
          {'layer_types', 'no_rope_layers'} if family.kinds else set())


def _account(hf, family) -> None:
  """Raises for any attribute that would be silently ignored."""
  known = handled(family)
  neutral = {**_REQUIRED, 'sliding_window': (None,),
             'layer_types': (None,), 'attention_bias': (False,),
             'mlp_bias': (False,), **family.neutral}
  for key, value in hf.items():
    if key in known or key in _IRRELEVANT or key in family.unused:
      continue
    if key == 'layer_types' and set(value or ()) == {'full_attention'}:
      continue
    if key in neutral and any(value == ok for ok in neutral[key]):
      continue
    raise UserError(
        f'config.json: {key}={value!r} is not implemented for '
        f'{family.model_type}; remove it from config.json if it does not '
        f'change what the model computes')
