"""What the CPU's forms compute is what the plain ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.model import cpu


@pytest.mark.parametrize('layout', ['cpu', 'plain'])
@pytest.mark.parametrize('spec, shapes', [
    ('BTD,DNH->BTNH', ((2, 3, 5), (5, 2, 4))),
    ('BTNH,NHD->BTD', ((2, 3, 2, 4), (2, 4, 5))),
    ('TD,VD->TV', ((3, 5), (7, 5)))])
def test_a_product_has_the_gradients_of_einsum(spec, shapes, layout):
  rng = np.random.default_rng(0)
  x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  pull = rng.normal(size=np.einsum(spec, x, kernel).shape)

  def gradients(function):
    return jax.grad(lambda *pair: jnp.sum(pull * function(*pair)),
                    argnums=(0, 1))(x, kernel)

  ours = gradients(lambda *pair: cpu.product(
      rtx.Run(layout=layout), spec, *pair, jnp.float32))
  plain = gradients(lambda *pair: jnp.einsum(spec, *pair))
  for one, other in zip(ours, plain, strict=True):
    assert tiny.distance(one, other) < 1e-6


@pytest.mark.parametrize('layout', ['cpu', 'plain'])
def test_argmax_is_the_first_largest(layout):
  x = np.random.default_rng(0).integers(0, 4, (50, 3, 9)).astype(np.float32)
  x[0] = -np.inf
  found = cpu.argmax(rtx.Run(layout=layout), x)
  assert found.dtype == jnp.int32
  assert (found == x.argmax(-1)).all()


def test_the_platform_chooses(monkeypatch):
  on = {}
  for platform in ('cpu', 'gpu', 'tpu'):
    monkeypatch.setattr(cpu, 'platform', lambda platform=platform: platform)
    on[platform] = [cpu.chosen(rtx.Run(layout=layout))
                    for layout in ('auto', 'plain', 'cpu')]
  assert on == {'cpu': [True, False, True], 'gpu': [False, False, True],
                'tpu': [False, False, True]}
