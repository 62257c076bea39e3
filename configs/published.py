"""Sizes of published models, as in their own config.json files.

For `plan` and for the baselines that start from random weights: a run that
starts from a checkpoint takes them from there.
"""

GEMMA_2B = dict(
    V=256_000, D=2048, F=16_384, N=8, K=1, H=256, layers_per_loop=18,
    norm='rms+1', norm_eps=1e-6, act='gelu_tanh', embed_scale=True)
TINYLLAMA_1B = dict(
    V=32_000, D=2048, F=5632, N=32, K=4, H=64, layers_per_loop=22,
    norm='rms', norm_eps=1e-5, act='silu', tied=False)
_PYTHIA = dict(
    V=50_304, norm='layer', norm_eps=1e-5, act='gelu', gated=False,
    parallel=True, attention_bias=True, mlp_bias=True, rope_fraction=0.25,
    tied=False)
PYTHIA_1B = dict(
    _PYTHIA, D=2048, F=8192, N=8, K=8, H=256, layers_per_loop=16)
PYTHIA_410M = dict(
    _PYTHIA, D=1024, F=4096, N=16, K=16, H=64, layers_per_loop=24)
PYTHIA_160M = dict(
    _PYTHIA, D=768, F=3072, N=12, K=12, H=64, layers_per_loop=12)
