"""Laws of the server, of a real one: what clients get, and what it survives."""

import asyncio
import collections
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

from bodies import BAD, CHAT, GOOD
import numpy as np
import openai
import pytest
from servers import CFG, EXIT, QUEUE, ROOT, SLOTS, started

import recursive_tx as rtx
from recursive_tx.text import tokenizer as tokenizer_lib

PROMPTS = ['the cat', 'a dog ate', 'on', '日本', '']
pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def server(directory):
  with started(directory, f'--slots={SLOTS}', f'--queue={QUEUE}',
               '--max_body=60000') as server:
    yield server
    _sigterm_lets_running_answers_finish(server)


def _sigterm_lets_running_answers_finish(server):
  """The law of the server's end, which all tests here share."""
  sock = server.begin(max_tokens=2500)
  server.process.send_signal(signal.SIGTERM)
  _until(lambda: server.ask('/health')[0] == 503)
  status, text, _ = server.ask('/v1/completions', GOOD)
  assert status == 503 and 'no more requests' in text
  received = b''
  with sock:
    while part := sock.recv(2**16):
      received += part
  assert b'data: [DONE]' in received and b'"length"' in received
  server.process.wait(30)


def _expected(directory, prompts, count, exit=EXIT, slots=32):
  """Greedy texts by `generate`, of each prompt alone."""
  cfg, variables = rtx.restore(directory)
  tokenizer = tokenizer_lib.load(directory)
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  news = rtx.generate(
      cfg, variables, [[1, *prompt] for prompt in ids], exit=exit,
      max_new_tokens=count, eos_id=2, slots=slots)
  return [tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)):]
          for prompt, new in zip(ids, news, strict=True)]


def _until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it never came about'
    time.sleep(0.02)


# What clients get.


def test_greedy_text_is_that_of_generate(server):
  prompts = PROMPTS[:4]
  answer = server.client.completions.create(
      model='tiny', prompt=prompts, temperature=0, max_tokens=24)
  assert [choice.text for choice in answer.choices] == _expected(
      server.directory, prompts, 24)
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  depths = [choice.model_extra['depth'] for choice in answer.choices]
  assert {depth for row in depths for depth in row} == {1, 2, 3}
  assert answer.usage.completion_tokens == sum(map(len, depths))
  ids = [tokenizer_lib.load(server.directory).encode(p) for p in prompts]
  assert answer.usage.prompt_tokens == sum(1 + len(row) for row in ids)
  # Token ids are taken as they are.
  again = server.client.completions.create(
      model='tiny', prompt=[[1, *row] for row in ids], temperature=0,
      max_tokens=24)
  assert [x.text for x in again.choices] == [x.text for x in answer.choices]


@pytest.mark.parametrize('stop', [None, 'a', ['zzz', 'og', '\ufffd\ufffd']])
def test_a_stream_is_the_whole_answer_in_pieces(server, stop):
  asked = dict(model='tiny', prompt=PROMPTS[:3], max_tokens=60, seed=5,
               temperature=1.5, top_p=0.9, stop=stop,
               extra_body={'top_k': 40})
  whole = server.client.completions.create(**asked)
  texts, depths, finish = ['', '', ''], [[], [], []], {}
  *chunks, last = server.client.completions.create(
      **asked, stream=True, stream_options={'include_usage': True})
  for chunk in chunks:
    choice, = chunk.choices
    assert choice.index not in finish
    texts[choice.index] += choice.text
    depths[choice.index] += choice.model_extra['depth']
    if choice.finish_reason:
      finish[choice.index] = choice.finish_reason
  assert texts == [choice.text for choice in whole.choices]
  assert depths == [choice.model_extra['depth'] for choice in whole.choices]
  assert [finish[i] for i in range(3)] == [
      choice.finish_reason for choice in whole.choices]
  assert last.choices == [] and last.usage == whole.usage
  for text in texts:
    assert not any(s in text for s in ([stop] if stop == 'a' else stop or []))


