"""The text the demo model is made from: the standard library that runs it.

Every Python installation carries some ten megabytes of source and prose, so a
language model can be trained and judged offline. This module lists that text,
reads it and divides it. It knows nothing of tokens, batches or models.

Left out, because they are not language anybody wrote or not everywhere the
same: tests, byte code, third-party packages, and tables made by programs
(`encodings`, `html/entities.py`, `locale.py`, `re/_casefix.py`,
`stringprep.py`, build-time `_sysconfigdata_*`). Distributions cut the library
differently (Debian packs idlelib, tkinter and tests apart); a missing module
is simply not listed.

Held out are the modules named in HELDOUT, whole, chosen by hand to be varied
(numbers, text, parsing, network, processes, prose), to be in every
distribution since Python 3.11, and to have no twin: no stretch of their text
but licence headers and interface boilerplate occurs in a training file. So
none of the pairs such as decimal/_pydecimal, io/_pyio, bz2/lzma or
wave/aifc, of which either half would give the other away, is among them.

  python -m recursive_tx.demo.corpus --output=DIR

prints the size and digest of both splits and, with --output, writes them as
DIR/train.jsonl and DIR/heldout.jsonl, one {"name", "text"} record a document.
"""

import argparse
import ast
from collections.abc import Iterable, Iterator
import hashlib
import json
import os
import pathlib
import sysconfig

from recursive_tx.errors import UserError

# A name that ends with a slash stands for all files of that package.
HELDOUT = (
  'asyncio/streams.py',
  'calendar.py',
  'csv.py',
  'email/architecture.rst',
  'email/feedparser.py',
  'fractions.py',
  'gettext.py',
  'http/cookies.py',
  'json/',
  'multiprocessing/shared_memory.py',
  'shlex.py',
  'statistics.py',
  'textwrap.py',
  'tomllib/',
  'unittest/loader.py',
)

_TOPICS = 'pydoc_data/topics.py'
_SUFFIXES = ('.py', '.rst', '.txt')
_SKIPPED_DIRECTORIES = frozenset((
  '__pycache__', 'dist-packages', 'encodings', 'idle_test', 'lib-dynload',
  'site-packages', 'test', 'tests',
))  # fmt: skip
_SKIPPED_FILES = frozenset((
  'html/entities.py', 'locale.py', 're/_casefix.py', 'sitecustomize.py',
  'stringprep.py',
))  # fmt: skip


def train_files() -> tuple[pathlib.Path, ...]:
  """The files to train on, sorted by name; none of HELDOUT is among them."""
  return tuple(path for name, path in _files() if not _is_heldout(name))


def heldout_files() -> tuple[pathlib.Path, ...]:
  """The files of HELDOUT that this installation has, sorted by name."""
  return tuple(path for name, path in _files() if _is_heldout(name))


def documents(files: Iterable[pathlib.Path]) -> Iterator[tuple[str, str]]:
  """Yields (name, text) of each document, in the order of `files`.

  A file is one document, under its name relative to the library. The
  exception is pydoc's topics, a literal dictionary of the language reference's
  sections: each section is one document, 'pydoc_data/topics.py#NAME', without
  the quotation marks of the literal.
  """
  root = _library()
  for path in files:
    name = path.relative_to(root).as_posix()
    text = path.read_bytes().decode('utf-8')
    if name == _TOPICS:
      for topic, section in sorted(_topics(text).items()):
        yield f'{name}#{topic}', section
    else:
      yield name, text


def write(directory: str | os.PathLike) -> None:
  """Writes train.jsonl and heldout.jsonl, made anew, into `directory`."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for split, files in _splits().items():
    partial = directory / f'{split}.jsonl.partial'
    with partial.open('w', encoding='utf-8') as f:
      for name, text in documents(files):
        record = {'name': name, 'text': text}
        f.write(json.dumps(record, ensure_ascii=False) + '\n')
    partial.replace(directory / f'{split}.jsonl')


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Sizes of the demo corpus; with --output, the corpus itself.'
  )
  parser.add_argument('--output', help='directory for the two JSONL files')
  args = parser.parse_args()
  for split, files in _splits().items():
    digest, count, size = hashlib.sha256(), 0, 0
    for _, text in documents(files):
      data = text.encode('utf-8')
      digest.update(hashlib.sha256(data).digest())
      count, size = count + 1, size + len(data)
    print(
      f'{split:8s} {len(files):4d} files {count:4d} documents '
      f'{size:9,d} bytes  sha256 {digest.hexdigest()[:16]}'
    )
  if args.output is not None:
    write(args.output)


def _library() -> pathlib.Path:
  return pathlib.Path(sysconfig.get_path('stdlib'))


def _splits() -> dict[str, tuple[pathlib.Path, ...]]:
  return {'train': train_files(), 'heldout': heldout_files()}


def _files() -> list[tuple[str, pathlib.Path]]:
  """(name, path) of every file of the corpus, sorted by name."""
  root = _library()
  found = []
  for directory, subdirectories, names in os.walk(root):
    subdirectories[:] = [
      d for d in subdirectories if d not in _SKIPPED_DIRECTORIES
    ]
    for filename in names:
      path = pathlib.Path(directory, filename)
      name = path.relative_to(root).as_posix()
      if _is_language(name) and _is_text(path):
        found.append((name, path))
  if not found:
    raise UserError(
      f'no source files under {root}: expected the standard library as files; '
      'run a Python that is not packed into an archive'
    )
  return sorted(found)


def _is_language(name: str) -> bool:
  base = name.rpartition('/')[2]
  if name in _SKIPPED_FILES or base.startswith('_sysconfigdata_'):
    return False
  return base.endswith(_SUFFIXES) or base.startswith('README')


def _is_text(path: pathlib.Path) -> bool:
  """Whether the file is UTF-8 with something in it."""
  try:
    return bool(path.read_bytes().decode('utf-8').strip())
  except UnicodeDecodeError:
    return False


def _is_heldout(name: str) -> bool:
  return any(
    name.startswith(entry) if entry.endswith('/') else name == entry
    for entry in HELDOUT
  )


def _topics(source: str) -> dict[str, str]:
  """The dictionary that pydoc_data/topics.py assigns, read, not executed."""
  for statement in ast.parse(source).body:
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
      return ast.literal_eval(statement.value)
  raise UserError(
    f'{_TOPICS} assigns no dictionary: expected `topics = {{...}}`; '
    'reinstall the standard library'
  )


if __name__ == '__main__':
  main()
