"""Accounts of compiled programs against arithmetic and against unrolled ones.
"""

import jax
import jax.numpy as jnp
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.errors import UserError
from recursive_tx.plan import hlo

# Two devices, a loop of three, and all that TPUs write in another way than
# others: products as convolutions, a batch as a padded window, steps of one
# collective in several computations.
TEXT = """HloModule jit_f, num_partitions=2

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p.1: bf16[4,8]) -> bf16[8,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)} all-gather(%p.1), GATHER
}

%done (p.2: bf16[4,8]) -> bf16[8,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)} all-gather(%p.2), GATHER
}

%body (s: (s32[], f32[4,8], bf16[4,8])) -> (s32[], f32[4,8], bf16[4,8]) {
  %s = (s32[], f32[4,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %w = bf16[4,8]{1,0} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two), metadata={op_name="a/b (c)"}
  %w.1 = bf16[8,8]{1,0} fusion(%w), kind=kLoop, calls=%start
  %w.2 = bf16[8,8]{1,0} fusion(%w), kind=kLoop, calls=%done
  %y = f32[4,8]{1,0} convolution(%x, %w.1), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[4,8]{1,0}, bf16[4,8]{1,0}) tuple(%next, %y, %w)
}

%condition (s.1: (s32[], f32[4,8], bf16[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8], bf16[4,8]) parameter(0)
  %six = s32[] constant(6)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  ROOT %less = pred[] compare(%i.1, %six), direction=LT
}

ENTRY %main (x.1: f32[4,8], w.3: bf16[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %w.3 = bf16[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %zero.1 = s32[] copy(%zero)
  %t.1 = (s32[], f32[4,8], /*index=2*/bf16[4,8]) tuple(%zero.1, %x.1, %w.3)
  %loop = (s32[], f32[4,8], bf16[4,8]) while(%t.1), LOOP
  %q = f32[3,4,5]{2,1,0} constant({...})
  %k = f32[3,6,5]{2,1,0} constant({...})
  %scores = f32[3,4,6]{2,1,0} convolution(%q, %k), WINDOW
  ROOT %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x.1), REDUCE
}
"""
for _name, _text in {
    'GATHER': "channel_id=7, replica_groups=mesh['x'=2,'y'=3] {'x'}",
    'LOOP': 'condition=%condition, body=%body',
    'WINDOW': 'window={size=3 stride=2 pad=2_2 lhs_dilate=3}, '
              'dim_labels=0bf_0oi->0bf',
    'REDUCE': 'channel_id=9, replica_groups={{0,1}}, to_apply=%add',
}.items():
  TEXT = TEXT.replace(_name, _text)


def test_loops_products_and_collectives_are_counted():
  found = hlo.account(TEXT)
  product = 2 * 4 * 8 * 8
  # Of the window's 3 x 3 pairs of places those count that meet an input.
  met = sum((2 * o + k - 2) % 3 == 0 and 0 <= 2 * o + k - 2 < 7
            for o in range(3) for k in range(3))
  assert found.flops == 3 * product + 2 * 4 * 5 * 6 * met
  assert found.bytes == {
      'all-gather': 3 * 4 * 8 * 2, 'all-reduce': 2 * 4 * 8 * 4 / 2}
  assert found.largest[0] == (3 * 6 * 5 * 4, 'f32[3,6,5]')


def test_a_loop_without_an_end_is_refused():
  with pytest.raises(UserError, match='%?loop does not say how often'):
    hlo.account(TEXT.replace('direction=LT', 'direction=NE'))


CFG = rtx.ModelConfig(
    V=256, D=64, F=128, N=4, K=2, H=16, layers_per_loop=2, loops=2, rank='8')


def _gradient(cfg, run, token_BT):
  decoder = rtx.Decoder(cfg, run=run)

  def loss(variables):
    return decoder.apply(variables, token_BT).sum()

  return jax.jit(jax.grad(loss)).lower(tiny.variables(cfg)).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    'remat', [pytest.param('none', marks=pytest.mark.slow), 'full'])
def test_loops_count_like_unrolled_ones(remat):
  token_BT = jnp.zeros((4, 32), jnp.int32)
  looped, unrolled = (
      _gradient(CFG, rtx.Run(remat=remat, unroll=unroll, attention='plain'),
                token_BT) for unroll in (False, True))
  counted = hlo.account(looped.as_text()).flops
  assert counted == pytest.approx(
      hlo.account(unrolled.as_text()).flops, rel=0.02)
  # XLA counts all operations of the unrolled program; the others are few.
  known = unrolled.cost_analysis()['flops']
  assert 0.9 * known < counted <= known
  # And would have been wrong about the looped one.
  assert looped.cost_analysis()['flops'] < 0.7 * known
