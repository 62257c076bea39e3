"""Every config builds; the paper's sizes; arguments are strict."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

from flax.linen import meta
import jax
import jax.numpy as jnp
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import losses, machine, train
from recursive_tx.cli.configs import typed
from recursive_tx.configs import common
from recursive_tx.data import DataConfig, Task
from recursive_tx.errors import UserError
from recursive_tx.store import config_json
from recursive_tx.train import optim

ROOT = tiny.ROOT
UPTRAINED = (
    'gemma_2b', 'tinyllama_1b', 'pythia_1b', 'pythia_410m', 'pythia_160m')

# Paper, section 3 and tables G.2 and I.2: parameters without embeddings, in
# billions, by rank; and the layers' LoRA parameters in millions.
RANKS = (0, 64, 128, 256, 512)
TABLE = {
    ('gemma_2b', 2): (0.99, 1.07, 1.15, 1.30, 1.60),
    ('gemma_2b', 3): (0.66, 0.74, 0.82, 0.97, 1.27),
    ('tinyllama_1b', 2): (0.48, 0.53, 0.58, 0.68, 0.86),
    ('pythia_1b', 2): (0.40, 0.44, 0.48, 0.55, 0.70),
}
LORA = {
    'gemma_2b': (0, 78.4, 156.9, 313.8, 606.3),
    'tinyllama_1b': (0, 50.5, 100.9, 201.9, 377.7),
    'pythia_1b': (0, 37.7, 75.5, 151.0, 302.0),
}
VANILLA = {
    'gemma_2b': (1.98, 0.52),
    'tinyllama_1b': (0.97, 0.13),
    'pythia_1b': (0.81, 0.21),
    'pythia_410m': (0.30, 0.10),
    'pythia_160m': (0.09, 0.08),
}


def pythia(**sizes):
  return dict(
      model_type='gpt_neox', vocab_size=50304, layer_norm_eps=1e-5,
      rotary_pct=0.25, rotary_emb_base=10000, hidden_act='gelu',
      use_parallel_residual=True, tie_word_embeddings=False,
      max_position_embeddings=2048, **sizes)


# What the models' own config.json files say.
HF = {
    'gemma_2b': dict(
        model_type='gemma', vocab_size=256000, hidden_size=2048,
        intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, rms_norm_eps=1e-6,
        rope_theta=10000.0, hidden_act='gelu', attention_bias=False,
        max_position_embeddings=8192, hidden_activation='gelu_pytorch_tanh',
    ),
    'tinyllama_1b': dict(
        model_type='llama', vocab_size=32000, hidden_size=2048,
        intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=10000.0,
        hidden_act='silu', tie_word_embeddings=False, attention_bias=False,
        max_position_embeddings=2048, rope_scaling=None,
    ),
    'pythia_1b': pythia(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=8),
    'pythia_410m': pythia(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16),
    'pythia_160m': pythia(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12),
}


def get_config(name, arg=None):
  return importlib.import_module(f'recursive_tx.configs.{name}').get_config(arg)


def shapes(cfg):
  token = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  tree = jax.eval_shape(rtx.Decoder(cfg).init, jax.random.key(0), token)
  return meta.unbox(tree)['params']


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(('name', 'loops'), TABLE)
def test_parameter_counts_of_the_paper(name, loops):
  for rank, billions, lora in zip(
      RANKS, TABLE[name, loops], LORA[name], strict=True
  ):
    config = get_config(name, f'loops={loops},rank={rank},paper')
    params = shapes(typed(config).model)
    adapters = count(params.get('adapters', {}))
    assert f'{adapters / 1e6:.1f}' == f'{lora:.1f}'
    # The paper adds rounded parts: TinyLlama's 0.484 + 0.101 is 0.58 there.
    total = sum(round(x / 1e9, 2) for x in (count(params['block']), adapters))
    assert f'{total:.2f}' == f'{billions:.2f}'


@pytest.mark.parametrize('name', UPTRAINED)
def test_parameter_counts_of_the_vanilla_models(name):
  config = get_config(name, 'loops=1,rank=0')
  params = shapes(typed(config).model)
  layers, embedding = VANILLA[name]
  assert f'{count(params["block"]) / 1e9:.2f}' == f'{layers:.2f}'
  # The paper's embeddings count input and output of an untied head.
  outside = count(params['embed']) + count(params.get('head', {}))
  assert f'{outside / 1e9:.2f}' == f'{embedding:.2f}'


@pytest.mark.parametrize('name', UPTRAINED)
def test_fields_are_those_of_the_released_model(name):
  config = get_config(name, 'loops=1,rank=0')
  _, cfg = config_json.read(HF[name])
  assert typed(config).model == cfg


def test_loop_norms_are_the_papers_only_when_asked_for():
  paper, ours = (
      typed(get_config('gemma_2b', arg)).model
      for arg in ('loops=2,paper', 'loops=2'))
  assert (paper.loop_norms, ours.loop_norms) == (False, True)
  assert count(shapes(ours)) - count(shapes(paper)) == 9 * 2 * 2048


@pytest.mark.parametrize(('name', 'arg'), [
    *((name, None) for name in (*UPTRAINED, 'demo')),
    ('exits', 'text=FILE'), ('exits', 'text=FILE,exits=1'),
    ('stories_neox', 'text=FILE')])
def test_every_config_builds_and_covers_its_parameters(name, arg):
  config = get_config(name, arg)
  built = typed(config)
  assert isinstance(built, train.Config)
  assert [task.name for task in built.data.tasks]
  optim.make(built.optim, shapes(built.model))
  assert built.losses.weights(built.model.loops)
  # Config files hold every field, so that each can be set after them.
  for field in dataclasses.fields(train.Config):
    assert field.name in config, field.name


@pytest.mark.parametrize('name', [*UPTRAINED, 'demo'])
def test_a_config_comes_back_from_json(name):
  built = typed(get_config(name))
  text = json.dumps(dataclasses.asdict(built))
  assert train.config.from_json(train.Config, json.loads(text)) == built


def test_the_papers_recipe():
  built = typed(get_config('gemma_2b', 'loops=3,rank=512,paper,teacher'))
  tokens = built.data.batch * built.data.seq_len
  assert tokens == 2_097_152 and built.data.seq_len == 2048
  assert built.optim.steps == 7153 and built.optim.warmup == 200
  assert built.optim.lr == 2e-4 and built.optim.schedule == 'cosine'
  assert built.losses.distill == (1.0,)
  assert built.losses.divergence == 'forward_kl'
  assert built.losses.next_token == (1.0,) and not built.losses.self_distill
  assert built.init == 'average'
  long = typed(get_config('gemma_2b', 'loops=3,tokens=60'))
  assert long.optim.steps == 28610 and long.optim.warmup == 800
  assert long.init == 'stepwise'
  assert not long.losses.distill
  assert typed(get_config('gemma_2b', 'init=lower')).init == 'lower'


@pytest.mark.parametrize(
    ('exits', 'earlier', 'final'),
    [
        ('exits', [0.1, 0.1], 1.0),
        ('exits=0.3', [0.3, 0.3], 1.0),
        ('exits=weighted', [1 / 6, 2 / 6], 3 / 6),
    ],
)
def test_exit_losses(exits, earlier, final):
  """The paper's, and each earlier loop learns from the final one."""
  built = typed(get_config('gemma_2b', f'loops=3,{exits},teacher'))
  weights = built.losses.weights(3)
  assert weights['next_token'] == pytest.approx([*earlier, final])
  assert weights['self_distill'] == pytest.approx([*earlier, 0.0])
  assert weights['distill'] == (0.0, 0.0, 1.0)


