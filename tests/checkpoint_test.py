"""What is saved comes back, and a run goes on only as itself."""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_tx import checkpoint

SETTINGS = {
    'model': {'D': 4, 'rank': '0', 'rope_scaling': ()},
    'data': {'tasks': ({'name': 'a', 'weight': 1.0},), 'seq_len': 8},
    'optim': {'lr': 0.1, 'table': (('.*', 1.0, 1.0),)},
    'losses': {'next_token': (1.0,)},
    'seed': 0,
    'init_from': '',
    'mesh': {'data': 1},
    'checkpoint': {'every': 5},
    'log': {'every': 1},
    'eval': {'every': 1},
    'run': {'dtype': 'float32'},
}


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple


def state_at(step: int) -> State:
  rng = np.random.default_rng(step)

  def leaf(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {'block': {'kernel': leaf(2, 3)}, 'norm': {'scale': leaf(3)}}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return State(jnp.int32(step), params, ({'m': half}, None, ()))


def save(workdir, *steps, keep=2):
  config = checkpoint.CheckpointConfig(keep=keep)
  with checkpoint.open_manager(str(workdir), config) as manager:
    for step in steps:
      checkpoint.save(
          manager, step, state=state_at(step),
          position=f'\0after {step}'.encode(), settings=SETTINGS,
      )


def changed(section, **values):
  return {**SETTINGS, section: {**SETTINGS[section], **values}}


def test_the_latest_state_and_position_come_back(tmp_path):
  save(tmp_path, 3, 7)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state_at(0),
  )
  with checkpoint.open_manager(str(tmp_path)) as manager:
    assert manager.latest_step() == 7
    state, position = checkpoint.restore(manager, abstract)
  assert position == b'\0after 7'
  assert jax.tree.structure(state) == jax.tree.structure(state_at(7))
  for found, saved in zip(
      jax.tree.leaves(state), jax.tree.leaves(state_at(7)), strict=True
  ):
    assert found.dtype == saved.dtype
    np.testing.assert_array_equal(found, saved)


def test_arrays_may_be_donated_right_after_saving(tmp_path):
  # The save goes on in the background while the next step overwrites.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros(1 << 21)
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.save(
        manager, 1, state={'params': {'x': x}}, position=b'', settings={})
    for _ in range(20):
      x = add(x)
    x.block_until_ready()
  params = checkpoint.load_params(str(tmp_path))[1]
  np.testing.assert_array_equal(params['x'], 0)


def test_only_the_latest_are_kept(tmp_path):
  save(tmp_path / 'two', 1, 2, 3, 4, keep=2)
  save(tmp_path / 'all', 1, 2, 3, 4, keep=0)

  def steps(name):
    folder = tmp_path / name / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir())

  assert steps('two') == [3, 4]
  assert steps('all') == [1, 2, 3, 4]


def test_the_same_settings_may_go_on(tmp_path):
  save(tmp_path, 1)
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.check_same(manager, SETTINGS, 'w')


@pytest.mark.parametrize(
    'section', ['mesh', 'checkpoint', 'log', 'eval', 'run']
)
def test_how_it_is_run_may_change(tmp_path, section):
  save(tmp_path, 1)
  settings = {**SETTINGS, section: {'every': 1000, 'other': 'thing'}}
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.check_same(manager, settings, 'w')


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        (changed('model', D=8), 'model.D 4 -> 8'),
        (changed('data', seq_len=16), 'data.seq_len 8 -> 16'),
        (changed('data', tasks=({'name': 'b', 'weight': 1.0},)), "'a'.*'b'"),
        (changed('optim', lr=0.2), 'optim.lr 0.1 -> 0.2'),
        (changed('losses', next_token=(1.0, 1.0)), r'\[1.0\] -> \[1.0, 1.0\]'),
        ({**SETTINGS, 'seed': 1}, 'seed 0 -> 1'),
        (changed('model', new=3), "model.new '.none.' -> 3"),
        ({k: v for k, v in SETTINGS.items() if k != 'seed'}, 'seed 0 -> '),
    ],
)
def test_what_is_computed_may_not_change(tmp_path, settings, said):
  save(tmp_path, 1)
  with checkpoint.open_manager(str(tmp_path)) as manager:
    with pytest.raises(ValueError, match=said) as error:
      checkpoint.check_same(manager, settings, 'runs/w')
  assert '--config.init_from=runs/w' in str(error.value)
  assert '\n' not in str(error.value)


def test_every_difference_is_shown(tmp_path):
  save(tmp_path, 1)
  settings = {**changed('model', D=8), 'seed': 1}
  with checkpoint.open_manager(str(tmp_path)) as manager:
    with pytest.raises(ValueError, match='model.D 4 -> 8; seed 0 -> 1'):
      checkpoint.check_same(manager, settings, 'w')


def test_parameters_are_read_without_knowing_the_rest(tmp_path):
  save(tmp_path, 3, 7)
  settings, params = checkpoint.load_params(str(tmp_path))
  assert settings['model']['D'] == 4
  jax.tree.map(np.testing.assert_array_equal, params, state_at(7).params)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
  assert not checkpoint.is_workdir(str(tmp_path))
  (tmp_path / 'checkpoints').mkdir()
  assert checkpoint.is_workdir(str(tmp_path))
  with pytest.raises(ValueError, match='no finished checkpoint'):
    checkpoint.load_params(str(tmp_path))
