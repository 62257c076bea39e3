"""`generate` on the command line, in real processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
from absl.testing import flagsaver
import pytest
import tiny
import tiny_tokenizers

import recursive_tx as rtx
from recursive_tx import exits
from recursive_tx.cli import exits as exit_flags
from recursive_tx.cli import generate
from recursive_tx.text import tokenizer

ROOT = tiny.ROOT
CFG = rtx.ModelConfig(
    V=290, D=16, F=24, N=2, K=1, H=8, layers_per_loop=1, loops=3)
EXIT = exits.Exit('top', (0.03, 0.035))
PAINT = re.compile(r'\x1b\[97;48;5;(\d+)m(.*?)\x1b\[0m', re.DOTALL)
pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A saved model whose tokens leave at all loops."""
  made = tmp_path_factory.mktemp('made') / 'tiny'
  files = tiny_tokenizers.train(
      tmp_path_factory.mktemp('tokenizer'), bos_id=1, eos_id=2, unk_id=0)
  rtx.save(made, CFG, tiny.variables(CFG))
  shutil.copy(files / 'tokenizer.model', made)
  exits.save(made, EXIT, {})
  return made


def _start(directory, *flags, **how):
  return subprocess.Popen(
      [sys.executable, '-m', 'recursive_tx', 'generate',
       f'--checkpoint={directory}', *flags], cwd=ROOT, text=True, **{
           'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE,
           'stderr': subprocess.PIPE, **how},
      # A test run in the background inherits that Ctrl-C is ignored.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), env={
               **os.environ, 'JAX_PLATFORMS': 'cpu',
               'PYTHONIOENCODING': 'utf-8',
               'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})


def _run(directory, *flags, given=''):
  process = _start(directory, *flags)
  output, errors = process.communicate(given, timeout=300)
  return process.returncode, output, errors


def _expected(directory, prompts, count, seed=0, temperature=0.0):
  """Whole texts, by `generate`."""
  ids = tokenizer.load(directory)
  prompts = [ids.encode(prompt) for prompt in prompts]
  news = rtx.generate(
      CFG, rtx.restore(directory)[1], [[1, *x] for x in prompts], exit=EXIT,
      max_new_tokens=count, eos_id=2,
      sampler=rtx.Sampler(temperature=temperature, seed=seed))
  return [ids.decode([*prompt, *new])
          for prompt, new in zip(prompts, news, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize('replicas', [1, 2])
def test_prompts_come_from_everywhere_and_leave_in_order(
    directory, tmp_path, replicas):
  records = tmp_path / 'prompts.jsonl'
  records.write_text('{"prompt": "a dog"}\n\n{"text": "日本\\nmat"}\n')
  code, output, errors = _run(
      directory, '--prompt=the cat', f'--prompts={records}', '--slots=2',
      f'--replicas={replicas}',
      '--max_new_tokens=9', '--seed=3', '--temperature=1')
  assert code == 0, errors
  texts = _expected(directory, ['the cat', 'a dog', '日本\nmat'], 9, seed=3,
                    temperature=1.0)
  assert output == ''.join(
      f'[{i}]\n{text}\n' for i, text in enumerate(texts, 1))


def test_depths_are_colours(directory):
  code, output, errors = _run(
      directory, '--prompts=-', '--show-depth', '--color=always',
      '--max_new_tokens=30', given='the cat\n')
  assert code == 0, errors
  legend, text = output.split('\n', 1)
  assert [x[1].strip() for x in PAINT.findall(legend)] == ['1', '2', '3']
  colors = [x[0] for x in PAINT.findall(legend)]
  assert len(set(colors)) == 3
  shown = {x[0] for x in PAINT.findall(text)}
  assert len(shown) > 1 and shown <= set(colors)
  assert PAINT.sub(r'\2', text) == _expected(
      directory, ['the cat'], 30)[0] + '\n'


@pytest.mark.slow
def test_no_colours_but_in_a_terminal(directory):
  code, output, _ = _run(directory, '--prompt=the cat', '--show_depth',
                         '--max_new_tokens=5')
  assert code == 0 and '\x1b' not in output and 'loops' not in output
  ours, theirs = os.openpty()
  process = _start(directory, '--prompt=the cat', '--show_depth',
                   '--max_new_tokens=5', stdout=theirs)
  os.close(theirs)
  assert process.wait(120) == 0
  assert '\x1b[' in os.read(ours, 9999).decode()
  os.close(ours)


@pytest.mark.slow
def test_tokens_come_as_they_are_made_and_ctrl_c_ends_cleanly(directory):
  process = _start(directory, '--prompt=the cat', '--max_new_tokens=60000',
                   '--exit=static=1', '--temperature=0')
  seen = process.stdout.read(len('the cat') + 5)
  assert seen.startswith('the cat')
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert errors.strip().splitlines()[-1] == 'generate: interrupted'
  assert 'Traceback' not in errors


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(directory):
  process = _start(directory, '--prompt=the cat', '--max_new_tokens=3000')
  process.stdout.read(9)
  process.stdout.close()
  end = time.monotonic() + 60
  while process.poll() is None and time.monotonic() < end:
    time.sleep(0.05)
  assert process.returncode == 0
  assert 'Traceback' not in process.stderr.read()


@pytest.mark.slow
def test_a_stop_is_not_shown(directory):
  text, = _expected(directory, ['the cat'], 30)
  stop = text[len('the cat') + 10:][:3]
  code, output, _ = _run(directory, '--prompt=the cat', f'--stop={stop}',
                         '--max_new_tokens=30')
  new = text[len('the cat'):]
  assert code == 0 and output == 'the cat' + new[:new.index(stop)] + '\n'


@pytest.mark.parametrize('name, content, prompts', [
    ('a.txt', '\ufeffa\u2028b\x0cc\x85d\r\n\ne', ['a\u2028b\x0cc\x85d', 'e']),
    ('a.jsonl', '\ufeff{"prompt": "a\u2028b"}\r\n{"text": "c\x85"}\n',
     ['a\u2028b', 'c\x85'])])
def test_records_end_at_line_feeds_alone(tmp_path, name, content, prompts):
  """And a byte order mark is no text."""
  path = tmp_path / name
  path.write_bytes(content.encode())
  with flagsaver.flagsaver():
    flags.FLAGS(['generate', f'--prompts={path}'])
    assert generate.prompts() == prompts


def test_the_flag_of_exits():
  assert exit_flags.parse('none', CFG) == exits.Exit()
  assert exit_flags.parse('static=2', CFG) == exits.static(2, 3)
  assert exit_flags.parse('top=0.9,0.8', CFG) == exits.Exit('top', (.9, .8))
  for text, *says in (
      ('tip=1,1', "did you mean 'top'"), ('top', 'top=0.9,0.8'),
      ('top=', 'expected'), ('top=a,b', 'expected'), ('static=1.5', 'static='),
      ('static=4', '1 to 3'), ('static=1,2', 'static=LOOP'),
      ('oracle', 'expected one of'), ('top=nan,1', 'numbers from 0')):
    with tiny.refused(*says):
      exit_flags.parse(text, CFG)


@pytest.mark.slow
def test_faults_are_one_line(directory, tmp_path):
  empty, odd = tmp_path / 'empty', tmp_path / 'odd.jsonl'
  empty.write_text('\n')
  odd.write_text('{"prompt": "x"}\n{"promt": "x"}\n')
  for flag, says in (
      (f'--prompts={empty}', 'holds no prompt'), (f'--prompts={odd}', ':2 has'),
      ('--prompts=/nowhere', 'cannot be read'), ('--stop=', '--stop'),
      ('--exit=top=0.5', '2'), ('--fill=x', 'propagate')):
    code, _, errors = _run(directory, flag)
    assert code == 1 and 'Traceback' not in errors, errors
    assert says in errors.strip().splitlines()[-1]
