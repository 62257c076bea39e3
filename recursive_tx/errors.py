"""What a person can mend: one line with the value and the way out."""

import difflib


class UserError(ValueError):
  """Input, a file or a setting is wrong, and whoever gave it can mend it.

  Its text is one line that says what was found, what was expected and the way
  out. The command line prints it without a traceback. Any other exception is
  a fault of the program and keeps its traceback.
  """


def one_of(what: str, value: str, known) -> None:
  """Raises UserError, naming the nearest, unless `value` is in `known`."""
  if value not in known:
    raise UserError(
        f'{what} {value!r} is not known{nearest(value, known)}; '
        f'expected one of {", ".join(known)}')


def nearest(value: str, known) -> str:
  """', did you mean X?' where something in `known` resembles `value`."""
  close = difflib.get_close_matches(str(value), list(known), n=1)
  return f', did you mean {close[0]!r}?' if close else ''
