"""Model FLOPs: the arithmetic of a step, however it is executed.

Matrix products only, 2 FLOPs a multiply-add; norms, softmax and the optimizer
are a few per cent of a small model and less of a large one. Recomputation,
masked scores and logits of loops without a loss are execution, and not
counted. An adapter counts as the lesser of two thin products with the tokens
and one product that is added to its kernel. This is the numerator of MFU
(Chowdhery et al., arxiv.org/abs/2204.02311, appendix B).

Knows sizes. Does not know arrays, meshes or chips.
"""

from collections.abc import Mapping, Sequence

from recursive_tx.config import HEAD, ModelConfig, parse_rank


def train_step(
    cfg: ModelConfig, weights: Mapping[str, Sequence[float]],
    teacher: ModelConfig | None, batch: int, seq_len: int,
) -> dict[str, float]:
  """FLOPs of one training step.

  Args:
    cfg: the model.
    weights: of every loss term at every loop, `LossConfig.weights(loops)`. A
      loop whose weights are all 0 needs no head, and what comes after the
      last loop that is used is not needed at all.
    teacher: the teacher's model; None is none.
    batch: sequences.
    seq_len: tokens of each. Sequences count as one document: packing shorter
      ones saves scores that this counts.

  Returns:
    Parts, forward and backward: 'prelude', 'block' and 'coda' (their
    linears), 'adapters', 'attention' (scores and mixing, of all layers),
    'head', and 'teacher' (forward, with its head). They add up to 'total', as
    do 'forward' (with the teacher) and 'backward'.
  """
  gated = _weighed([weights.get('gate', ())])
  learning = _weighed(
      [loops for term, loops in weights.items() if term != 'gate'])
  # The final loop's logits, where they teach the earlier ones, are made
  # whether or not they have a loss of their own; so are those that a gate, too
  # small to be counted, learns from without a gradient of theirs.
  taught = gated or any(weights.get('self_distill', ()))
  needed = sorted({*learning, *gated, *([cfg.loops] if taught else [])})
  there = forward(cfg, batch, seq_len, exits=needed)
  # A product's gradient is two products of the same size, one for each factor.
  back = dict.fromkeys(there, 0.0)
  if learning:
    back = {
        part: 2 * flops for part, flops in forward(
            cfg, batch, seq_len, exits=learning).items()}
  parts = {part: there[part] + back[part] for part in there}
  parts['teacher'] = 0.0
  if teacher is not None:
    parts['teacher'] = sum(forward(teacher, batch, seq_len).values())
  backward = sum(back.values())
  total = sum(parts.values())
  return {**parts, 'forward': total - backward, 'backward': backward,
          'total': total}


def forward(
    cfg: ModelConfig, batch: int, seq_len: int, *,
    exits: Sequence[int] | None = None,
) -> dict[str, float]:
  """FLOPs of one forward pass, by the parts of `train_step`.

  Args:
    cfg: the model.
    batch: sequences.
    seq_len: tokens of each.
    exits: loops, from 1, whose logits are made, each through the coda; None
      is the last one's only. Loops after the last of them do not run.
  """
  exits = (cfg.loops,) if exits is None else exits
  loops = max(exits)
  tokens = float(batch * seq_len)
  linears = looped = adapters = 0
  for kernel in cfg.kernels:
    rows, columns = cfg.in_out(kernel)
    passes = loops if cfg.loop_keys or kernel not in 'kv' else 1
    linears += rows * columns
    looped += passes * rows * columns
    adapters += passes * cfg.ranks[kernel] * min(
        tokens * (rows + columns), rows * columns)
  head_rank = min(cfg.D, cfg.V, parse_rank(cfg.rank).get(HEAD, 0))
  early = sum(loop < cfg.loops for loop in exits)
  block = loops * cfg.layers_per_loop
  coda = len(exits) * cfg.coda
  # A query's product with a key, and its weight's with a value.
  scores = 4.0 * batch * pairs(seq_len, cfg.window) * cfg.N * cfg.H
  return {
      'prelude': 2 * tokens * linears * cfg.prelude,
      'block': 2 * tokens * looped * cfg.layers_per_loop,
      'coda': 2 * tokens * linears * coda,
      'adapters': 2 * adapters * cfg.layers_per_loop
                  + 2 * tokens * head_rank * (cfg.D + cfg.V) * early,
      'attention': scores * (cfg.prelude + block + coda),
      'head': 2 * tokens * cfg.D * cfg.V * len(exits)}


def _weighed(terms: Sequence[Sequence[float]]) -> list[int]:
  """Loops, from 1, where one of the terms has a weight."""
  return [loop for loop, weights in enumerate(zip(*terms, strict=True), 1)
          if any(weights)]


def pairs(seq_len: int, window: int = 0) -> int:
  """Queries times the keys that each may see; `window` 0 is all before it."""
  full = min(seq_len, window or seq_len)
  # The first `full` queries see 1, 2, ..., and the others `full` each.
  return full * (full + 1) // 2 + (seq_len - full) * full