def test_a_chat_is_a_completion_of_its_lines(server):
  messages = [{'role': 'user', 'content': 'the cat'},
              {'role': 'assistant', 'content': 'ate'},
              {'role': 'user', 'content': [{'type': 'text', 'text': 'it'}]}]
  asked = dict(model='tiny', temperature=0, max_tokens=20)
  lines = 'user: the cat\nassistant: ate\nuser: it\nassistant:'
  plain = server.client.completions.create(
      **asked, prompt=lines, logprobs=1).choices[0]
  chat = server.client.chat.completions.create(
      **asked, messages=messages, logprobs=True).choices[0]
  assert chat.message.content == plain.text
  assert chat.model_extra['depth'] == plain.model_extra['depth']
  assert [token.logprob for token in chat.logprobs.content] == (
      plain.logprobs.token_logprobs)
  chunks = list(server.client.chat.completions.create(
      **asked, messages=messages, stream=True))
  assert chunks[0].choices[0].delta.role == 'assistant'
  assert ''.join(chunk.choices[0].delta.content or ''
                 for chunk in chunks) == plain.text
  assert [d for chunk in chunks for d in chunk.choices[0].model_extra.get(
      'depth', [])] == plain.model_extra['depth']
  assert chunks[-1].choices[0].finish_reason == 'length'


def test_log_probabilities_are_of_the_tokens(server):
  choice = server.client.completions.create(
      model='tiny', prompt='the cat', temperature=0, max_tokens=12, logprobs=0,
      ).choices[0]
  logprobs = choice.logprobs
  assert len(logprobs.tokens) == len(choice.model_extra['depth']) == 12
  # The likeliest of V is no less likely than 1 / V.
  assert all(-np.log(CFG.V) < x < 0 for x in logprobs.token_logprobs)
  first, log_p = logprobs.tokens[0], logprobs.token_logprobs[0]
  assert logprobs.top_logprobs[0] == {first: log_p}
  assert logprobs.text_offset == sorted(logprobs.text_offset)
  assert logprobs.text_offset[0] == 0
  assert first in (choice.text[:len(first)], '\ufffd')


def test_the_bytes_of_half_a_character_are_its_own(server):
  """They are no U+FFFD's, and all together they are the text's."""
  choice = server.client.chat.completions.create(
      model='tiny', messages=[{'role': 'user', 'content': 'the cat'}],
      temperature=2, seed=5, max_tokens=60, logprobs=True).choices[0]
  pieces = [entry.bytes for entry in choice.logprobs.content]
  halves = [piece for piece in pieces if len(piece) == 1 and piece[0] >= 0x80]
  assert len(halves) > 10 and len({tuple(piece) for piece in halves}) > 5
  assert list('\ufffd'.encode()) not in pieces
  whole = bytes(itertools.chain.from_iterable(pieces))
  valid = whole.decode('utf-8', 'ignore').replace(' ', '')
  content = choice.message.content.replace('\ufffd', '').replace(' ', '')
  assert valid == content


def test_the_same_seed_gives_the_same_text_whatever_the_neighbours(server):
  asked = dict(model='tiny', prompt='the cat', max_tokens=40)
  alone = [server.client.completions.create(**asked, seed=seed).choices[0].text
           for seed in range(4)]
  assert len(set(alone)) == 4

  async def together():
    client = openai.AsyncOpenAI(
        base_url=server.client.base_url, api_key='none', max_retries=0)
    return await asyncio.gather(*(
        client.completions.create(**asked, seed=seed) for seed in range(4)))

  assert [answer.choices[0].text
          for answer in asyncio.run(together())] == alone
  drawn = {server.client.completions.create(**asked).choices[0].text
           for _ in range(3)}
  assert len(drawn) == 3


def test_the_end_of_text_is_no_text(server):
  before = server.metric('tokens_total')
  answer = server.client.completions.create(
      model='tiny', prompt=['the cat'] * 4, max_tokens=300, temperature=2,
      seed=3, logprobs=1)
  ended = [x for x in answer.choices if x.finish_reason == 'stop']
  assert 0 < len(ended) < 4
  for choice in ended:
    assert len(choice.model_extra['depth']) < 300
    assert len(choice.logprobs.tokens) == len(choice.model_extra['depth'])
  # It is generated all the same.
  assert server.metric('tokens_total') - before == (
      answer.usage.completion_tokens + len(ended))


