"""Real servers of a tiny model, in processes of their own."""

import contextlib
import dataclasses
import functools
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import openai
import pytest
import tiny
import tiny_tokenizers

import recursive_tx as rtx
from recursive_tx import exits

ROOT = tiny.ROOT
CFG = rtx.ModelConfig(
    V=290, D=16, F=24, N=2, K=1, H=8, layers_per_loop=1, loops=3)
EXIT = exits.Exit('top', (0.03, 0.035))
MAX_LEN, SLOTS, QUEUE = 16384, 2, 3


@dataclasses.dataclass
class Server:
  """A running one."""
  process: subprocess.Popen
  port: int
  directory: pathlib.Path

  @functools.cached_property
  def client(self):
    return openai.OpenAI(base_url=f'http://127.0.0.1:{self.port}/v1',
                         api_key='none', max_retries=0, timeout=60)

  def metrics(self):
    """{name and labels: value}."""
    _, text, _ = self.ask('/metrics')
    return {line.rsplit(' ', 1)[0]: float(line.rsplit(' ', 1)[1])
            for line in text.splitlines() if line[:1] != '#'}

  def metric(self, name):
    return self.metrics()[f'recursive_tx_{name}']

  def ask(self, path, body=None, **headers):
    """(status, text, headers) of one request of its own connection."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
    with contextlib.closing(connection):
      if isinstance(body, dict):
        body = json.dumps(body)
      connection.request(
          'GET' if body is None else 'POST', path, body,
          {'content-type': 'application/json', **headers})
      answer = connection.getresponse()
      return answer.status, answer.read().decode(), answer.headers

  def begin(self, **fields):
    """A socket on which a long answer has begun to come."""
    body = json.dumps({'prompt': 'the cat', 'temperature': 0, 'stream': True,
                       'max_tokens': MAX_LEN - 10, **fields})
    sock = socket.create_connection(('127.0.0.1', self.port), timeout=60)
    sock.sendall(
        b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type:'
        b' application/json\r\ncontent-length: %d\r\n\r\n%s'
        % (len(body), body.encode()))
    assert b'200 OK' in sock.recv(12)+sock.recv(99)
    return sock


@contextlib.contextmanager
def started(directory, *flags):
  """A server of a directory; it must end well."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'recursive_tx', 'serve', '--port=0',
       f'--checkpoint={directory}', f'--max_len={MAX_LEN}', '--warm_up=2',
       *flags], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
          **os.environ, 'JAX_PLATFORMS': 'cpu',
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
          # Of several servers, the second finds what the first compiled.
          'JAX_COMPILATION_CACHE_DIR': str(directory.parent / 'compiled'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
  try:
    line = process.stdout.readline()
    found = re.fullmatch(r'serving at http://127\.0\.0\.1:(\d+)\n', line)
    assert found, process.communicate()[1]
    yield Server(process, int(found[1]), directory)
    if process.poll() is None:
      process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert 'Traceback' not in errors and 'Warning' not in errors, errors
  finally:
    process.kill()
    process.communicate()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A saved model whose tokens leave at all loops."""
  tokenizer = tiny_tokenizers.train(
      tmp_path_factory.mktemp('tokenizer'), bos_id=1, eos_id=2, unk_id=0)
  made = tmp_path_factory.mktemp('made') / 'tiny'
  rtx.save(made, CFG, tiny.variables(CFG))
  shutil.copy(tokenizer / 'tokenizer.model', made)
  exits.save(made, EXIT, {})
  return made
