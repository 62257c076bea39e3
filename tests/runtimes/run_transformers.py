"""Runs a job in transformers; see runtimes/__init__.py."""

import json
import sys

import torch
import transformers

job = json.load(sys.stdin)
model = transformers.AutoModelForCausalLM.from_pretrained(
    job['path'], trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(
    job['path'], trust_remote_code=True)
model.generation_config.eos_token_id = None
found = {'tokens': [], 'texts': [
    tokenizer(text).input_ids for text in job['texts']]}
for prompt in job['prompts']:
  with torch.no_grad():
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=job['new'], do_sample=False,
        pad_token_id=0)
  found['tokens'].append(tokens[0, len(prompt):].tolist())
print(json.dumps(found))
