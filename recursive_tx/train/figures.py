"""What a run logs besides its training loss."""

from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh

from recursive_tx import engine
from recursive_tx.config import ModelConfig
from recursive_tx.evaluate.heldout import evaluate
from recursive_tx.machine import chips, flops
from recursive_tx.train import step as step_lib
from recursive_tx.train.config import Config


def heldout_loss(
    config: Config, mesh: Mesh, cfg: ModelConfig, variables: Any, heldout: Any
) -> dict[str, Any]:
  """`evaluate` of the student or the teacher, where the run has them."""
  with nn.logical_axis_rules(step_lib.rules(config, cfg, mesh)):
    return evaluate(cfg, variables, heldout, run=config.run, mesh=mesh)


def flops_of_step(config: Config, teacher: ModelConfig | None) -> float:
  """Model FLOPs of a step on all devices."""
  return flops.train_step(
      config.model, config.losses.weights(config.model.loops), teacher,
      config.data.batch, config.data.seq_len)['total']


def peak() -> float | None:
  """FLOP/s of one device; None where they are not known."""
  chip = chips.find(jax.devices()[0])
  return chip and chip.flops


def samples(
    config: Config, variables: Any, tokenizer: Any
) -> dict[str, str]:
  """Greedy continuations of eval.prompts: {prompt: continuation}."""
  news = engine.generate(
      config.model, variables,
      [tokenizer.opening + tokenizer.encode(prompt)
       for prompt in config.eval.prompts],
      eos_id=tokenizer.end_ids, known_V=tokenizer.known(config.model.V),
      run=config.run)
  return {
      prompt: tokenizer.decode(new)
      for prompt, new in zip(config.eval.prompts, news, strict=True)}
