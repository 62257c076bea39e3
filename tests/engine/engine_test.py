"""Laws of the engine: what a request gets depends on nothing but itself."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import recursive_tx as rtx
from recursive_tx import engine, exits, model
from recursive_tx.model import adapters

LENGTH = 48
MIXED = dataclasses.replace(tiny.MIXED, loops=3)
TIED = dataclasses.replace(
    tiny.MIXED, loops=3, prelude=0, coda=0, rank='0', loop_norms=False,
    window=0)
pytestmark = pytest.mark.usefixtures('quick_compiler')


@functools.cache
def _variables(cfg):
  return tiny.variables(cfg)


def _full(cfg, tokens):
  """Logits of every place and loop, [L, T, V], by a full forward."""
  token_1T = np.zeros((1, LENGTH), np.int32)
  token_1T[0, :len(tokens)] = tokens
  values = _variables(cfg)
  h_LTD = tiny.decoder(cfg, method='hidden')(values, token_1T)[:, 0]
  logits = tiny.decoder(cfg, method='logits')
  return np.stack([logits(values, h_TD[None])[0] for h_TD in h_LTD])[
      :, :len(tokens)]


@functools.cache
def _solo(cfg, prompt, count, loop=-1):
  """Greedy tokens by full forwards, after a loop."""
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(int(np.argmax(_full(cfg, tokens)[loop, -1])))
  return tokens[len(prompt):]


def _prompts(cfg, count, seed=0, longest=12):
  rng = np.random.default_rng(seed)
  return [tuple(rng.integers(0, cfg.V, rng.integers(1, longest)).tolist())
          for _ in range(count)]


def _drain(served, ids, most=500):
  """Every event of some requests, by id."""
  events = {id: [] for id in ids}
  for _ in range(most):
    if not served.pending:
      return events
    for event in served.poll():
      events[event.id].append(event)
  raise AssertionError(f'{served.pending} requests did not end')


def _tokens(events):
  return [[event.token for event in row] for row in events.values()]


def _run(cfg, requests, **arguments):
  served = rtx.Engine(cfg, _variables(cfg), **{
      'slots': 2, 'max_len': LENGTH, 'steps': 5, **arguments})
  return _drain(served, [served.submit(request) for request in requests])


@pytest.mark.parametrize('cfg, schedule', [
    (MIXED, 'cdb'),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        (MIXED, 'csb'), (MIXED, 'static'), (TIED, 'cdb'), (TIED, 'csb'),
        (tiny.FAMILIES['gpt_neox'], 'cdb'),
        # Rows whose layers have windows or not, and other rotations.
        (dataclasses.replace(tiny.FAMILIES['gemma3_text'], layers_per_loop=2,
                             loops=3, rank='2'), 'cdb'),
        (dataclasses.replace(tiny.FAMILIES['smollm3'], layers_per_loop=1,
                             loops=3, loop_norms=False), 'cdb'),
        (tiny.FAMILIES['llama'], 'csb')))])
def test_every_request_gets_what_it_would_get_alone(cfg, schedule):
  """More requests than slots and rows, of different lengths."""
  prompts, counts = _prompts(cfg, 5), [7, 1, 4, 6, 2]
  events = _run(cfg, [
      engine.Request(prompt, count)
      for prompt, count in zip(prompts, counts, strict=True)],
      schedule=schedule)
  assert _tokens(events) == [
      _solo(cfg, prompt, count)
      for prompt, count in zip(prompts, counts, strict=True)]
  for row in events.values():
    assert [event.finish for event in row] == [None] * (len(row) - 1) + [
        'length']
    assert {event.depth for event in row} == {cfg.loops}


def test_log_probabilities_are_the_models():
  prompt, = _prompts(TIED, 1)
  row, = _run(TIED, [engine.Request(prompt, 5)]).values()
  tokens = [*prompt, *(event.token for event in row)]
  logits_TV = _full(TIED, tokens)[-1]
  log_p_TV = jax.nn.log_softmax(logits_TV)
  at = np.arange(len(prompt) - 1, len(tokens) - 1)
  np.testing.assert_allclose(
      [event.log_p for event in row], log_p_TV[at, tokens[len(prompt):]],
      atol=1e-4)


# Exits.


@functools.partial(jax.jit, static_argnums=0)
def _frozen(cfg, values, token_1T, depth_T, last):
  """Logits and gates of place `last` at every loop, [L, V] and [L].

  By a full forward in which a token stays as it is once it has exited, after
  depth_T loops; every layer makes keys and values of what it is.
  """
  params = values['params']
  bound = rtx.Decoder(cfg).bind(values)
  context = model.whole(cfg, token_1T.shape)
  layer = model.Layer(cfg, rtx.Run())
  (x_1TD, _), at_L = bound.enter(token_1T, context), []
  adapted = {name: leaves for name, leaves in params.get(
      'adapters', {}).items() if name != 'exit'}
  for loop in range(cfg.loops):
    for i in range(cfg.layers_per_loop):
      leaves = jax.tree.map(lambda v, i=i: v[i], params['block'])
      own = jax.tree.map(lambda v, at=(loop, i): v[at], adapted)
      y_1TD, _ = layer.apply(
          {'params': leaves['layers']}, x_1TD,
          adapters.layer_values(cfg, leaves.get('vectors', {}), own), context)
      x_1TD = jnp.where((loop < depth_T)[:, None], y_1TD, x_1TD)
    at_L.append(x_1TD[0, last])
  h_LD = [bound.finish(x_1TD.at[0, last].set(x_D), context)[0][0, last]
          for x_D in at_L]
  gate_L = jnp.zeros(cfg.loops)
  if cfg.exit_gate:
    gate_L = jnp.stack([
        bound.gate(model.normalize(cfg, x_D, params['norm']), loop)
        for loop, x_D in enumerate(at_L[:-1])])
  return bound.logits(jnp.stack(h_LD)), gate_L


def _by_frozen_forwards(cfg, prompt, count, exit, fill):
  """Tokens and depths, by the rule's definition."""
  values, tokens, depths = _variables(cfg), list(prompt), []
  for _ in range(count):
    token_1T = np.zeros((1, LENGTH), np.int32)
    token_1T[0, :len(tokens)] = tokens
    depth_T = np.full(LENGTH, cfg.loops)
    if fill == 'propagate':
      depth_T[len(prompt) - 1:len(tokens) - 1] = depths
    logits_LV, gate_L = map(np.asarray, _frozen(
        cfg, values, token_1T, depth_T, len(tokens) - 1))
    gate_L = [*gate_L, 0.0][:cfg.loops]  # The final loop has none.
    for loop, threshold in enumerate([*exit.thresholds, -np.inf]):
      score = (0.0 if exit.rule == 'static' else np.asarray(exits.score(
          exit.rule, logits=logits_LV[loop][None],
          gate=jnp.array(gate_L[loop:loop + 1])))[0])
      if score >= threshold:
        break
    tokens.append(int(logits_LV[loop].argmax()))
    depths.append(loop + 1)
  return tokens[len(prompt):], depths