def test_baselines():
  """As the paper compares: same layers, or same parameters."""
  def sizes(arg):
    built = typed(get_config('gemma_2b', arg))
    model = built.model
    return (model.loops, model.layers_per_loop,
            count(shapes(model)['block']), built.init)

  looped = sizes('loops=3,paper')
  full = sizes('loops=3,baseline=full,paper')
  reduced = sizes('loops=3,baseline=reduced,paper')
  random = sizes('loops=3,baseline=random,paper')
  assert full[:2] == (1, 18) and reduced[:2] == (1, 6)
  assert full[2] == 3 * looped[2] and reduced[2] == looped[2]
  assert random == (*looped[:3], 'random')


@pytest.mark.parametrize(
    ('name', 'arg', 'task', 'kind'),
    [
        ('gemma_2b', '', 'slimpajama', 'jsonl'),
        ('pythia_160m', '', 'pile', 'jsonl'),
        ('pythia_160m', 'data=slimpajama', 'slimpajama', 'jsonl'),
        ('gemma_2b', 'data=c4', 'c4', 'tfds'),
        ('gemma_2b', 'data=text', 'text', 'text'),
    ],
)
def test_data_is_chosen_by_name(name, arg, task, kind):
  found, = typed(get_config(name, arg)).data.tasks
  assert (found.name, found.kind) == (task, kind)
  assert found.train and found.heldout


