"""What the verbs' command lines share."""


def check(argv: list[str], **required: object) -> None:
  """Raises ValueError for stray words or missing flags."""
  if len(argv) > 1:
    raise ValueError(f'unexpected arguments {argv[1:]}; flags start with --')
  for name, value in required.items():
    if value in (None, ''):
      raise ValueError(f'--{name} is missing; see {argv[0]} --help')