def test_models_health_page_and_no_way_for_other_sites(server):
  model, = server.client.models.list().data
  assert (model.id, model.model_extra['loops']) == ('tiny', 3)
  assert server.client.models.retrieve('tiny').id == 'tiny'
  assert server.ask('/health')[:2] == (200, '{"status":"ok"}')
  status, page, headers = server.ask('/', origin='https://elsewhere.example')
  assert status == 200
  policy = headers['content-security-policy']
  assert "default-src 'none'" in policy and 'unsafe' not in policy
  assert not re.search(r'https?://|src=|href=|innerHTML', page)
  assert not any(name.lower().startswith('access-control')
                 for name in headers)
  assert server.ask('/nowhere')[0] == 404
  assert server.ask('/v1/completions')[0] == 405


# What it survives.


def test_faults_are_answered_in_openais_form(server):
  for path, body, status, says in BAD:
    if path == 'chat/completions' and body is GOOD:
      says = 'there is no field'
    found, text, _ = server.ask(f'/v1/{path}', body)
    error = json.loads(text)['error']
    assert (found, says in error['message']) == (status, True), (body, text)
    assert error.keys() == {'message', 'type', 'param', 'code'}
    assert len(error['message']) < 400 and '\n' not in error['message']
    assert str(server.directory.parent) not in text
  assert server.ask('/v1/completions', GOOD)[0] == 200
  # What asks for nothing is no fault.
  assert server.ask('/v1/chat/completions', CHAT | {
      'max_tokens': 3, 'tools': [], 'response_format': {'type': 'text'},
      'top_logprobs': 0, 'store': None, 'n': 1})[0] == 200
  with pytest.raises(openai.BadRequestError) as caught:
    server.client.completions.create(model='tiny', prompt='x', best_of=2)
  assert caught.value.param == 'best_of'


def test_only_json_is_taken(server):
  for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
    assert server.ask('/v1/completions', GOOD, **{
        'content-type': kind})[0] == 415
  assert server.ask('/v1/completions', GOOD, **{
      'content-type': 'Application/JSON; charset=utf-8'})[0] == 200


@pytest.mark.parametrize('sent, status', [
    (b'nonsense\r\n\r\n', b'400'),
    (b'GET / HTTP/1.1\r\nhost: x\r\nx: ' + b'a' * 400000 + b'\r\n\r\n', b'4'),
    # A length that is a lie, and a body that never ends.
    (b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application'
     b'/json\r\ncontent-length: 99999999999\r\n\r\n{', b'413'),
    (b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application'
     b'/json\r\ntransfer-encoding: chunked\r\n\r\n'
     + (b'2000\r\n' + b' ' * 0x2000 + b'\r\n') * 8, b'413'),
    (b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application'
     b'/json\r\ncontent-length: 50\r\n\r\n{"prompt"', b''),
])
def test_malformed_http(server, sent, status):
  with socket.create_connection(('127.0.0.1', server.port), 30) as sock:
    sock.sendall(sent)
    if status:
      assert sock.recv(99).startswith(b'HTTP/1.1 ' + status)
  assert server.ask('/v1/completions', GOOD)[0] == 200


def test_a_disconnect_frees_the_slot_and_a_full_queue_is_an_error(server):
  _until(lambda: server.metric('slots_in_use') == 0)
  before = server.metric('disconnects_total')
  socks = [server.begin() for _ in range(SLOTS)]
  assert server.metric('slots_in_use') == SLOTS
  waiting = []
  for i in range(QUEUE):  # They wait for a slot, so nothing comes of them.
    waiting.append(socket.create_connection(('127.0.0.1', server.port)))
    body = json.dumps(GOOD).encode()
    waiting[-1].sendall(
        b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application'
        b'/json\r\ncontent-length: %d\r\n\r\n' % len(body) + body)
    _until(lambda i=i: server.metric('queue_length') == i + 1)
  status, text, headers = server.ask('/v1/completions', GOOD)
  assert (status, json.loads(text)['error']['code']) == (429, 'queue_full')
  assert int(headers['retry-after']) > 0
  with pytest.raises(openai.RateLimitError):
    server.client.completions.create(model='tiny', prompt='x')
  waiting.pop().close()  # One of those that wait goes, too.
  _until(lambda: server.metric('queue_length') == QUEUE - 1)
  for sock in socks:
    sock.close()
  for sock in waiting:
    assert sock.recv(99).startswith(b'HTTP/1.1 200')
    sock.close()
  _until(lambda: server.metric('slots_in_use') == 0)
  assert server.metric('disconnects_total') == before + SLOTS + 1
  # Those who went had not read their answers to the end.
  assert server.metric('queue_length') == 0


