"""Time and peak memory of converting a Gemma-2B-shaped checkpoint.

  python tests/benchmarks/convert_gemma.py [--calibration=TEXT] \\
    [--layers=18] [--output=FILE] [--scratch=DIR]

Writes 2.5 B random bf16 parameters as sharded safetensors, then converts
them to 2 loops of rank 64 in a process of its own, whose peak resident
memory the kernel reports: by the mean of the layers, or fitted to 8,192
tokens of --calibration. Needs 12 GB of disk, 24 GB with a text.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from recursive_tx import demo, files
from recursive_tx.store import config_json, families

CONFIG = {
    'architectures': ['GemmaForCausalLM'], 'model_type': 'gemma',
    'vocab_size': 256000, 'hidden_size': 2048, 'intermediate_size': 16384,
    'num_attention_heads': 8, 'num_key_value_heads': 1, 'head_dim': 256,
    'hidden_act': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6,
    'torch_dtype': 'bfloat16'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--calibration')
  parser.add_argument('--layers', type=int, default=18)
  parser.add_argument('--scratch')
  parser.add_argument('--output')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
    folder = pathlib.Path(folder)
    count = write(folder / 'source', args.layers)
    init = ['--init=average']
    if args.calibration:
      init = ['--init=fit', f'--calibration={args.calibration}',
              '--calibration_tokens=8192']
      for file in pathlib.Path(demo.__file__).parent.glob('tokenizer*'):
        shutil.copy(file, folder / 'source')
    start = time.monotonic()
    subprocess.run(
        [sys.executable, '-m', 'recursive_tx', 'convert',
         f'--source={folder}/source', f'--output={folder}/new',
         '--loops=2', '--rank=64', *init], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  print(f'{count / 1e9:.3f} B parameters: {seconds:.0f} s, '
        f'peak {peak:.2f} GiB')
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps({
        'parameters': count, 'seconds': seconds, 'peak_gib': peak}) + '\n')


def write(folder: pathlib.Path, layers: int) -> int:
  """A sharded checkpoint of random weights; returns its parameters."""
  folder.mkdir()
  config = {**CONFIG, 'num_hidden_layers': layers}
  files.write_json(folder / 'config.json', config)
  family, cfg = config_json.read(config)
  rng = np.random.default_rng(0)
  shards, index, count = {}, {}, 0
  for name, _, pattern, layer in families.tensors(family, cfg):
    groups = pattern.split(' -> ')[0].replace('(', ' ( ').replace(
        ')', ' ) ').split()
    shard = 0 if layer is None else 1 + layer // 6
    shards.setdefault(shard, {})[name] = _sizes(cfg, groups)
  for shard, tensors in shards.items():
    file = f'model-{shard + 1:05d}-of-{len(shards):05d}.safetensors'
    with files.Writer(folder / file, {
        name: (shape, ml_dtypes.bfloat16) for name, shape in tensors.items()
    }) as writer:
      for name, shape in tensors.items():
        flat = rng.standard_normal(int(np.prod(shape)), np.float32)
        writer.write(name, (flat.reshape(shape) * 0.02).astype(
            ml_dtypes.bfloat16))
        index[name] = file
        count += flat.size
  files.write_json(folder / 'model.safetensors.index.json',
                  {'metadata': {}, 'weight_map': index})
  return count


def _sizes(cfg, groups: list[str]) -> tuple[int, ...]:
  """Shape of a tensor on disk from the left side of its rule."""
  shape, inside = [], False
  for word in groups:
    if word in '()':
      inside = word == '('
      if inside:
        shape.append(1)
    elif inside:
      shape[-1] *= getattr(cfg, word)
    else:
      shape.append(getattr(cfg, word))
  return tuple(shape)


if __name__ == '__main__':
  main()
