"""The recursive form: transformers computes what this library does."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import files
from recursive_tx.store import compact

torch = pytest.importorskip('torch', reason=tiny.TORCH)
transformers = pytest.importorskip('transformers', reason=tiny.TORCH)

# Every kind of layer, norm and bias, tied and per loop, and both ropes.
_RELAXED = dict(layers_per_loop=2, loops=3, rank='q2+k9+o3+mlp4')
CFGS = {
    **{name: dataclasses.replace(cfg, **_RELAXED)
       for name, cfg in tiny.FAMILIES.items() if not cfg.rare},
    'mixed': tiny.MIXED,
    'tied': dataclasses.replace(
        tiny.FAMILIES['gpt_neox'], **{**_RELAXED, 'rank': '0'},
        loop_norms=False),
    'llama_3': dataclasses.replace(
        tiny.FAMILIES['llama'], **_RELAXED, H=16, prelude=1, coda=2,
        rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    'linear': dataclasses.replace(
        tiny.FAMILIES['llama'], **_RELAXED, rope_scaling=(2.5,), coda=1),
    'vanilla': tiny.FAMILIES['llama']}


def load(directory, **how):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, trust_remote_code=True,
      **{'dtype': torch.float32, **how}).eval()


def make(directory, cfg, **how):
  values = tiny.variables(cfg)
  compact.save(directory, cfg, values, **how)
  return values


@pytest.mark.parametrize('name, attention', [
    *((name, 'sdpa') for name in CFGS), ('mixed', 'eager')])
def test_logits_are_ours(tmp_path, name, attention):
  cfg = CFGS[name]
  values = make(tmp_path / 'out', cfg)
  made = load(tmp_path / 'out', attn_implementation=attention)
  token_BT = tiny.tokens(cfg, T=40)
  expected_BTV = tiny.decoder(cfg)(values, token_BT)
  assert tiny.distance(
      tiny.torch_logits(made, token_BT), expected_BTV) < 1e-5
  assert expected_BTV.std() > 0.1


# Generation: what the stock model of the same function does, unrolled.

LLAMA = dataclasses.replace(CFGS['llama_3'], V=61, window=0)
WINDOW = dataclasses.replace(CFGS['mistral'], prelude=1)
IDS = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
       'max_position_embeddings': 256}


@pytest.fixture(scope='module', params=['llama', 'window'])
def both(request, tmp_path_factory):
  """The recursive form and the stock one, unrolled, fp32."""
  cfg = {'llama': LLAMA, 'window': WINDOW}[request.param]
  folder = tmp_path_factory.mktemp('both')
  values = make(folder / 'out', cfg, hf_config=IDS)
  rtx.save_hf(folder / 'stock', cfg, values)
  ours = load(folder / 'out')
  stock = transformers.AutoModelForCausalLM.from_pretrained(
      folder / 'stock', dtype=torch.float32).eval()
  stock.generation_config = ours.generation_config
  return ours, stock


def generated(made, B=2, **how):
  """Greedy tokens that follow random ones, [B, 24]."""
  token_BT = torch.tensor(np.random.default_rng(1).integers(
      3, made.config.vocab_size, (B, 9)))
  how.setdefault('attention_mask', torch.ones_like(token_BT))
  return made.generate(
      token_BT, max_new_tokens=24, min_new_tokens=24, do_sample=False,
      pad_token_id=0, **how)[:, 9:].tolist()


@pytest.mark.parametrize('how', [
    dict(use_cache=False), {}, dict(cache_implementation='static'),
    dict(num_beams=3), dict(num_beams=2, cache_implementation='static')],
    ids=['none', 'dynamic', 'static', 'beams', 'static_beams'])
def test_generate_as_the_stock_model(both, how):
  ours, stock = both
  found = generated(ours, **how)
  assert found == generated(stock, use_cache='num_beams' in how, **{
      k: v for k, v in how.items() if k == 'num_beams'})
  assert len({*map(tuple, found)}) == 2 and len({*found[0]}) > 3


def test_left_padding_changes_no_token(both):
  ours, stock = both
  mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
  found = generated(ours, attention_mask=mask)
  assert found == generated(stock, attention_mask=mask)
  assert found[1] == generated(ours)[1] and found[0] != generated(ours)[0]


def test_bf16_is_as_near_as_the_stock_model(both):
  ours, stock = both
  token_BT = tiny.tokens(LLAMA if ours.config.sliding_window is None
                         else WINDOW, T=40)
  exact = tiny.torch_logits(stock, token_BT)
  distances = []
  for made in (ours, stock):
    half = copy.deepcopy(made).to(torch.bfloat16)
    logits = half(torch.tensor(token_BT).long()).logits
    distances.append(tiny.distance(logits.detach().float().numpy(), exact))
  assert 0 < distances[0] < 2 * distances[1]


def test_compiles_whole(both):
  ours, _ = both
  token_BT = torch.tensor(tiny.tokens(LLAMA, T=11) % 29).long()
  with torch.no_grad():
    expected = ours(token_BT, use_cache=False).logits
    compiled = torch.compile(ours, backend='aot_eager', fullgraph=True)
    found = compiled(token_BT, use_cache=False).logits
  assert tiny.distance(found, expected) < 1e-5


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradients_with_checkpointing_are_those_without(both, reentrant):
  ours, stock = both
  token_BT = torch.tensor(tiny.tokens(LLAMA, T=11) % 29).long()
  grads = []
  ours.train()
  for checkpointed in (False, True):
    if checkpointed:
      ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    ours.zero_grad()
    loss = ours(token_BT, labels=token_BT).loss
    loss.backward()
    grads.append({k: p.grad.clone() for k, p in ours.named_parameters()})
  ours.gradient_checkpointing_disable()
  ours.eval()
  expected = stock(token_BT, labels=token_BT).loss
  assert abs(loss.item() - expected.item()) < 1e-5
  for name, grad in grads[0].items():
    assert grad.abs().max() > 0, name
    assert tiny.distance(grads[1][name], grad) < 1e-5, name


def test_hidden_states_and_attentions(both):
  ours, stock = both
  token_BT = torch.tensor(tiny.tokens(LLAMA, T=11) % 29).long()
  found, expected = (
      made(token_BT, output_hidden_states=True) for made in both)
  assert len(found.hidden_states) == len(expected.hidden_states)
  for one, other in zip(
      found.hidden_states, expected.hidden_states, strict=True):
    assert tiny.distance(one.detach(), other.detach()) < 1e-5
  kept = ours(token_BT, logits_to_keep=1, return_dict=False)[0]
  assert tiny.distance(
      kept[:, 0].detach(), expected.logits[:, -1].detach()) < 1e-5


# The directory.


def test_what_is_saved_again_loads_without_the_first(tmp_path, monkeypatch):
  """Nothing leads back to the first directory, or to a network."""
  def refuse(*_):
    raise AssertionError('a connection')

  monkeypatch.setattr('socket.socket.connect', refuse)
  make(tmp_path / 'out', LLAMA, hf_config=IDS)
  made = load(tmp_path / 'out')
  made.save_pretrained(tmp_path / 'again')
  first, again = (files.Reader(tmp_path / name) for name in ('out', 'again'))
  assert first.shapes == again.shapes
  for name in first.shapes:
    np.testing.assert_array_equal(first.read(name), again.read(name))
  token_BT = tiny.tokens(LLAMA)
  expected_BTV = tiny.torch_logits(made, token_BT)
  (tmp_path / 'out').rename(tmp_path / 'gone')
  for path in (tmp_path / 'again').iterdir():
    assert str(tmp_path).encode() not in path.read_bytes(), path
  assert tiny.distance(tiny.torch_logits(
      load(tmp_path / 'again'), token_BT), expected_BTV) == 0


def test_a_file_is_as_large_as_its_unique_parameters(tmp_path):
  for tied in (False, True):
    cfg = dataclasses.replace(LLAMA, tied=tied)
    values = make(tmp_path / f'{tied}', cfg)
    count = sum(leaf.size for _, leaf in files.paths.items(values['params']))
    reader = files.Reader(tmp_path / f'{tied}')
    assert sum(np.prod(s) for s in reader.shapes.values()) == count
    made = load(tmp_path / f'{tied}')
    assert sum(p.numel() for p in made.parameters()) == count


def test_half_precision_files_and_values_that_do_not_fit(tmp_path):
  values = tiny.variables(LLAMA)
  compact.save(tmp_path / 'half', LLAMA, values, dtype='float16')
  assert {str(d) for d in files.Reader(tmp_path / 'half').dtypes.values()} == {
      'float16'}
  assert json.loads((tmp_path / 'half' / 'config.json').read_text())[
      'torch_dtype'] == 'float16'
  values['params']['embed']['embedding'][3] = 1e6
  with tiny.refused('1e+06', 'float16 cannot hold', 'bfloat16'):
    compact.save(tmp_path / 'out', LLAMA, values, dtype='float16')
  assert not (tmp_path / 'out').exists()


def test_loops_that_share_keys_are_refused(tmp_path):
  cfg = dataclasses.replace(LLAMA, loop_keys=False)
  with tiny.refused('loop_keys=False', 'config.model.loop_keys=True'):
    compact.save(tmp_path / 'out', cfg, tiny.variables(cfg))
  assert not (tmp_path / 'out').exists()


def test_what_the_code_does_not_have_is_refused(tmp_path):
  for cfg in tiny.FAMILIES.values():
    for name, value in cfg.rare.items():
      with tiny.refused(f'model.{name}={value!r}', '--form=unrolled'):
        compact.save(tmp_path / 'out', cfg, tiny.variables(cfg))
  assert not (tmp_path / 'out').exists()


def test_the_code_is_linted_and_short():
  """It is text to this package, so that nothing imports it."""
  import subprocess
  import sys
  for path in compact.CODE.iterdir():
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', f'--stdin-filename={path.stem}',
         '--config', str(tiny.ROOT / 'pyproject.toml'), '-'],
        input=path.read_text(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(path.read_text().splitlines()) <= 400


def test_peft_adapts_the_block_once_for_all_loops(tmp_path):
  """Its LoRA on q and v trains, merges, and leaves our adapters alone."""
  peft = pytest.importorskip('peft', reason='pip install peft')
  make(tmp_path / 'out', LLAMA)
  made = load(tmp_path / 'out')
  token_BT = torch.tensor(tiny.tokens(LLAMA)).long()
  before = made(token_BT).logits.detach()
  tuned = peft.get_peft_model(made, peft.LoraConfig(
      r=2, target_modules=['q_proj', 'v_proj'], init_lora_weights=False,
      task_type='CAUSAL_LM'))
  trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
  layers = LLAMA.prelude + LLAMA.layers_per_loop + LLAMA.coda
  assert len(trained) == 2 * 2 * layers
  assert all('.block.' in name for name in trained)
  tuned(token_BT, labels=token_BT).loss.backward()
  assert all(p.grad is not None and p.grad.abs().max() > 0
             for p in tuned.parameters() if p.requires_grad)
  after = tuned(token_BT).logits.detach()
  assert tiny.distance(after, before) > 1e-3
  merged = tuned.merge_and_unload()
  assert tiny.distance(merged(token_BT).logits.detach(), after) < 1e-5
