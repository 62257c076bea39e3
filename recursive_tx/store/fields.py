"""Fields of config.json that are written in several places, or dialects.

Where two of them mean the same they must agree. transformers 5 gathers in
rope_parameters what stood beside rope_scaling before.
"""

import math
from typing import Any

from recursive_tx.config import ModelConfig
from recursive_tx.errors import UserError, one_of

# Types of rope that are implemented, and the numbers that each needs.
_ROPE_KINDS = {
    'default': (), 'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
               'original_max_position_embeddings'),
    'longrope': ('original_max_position_embeddings', 'attention_factor',
                 'short_factor', 'long_factor')}
_ORIGINAL = 'original_max_position_embeddings'


def read_rope(
    hf: dict[str, Any], theta_key: str, share_key: str | None, share: float,
    default: float = 10_000.0,
) -> dict[str, Any]:
  """ModelConfig's rope_* fields, from either dialect, or both alike.

  Args:
    hf: config.json.
    theta_key, share_key, share: of `Family.rope`.
    default: of theta.

  Raises:
    UserError: a kind of rope that is not implemented, or fields that
      contradict each other.
  """
  objects = {key: _rope_object(hf, key)
             for key in ('rope_parameters', 'rope_scaling') if hf.get(key)}
  theta, given, kind = (
      agreed({**{key: hf.get(key) for key in beside if key}, **{
          f'{key}.{name}': rope.pop(name, None)
          for key, rope in objects.items()}})
      for name, beside in (
          ('rope_theta', (theta_key, 'rope_theta')),
          ('partial_rotary_factor', (share_key, 'partial_rotary_factor')),
          ('rope_type', ())))
  theta = default if theta is None else theta
  given = share if given is None else given
  if not share_key and given != 1:
    raise UserError(
        f'config.json: partial_rotary_factor={given!r} is not implemented for '
        f'{hf["model_type"]}, which rotates whole heads; remove it')
  rope = agreed(objects) or {}
  wanted = _ROPE_KINDS[kind or 'default']
  if kind == 'longrope':
    _complete_long(hf, rope)
  if _ORIGINAL in wanted and _ORIGINAL not in rope:
    rope[_ORIGINAL] = hf.get('max_position_embeddings')
  extra = set(rope) - set(wanted)
  missing = set(wanted) - set(rope)
  if extra or missing:
    raise UserError(
        f'config.json: rope of type {kind!r} needs {list(wanted)}; '
        f'missing {sorted(missing)}, not implemented {sorted(extra)}')
  numbers = {key: value if isinstance(value, list) and key.endswith('_factor')
             else [value] for key, value in rope.items()}
  for key, values in {'rope_theta': [theta], 'partial_rotary_factor': [given],
                      **numbers}.items():
    for number in values:
      if not is_number(number, int, float) or not math.isfinite(number):
        raise UserError(
            f'config.json: {key}={number!r} is not a finite number')
  scaling = tuple(float(number) for key in wanted for number in numbers[key])
  return dict(
      rope_theta=float(theta), rope_fraction=float(given),
      **{'long_rope' if kind == 'longrope' else 'rope_scaling': scaling})


def _complete_long(hf, rope) -> None:
  """Adds what LongRoPE has beside rope_scaling, or by default."""
  longest, key = hf.get('max_position_embeddings'), _ORIGINAL
  original = agreed({key: hf.get(key), f'rope_scaling.{key}': rope.get(key)})
  original = longest if original is None else original
  factor = rope.pop('factor', None)
  if not is_number(original, int) or original < 2 or (
      None is factor is rope.get('attention_factor')
      and not is_number(longest, int)):
    raise UserError(
        f'config.json: {key}={original!r} and max_position_embeddings='
        f"{longest!r}; rope of type 'longrope' needs numbers of tokens")
  rope[key] = original
  if rope.get('attention_factor') is None:
    factor = factor or longest / original
    rope['attention_factor'] = 1.0 if factor <= 1 else math.sqrt(
        1 + math.log(factor) / math.log(original))


def _rope_object(hf, key) -> dict[str, Any]:
  """A copy of rope_parameters or rope_scaling, whose type is 'rope_type'."""
  rope = hf[key]
  if not isinstance(rope, dict):
    raise UserError(f'config.json: {key}={rope!r} is not an object')
  rope = dict(rope)
  kind = agreed({f'{key}.{name}': rope.pop(name, None)
                  for name in ('rope_type', 'type')}) or 'default'
  kind = 'longrope' if kind == 'su' else kind  # The first releases of Phi 3.
  one_of('config.json: rope type', str(kind), _ROPE_KINDS)
  return {**rope, 'rope_type': kind}


def agreed(values: dict[str, Any]) -> Any:
  """The one value of fields that mean the same; None where none is set.

  Raises:
    UserError: two of them differ.
  """
  found = {key: value for key, value in values.items() if value is not None}
  first = next(iter(found.values()), None)
  if len(found) > 1 and any(value != first for value in found.values()):
    raise UserError(
        'config.json: ' + ' and '.join(f'{k}={v!r}' for k, v in found.items())
        + ' contradict each other; remove the wrong one')
  return first


def write_scaling(cfg: ModelConfig) -> dict[str, Any] | None:
  """What `read_rope` reads from rope_scaling."""
  scaling = cfg.rope_scaling
  if cfg.long_rope:
    original, scale = cfg.long_rope[:2]
    return {'rope_type': 'longrope', _ORIGINAL: int(original),
            'attention_factor': scale,
            'short_factor': list(cfg.rope_divisors(long=False)),
            'long_factor': list(cfg.rope_divisors(long=True))}
  if not scaling:
    return None
  if len(scaling) == 1:
    return {'rope_type': 'linear', 'factor': scaling[0]}
  factor, low, high, length = scaling
  return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low,
          'high_freq_factor': high,
          'original_max_position_embeddings': int(length)}


def is_number(value: Any, *kinds: type) -> bool:
  """Whether a value has one of these types; a bool is no int."""
  return isinstance(value, kinds) and not isinstance(value, bool)
