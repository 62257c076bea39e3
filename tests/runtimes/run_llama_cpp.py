"""Runs a job in llama.cpp; see runtimes/__init__.py. Needs llama-cpp-python."""

import json
import sys

from llama_cpp import Llama
import numpy as np

F32 = 0  # ggml's number of the type, for keys and values.

job = json.load(sys.stdin)
model = Llama(
    job['path'] + '/model.gguf', n_ctx=job['length'], logits_all=True,
    verbose=False, type_k=F32, type_v=F32, n_threads=1)
found = {'tokens': [], 'texts': [
    model.tokenize(text.encode(), add_bos=True, special=False)
    for text in job['texts']]}
logits = []
for prompt in job['prompts']:
  model.reset()
  model.eval(prompt)
  logits.append(np.array(model.scores[:len(prompt)]))
  tokens = []
  for _ in range(job['new']):
    tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(tokens[-1:])
  found['tokens'].append(tokens)
if job['logits']:
  np.save(job['logits'], np.stack(logits))
print(json.dumps(found))