@pytest.mark.parametrize(('name', 'arg'), [
    ('gemma_2b', 'data=text'), ('demo', ''), ('quickstart', ''),
    ('exits', 'text=a.txt'), ('stories_neox', 'text=a.txt')])
def test_every_field_of_a_task_can_be_named(name, arg):
  """As docs/data.md does on the command line, where a key must exist."""
  task, = get_config(name, arg).data.tasks.values()
  fields = {field.name for field in dataclasses.fields(Task)}
  assert set(task) == fields - {'name'}


def test_a_task_is_what_its_row_says():
  found, = typed(get_config('gemma_2b', 'data=text')).data.tasks
  assert found == Task(name='text', **common.TASKS['text'])


# Each recipe, and each way through one; all but the richest are slow.
STEPS = [
    ('pythia_410m', 'loops=2,teacher,exits,paper'),
    *(pytest.param(*step, marks=pytest.mark.slow) for step in (
        *((name, '') for name in (*UPTRAINED, 'demo', 'quickstart')),
        ('gemma_2b', 'loops=3,rank=2,teacher,exits=weighted'),
        ('gemma_2b', 'baseline=reduced'),
    )),
]


@pytest.mark.parametrize(('name', 'arg'), STEPS)
def test_every_config_takes_a_step(name, arg, quick_compiler):
  """Shrunk, and moved by it as its losses say."""
  built = typed(get_config(name, arg))
  replace = dataclasses.replace
  model = replace(built.model, V=16, D=8, F=8, N=2, K=1, H=8,
                  layers_per_loop=1)
  built = replace(
      built, model=model, run=replace(built.run, dtype='float32'),
      data=replace(built.data, batch=2, seq_len=8, shards=2),
      optim=replace(built.optim, warmup=0), init_from='')
  teacher = None
  if losses.uses_teacher(built.losses):
    teacher = replace(model, loops=1, rank='0')
  mesh = machine.make_mesh(built.mesh)
  with jax.set_mesh(mesh):
    tx, abstract = train.abstract_state(built, mesh)
    state = train.first_state(built, tx, abstract)
    before = jax.tree.map(jnp.copy, state.params)
    batch = {
        f'{key}_BT': jnp.ones((2, 8), jnp.int32)
        for key in ('token', 'target', 'segment', 'position')}
    batch['weight_BT'] = jnp.ones((2, 8))
    given = teacher and meta.unbox(
        rtx.Decoder(teacher).init(jax.random.key(1), batch['token_BT']))
    state, metrics = train.jit_step(built, mesh, tx, abstract, teacher)(
        state, batch, given)
  named = {
      f'{term}/loop{i + 1}'
      for term, weights in built.losses.weights(model.loops).items()
      for i, weight in enumerate(weights) if weight}
  assert named <= metrics.keys()
  assert jnp.isfinite(metrics['loss']) and metrics['skipped'] == 0
  assert any(jax.tree.leaves(jax.tree.map(
      lambda a, b: bool((a != b).any()), before, state.params)))


def decays(name, arg):
  """{parameter: weight decay} of a config, by what AdamW does to ones."""
  built = typed(get_config(name, arg))
  small = dataclasses.replace(
      built.model, V=8, D=8, F=8, N=2, K=1, H=8, layers_per_loop=1)
  ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes(small))
  tx = optim.make(dataclasses.replace(built.optim, warmup=0), ones)
  zeros = jax.tree.map(jnp.zeros_like, ones)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(ones), ones)
  rate = float(optim.learning_rate(
      dataclasses.replace(built.optim, warmup=0), 0))
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'):
          round(float(-x.max()) / rate, 6)
      for path, x in jax.tree_util.tree_leaves_with_path(updates)
  }


def test_kernels_decay_and_nothing_else():
  for name, decay in decays('pythia_1b', 'rank=2').items():
    assert decay == (0.1 if name.endswith('kernel') else 0), name


def test_the_paper_decays_all_kernels_alike():
  for name, decay in decays('pythia_1b', 'rank=2,paper').items():
    kernel = name.rpartition('/')[2] in ('kernel', 'a', 'b')
    assert decay == (0.1 if kernel else 0), name


def test_the_demo_model_fits_its_bounds():
  cfg = typed(get_config('demo')).model
  assert cfg.layers_per_loop >= 8 and cfg.layers_per_loop % 4 == 0
  assert cfg.loops == 1 and cfg.K < cfg.N and cfg.tied
  assert 2.6e6 < count(shapes(cfg)) < 2.8e6


