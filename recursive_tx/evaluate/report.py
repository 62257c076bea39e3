"""A held-out evaluation as a person reads it."""

from typing import Any

from recursive_tx.text.columns import columns


def table(result: dict[str, Any]) -> str:
  """The result of `evaluate` as text, a row for each loop."""
  rows = [('loop', 'nats/token', 'perplexity', 'bits/byte')]
  for row in result['loops']:
    many = row['perplexity'] >= 1e9
    rows.append((
        f'{row["loop"]}', f'{row["loss"]:.4f}',
        f'{row["perplexity"]:{".3e" if many else ".3f"}}',
        f'{row["bits_per_byte"]:.4f}'))
  return (
      f'{result["documents"]} documents, {result["bytes"]:,} bytes,'
      f' {result["tokens"]:,} tokens\n{columns(rows, left=0)}')
