"""Tables of plain text."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
  """Rows in columns, each as wide as its widest cell and three spaces apart.

  Args:
    rows: cells, the headings first; all rows have the same number.
    left: so many columns are aligned to the left, the others to the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
      '   '.join(
          cell.ljust(width) if i < left else cell.rjust(width)
          for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows)