def _half(cfg, rule):
  """An exit that about half of the tokens take at each loop."""
  if rule == 'gate':
    return exits.Exit(rule, (0.5,) * (cfg.loops - 1))
  logits_LTV = _full(cfg, tiny.tokens(cfg, 1, LENGTH)[0])
  scores = [np.asarray(exits.score(rule, logits=logits_LTV[loop]))
            for loop in range(cfg.loops - 1)]
  return exits.Exit(rule, tuple(float(np.median(score)) for score in scores))


GATED = dataclasses.replace(MIXED, exit_gate=5, loop_norms=False)
SERIAL = dataclasses.replace(tiny.FAMILIES['gpt_neox'], loops=3,
                             layers_per_loop=1, loop_norms=True, rank='2')


@pytest.mark.parametrize('cfg, rule, fill', [
    (MIXED, 'top', 'propagate'),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        (MIXED, 'top', 'complete'), (GATED, 'gate', 'propagate'),
        (GATED, 'gate', 'complete'), (TIED, 'margin', 'propagate'),
        (TIED, 'top', 'complete'), (SERIAL, 'margin', 'propagate'),
        (SERIAL, 2, 'propagate'), (MIXED, 1, 'complete')))])
def test_tokens_exit_by_the_rule(cfg, rule, fill):
  exit = (exits.static(rule, cfg.loops) if isinstance(rule, int)
          else _half(cfg, rule))
  prompts = _prompts(cfg, 3)
  events = _run(cfg, [engine.Request(prompt, 8) for prompt in prompts],
                exit=exit, fill=fill)
  seen = set()
  for prompt, row in zip(prompts, events.values(), strict=True):
    tokens, depths = _by_frozen_forwards(cfg, prompt, 8, exit, fill)
    assert [event.token for event in row] == tokens
    assert [event.depth for event in row] == depths
    seen.update(depths)
  assert len(seen) > 1 or isinstance(rule, int), 'all exit at the same loop'


@pytest.mark.parametrize('cfg', [
    dataclasses.replace(TIED, loop_keys=False),
    pytest.param(dataclasses.replace(
        SERIAL, loop_keys=False, prelude=1), marks=pytest.mark.slow)])
