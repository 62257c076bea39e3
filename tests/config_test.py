"""ModelConfig and Run accept what they can compute and explain the rest."""

import dataclasses

import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import config as config_lib

BASE = tiny.FAMILIES['llama']


@pytest.mark.parametrize('kernel, inner, outer, shape', [
    ('q', 'D', 'NH', (16, 4, 6)), ('k', 'D', 'KH', (16, 2, 6)),
    ('v', 'D', 'KH', (16, 2, 6)), ('o', 'NH', 'D', (4, 6, 16)),
    ('gate', 'D', 'F', (16, 24)), ('up', 'D', 'F', (16, 24)),
    ('down', 'F', 'D', (24, 16)),
])
def test_one_string_gives_a_kernels_shape(kernel, inner, outer, shape):
  assert config_lib.split(config_lib.KERNELS[kernel]) == (inner, outer)
  assert BASE.shape(inner + outer) == shape
  rows, columns = BASE.in_out(kernel)
  assert (rows, columns) == (
      {'o': 24, 'down': 24}.get(kernel, 16),
      {'q': 24, 'k': 12, 'v': 12, 'o': 16, 'down': 16}.get(kernel, 24))


@pytest.mark.parametrize('rank, ranks', [
    (0, dict(q=0, k=0, v=0, o=0, gate=0, up=0, down=0)),
    ('5', dict(q=5, k=5, v=5, o=5, gate=5, up=5, down=5)),
    # Capped at min(in, out).
    (14, dict(q=14, k=12, v=12, o=14, gate=14, up=14, down=14)),
    ('full', dict(q=16, k=12, v=12, o=16, gate=16, up=16, down=16)),
    ('q3+k2+v20+o1+mlp4', dict(q=3, k=2, v=12, o=1, gate=4, up=4, down=4)),
    ('attn2+down9', dict(q=2, k=2, v=2, o=2, gate=0, up=0, down=9)),
])
def test_rank_by_kernel(rank, ranks):
  assert dataclasses.replace(BASE, rank=rank).ranks == ranks


def test_an_ungated_mlp_has_no_gate():
  assert 'gate' not in tiny.FAMILIES['gpt_neox'].kernels
  cfg = dataclasses.replace(tiny.FAMILIES['gpt_neox'], rank='mlp3')
  assert cfg.ranks == dict(q=0, k=0, v=0, o=0, up=3, down=3)


@pytest.mark.parametrize('rank, parts', [
    ('q', ("'q'", 'q64+k32', "'full'")),
    ('-1', ("'-1'", "'full'")),
    (-1, ("'-1'", "'full'")),
    ('4.5', ("'4.5'", "'full'")),
    ('', ("''", "'full'")),
    (True, ('True', "'full'")),
    ('q4,k4', ("'q4,k4'", "'full'")),
    ('64+q8', ("'64'", "'full'")),
    ('qq4', ("'qq'", 'gate', 'mlp')),
    ('atn4', ("'atn'", "'attn'")),
    ('q4+q8', ("'q'", 'twice')),
    ('attn4+o8', ("'o'", 'twice')),
])
def test_a_bad_rank_is_refused(rank, parts):
  with tiny.refused('rank', *parts):
    dataclasses.replace(BASE, rank=rank)


def test_layers_are_counted():
  assert BASE.num_layers == 6
  assert tiny.MIXED.num_layers == 1 + 2 * 2 + 1


@pytest.mark.parametrize('field', [
    'V', 'D', 'F', 'N', 'K', 'H', 'layers_per_loop', 'loops', 'prelude',
    'coda', 'window', 'exit_gate'])
@pytest.mark.parametrize('value', [-1, 2.0, '2', True, None])
def test_sizes_are_positive_integers(field, value):
  with tiny.refused(f'model.{field} is {value!r}'):
    dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize('change, parts', [
    (dict(loops=0), ('model.loops is 0', 'at least 1')),
    (dict(layers_per_loop=0), ('model.layers_per_loop is 0', 'at least 1')),
    (dict(K=3), ('model.K=3', 'model.N=4', 'divide')),
    (dict(pattern='wx'), ("'wx'", "'w'", "'g'")),
    (dict(pattern='wg', window=0), ("'wg'", 'model.window=0')),
    (dict(pattern='gn', window=5), ("'gn'", 'model.window=5')),
    (dict(norm_place='mid'), ("'mid'", 'both')),
    (dict(qk_norm='heads'), ("'heads'", "'head'")),
    (dict(K=8), ('model.K=8', 'divide')),
    (dict(rope_fraction=0.0), ('model.rope_fraction is 0.0', 'above 0')),
    (dict(rope_fraction=1.5), ('model.rope_fraction is 1.5', 'at most')),
    (dict(rope_fraction=0.5), ('model.rope_fraction=0.5', 'even')),
    (dict(rope_scaling=(1.0, 2.0)), ('(1.0, 2.0)', 'linear', 'Llama 3')),
    (dict(long_rope=(8.0, 1.0)), ('2 numbers', 'expected')),
    (dict(norm='rmsnorm'), ("'rmsnorm'", "'rms'", 'layer')),
    (dict(act='gelu_tan'), ("'gelu_tan'", "'gelu_tanh'", 'silu')),
    (dict(exit_gate=4), ('model.exit_gate=4', 'loops=1')),
])
def test_what_cannot_be_computed_is_refused(change, parts):
  with tiny.refused(*parts):
    dataclasses.replace(BASE, **change)


@pytest.mark.parametrize('field, value', [
    ('tied', 'false'), ('loop_norms', 0), ('gated', None),
    ('norm_eps', '1e-6'), ('rope_theta', None), ('rope_fraction', '1'),
    ('rope_scaling', ('8',)), ('rope_scaling', '8')])
def test_flags_and_numbers_have_their_type(field, value):
  # 'false' is true to Python: an ill-typed field must not pass in silence.
  with tiny.refused(f'model.{field}'):
    dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize('change, parts', [
    (dict(dtype='float16'), ("'float16'", "'bfloat16'", 'float32')),
    (dict(remat='ful'), ("'ful'", "'full'", 'none')),
    (dict(attention='block'), ("'block'", "'blocks'", 'plain')),
])
def test_an_unknown_way_to_run_names_the_nearest(change, parts):
  with tiny.refused(f'run.{next(iter(change))}', *parts):
    rtx.Run(**change)


def test_configs_are_values():
  twin = dataclasses.replace(BASE, rope_scaling=[2.0])
  assert hash(twin) == hash(dataclasses.replace(BASE, rope_scaling=(2.0,)))
  with pytest.raises(dataclasses.FrozenInstanceError):
    BASE.V = 3


def test_chunks_keep_to_the_budget():
  run = rtx.Run(logits_mib=1)
  assert run.chunk(12, 1 << 18) == 4
  assert run.chunk(12, (1 << 18) + 1) == 3
  assert run.chunk(12, 1 << 30) == 1
  assert run.chunk(12, 1) == 12
