"""Documentation names only what is there, and leaves no public name out."""

import inspect
import pathlib
import re

from benchmarks import tables
import pytest

import recursive_tx
from recursive_tx.__main__ import VERBS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
# Other paths are outputs, or files of users.
_FOLDERS = {'recursive_tx', 'configs', 'launch', 'tests', 'docs', 'colabs',
            '.github'}
_PATH = re.compile(
    r'[\w.-]+(?:/[\w.-]+)+\.(?:py|sh|md|txt|json|jsonl|toml|yml|png|cff|bash'
    r'|html|ipynb)')
_LINK = re.compile(r'\[[^\]]*\]\(\s*([^)\s]+)\s*\)')


def _id(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def _text(path: pathlib.Path) -> str:
  return path.read_text('utf-8')


def _anchors(page: pathlib.Path) -> set[str]:
  """Anchors of a page's headings, made as GitHub makes them."""
  prose = re.sub(r'^( *)```.*?^\1```', '', _text(page), flags=re.M | re.S)
  titles = re.findall(r'^#+ +(.*)$', prose, flags=re.M)
  return {re.sub(r'[^\w\- ]', '', title.lower()).strip().replace(' ', '-')
          for title in titles}


def _names() -> list[str]:
  """The public API: what `recursive_tx/__init__.py` imports by its name."""
  given = getattr(recursive_tx, '__all__', None)
  return sorted(given or {
      name for line in _text(ROOT / 'recursive_tx/__init__.py').splitlines()
      for name in re.findall(r'^from \S+ import \w+ as (\w+)$', line)})


def test_the_front_page_is_short():
  assert len(_text(ROOT / 'README.md').splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES, ids=_id)
def test_links_lead_somewhere(page):
  for link in _LINK.findall(_text(page)):
    if link.startswith(('http://', 'https://', 'mailto:')):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    if anchor:
      assert anchor in _anchors(target), link


@pytest.mark.parametrize('page', PAGES, ids=_id)
def test_paths_in_backticks_exist(page):
  """Also those in commands."""
  text = _text(page)
  spans = re.findall(r'^ *```.*?^ *```', text, flags=re.M | re.S)
  spans += re.findall(r'`([^`\n]+)`', text)
  for path in {found for span in spans for found in _PATH.findall(span)}:
    if path.split('/')[0] in _FOLDERS:
      assert (ROOT / path).exists(), path


@pytest.mark.parametrize('page', PAGES, ids=_id)
def test_tables_are_what_was_measured(page):
  """`python tests/benchmarks/tables.py` makes them anew."""
  assert tables.updated(_text(page)) == _text(page)


def test_there_are_public_names():
  assert {'open', 'relax', 'Decoder', 'UserError'} <= set(_names())


@pytest.mark.parametrize('name', _names())
def test_a_public_name_is_documented(name):
  value = getattr(recursive_tx, name)
  if callable(value):  # FAMILIES is a table.
    own = vars(value).get('__doc__') if inspect.isclass(value) else (
        value.__doc__)
    assert own and own.strip(), f'{name} has no docstring'
    # What a dataclass writes itself is its signature.
    assert not own.startswith(f'{name}('), f'{name} has no docstring'
  page = _text(ROOT / 'docs/api.md')
  assert re.search(rf'^### rtx\.{name}$', page, flags=re.M), (
      f'docs/api.md has no section for rtx.{name}')


def test_the_api_page_names_nothing_else():
  page = _text(ROOT / 'docs/api.md')
  assert sorted(re.findall(r'^### rtx\.(\w+)$', page, flags=re.M)) == _names()


@pytest.mark.parametrize('verb', VERBS)
def test_the_front_page_lists_every_verb(verb):
  assert f'| `{verb}` |' in _text(ROOT / 'README.md')
