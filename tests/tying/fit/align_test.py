"""Hidden units of tied layers in step: the same model, nearer layers."""

import dataclasses

import numpy as np
import pytest
import tiny

from recursive_tx import model
from recursive_tx.files import paths
from recursive_tx.tying import fit
from recursive_tx.tying.fit import align

LLAMA = tiny.FAMILIES['llama']


def _read(values):
  return lambda path, layer: paths.get(values['params'], path)[
      () if layer is None else layer]


def _orders(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return {layer: rng.permutation(cfg.F) for layer in (1, 2, 4)}


def _variables(cfg, read):
  params = {}
  for path in model.flat_shapes(cfg):
    paths.put(params, path, read(path, None) if not path.startswith(
        'block/') else np.stack([
            read(path, layer) for layer in range(cfg.num_layers)]))
  return {'params': params}


@pytest.mark.parametrize('name', tiny.EACH_FAMILY)
def test_the_aligned_model_is_the_original(name):
  cfg = tiny.FAMILIES[name]
  values, token_BT = tiny.variables(cfg), tiny.tokens(cfg)
  aligned = align.Aligned(_read(values), None, _orders(cfg))
  permuted = _variables(cfg, aligned.read)
  up = [v['params']['block']['layers']['mlp']['up']['kernel'][1]
        for v in (permuted, values)]
  assert not np.array_equal(*up)
  assert tiny.distance(tiny.decoder(cfg)(permuted, token_BT),
                       tiny.decoder(cfg)(values, token_BT)) < 1e-5


def test_moments_of_the_aligned_model_are_the_aligned_moments(tmp_path):
  values, token_QT = tiny.variables(LLAMA), tiny.tokens(LLAMA, 4)
  found = []
  for place, read in enumerate((_read(values), None)):
    folder = tmp_path / str(place)
    folder.mkdir()
    read = read or align.Aligned(_read(values), None, _orders(LLAMA)).read
    found.append(fit.measure(LLAMA, read, token_QT, folder, seed=0))
  aligned = align.Aligned(_read(values), found[0], _orders(LLAMA))
  for name in LLAMA.kernels:
    for side in ('input', 'output'):
      one, other = (getattr(m, side)(name, 1) for m in (aligned, found[1]))
      assert np.abs(one - other).max() < 1e-4 * np.abs(other).max(), name


class _Same:
  """Moments that are the same in every direction."""

  def input(self, kernel, layer):
    return np.eye(LLAMA.in_out(kernel)[0])

  def output(self, kernel, layer):
    return np.eye(LLAMA.in_out(kernel)[1])


def test_units_that_only_stand_elsewhere_are_found():
  values = tiny.variables(LLAMA)
  for path, value in paths.items(values['params']['block']):
    paths.put(values['params']['block'], path, np.concatenate([value[:2]] * 3))
  permuted = align.Aligned(_read(values), None, _orders(LLAMA)).read
  tied = dataclasses.replace(LLAMA, loops=3, layers_per_loop=2)
  orders = align.orders(tied, permuted, _Same())
  assert sorted(orders) == [2, 3, 4, 5]
  again = align.Aligned(permuted, None, orders).read
  for name in ('gate', 'up', 'down'):
    path = f'block/layers/mlp/{name}/kernel'
    for layer in orders:
      assert np.array_equal(again(path, layer), again(path, layer % 2))


def test_only_what_is_seen_and_does_something_decides(monkeypatch):
  rng = np.random.default_rng(0)
  values = tiny.variables(LLAMA)
  mlp = values['params']['block']['layers']['mlp']
  order = rng.permutation(LLAMA.F)
  for name, leaf in mlp.items():
    one, noise = leaf['kernel'][0], rng.normal(size=leaf['kernel'][0].shape)
    permuted = one[:, order] if name != 'down' else one[order]
    # The upper half of D is noise, that no token shows.
    half = [..., slice(8, None)] if name == 'down' else [slice(8, None)]
    permuted = permuted.copy()
    permuted[tuple(half)] = 9 * noise[tuple(half)]
    leaf['kernel'][3] = permuted

  class Lower(_Same):
    """Moments of streams that lie in the lower half of D."""

    def input(self, kernel, layer):
      moment = super().input(kernel, layer)
      if kernel != 'down':
        moment[8:] = 0
      return moment

    def output(self, kernel, layer):
      moment = super().output(kernel, layer)
      if kernel == 'down':
        moment[8:] = 0
      return moment

  tied = dataclasses.replace(LLAMA, loops=2, layers_per_loop=3)
  assert np.array_equal(
      order[align.orders(tied, _read(values), Lower())[3]],
      np.arange(LLAMA.F))
  monkeypatch.setattr(align, '_WIDEST', LLAMA.F - 1)
  assert align.orders(tied, _read(values), Lower()) == {}
