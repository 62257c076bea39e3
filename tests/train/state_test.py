"""A teacher of another tokenizer is refused; another file of it is not."""

import dataclasses
import json
import shutil

from flax.linen import meta
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
from tiny_tokenizers import sentencepiece_dir as sentencepiece_dir

import recursive_tx as rtx
from recursive_tx import losses, machine
from recursive_tx.text import tokenizer
from recursive_tx.train import state

pytestmark = pytest.mark.usefixtures('quick_compiler')


def edit(folder, change):
  path = folder / 'tokenizer.json'
  value = json.loads(path.read_text())
  change(value['model']['vocab'])
  path.write_text(json.dumps(value, indent=1))


def swap(vocab):
  vocab['a'], vocab['b'] = vocab['b'], vocab['a']


def reorder(vocab):
  items = sorted(vocab.items(), reverse=True)
  vocab.clear()
  vocab.update(items)


@pytest.fixture
def run(tmp_path):
  """A run, and its teacher with a tokenizer of its own."""
  (tmp_path / 'files').mkdir()
  processes.write_files(tmp_path / 'files', train=20)
  base = processes.config(tmp_path / 'files')
  cfg = dataclasses.replace(base.model, loops=1, rank='0')
  params = rtx.Decoder(cfg).init(
      jax.random.key(3), jnp.zeros((1, 4), jnp.int32))['params']
  rtx.save(tmp_path / 'teacher', cfg, {
      'params': jax.tree.map(np.asarray, meta.unbox(params))})
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copy(tmp_path / 'files' / name, tmp_path / 'teacher' / name)
  return tmp_path / 'teacher', dataclasses.replace(
      base, teacher=str(tmp_path / 'teacher'),
      losses=losses.LossConfig((), (1.0,)))


def load(config):
  mesh = machine.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return state.load_teacher(
        config, mesh, tokenizer.load(config.tokenizer))


def test_a_teacher_of_another_tokenizer_of_the_same_size_is_refused(run):
  teacher, config = run
  edit(teacher, swap)
  with tiny.refused(teacher, 'another tokenizer', '2 of 27 pieces',
                    "'a', which is [0] for the run and [1] for the teacher"):
    load(config)


def test_another_file_of_the_same_tokenizer_is_taken(run):
  teacher, config = run
  edit(teacher, reorder)
  assert tokenizer.load(teacher).digest != tokenizer.load(
      config.tokenizer).digest
  assert load(config)[0].V == 32


def test_a_teacher_without_a_tokenizer_is_taken(run):
  teacher, config = run
  (teacher / 'tokenizer.json').unlink()
  assert load(config)[0].V == 32


@pytest.mark.skipif(not tiny.REAL.exists(), reason='needs real models')
def test_real_tokenizers(sentencepiece_dir):
  small, large = (tokenizer.load(tiny.REAL / name)
                  for name in ('stories260K', 'stories3M'))
  other = tokenizer.load(sentencepiece_dir)
  for one, two in ((small, large), (small, other)):
    with tiny.refused('another tokenizer'):
      state.check_tokenizers(one, two, 'there')
  # Not only by its digest is it the same.
  again = dataclasses.replace(small, digest='another')
  state.check_tokenizers(small, again, 'there')