def test_metrics_count(server):
  before = server.metrics()
  answer = server.client.completions.create(
      model='tiny', prompt='the cat', max_tokens=7, temperature=0)
  after = collections.Counter(server.metrics())
  after.subtract(before)
  depths = answer.choices[0].model_extra['depth']
  for name, value in (
      ('requests_total{status="200"}', 1), ('tokens_total', len(depths)),
      ('loops_total', sum(depths)),
      ('prompt_tokens_total', answer.usage.prompt_tokens),
      ('time_to_first_token_seconds_count', 1)):
    assert after[f'recursive_tx_{name}'] == value, name
  assert 1 <= server.metric('mean_depth') <= CFG.loops
  assert server.metric('tokens_per_second') > 0


# The command line.


@pytest.mark.slow
def test_flags_that_are_wrong(directory, server):
  for flag, says in ((f'--port={server.port}', 'cannot listen'),
                     ('--exit=top=0.5', '2'), ('--exit=tip=1', "'top'"),
                     ('--exit=static=4', '1 to 3'), ('--queue=-1', 'queue'),
                     ('--slots=0', 'slots')):
    done = subprocess.run(
        [sys.executable, '-m', 'recursive_tx', 'serve',
         f'--checkpoint={directory}', '--port=0', flag], cwd=ROOT,
        capture_output=True, text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr


# Many at once.


def _resident(process):
  """Bytes."""
  pages = pathlib.Path(f'/proc/{process.pid}/statm').read_text().split()[1]
  return int(pages) * os.sysconf('SC_PAGE_SIZE')


async def _one(port, prompt, count, leaves):
  """The text of a streamed answer; None where the client leaves early."""
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  try:
    body = json.dumps({'prompt': prompt, 'max_tokens': count, 'stream': True,
                       'temperature': 0}).encode()
    writer.write(
        b'POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n'
        b'content-type: application/json\r\ncontent-length: %d\r\n\r\n%s'
        % (len(body), body))
    text, lines, done = '', 0, False
    while line := await reader.readline():
      if line.startswith(b'data: {'):
        lines += 1
        text += json.loads(line[6:])['choices'][0]['text']
      done |= line.startswith(b'data: [DONE]')
      if leaves is not None and lines >= leaves:
        return None
    assert done, 'the answer was cut off'
    return text
  finally:
    writer.close()


@pytest.mark.slow
def test_a_thousand_at_once_of_whom_many_leave(directory):
  """None lost, none crossed, and memory as it was: within 16 MiB."""
  rng = random.Random(0)
  words = 'the cat sat on mat and dog ate it'.split()
  prompts = [' '.join(rng.choices(words, k=rng.randint(1, 9)))
             for _ in range(60)]
  count = 48
  expected = dict(zip(prompts, _expected(
      directory, prompts, count), strict=True))

  async def all_of(server, total):
    asked = [(rng.choice(prompts), rng.choice([None, None, 0, 1, 5, 20]))
             for _ in range(total)]
    found = await asyncio.gather(*(
        _one(server.port, prompt, count, leaves) for prompt, leaves in asked))
    for (prompt, leaves), text in zip(asked, found, strict=True):
      assert text is None if leaves is not None and text is None else (
          text == expected[prompt]), prompt
    return sum(text is not None for text in found)

  with started(directory, '--slots=8', '--queue=1000',
               '--max_len=128') as server:
    asyncio.run(all_of(server, 1000))
    before = _resident(server.process)
    whole = asyncio.run(all_of(server, 1000))
    _until(lambda: server.metric('slots_in_use') == 0)
    grown = _resident(server.process) - before
    assert whole >= 300  # A third stay to the end.
    assert grown < 16 * 2**20, f'{grown / 2**20:.1f} MiB'
    print(f'{whole} whole answers; memory grew by {grown / 2**20:.1f} MiB')
    assert server.metric('queue_length') == 0
