"""The model that ships: its size, its text, its tokenizer, its quality."""

import pathlib

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import data, evaluate
from recursive_tx.demo import corpus
from recursive_tx.store import convert
from recursive_tx.text import tokenizer

DEMO = pathlib.Path(corpus.__file__).parent
# Of the figures in README.
KNESER_NEY_BITS_PER_BYTE = 1.7817


def test_it_is_small_and_divides_by_2_and_4():
  cfg, _ = rtx.load_hf(DEMO)
  assert cfg.num_layers >= 8 and cfg.num_layers % 4 == 0
  assert cfg.K < cfg.N
  size = sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file())
  assert size <= 6e6
  assert convert.parameters(cfg)['total'] > 2e6


def test_held_out_modules_are_never_trained_on():
  train, heldout = corpus.train_files(), corpus.heldout_files()
  assert heldout and not set(train) & set(heldout)


def test_the_tokenizer_loses_nothing():
  pieces = tokenizer.load(DEMO)
  texts = [text for _, text in corpus.documents(corpus.heldout_files())]
  texts += ['\n\n    x\t=  1  \n', ' leading', 'naïve 東京 \U0001f600\x00']
  for text in texts:
    assert pieces.decode(pieces.encode(text)) == text


@pytest.mark.slow
def test_it_beats_kneser_ney_by_a_tenth_on_all_held_out_text(tmp_path):
  assert _bits_per_byte(tmp_path, 512) <= 0.9 * KNESER_NEY_BITS_PER_BYTE


def test_it_knows_its_language(tmp_path):
  bits = _bits_per_byte(tmp_path, 256, max_tokens=8000)
  assert bits < KNESER_NEY_BITS_PER_BYTE


def test_transformers_opens_it():
  torch = pytest.importorskip('torch', reason=tiny.TORCH)
  transformers = pytest.importorskip('transformers', reason=tiny.TORCH)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      DEMO, dtype=torch.float32)
  pieces = tokenizer.load(DEMO)
  ids = [pieces.bos_id, *pieces.encode('def __init__(self, path):\n')]
  theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
  assert theirs('def __init__(self, path):\n')['input_ids'] == ids
  cfg, variables = rtx.load_hf(DEMO)
  ours = rtx.Decoder(cfg).apply(variables, np.array([ids], np.int32))
  assert tiny.distance(ours, tiny.torch_logits(model, np.array([ids]))) < 1e-5


def _bits_per_byte(folder, seq_len, max_tokens=None) -> float:
  corpus.write(folder)
  config = data.DataConfig(
      (data.Task('python', 'jsonl', train=(f'{folder}/train.jsonl',),
                 heldout=(f'{folder}/heldout.jsonl',)),),
      seq_len=seq_len, batch=8)
  cfg, variables = rtx.load_hf(DEMO)
  heldout = data.heldout(config, tokenizer.load(DEMO), max_tokens=max_tokens)
  result = evaluate.evaluate(cfg, variables, heldout)
  return result['loops'][-1]['bits_per_byte']
