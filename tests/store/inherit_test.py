"""What a directory knows of its model, a run that starts from it inherits."""

import dataclasses

import pytest
import tiny

import recursive_tx as rtx
from recursive_tx.cli.configs import typed
from recursive_tx.configs import gemma_2b, uptrain
from recursive_tx.store.inherit import inherit

HOW = dict(init='average', lora='svd')
FITTED = 'q2+k1+v3+o2+gate5+up4+down6'
CONVERTED = dataclasses.replace(
    tiny.FAMILIES['llama'], loops=3, layers_per_loop=2, rank=FITTED,
    loop_norms=False)


@pytest.fixture
def converted(tmp_path):
  rtx.save(tmp_path / 'converted', CONVERTED, tiny.variables(CONVERTED))
  return str(tmp_path / 'converted')


def vanilla(directory, name):
  """A directory with the config of a family, and no weights."""
  directory.mkdir()
  cfg = tiny.FAMILIES[name]
  rtx.save_hf(directory / 'hf', cfg, tiny.variables(cfg))
  (directory / 'hf' / 'model.safetensors').unlink()
  return cfg, str(directory / 'hf')


@pytest.mark.parametrize('name', tiny.FAMILIES)
def test_sizes_and_family_of_a_vanilla_model(name, tmp_path):
  """As `relax` would make it; its weights need not be there."""
  cfg, directory = vanilla(tmp_path / 'x', name)
  found = inherit(directory, dict(loops=2, rank=4), **HOW)
  assert found == dataclasses.replace(
      cfg, loops=2, layers_per_loop=3, rank='4')
  found = inherit(directory, dict(
      loops=2, prelude=1, coda=1, loop_norms=False, loop_keys=False,
      exit_gate=8), **HOW)
  assert found == dataclasses.replace(
      cfg, loops=2, layers_per_loop=2, prelude=1, coda=1, loop_norms=False,
      loop_keys=False, exit_gate=8)
  assert inherit(directory, dict(loops=1), **HOW) == cfg
  with tiny.refused(directory, 'vanilla', '--config.model.loops=2'):
    inherit(directory, {}, **HOW)
  with tiny.refused('loops=4 does not divide 6'):
    inherit(directory, dict(loops=4), **HOW)


def test_loops_ranks_and_norms_of_a_converted_one(converted):
  assert inherit(converted, {}, **HOW) == CONVERTED
  # Said as well, and true.
  for given in (dict(loops=3, V=29), dict(rank=FITTED), dict(loop_norms=False)):
    assert inherit(converted, given, **HOW) == CONVERTED


@pytest.mark.parametrize(('name', 'given', 'has'), [
    ('loops', 2, 3), ('rank', '64', FITTED), ('loop_norms', True, False),
    ('V', 30, 29), ('norm', 'layer', 'rms'), ('prelude', 1, 0),
    ('rope_scaling', (2.0,), ()), ('layers_per_loop', 3, 2)])
def test_a_contradiction_shows_both(name, given, has, converted):
  with tiny.refused(f'config.model.{name} is {given!r}',
                    f'{converted} has {has!r}'):
    inherit(converted, {name: given}, **HOW)


def test_training_may_add_what_exits_need(converted):
  head = FITTED + '+head8'
  found = inherit(converted, dict(
      exit_gate=16, loop_keys=False, rank=head), **HOW)
  assert found == dataclasses.replace(
      CONVERTED, exit_gate=16, loop_keys=False, rank=head)


def config(arg, **fields):
  made = uptrain.get_config(arg)
  made.update(fields)
  return typed(made)


def test_one_config_uptrains_any_checkpoint(converted, tmp_path):
  for name in tiny.FAMILIES:
    cfg, directory = vanilla(tmp_path / name, name)
    built = config('loops=2,rank=4,teacher', init_from=directory)
    assert built.model == dataclasses.replace(
        cfg, loops=2, layers_per_loop=3, rank='4')
    assert built.teacher == directory and built.init == 'average'
    # The teacher is the original, unless one is named.
    built = config('loops=2,teacher', init_from=directory, teacher='other')
    assert built.teacher == 'other' and built.init == 'stepwise'
  assert config('', init_from=converted).model == CONVERTED
  # Of a converted one nobody knows the original's place.
  assert config('teacher', init_from=converted).teacher == ''
  with tiny.refused('config.model.loops is 2', 'has 3'):
    config('loops=2', init_from=converted)
  with tiny.refused('config.model.V is not set', '--config.init_from=DIR'):
    config('loops=2')
  with tiny.refused('exits=0.1', 'loops=N'):
    config('exits', init_from=converted)


def test_a_recipe_inherits_too(converted):
  """Its published sizes are for runs that start from no directory."""
  made = gemma_2b.get_config('teacher')
  assert typed(made).model.D == 2048 and typed(made).model.loops == 2
  made.init_from = converted
  assert typed(made).model == CONVERTED
  made = gemma_2b.get_config('loops=3,rank=512')
  made.init_from = converted
  with tiny.refused("config.model.rank is '512'", FITTED):
    typed(made)
