"""What every test shares: JAX stays on the CPU, markers, tiny checkpoints."""

import os

# libtpu locks the machine for one process; only `plan` may load it.
os.environ['JAX_PLATFORMS'] = os.environ.get(
    'RECURSIVE_TX_TEST_PLATFORM', 'cpu')

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from tiny_tokenizers import (  # noqa: E402, F401
    byte_level_dir,
    sentencepiece_dir,
)


def pytest_configure(config):
  config.addinivalue_line(
      'markers', 'slow: a full grid or a large case; each has a small sibling '
      'that is not marked')


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
  """(directory, transformers model) of a row of tiny.HF, made once each."""
  made = {}

  def make(name: str, dtype: str = 'float32'):
    if (name, dtype) not in made:
      directory = tmp_path_factory.mktemp(f'{name}_{dtype}')
      made[name, dtype] = directory, tiny.make_hf(directory, name, dtype)
    return made[name, dtype]

  return make


@pytest.fixture(scope='module', autouse=True)
def forget_compiled():
  """A file's programs go with it: those of all files are too many to map."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='module')
def quick_compiler():
  """Tiny programs take longer to optimise than to run."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
