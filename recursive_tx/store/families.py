"""Model families as data: how a Hugging Face config and its tensors map.

The only place that names families. A new one is a record in FAMILIES and a
row in the parity test. Rules rearrange and nothing else; arithmetic is the
model's. They name tensors as they lie on disk.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

from recursive_tx import config as config_lib
from recursive_tx.errors import UserError

Pattern = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
  """One lineage of decoders.

  Attributes:
    model_type: its name in config.json.
    architecture: its class in transformers.
    fixed: ModelConfig fields that are the same in every member.
    fields: (config.json's key, ModelConfig's field, default or None where
      the key must be there); a default may name another key by '=key'.
    rope: config.json's keys of rope_theta and of the rotated share (None
      where all of H is rotated), and the default share; () without rope.
    rules: (our leaf or leaves, tensor's name, einops pattern from disk to
      ours); '{i}' is the layer. Several leaves are one array's first
      dimension, or with a pattern each they lie one after the other.
    base: what the names of all tensors but the head's begin with; a model
      that was saved without its head lacks it.
    buffers: regex of tensors on disk that are not parameters.
    derived: ModelConfig fields that follow from others, by a function of
      them.
    overrides: (key, the key whose place its value takes where it is set).
    loose: values of 'hidden_act' that mean another.
    kinds: layers may differ in what they attend to: `pattern`'s letters by
      default, repeated.
    theta: default of rope_theta.
    neutral: further keys, of which the given settings alone are implemented.
    unused: further keys that do not change what is computed.
  """
  model_type: str
  architecture: str
  fixed: dict[str, Any]
  fields: tuple[tuple[str, str, Any], ...]
  rules: tuple[tuple[tuple[str, ...], str, Pattern], ...]
  rope: tuple[str, str | None, float] | tuple[()] = ('rope_theta', None, 1.0)
  base: str = 'model.'
  buffers: str = r'.*\.rotary_emb\.inv_freq'
  derived: dict[str, Callable[[dict], int]] = dataclasses.field(
      default_factory=dict)
  overrides: tuple[tuple[str, str], ...] = ()
  loose: dict[str, str] = dataclasses.field(default_factory=dict)
  kinds: str = ''
  theta: float = 10_000.0
  neutral: dict[str, tuple] = dataclasses.field(default_factory=dict)
  unused: tuple[str, ...] = ()


_SIZES = (
    ('vocab_size', 'V', None), ('hidden_size', 'D', None),
    ('intermediate_size', 'F', None), ('num_hidden_layers', 'layers', None),
    ('num_attention_heads', 'N', None))
_GROUPED = (
    *_SIZES, ('num_key_value_heads', 'K', '=num_attention_heads'),
    ('head_dim', 'H', 'hidden_size/num_attention_heads'),
    ('hidden_act', 'act', 'silu'), ('rms_norm_eps', 'norm_eps', 1e-6))


def _replaced(rows, *others):
  """Rows with other defaults, those that transformers has where they differ.
  """
  new = {row[0]: row for row in others}
  return tuple(new.get(row[0], row) for row in rows)


_LAYER = 'model.layers.{i}.'
_LLAMA_RULES = (
    (('embed/embedding',), 'model.embed_tokens.weight', 'V D -> V D'),
    (('head/kernel',), 'lm_head.weight', 'V D -> V D'),
    (('norm/scale',), 'model.norm.weight', 'D -> D'),
    (('vectors/attn_norm/scale',), _LAYER + 'input_layernorm.weight',
     'D -> D'),
    (('vectors/mlp_norm/scale',), _LAYER + 'post_attention_layernorm.weight',
     'D -> D'),
    (('layers/attn/q/kernel',), _LAYER + 'self_attn.q_proj.weight',
     '(N H) D -> D N H'),
    (('layers/attn/k/kernel',), _LAYER + 'self_attn.k_proj.weight',
     '(K H) D -> D K H'),
    (('layers/attn/v/kernel',), _LAYER + 'self_attn.v_proj.weight',
     '(K H) D -> D K H'),
    (('layers/attn/o/kernel',), _LAYER + 'self_attn.o_proj.weight',
     'D (N H) -> N H D'),
    (('vectors/q/bias',), _LAYER + 'self_attn.q_proj.bias', '(N H) -> N H'),
    (('vectors/k/bias',), _LAYER + 'self_attn.k_proj.bias', '(K H) -> K H'),
    (('vectors/v/bias',), _LAYER + 'self_attn.v_proj.bias', '(K H) -> K H'),
    (('vectors/o/bias',), _LAYER + 'self_attn.o_proj.bias', 'D -> D'),
    (('layers/mlp/gate/kernel',), _LAYER + 'mlp.gate_proj.weight',
     'F D -> D F'),
    (('layers/mlp/up/kernel',), _LAYER + 'mlp.up_proj.weight', 'F D -> D F'),
    (('layers/mlp/down/kernel',), _LAYER + 'mlp.down_proj.weight',
     'D F -> F D'),
    (('vectors/gate/bias',), _LAYER + 'mlp.gate_proj.bias', 'F -> F'),
    (('vectors/up/bias',), _LAYER + 'mlp.up_proj.bias', 'F -> F'),
    (('vectors/down/bias',), _LAYER + 'mlp.down_proj.bias', 'D -> D'))
_NEOX = 'gpt_neox.layers.{i}.'
_QKV = tuple(f'layers/attn/{name}/kernel' for name in 'qkv')
_QKV_BIAS = tuple(f'vectors/{name}/bias' for name in 'qkv')
_NEOX_RULES = (
    (('embed/embedding',), 'gpt_neox.embed_in.weight', 'V D -> V D'),
    (('head/kernel',), 'embed_out.weight', 'V D -> V D'),
    (('norm/scale',), 'gpt_neox.final_layer_norm.weight', 'D -> D'),
    (('norm/bias',), 'gpt_neox.final_layer_norm.bias', 'D -> D'),
    (('vectors/attn_norm/scale',), _NEOX + 'input_layernorm.weight',
     'D -> D'),
    (('vectors/attn_norm/bias',), _NEOX + 'input_layernorm.bias', 'D -> D'),
    (('vectors/mlp_norm/scale',), _NEOX + 'post_attention_layernorm.weight',
     'D -> D'),
    (('vectors/mlp_norm/bias',), _NEOX + 'post_attention_layernorm.bias',
     'D -> D'),
    # Each head's rows hold its query, its key and its value.
    (_QKV, _NEOX + 'attention.query_key_value.weight',
     '(N qkv H) D -> qkv D N H'),
    (_QKV_BIAS, _NEOX + 'attention.query_key_value.bias',
     '(N qkv H) -> qkv N H'),
    (('layers/attn/o/kernel',), _NEOX + 'attention.dense.weight',
     'D (N H) -> N H D'),
    (('vectors/o/bias',), _NEOX + 'attention.dense.bias', 'D -> D'),
    (('layers/mlp/up/kernel',), _NEOX + 'mlp.dense_h_to_4h.weight',
     'F D -> D F'),
    (('vectors/up/bias',), _NEOX + 'mlp.dense_h_to_4h.bias', 'F -> F'),
    (('layers/mlp/down/kernel',), _NEOX + 'mlp.dense_4h_to_h.weight',
     'D F -> F D'),
    (('vectors/down/bias',), _NEOX + 'mlp.dense_4h_to_h.bias', 'D -> D'))
_H = 'transformer.h.{i}.'
_GPT_RULES = (
    (('embed/embedding',), 'transformer.wte.weight', 'V D -> V D'),
    (('embed/positions',), 'transformer.wpe.weight', 'T D -> T D'),
    (('head/kernel',), 'lm_head.weight', 'V D -> V D'),
    *(((f'norm/{leaf}',), f'transformer.ln_f.{name}', 'D -> D')
      for leaf, name in (('scale', 'weight'), ('bias', 'bias'))),
    *(((f'vectors/{norm}/{leaf}',), f'{_H}{ln}.{name}', 'D -> D')
      for norm, ln in (('attn_norm', 'ln_1'), ('mlp_norm', 'ln_2'))
      for leaf, name in (('scale', 'weight'), ('bias', 'bias'))),
    # Kernels lie as they are applied, rows first.
    (_QKV, _H + 'attn.c_attn.weight', 'D (qkv N H) -> qkv D N H'),
    (_QKV_BIAS, _H + 'attn.c_attn.bias', '(qkv N H) -> qkv N H'),
    (('layers/attn/o/kernel',), _H + 'attn.c_proj.weight',
     '(N H) D -> N H D'),
    (('vectors/o/bias',), _H + 'attn.c_proj.bias', 'D -> D'),
    (('layers/mlp/up/kernel',), _H + 'mlp.c_fc.weight', 'D F -> D F'),
    (('vectors/up/bias',), _H + 'mlp.c_fc.bias', 'F -> F'),
    (('layers/mlp/down/kernel',), _H + 'mlp.c_proj.weight', 'F D -> F D'),
    (('vectors/down/bias',), _H + 'mlp.c_proj.bias', 'D -> D'))
_PLAIN = dict(gated=True, parallel=False)
_QK = tuple(
    ((f'vectors/{name}_norm/scale',), f'{_LAYER}self_attn.{name}_norm.weight',
     'H -> H') for name in 'qk')
_OUTPUTS = (
    (('vectors/attn_post_norm/scale',),
     _LAYER + 'post_attention_layernorm.weight', 'D -> D'),
    (('vectors/mlp_post_norm/scale',),
     _LAYER + 'post_feedforward_layernorm.weight', 'D -> D'))
_BOTH_RULES = tuple(
    (leaves, _LAYER + 'pre_feedforward_layernorm.weight', pattern)
    if leaves == ('vectors/mlp_norm/scale',) else (leaves, name, pattern)
    for leaves, name, pattern in _LLAMA_RULES) + _OUTPUTS
_OLMO_RULES = tuple(
    row for row in _LLAMA_RULES if not row[0][0].endswith('_norm/scale')) + (
        *_OUTPUTS,
        (('vectors/q_norm/scale',), _LAYER + 'self_attn.q_norm.weight',
         '(N H) -> N H'),
        (('vectors/k_norm/scale',), _LAYER + 'self_attn.k_norm.weight',
         '(K H) -> K H'))
_FUSED = ('q', 'k', 'v', 'gate', 'up')
_PHI_RULES = tuple(
    row for row in _LLAMA_RULES
    if row[0][0].split('/')[-2] not in _FUSED) + (
        (_QKV, _LAYER + 'self_attn.qkv_proj.weight',
         ('(N H) D -> D N H', '(K H) D -> D K H', '(K H) D -> D K H')),
        (('layers/mlp/gate/kernel', 'layers/mlp/up/kernel'),
         _LAYER + 'mlp.gate_up_proj.weight', ('F D -> D F', 'F D -> D F')))
# Models of Qwen and SmolLM 3 name a window that they do not use.
_NO_WINDOW = dict(neutral={'use_sliding_window': (False,)},
                  unused=('sliding_window', 'max_window_layers'))
_GEMMA_2 = (*_replaced(_GROUPED, ('num_key_value_heads', 'K', 4),
                       ('head_dim', 'H', 256),
                       ('hidden_act', 'act', 'gelu_pytorch_tanh')),
            ('tie_word_embeddings', 'tied', True),
            ('attention_bias', 'attention_bias', False),
            ('sliding_window', 'window', 4096),
            ('query_pre_attn_scalar', 'query_scale', 256))

# Fields of which each family has its own, or the default.
_OWN = (*(set(config_lib.RARE) - {'long_rope'}), 'attention_bias', 'mlp_bias',
        'window', 'embed_scale', 'parallel')

FAMILIES = {family.model_type: family for family in (
    Family(
        model_type='llama', architecture='LlamaForCausalLM',
        fixed=dict(_PLAIN, norm='rms', embed_scale=False, window=0),
        fields=(*_GROUPED, ('tie_word_embeddings', 'tied', False),
                ('attention_bias', 'attention_bias', False),
                ('mlp_bias', 'mlp_bias', False)),
        rules=_LLAMA_RULES),
    Family(
        model_type='mistral', architecture='MistralForCausalLM',
        fixed=dict(_PLAIN, norm='rms', embed_scale=False, mlp_bias=False,
                   attention_bias=False),
        fields=(*_replaced(_GROUPED, ('num_key_value_heads', 'K', 8)),
                ('tie_word_embeddings', 'tied', False),
                ('sliding_window', 'window', 4096)),
        rules=_LLAMA_RULES),
    Family(
        model_type='gemma', architecture='GemmaForCausalLM',
        fixed=dict(_PLAIN, norm='rms+1', embed_scale=True, mlp_bias=False,
                   window=0),
        fields=(*_replaced(_GROUPED, ('num_key_value_heads', 'K', 16),
                           ('head_dim', 'H', 256),
                           ('hidden_act', 'act', 'gelu_pytorch_tanh')),
                ('tie_word_embeddings', 'tied', True),
                ('attention_bias', 'attention_bias', False)),
        rules=_LLAMA_RULES,
        # The first releases say 'gelu' and were trained with the tanh form.
        overrides=(('hidden_activation', 'hidden_act'),),
        loose={'gelu': 'gelu_pytorch_tanh'}),
    Family(
        model_type='gpt_neox', architecture='GPTNeoXForCausalLM',
        fixed=dict(gated=False, norm='layer', embed_scale=False, window=0,
                   mlp_bias=True),
        fields=(*_SIZES, ('hidden_act', 'act', 'gelu'),
                ('layer_norm_eps', 'norm_eps', 1e-5),
                ('use_parallel_residual', 'parallel', True),
                ('tie_word_embeddings', 'tied', False),
                ('attention_bias', 'attention_bias', True)),
        derived={'K': lambda f: f['N'], 'H': lambda f: f['D'] // f['N']},
        rules=_NEOX_RULES, rope=('rotary_emb_base', 'rotary_pct', 0.25),
        base='gpt_neox.',
        buffers=r'gpt_neox\.layers\.\d+\.attention\.'
                r'(bias|masked_bias|rotary_emb\.inv_freq)'),
    Family(
        model_type='gpt2', architecture='GPT2LMHeadModel',
        fixed=dict(gated=False, parallel=False, norm='layer', pattern='n',
                   attention_bias=True, mlp_bias=True),
        fields=(('vocab_size', 'V', None), ('n_embd', 'D', None),
                ('n_inner', 'F', '4*n_embd'), ('n_layer', 'layers', None),
                ('n_head', 'N', None), ('n_positions', 'positions', None),
                ('activation_function', 'act', 'gelu_new'),
                ('layer_norm_epsilon', 'norm_eps', 1e-5),
                ('tie_word_embeddings', 'tied', True)),
        derived={'K': lambda f: f['N'], 'H': lambda f: f['D'] // f['N']},
        rules=_GPT_RULES, rope=(), base='transformer.',
        buffers=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',
        neutral={'scale_attn_weights': (True,),
                 'scale_attn_by_inverse_layer_idx': (False,)},
        # Dropout is not part of what it computes; scores are in fp32.
        unused=('n_ctx', 'attn_pdrop', 'embd_pdrop', 'resid_pdrop',
                'reorder_and_upcast_attn', 'summary_activation',
                'summary_first_dropout', 'summary_proj_to_labels',
                'summary_type', 'summary_use_proj', '_num_labels')),
    Family(
        model_type='qwen2', architecture='Qwen2ForCausalLM',
        fixed=dict(_PLAIN, norm='rms', qkv_bias=True),
        fields=(*_replaced(_GROUPED, ('num_key_value_heads', 'K', 32)),
                ('tie_word_embeddings', 'tied', False)),
        rules=_LLAMA_RULES, **_NO_WINDOW),
    Family(
        model_type='qwen3', architecture='Qwen3ForCausalLM',
        fixed=dict(_PLAIN, norm='rms', qk_norm='head'),
        fields=(*_replaced(_GROUPED, ('num_key_value_heads', 'K', 32),
                           ('head_dim', 'H', 128)),
                ('tie_word_embeddings', 'tied', False),
                ('attention_bias', 'attention_bias', False)),
        rules=(*_LLAMA_RULES, *_QK), **_NO_WINDOW),
    Family(
        model_type='olmo2', architecture='Olmo2ForCausalLM',
        fixed=dict(_PLAIN, norm='rms', norm_place='post', qk_norm='all'),
        fields=(*_replaced(_GROUPED, ('rms_norm_eps', 'norm_eps', 1e-5)),
                ('tie_word_embeddings', 'tied', False),
                ('attention_bias', 'attention_bias', False)),
        rules=_OLMO_RULES),
    Family(
        model_type='granite', architecture='GraniteForCausalLM',
        fixed=dict(_PLAIN, norm='rms'),
        fields=(*_GROUPED, ('tie_word_embeddings', 'tied', False),
                ('attention_bias', 'attention_bias', False),
                ('mlp_bias', 'mlp_bias', False),
                ('embedding_multiplier', 'embed_factor', 1.0),
                ('residual_multiplier', 'residual_scale', 1.0),
                ('attention_multiplier', 'query_scale', 1.0),
                ('logits_scaling', 'logits_scale', 1.0)),
        rules=_LLAMA_RULES),
    Family(
        model_type='gemma2', architecture='Gemma2ForCausalLM',
        fixed=dict(_PLAIN, norm='rms+1', norm_place='both', embed_scale=True),
        fields=(*_GEMMA_2, ('attn_logit_softcapping', 'attention_cap', 50.0),
                ('final_logit_softcapping', 'logits_cap', 30.0)),
        rules=_BOTH_RULES, kinds='wg',
        overrides=(('hidden_activation', 'hidden_act'),)),
    Family(
        model_type='gemma3_text', architecture='Gemma3ForCausalLM',
        fixed=dict(_PLAIN, norm='rms+1', norm_place='both', embed_scale=True,
                   qk_norm='head'),
        fields=(*_GEMMA_2, ('attn_logit_softcapping', 'attention_cap', 0.0),
                ('final_logit_softcapping', 'logits_cap', 0.0),
                ('rope_local_base_freq', 'window_theta', 10_000.0)),
        rules=(*_BOTH_RULES, *_QK), kinds='wwwwwg', theta=1e6,
        overrides=(('hidden_activation', 'hidden_act'),),
        unused=('sliding_window_pattern', '_sliding_window_pattern')),
    Family(
        model_type='phi3', architecture='Phi3ForCausalLM',
        fixed=dict(_PLAIN, norm='rms'),
        fields=(*_replaced(_GROUPED, ('rms_norm_eps', 'norm_eps', 1e-5)),
                ('tie_word_embeddings', 'tied', False),
                ('sliding_window', 'window', 0)),
        rules=_PHI_RULES, rope=('rope_theta', 'partial_rotary_factor', 1.0),
        neutral={'resid_pdrop': (0,), 'embd_pdrop': (0,)}),
    Family(
        model_type='smollm3', architecture='SmolLM3ForCausalLM',
        fixed=dict(_PLAIN, norm='rms'),
        fields=(*_replaced(_GROUPED, ('num_key_value_heads', 'K', 4)),
                ('tie_word_embeddings', 'tied', True),
                ('attention_bias', 'attention_bias', False),
                ('mlp_bias', 'mlp_bias', False)),
        rules=_LLAMA_RULES, kinds='gggn', theta=2e6,
        neutral=_NO_WINDOW['neutral'],
        unused=(*_NO_WINDOW['unused'], 'no_rope_layer_interval')))}


def of(
    cfg: config_lib.ModelConfig, preferred: str | None = None
) -> Family:
  """A family that computes like `cfg`: the preferred model_type if it does."""
  families = sorted(
      FAMILIES.values(), key=lambda family: family.model_type != preferred)
  for family in families:
    fits = all(getattr(cfg, k) == v for k, v in {
        **_unread(family), **family.fixed}.items()) and set(
            cfg.pattern) <= set(family.fixed.get('pattern', family.kinds))
    share = not family.rope or family.rope[1] is not None or (
        cfg.rope_fraction == 1.0)
    heads = any(f == 'K' for _, f, _ in family.fields) or (
        cfg.K == cfg.N and cfg.N * cfg.H == cfg.D)
    if fits and share and heads:
      return family
  raise UserError(
      f'no family of {", ".join(FAMILIES)} computes what this model does '
      f'(norm={cfg.norm}, gated={cfg.gated}, window={cfg.window}); it can be '
      f'saved but not exported')


def _unread(family: Family) -> dict[str, Any]:
  """Fields that no model of the family sets, and their values."""
  read = {field for _, field, _ in family.fields} | set(family.fixed)
  if family.kinds:
    read |= {'pattern', 'window'}
  return {
      field.name: field.default
      for field in dataclasses.fields(config_lib.ModelConfig)
      if field.name in _OWN and field.name not in read}


def tensors(
    family: Family, cfg: config_lib.ModelConfig
) -> list[tuple[str, tuple[str, ...], Pattern, int | None]]:
  """(name on disk, our leaves, pattern, layer) of every tensor of `cfg`."""
  rows = []
  for leaves, name, pattern in family.rules:
    if not _has(cfg, leaves[0]):
      continue
    layers = range(cfg.num_layers) if '{i}' in name else (None,)
    rows += [(name.format(i=i), leaves, pattern, i) for i in layers]
  return rows


def is_buffer(family: Family, name: str) -> bool:
  """Whether a tensor on disk is a buffer that no parameter comes from."""
  return re.fullmatch(family.buffers, name) is not None


def _has(cfg, leaf: str) -> bool:
  """Whether a model of this config has the leaf at all."""
  part, *rest = leaf.split('/')
  if part == 'head':
    return not cfg.tied
  if rest[-1] == 'bias' and part == 'vectors' and rest[0] in cfg.kernels:
    return cfg.has_bias(rest[0])
  return True
