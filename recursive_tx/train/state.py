"""Where the first state and the teacher come from, onto the mesh."""

from typing import Any

from flax.linen import meta
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from recursive_tx import model, sharding, start
from recursive_tx.config import ModelConfig
from recursive_tx.train import step
from recursive_tx.train.config import Config
from recursive_tx.train.step import TrainState


def first_state(
    config: Config, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
  """The state before the first step: from init_from, else random."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  if config.init_from:
    variables = start.load_as(
        config.init_from, config.model, init=config.init, lora=config.lora,
        seed=config.seed,
    )
    params = jax.tree.map(
        lambda x: np.asarray(x, np.float32), variables['params']
    )
    params = sharding.place(params, shardings.params)
  else:
    decoder = model.Decoder(config.model)
    params = jax.jit(
        lambda key: meta.unbox(
            decoder.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        ),
        out_shardings=shardings.params,
    )(jax.random.key(config.seed))
  return jax.jit(
      lambda params: TrainState(jnp.int32(0), params, tx.init(params)),
      donate_argnums=0, out_shardings=shardings,
  )(params)


def num_bytes(abstract: Any) -> int:
  """Of all arrays of a tree together."""
  return sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)
  )


def load_teacher(config: Config, mesh: Mesh) -> tuple[ModelConfig | None, Any]:
  """The teacher's model and its variables, in the run's dtype."""
  if not config.teacher:
    return None, None
  cfg, variables = start.load(config.teacher)
  if cfg.V != config.model.V:
    raise ValueError(
        f'The teacher {config.teacher} has a vocabulary of {cfg.V}, the model'
        f' of {config.model.V}; distillation needs the same.'
    )
  shardings = jax.tree.map(
      lambda x: x.sharding, step.abstract_params(config, cfg, mesh)
  )
  params = jax.tree.map(
      lambda x: np.asarray(x).astype(config.run.dtype), variables['params']
  )
  return cfg, {'params': sharding.place(params, shardings)}
