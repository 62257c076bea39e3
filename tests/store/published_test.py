"""Every published size: its config.json is read, and has its parameters.

The sizes are those of the models' own config.json files, the counts those of
their cards. Nothing is made but shapes.
"""

import math

import pytest

from recursive_tx import model
from recursive_tx.store import config_json

PUBLISHED = {
    'Qwen/Qwen2.5-0.5B': (494_032_768, dict(
        model_type='qwen2', vocab_size=151936, hidden_size=896,
        intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1000000.0,
        use_sliding_window=False, sliding_window=32768, max_window_layers=24)),
    'Qwen/Qwen2.5-7B': (7_615_616_512, dict(
        model_type='qwen2', vocab_size=152064, hidden_size=3584,
        intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False)),
    'Qwen/Qwen3-0.6B': (596_049_920, dict(
        model_type='qwen3', vocab_size=151936, hidden_size=1024,
        intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    'Qwen/Qwen3-8B': (8_190_735_360, dict(
        model_type='qwen3', vocab_size=151936, hidden_size=4096,
        intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)),
    'google/gemma-2-2b': (2_614_341_888, dict(
        model_type='gemma2', vocab_size=256000, hidden_size=2304,
        intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256)),
    'google/gemma-2-9b': (9_241_705_984, dict(
        model_type='gemma2', vocab_size=256000, hidden_size=3584,
        intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256)),
    'google/gemma-3-270m': (268_098_176, dict(
        model_type='gemma3_text', vocab_size=262144, hidden_size=640,
        intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
        _sliding_window_pattern=6)),
    'google/gemma-3-1b-pt': (999_885_952, dict(
        model_type='gemma3_text', vocab_size=262144, hidden_size=1152,
        intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
        sliding_window_pattern=6)),
    'allenai/OLMo-2-0425-1B': (1_484_916_736, dict(
        model_type='olmo2', vocab_size=100352, hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16)),
    'allenai/OLMo-2-1124-7B': (7_298_617_344, dict(
        model_type='olmo2', vocab_size=100352, hidden_size=4096,
        intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32)),
    'HuggingFaceTB/SmolLM3-3B': (3_075_098_624, dict(
        model_type='smollm3', vocab_size=128256, hidden_size=2048,
        intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True)),
    'ibm-granite/granite-3.0-2b-base': (2_533_531_648, dict(
        model_type='granite', vocab_size=49155, hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True)),
    'meta-llama/Llama-3.2-1B': (1_235_814_400, dict(
        model_type='llama', vocab_size=128256, hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)),
    'meta-llama/Llama-3.1-8B': (8_030_261_248, dict(
        model_type='llama', vocab_size=128256, hidden_size=4096,
        intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False)),
    'mistralai/Mistral-7B-v0.1': (7_241_732_096, dict(
        model_type='mistral', vocab_size=32000, hidden_size=4096,
        intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8)),
    'google/gemma-2b': (2_506_172_416, dict(
        model_type='gemma', vocab_size=256000, hidden_size=2048,
        intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256)),
    'microsoft/Phi-3-mini-4k-instruct': (3_821_079_552, dict(
        model_type='phi3', vocab_size=32064, hidden_size=3072,
        intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, sliding_window=2047, resid_pdrop=0.0)),
    'microsoft/Phi-3-mini-128k-instruct': (3_821_079_552, dict(
        model_type='phi3', vocab_size=32064, hidden_size=3072,
        intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, sliding_window=262144,
        max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=dict(type='longrope', short_factor=48 * [1.05],
                          long_factor=48 * [2.0]))),
    'microsoft/Phi-3-medium-4k-instruct': (13_960_238_080, dict(
        model_type='phi3', vocab_size=32064, hidden_size=5120,
        intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, sliding_window=2047)),
    'microsoft/Phi-4-mini-instruct': (3_836_021_760, dict(
        model_type='phi3', vocab_size=200064, hidden_size=3072,
        intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24,
        num_key_value_heads=8, partial_rotary_factor=0.75,
        tie_word_embeddings=True, sliding_window=262144,
        max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=dict(type='longrope', short_factor=48 * [1.0],
                          long_factor=48 * [2.0]))),
    'microsoft/phi-4': (14_659_507_200, dict(
        model_type='phi3', vocab_size=100352, hidden_size=5120,
        intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, rope_theta=250000)),
    'openai-community/gpt2': (124_439_808, dict(
        model_type='gpt2', n_embd=768, n_layer=12, n_head=12, n_ctx=1024,
        n_positions=1024, vocab_size=50257, attn_pdrop=0.1,
        summary_type='cls_index')),
    'openai-community/gpt2-xl': (1_557_611_200, dict(
        model_type='gpt2', n_embd=1600, n_layer=48, n_head=25, n_inner=None,
        n_positions=1024, vocab_size=50257)),
    'EleutherAI/pythia-410m': (405_334_016, dict(
        model_type='gpt_neox', vocab_size=50304, hidden_size=1024,
        intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_it_has_the_published_parameters(name):
  count, hf = PUBLISHED[name]
  cfg = config_json.read(hf)[1]
  assert count == sum(
      math.prod(shape) for shape in model.flat_shapes(cfg).values())


@pytest.mark.parametrize('name, pattern', [
    ('google/gemma-2-9b', 'wg'), ('google/gemma-3-1b-pt', 'wwwwwg'),
    ('HuggingFaceTB/SmolLM3-3B', 'gggn'), ('Qwen/Qwen2.5-0.5B', '')])
def test_its_layers_attend_as_they_should(name, pattern):
  assert config_json.read(PUBLISHED[name][1])[1].pattern == pattern