def test_exits_change_no_later_token_where_loops_share_keys(cfg):
  """By full forwards of whole texts: the next token, and when it exits."""
  exit, prompts = _half(cfg, 'top'), _prompts(cfg, 3)
  events = _run(cfg, [engine.Request(prompt, 8) for prompt in prompts],
                exit=exit)
  seen = set()
  for prompt, row in zip(prompts, events.values(), strict=True):
    tokens = list(prompt)
    for event in row:
      logits_LV = _full(cfg, tokens)[:, -1]
      score_L = exits.score('top', logits=logits_LV)
      exits_L = score_L >= np.array([*exit.thresholds, -np.inf])
      loop = int(np.argmax(exits_L))
      assert event.token == logits_LV[loop].argmax()
      assert event.depth == loop + 1
      tokens.append(event.token)
      seen.add(event.depth)
  assert len(seen) > 1


# Any order of arrival, any neighbours.


@functools.cache
def _served(slots, schedule, alone=False):
  """An engine for all tests that ask alike; `alone`: for none but `_alone`."""
  return rtx.Engine(
      MIXED, _variables(MIXED), slots=slots, max_len=LENGTH, steps=4,
      schedule=schedule, exit=_half(MIXED, 'top'), fill='complete')


@functools.cache
def _alone(prompt, count, sampler):
  """What a request gets in an engine of its own."""
  served = _served(1, 'cdb', alone=True)
  rows = _drain(served, [served.submit(engine.Request(
      prompt, count, sampler))])
  return [(event.token, event.depth) for row in rows.values() for event in row]


PROMPTS = _prompts(MIXED, 4)
SAMPLERS = [rtx.Sampler(), rtx.Sampler(temperature=1.0, seed=1),
            rtx.Sampler(temperature=1.0, seed=2, top_k=9, top_p=0.9)]
ARRIVALS = st.lists(st.tuples(
    st.integers(0, 3),  # Polls before it comes.
    st.sampled_from(PROMPTS), st.integers(1, 6), st.sampled_from(SAMPLERS),
    st.none() | st.integers(0, 3),  # Polls before it is cancelled.
), min_size=1, max_size=8)


def _any_schedule(arrivals, slots, schedule):
  served = _served(slots, schedule)
  wanted, got, cancels = {}, {}, {}
  cancelled = set()
  clock = 0

  def poll():
    for event in served.poll():
      assert event.id not in cancelled, 'an event after it was cancelled'
      got[event.id].append((event.token, event.depth))

  for wait, prompt, count, sampler, patience in arrivals:
    for _ in range(wait):
      poll()
      clock += 1
    id = served.submit(engine.Request(prompt, count, sampler))
    wanted[id], got[id] = _alone(prompt, count, sampler), []
    if patience is not None:
      cancels[id] = clock + patience
    for late in [late for late, when in cancels.items() if when <= clock]:
      del cancels[late]
      served.cancel(late)
      cancelled.add(late)
  for _ in range(300):
    if not served.pending:
      break
    poll()
  assert not served.pending
  for id, tokens in wanted.items():
    if id in cancelled:
      assert got[id] == tokens[:len(got[id])]
    else:
      assert got[id] == tokens


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True,
                     database=None)
@hypothesis.given(ARRIVALS)
def test_neighbours_and_arrivals_change_nothing(arrivals):
  _any_schedule(arrivals, 2, 'cdb')


@pytest.mark.slow
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True,
                     database=None)
@hypothesis.given(ARRIVALS, st.sampled_from([1, 2, 3, 5]),
                  st.sampled_from(['cdb', 'csb', 'static']))
def test_neighbours_slots_and_schedules_change_nothing(
    arrivals, slots, schedule):
  _any_schedule(arrivals, slots, schedule)


# What ends a request, and what is refused.


def test_the_end_of_text_ends_a_request():
  prompt = PROMPTS[0]
  whole = _solo(MIXED, prompt, 8)
  events = _run(MIXED, [engine.Request(prompt, 8),
                        engine.Request(prompt, 8, ignore_eos=True)],
                eos_id=whole[3])
  stopped, continued = _tokens(events)
  assert stopped == whole[:whole.index(whole[3]) + 1]
  assert continued == whole
  assert [row[-1].finish for row in events.values()] == ['stop', 'length']


def test_generate_leaves_the_end_of_text_out():
  prompts = PROMPTS[:2]
  whole = [_solo(MIXED, prompt, 6) for prompt in prompts]
  eos = whole[0][2]
  news = rtx.generate(MIXED, _variables(MIXED), prompts, max_new_tokens=6,
                      eos_id=eos)
  assert news == [
      row[:row.index(eos)] if eos in row else row for row in whole]