def test_arguments_take_the_types_of_their_defaults():
  args = common.parse(
      'a=3,b=0.5,name=x64,flag', a=1, b=1.0, name='', flag=False, c=7)
  assert args.to_dict() == dict(a=3, b=0.5, name='x64', flag=True, c=7)
  assert common.parse('b=2', b=1.0).b == 2.0
  assert common.parse('flag=false', flag=True).flag is False
  for nothing in (None, ''):
    assert common.parse(nothing, a=1).a == 1


@pytest.mark.parametrize(
    ('arg', 'said'),
    [
        ('loop=3', "'loop'; did you mean 'loops'"),
        ('loops=3,lops=2', "'lops'; did you mean 'loops'"),
        ('loops=three', "loops is 'three'; expected loops=INT"),
        ('loops=2.5', "loops is '2.5'; expected loops=INT"),
        ('loops', 'expected loops=INT'),
        ('loops=', 'expected loops=INT'),
        ('tokens=many', 'expected tokens=FLOAT'),
        ('init', 'expected init=STR'),
        ('paper=7', 'expected paper alone'),
        ('loops=2,loops=3', 'given twice'),
        ('loops=4', r'does not divide the 18 layers; use one of \[1, 2, 3, 6'),
        ('loops=0', 'does not divide'),
        ('teacher=DIR', "teacher is 'DIR'; expected teacher alone"),
        ('exits=often', "exits is 'often'; expected exits alone"),
        ('exits=-1', 'a weight above 0'),
        ('tokens=nan', 'tokens is nan, expected a finite number above 0'),
        ('tokens=-1', 'tokens is -1.0, expected a finite number above 0'),
        ('gate=-8', 'gate is -8, expected a whole number of at least 0'),
        ('loops=-1', 'does not divide'),
        ('exits=nan', 'a weight above 0'),
        ('loops=1,exits', 'has no earlier exit'),
        ('loops=1,gate=8', 'gate=8 with a model of one loop'),
        ('gate', 'expected gate=INT'),
        ('baseline=reduced,exits', 'has no earlier exit'),
        ('baseline=small', "baseline 'small' is not known.*expected one of f"),
        ('baseline=random,rank=8', 'has no adapters; leave out rank=8'),
        ('data=slimpajma', "'slimpajma' is not known, did you mean 'slimpaj"),
    ],
)
def test_bad_arguments_are_refused(arg, said):
  with pytest.raises(UserError, match=said) as error:
    get_config('gemma_2b', arg)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('path', 'said'),
    [
        ('optim.learning_rate', "'learning_rate' is not known"),
        ('optim.warmpu', "did you mean 'warmup'"),
        ('lossess', "did you mean 'losses'"),
        ('data.tasks.slimpajama.tarin', "did you mean 'train'"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, said):
  config = get_config('gemma_2b')
  section = config
  *folders, key = path.split('.')
  for folder in folders:
    section = section[folder]
  section[key] = 1
  with pytest.raises(UserError, match=said):
    typed(config)


def test_a_value_that_is_not_set_is_named():
  config = get_config('gemma_2b')
  config.data = common.section(
      DataConfig, tasks=config.data.tasks, seq_len=8)
  with pytest.raises(UserError, match='--config.data.batch='):
    typed(config)


@pytest.mark.parametrize(
    ('args', 'said'),
    [
        (['--config=configs/gemma_2b.py:lops=2'], "did you mean 'loops'"),
        (['--config=configs/demo.py', '--config.optim.lrr=1'], "mean 'lr'"),
        (['--config=configs/nemo.py'], 'there is no such file'),
        (['--config=configs/gemma_2b.py:teacher'], '--config.teacher='),
        (['--config=demo', '--config.optim.clip=-1.0'],
         'optim.clip is -1.0, expected a finite number of at least 0'),
        (['--config=demo', '--config.losses.next_token=(1e999,)'],
         'a number of losses.next_token=(inf,) is inf'),
        (['--config=demo', '--processes=-2'], '--processes is -2'),
        (['--config=demo', '--process=-3'], '--process is -3'),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, args, said):
  workdir = tmp_path / 'run'
  done = subprocess.run(
      [sys.executable, '-m', 'recursive_tx', 'train', *args,
       f'--workdir={workdir}'],
      cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert said in line
  assert not workdir.exists()
