"""A held-out evaluation as a person reads it."""

from typing import Any

from recursive_tx.text.columns import columns

# Titles and keys of a row; those that a result lacks are left out.
_COLUMNS = {'nats/token': 'loss', 'perplexity': 'perplexity',
            'bits/byte': 'bits_per_byte',
            'word perplexity': 'word_perplexity',
            'byte perplexity': 'byte_perplexity'}


def table(result: dict[str, Any]) -> str:
  """The result of `evaluate` as text, a row for each loop."""
  shown = {title: key for title, key in _COLUMNS.items()
           if key in result['loops'][0]}
  rows = [('loop', *shown)]
  for row in result['loops']:
    rows.append((f'{row["loop"]}', *(
        _number(key, row[key]) for key in shown.values())))
  words = f' {result["words"]:,} words,' if 'words' in result else ''
  return (
      f'{result["documents"]} documents, {result["bytes"]:,} bytes,{words}'
      f' {result["tokens"]:,} tokens\n{columns(rows, left=0)}')


def _number(key: str, value: float) -> str:
  if value >= 1e9:
    return f'{value:.3e}'
  few = key in ('perplexity', 'word_perplexity')
  return f'{value:.{3 if few else 4}f}'
