"""Runs a job in mlx-lm; see runtimes/__init__.py. Needs mlx and mlx-lm."""

import json
import pathlib
import sys

import mlx.core as mx
from mlx_lm.models import nanbeige
import numpy as np

job = json.load(sys.stdin)
path = pathlib.Path(job['path'])
model = nanbeige.Model(nanbeige.ModelArgs.from_dict(
    json.loads((path / 'config.json').read_text())))
model.load_weights(str(path / 'model.safetensors'), strict=True)
found, logits = {'tokens': [], 'texts': []}, []
for prompt in job['prompts']:
  cache = model.make_cache()
  scores = model(mx.array([prompt]), cache)
  logits.append(np.array(scores[0].astype(mx.float32)))
  tokens = []
  for _ in range(job['new']):
    tokens.append(int(mx.argmax(scores[0, -1]).item()))
    scores = model(mx.array([tokens[-1:]]), cache)
  found['tokens'].append(tokens)
if job['logits']:
  np.save(job['logits'], np.stack(logits))
print(json.dumps(found))