@pytest.mark.parametrize('request_, part', [
    (engine.Request(()), 'empty prompt'),
    (engine.Request((1,), 0), 'max_new_tokens is 0'),
    (engine.Request((1,), LENGTH), f'max_len={LENGTH}'),
    (engine.Request((29,), 1), 'outside'),
    (engine.Request((-1,), 1), 'outside')])
def test_bad_requests_are_refused(request_, part):
  with tiny.refused(part):
    _served(2, 'cdb').submit(request_)


@pytest.mark.parametrize('arguments, part', [
    (dict(slots=0), 'slots is 0'), (dict(max_len=0), 'max_len is 0'),
    (dict(fill='share'), 'propagate'), (dict(schedule='cbd'), "'csb'"),
    (dict(exit=exits.Exit('top', (0.5,))), 'thresholds')])
def test_bad_engines_are_refused(arguments, part):
  with tiny.refused(part):
    rtx.Engine(MIXED, _variables(MIXED), **arguments)


def test_long_prompts_are_read_in_chunks(monkeypatch):
  import recursive_tx.engine.engine as module
  monkeypatch.setattr(module, '_CHUNK', 8)
  monkeypatch.setattr(module, '_SHORTEST', 4)
  prompts = [tuple(tiny.tokens(MIXED, 1, n, n)[0].tolist())
             for n in (3, 9, 10, 25, 30)]
  events = _run(MIXED, [engine.Request(prompt, 3) for prompt in prompts])
  assert _tokens(events) == [_solo(MIXED, prompt, 3) for prompt in prompts]


# Ends, and tokens that a tokenizer does not know.


@pytest.mark.slow
def test_any_of_several_ends_ends_a_request():
  prompt = _prompts(TIED, 1)[0]
  whole = _solo(TIED, prompt, 8)
  for ends in ([whole[3]], (whole[5], whole[2]), [TIED.V + 9, whole[1]]):
    row, = _run(TIED, [engine.Request(prompt, 8)], eos_id=ends).values()
    first = min(whole.index(end) for end in ends if end in whole)
    assert [event.token for event in row] == whole[:first + 1]
    assert row[-1].finish == 'stop'
    assert [event.finish for event in row[:-1]] == [None] * first
    new, = rtx.generate(TIED, _variables(TIED), [prompt], max_new_tokens=8,
                        eos_id=ends)
    assert new == whole[:first]
  row, = _run(TIED, [engine.Request(prompt, 8, ignore_eos=True)],
              eos_id=whole).values()
  assert [event.token for event in row] == whole


@pytest.mark.parametrize('temperature', [0.0, 1.0, 1e30])
def test_unknown_tokens_are_never_generated(temperature):
  """And the known ones as by the logits of these alone."""
  prompt = _prompts(TIED, 1)[0]
  known_V = np.arange(TIED.V) % 3 == 0
  new, = rtx.generate(
      TIED, _variables(TIED), [prompt], max_new_tokens=24, known_V=known_V,
      sampler=rtx.Sampler(temperature=temperature))
  assert known_V[new].all()
  if not temperature:
    tokens = list(prompt)
    for token in new:
      logits_V = _full(TIED, tokens)[-1, -1]
      assert token == np.where(known_V, logits_V, -np.inf).argmax()
      tokens.append(token)


@pytest.mark.parametrize('request_, says', [
    (dict(prompt=[]), 'empty prompt'), (dict(prompt=[1.5]), 'float64'),
    (dict(prompt=[[1]]), '(1, 1)'), (dict(prompt=[-1]), '-1..-1'),
    (dict(prompt=[TIED.V]), 'outside'), (dict(prompt=[True]), 'bool'),
    (dict(prompt=[1], max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(prompt=[1], max_new_tokens=1.5), 'max_new_tokens is 1.5'),
    (dict(prompt=[1], max_new_tokens=LENGTH), 'exceed max_len')])
def test_a_bad_request_is_refused(request_, says):
  served = rtx.Engine(TIED, _variables(TIED), slots=1, max_len=LENGTH)
  with tiny.refused(says):
    served.submit(engine.Request(**request_))


@pytest.mark.parametrize('arguments', [
    dict(slots=0), dict(slots=1.5), dict(max_len=float('nan')),
    dict(steps=-1), dict(eos_id='2'), dict(eos_id=[1.0]),
    dict(known_V=np.zeros(TIED.V, bool))])
def test_a_bad_engine_is_refused(arguments):
  name, = arguments
  with tiny.refused('no token' if name == 'known_V' else name):
    rtx.Engine(TIED, _variables(TIED), **arguments)
