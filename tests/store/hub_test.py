"""Names on the hub, with the real client and a server that speaks its API."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import tiny

from recursive_tx.errors import UserError
from recursive_tx.store import hub, opening

pytest.importorskip('huggingface_hub', reason='of the extra data')
DEMO = tiny.ROOT / 'recursive_tx' / 'demo'
COMMIT = 'a' * 40


class _Server(http.server.ThreadingHTTPServer):
  """One model, org/name, of which it notes what is fetched."""

  def __init__(self, folder: pathlib.Path):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.folder, self.fetched = folder, []
    threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.split('?')[0]
    folder = self.server.folder
    names = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob('*')
        if file.is_file())
    if path.startswith('/api/models/org/name/revision/'):
      revision = path.rsplit('/', 1)[1]
      if revision in ('main', 'v1', COMMIT):
        return self._send(json.dumps({
            'id': 'org/name', 'sha': COMMIT, 'private': False, 'tags': [],
            'siblings': [{'rfilename': name} for name in names]}).encode())
    if path.startswith('/api/models/org/name/tree/'):
      return self._send(json.dumps([{
          'type': 'file', 'path': name, 'oid': name,
          'size': (folder / name).stat().st_size} for name in names]).encode())
    name = path.removeprefix(f'/org/name/resolve/{COMMIT}/')
    if name in names:
      content = (folder / name).read_bytes()
      if self.command == 'GET':
        self.server.fetched.append(name)
      return self._send(content, {
          'ETag': f'"{hashlib.sha1(content).hexdigest()}"',
          'X-Repo-Commit': COMMIT})
    code = ('RevisionNotFound' if '/org/name/' in path else 'RepoNotFound')
    self._send(b'', {'X-Error-Code': code}, 404)

  def _send(self, content, headers=None, status=200):
    self.send_response(status)
    for key, value in {**(headers or {}), 'Content-Length': str(len(content)),
                       'Content-Type': 'application/json'}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
  folder = tmp_path / 'there'
  folder.mkdir()
  for path in DEMO.iterdir():
    if path.suffix in ('.json', '.model', '.safetensors', '.md'):
      (folder / path.name).write_bytes(path.read_bytes())
  for name in ('modeling.py', 'pytorch_model.bin', 'onnx/config.json',
               'original/weights.safetensors'):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'never fetched')
  found = _Server(folder)
  yield found
  found.shutdown()
  found.server_close()


def run(tmp_path, code: str, server=None) -> subprocess.CompletedProcess:
  """In a new process: the client reads its settings when it is imported."""
  port = server.server_address[1] if server else 9  # Where nobody listens.
  return subprocess.run(
      [sys.executable, '-c', code], cwd=tmp_path, text=True, timeout=120,
      capture_output=True, env={
          **os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HOME': f'{tmp_path}/cache',
          'HF_ENDPOINT': f'http://127.0.0.1:{port}', 'HF_HUB_DISABLE_XET': '1',
          'PYTHONPATH': os.pathsep.join([str(tiny.ROOT), *sys.path])})


def test_a_name_opens_the_model_and_fetches_nothing_else(server, tmp_path):
  """Its config alone before its weights; both again without the hub."""
  code = (
      'from recursive_tx.store import opening\n'
      "name = 'org/name@v1'\n"
      'cfg, tok = opening.config(name), opening.load_tokenizer(name)\n'
      'import pathlib\n'
      "where = pathlib.Path(opening.companions(name))\n"
      "print((where / 'model.safetensors').exists())\n"
      'found = opening.open(name)\n'
      'assert found.config == cfg and found.tokenizer.digest == tok.digest\n'
      'print(found.companions)\n')
  done = run(tmp_path, code, server)
  assert done.returncode == 0, done.stderr[-2000:]
  early, where = done.stdout.split()
  assert early == 'False'
  ours, theirs = opening.open(DEMO), opening.open(where)
  assert ours.config == theirs.config
  assert set(server.fetched) == {
      path.name for path in DEMO.iterdir()
      if path.suffix in ('.json', '.model', '.safetensors', '.md')}
  again = run(tmp_path, code)
  assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.parametrize(('name', 'reached', 'message'), [
    ('org/name', False, 'LocalEntryNotFoundError'),
    ('org/nothing', True, 'RepositoryNotFoundError'),
    ('org/name@v2', True, 'RevisionNotFoundError'),
])
def test_what_cannot_be_fetched_is_refused_in_one_line(
    server, tmp_path, name, reached, message
):
  done = run(tmp_path, (
      'import sys\n'
      'from recursive_tx.__main__ import main\n'
      f"sys.exit(main(['convert', '--source={name}', '--output=out',"
      " '--loops=2']))"), server if reached else None)
  assert done.returncode == 1
  line, = done.stderr.splitlines()
  assert f"{name!r} is no directory here" in line and message in line
  assert 'fetch it where the hub is reached' in line


def test_paths_are_no_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs' / 'one').mkdir(parents=True)
  for path in ('runs/one', '/a/b', './a/b', '../b', 'a', 'a/b/c', '~/a',
               'gs://a/b', 'a/b@', ''):
    assert not hub.is_name(path), path
  for name in ('org/name', 'o-r.g/n_a.me-1', 'org/name@v1', 'org/name@pr/3'):
    assert hub.is_name(name), name


def test_without_the_package_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"pip install 'recursive_tx\[data\]'"):
    opening.config('org/nowhere')
