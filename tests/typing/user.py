"""A user's code over the whole public API, checked and never run.

`launch/test.sh` runs mypy over it. What the library returns has the type
asserted here; a line marked `type: ignore` is a mistake that must be an error,
and mypy says so where it is none.
"""

import os
from typing import assert_type

import recursive_tx as rtx

Model = tuple[rtx.ModelConfig, dict]


def directories(path: str | os.PathLike) -> None:
  opened = rtx.open(path)
  assert_type(opened.config, rtx.ModelConfig)
  assert_type(opened.variables, dict)
  assert_type(opened.exit, rtx.Exit | None)
  assert_type(rtx.load_hf(path), Model)
  assert_type(rtx.restore(path), Model)
  rtx.save(path, *rtx.restore(path), companions=opened.companions,
           overwrite=True)
  rtx.save_hf(path, opened.config, opened.variables, hf={'eos_token_id': 0},
              dtype='bfloat16', companions=path)
  rtx.save(path, opened.variables, opened.config)  # type: ignore[arg-type]
  rtx.save_hf(path, opened)  # type: ignore[call-arg, arg-type]
  rtx.open(1)  # type: ignore[arg-type]
  # A directory may have no tokenizer.
  opened.tokenizer.encode('')  # type: ignore[union-attr]


def tokenizers(path: str) -> None:
  tokenizer = rtx.load_tokenizer(path)
  assert_type(tokenizer.encode('text'), list[int])
  assert_type(tokenizer.encode_batch(['text']), list[list[int]])
  assert_type(tokenizer.decode([1, 2]), str)
  assert_type(tokenizer.opening, list[int])
  assert_type(tokenizer.bos_id, int | None)
  tokenizer.decode('text')  # type: ignore[arg-type]


def tying(config: rtx.ModelConfig, variables: dict) -> None:
  assert_type(rtx.relax(config, variables, loops=2), Model)
  assert_type(rtx.relax(config, variables, loops=2, rank='q8+mlp16',
                        init='fit', loop_norms=False, prelude=1, coda=1,
                        lora='zero', calibration=[[1, 2]], seed=1), Model)
  assert_type(rtx.merge(config, variables), Model)
  rtx.relax(config, variables)  # type: ignore[call-arg]
  rtx.relax(config, variables, 2)  # type: ignore[call-arg]
  rtx.relax(config, variables, loops='2')  # type: ignore[arg-type]
  rtx.merge(variables)  # type: ignore[call-arg, arg-type]


def models() -> None:
  config = rtx.ModelConfig(
      V=8, D=4, F=8, N=2, K=1, H=2, layers_per_loop=1, loops=2, rank='2')
  assert_type(config.num_layers, int)
  assert_type(config.ranks, dict[str, int])
  rtx.Decoder(config, run=rtx.Run(dtype='bfloat16', remat='full'))
  rtx.ModelConfig(V=8)  # type: ignore[call-arg]
  config.V = 9  # type: ignore[misc]
  rtx.Decoder({})  # type: ignore[arg-type]
  rtx.Run(remat=True)  # type: ignore[arg-type]
  for family in rtx.FAMILIES.values():
    assert_type(family.model_type, str)


def generation(config: rtx.ModelConfig, variables: dict) -> None:
  assert_type(
      rtx.generate(config, variables, [[1, 2]], max_new_tokens=8,
                   sampler=rtx.Sampler(temperature=0.7, top_k=40, seed=1),
                   exit=rtx.Exit('top', (0.9,)), eos_id=None,
                   run=rtx.Run(), slots=2),
      list[list[int]])
  engine = rtx.Engine(config, variables, slots=2, max_len=64)
  for server in (engine, rtx.Replicas([engine])):
    assert_type(server.submit(rtx.Request([1, 2], max_new_tokens=8)), int)
    for event in server.poll():
      assert_type(event.token, int)
      assert_type(event.depth, int)
      assert_type(event.finish, str | None)
  rtx.generate(config, variables, ['text'])  # type: ignore[list-item]
  rtx.generate(config, variables, [[1]], exit=0.9)  # type: ignore[arg-type]
  rtx.Sampler(temperature='hot')  # type: ignore[arg-type]
  rtx.Exit(thresholds=0.9)  # type: ignore[arg-type]
  rtx.Request('text')  # type: ignore[arg-type]
  rtx.Replicas(engine)  # type: ignore[arg-type]


def errors() -> ValueError:
  return rtx.UserError('value, expectation, way out')
