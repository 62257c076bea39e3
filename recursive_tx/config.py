"""The alphabet, and what a model computes (ModelConfig) and how (Run).

A capital letter names a dimension everywhere: in einsum strings, as a suffix
of array names, in checkpoint rules, as a size in ModelConfig, as a logical
mesh axis.

  B batch        T query time   S key time     V vocabulary
  D model        F MLP hidden   X, Y rows and columns of a kernel as a matrix
  N heads        K key heads    G query heads per key head      H head
  R rank         L loops        M layers of a run of layers
  E exits, loops - 1            W exit gate's MLP hidden
  C a chunk of another dimension, what is computed at once
  Q sequences of a whole set    P prompts that are read at once
  A positions that are scored   J the teacher's likeliest tokens

This module knows nothing of arrays, families or files.
"""

import dataclasses
import re

from recursive_tx.errors import UserError, check_ranges, one_of

# Every linear of a layer, by the einsum that applies it. The middle operand
# is the kernel; its letters shared with the first are summed over.
KERNELS = {
    'q': 'BTD,DNH->BTNH',
    'k': 'BTD,DKH->BTKH',
    'v': 'BTD,DKH->BTKH',
    'o': 'BTNH,NHD->BTD',
    'gate': 'BTD,DF->BTF',
    'up': 'BTD,DF->BTF',
    'down': 'BTF,FD->BTD',
}
# Names a rank specification may use for several kernels at once.
GROUPS = {'attn': ('q', 'k', 'v', 'o'), 'mlp': ('gate', 'up', 'down')}
# Likewise for the head, of the loops before the final one; no group has it.
HEAD = 'head'

NORMS = ('rms', 'rms+1', 'layer')
PLACES = ('pre', 'post', 'both')
QK_NORMS = ('none', 'head', 'all')
# Fields that one or two families set, and that not every program has which
# reads what is exported.
RARE = ('norm_place', 'qk_norm', 'qkv_bias', 'query_scale', 'attention_cap',
        'logits_cap', 'residual_scale', 'logits_scale', 'pattern',
        'window_theta', 'embed_factor', 'long_rope', 'positions')
# What a virtual layer attends to; see ModelConfig.pattern.
KINDS = ('g', 'w', 'n')
WINDOW = KINDS.index('w')
ACTS = ('silu', 'gelu', 'gelu_tanh', 'relu')
DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'full', 'dots')
LAYOUTS = ('auto', 'plain', 'cpu')
ATTENTIONS = ('auto', 'plain', 'blocks', 'splash', 'pallas')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What the model computes; nothing of how it is executed.

  Numbers are checked against the intervals named here.

  Virtual layers number `prelude`, then `loop * layers_per_loop + layer`, then
  `coda`. A vanilla model is one loop.

  Attributes:
    V, D, F, N, K, H: sizes, see the alphabet above, in [1, inf).
    layers_per_loop: layers in the shared block, in [1, inf).
    loops: how often the block runs, in [1, inf).
    prelude, coda: unshared layers before and after the loops, in [0, inf).
    rank: adapter rank: a number, 'full', or per kernel such as
      'q64+k32+v32+o64+mlp128'; capped at min(in, out) per kernel. A part such
      as 'head128' is of the head, for the logits of every loop but the final
      one; a number or 'full' alone does not mean it.
    loop_norms: each loop has its own norm scales and biases (if loops > 1);
      False is the paper's tying.
    loop_keys: each loop attends to keys and values of its own; False: all to
      those of the first, so that a token's are whole wherever it exits
      (recursive KV sharing of Mixture-of-Recursions, arxiv.org/abs/2507.10524,
      section 2.2).
    norm: 'rms', 'rms+1' (the scale is stored minus one), or 'layer'.
    norm_eps: added to the mean square (or variance), in [0, inf).
    norm_place: norms of what attention and MLP read, 'pre'; of what they
      return, 'post' (OLMo 2); or of 'both' (Gemma 2).
    qk_norm: RMS norms of queries and keys before they are rotated: 'none', of
      each 'head' (Qwen 3, Gemma 3), or of 'all' heads as one (OLMo 2).
    act: the MLP's activation.
    gated: act(gate) * up rather than act(up).
    parallel: attention and MLP read the same residual stream.
    attention_bias, mlp_bias: biases on q, k, v, o and on the MLP's linears.
    qkv_bias: biases on q, k and v, but not o.
    query_scale: of attention's scores, in [0, inf); 0 is H ** -0.5.
    attention_cap, logits_cap: c tanh(x / c) of attention's scores and of the
      logits, in [0, inf); 0 is none.
    residual_scale: of what attention and MLP add to the stream, in (0, inf).
    logits_scale: of the logits, in (0, inf).
    rope_theta: base of the rotary wavelengths, in (0, inf).
    rope_fraction: share of H that is rotated, from its start, in (0, 1].
    rope_scaling: () none; (factor,) linear; (factor, low_freq_factor,
      high_freq_factor, original_length) Llama 3's; each in (0, inf).
    long_rope: () none; or (original length, factor of cosine and sine, of
      each rotated pair what divides its frequency in contexts up to that
      length, and then what does in longer ones), each in (0, inf): LongRoPE
      as Phi 3 has it.
    context: tokens that the model is opened for, in [0, inf), which long_rope
      asks; never the present length, or a token's keys would change with what
      follows it. 0 is the original length.
    window: keys a query sees, itself included, in [0, inf); 0 is all.
    pattern: what each virtual layer attends to, one letter each, repeated: 'g'
      all keys before it, 'w' those of the window, 'n' all, without rotary
      positions. '' is the window everywhere.
    window_theta: rope_theta of the layers 'w', unscaled, in [0, inf); 0 is
      that of the others, and their scaling.
    embed_scale: embeddings are multiplied by sqrt(D).
    embed_factor: embeddings are multiplied by this, in (0, inf).
    positions: learned vectors of so many positions are added to the
      embeddings, in [0, inf); 0 is none.
    tied: the head is the embedding.
    exit_gate: hidden width, in [0, inf), of the MLP that decides after every
      loop but the final one whether a token may exit; 0 is none. It changes
      no logits.
  """
  V: int
  D: int
  F: int
  N: int
  K: int
  H: int
  layers_per_loop: int
  loops: int = 1
  prelude: int = 0
  coda: int = 0
  rank: str = '0'
  loop_norms: bool = True
  loop_keys: bool = True
  norm: str = 'rms'
  norm_eps: float = 1e-6
  norm_place: str = 'pre'
  qk_norm: str = 'none'
  act: str = 'silu'
  gated: bool = True
  parallel: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  qkv_bias: bool = False
  query_scale: float = 0.0
  attention_cap: float = 0.0
  logits_cap: float = 0.0
  residual_scale: float = 1.0
  logits_scale: float = 1.0
  rope_theta: float = 10_000.0
  rope_fraction: float = 1.0
  rope_scaling: tuple[float, ...] = ()
  long_rope: tuple[float, ...] = ()
  context: int = 0
  window: int = 0
  pattern: str = ''
  window_theta: float = 0.0
  embed_scale: bool = False
  embed_factor: float = 1.0
  positions: int = 0
  tied: bool = True
  exit_gate: int = 0

  RANGES = dict(
      dict.fromkeys(('V', 'D', 'F', 'N', 'K', 'H', 'layers_per_loop',
                     'loops'), '[1, inf)'),
      prelude='[0, inf)', coda='[0, inf)', norm_eps='[0, inf)',
      rope_theta='(0, inf)', rope_fraction='(0, 1]', rope_scaling='(0, inf)',
      long_rope='(0, inf)',
      **dict.fromkeys(('context', 'window', 'exit_gate', 'window_theta',
                       'positions'), '[0, inf)'),
      **dict.fromkeys(('query_scale', 'attention_cap', 'logits_cap'),
                      '[0, inf)'),
      **dict.fromkeys(('residual_scale', 'logits_scale', 'embed_factor'),
                      '(0, inf)'))

  def __post_init__(self):
    object.__setattr__(self, 'rank', str(self.rank))
    for name in ('rope_scaling', 'long_rope'):
      if isinstance(getattr(self, name), list):  # As JSON reads it back.
        object.__setattr__(self, name, tuple(getattr(self, name)))
    _check(self)
    wanted = parse_rank(self.rank)  # Raises where the specification is bad.
    if wanted.get(HEAD) and self.loops == 1:
      raise UserError(
          f'model.rank={self.rank!r} adapts the head for loops before the'
          ' final one, but model.loops=1; leave that part out')
    if self.exit_gate and self.loops == 1:
      raise UserError(
          f'model.exit_gate={self.exit_gate} is for loops before the final'
          ' one, but model.loops=1; leave it out')

  @property
  def W(self) -> int:
    """Size of the letter: the exit gate's hidden width."""
    return self.exit_gate

  @property
  def num_layers(self) -> int:
    """Layers a token passes through."""
    return self.prelude + self.loops * self.layers_per_loop + self.coda

  @property
  def key_layers(self) -> int:
    """Virtual layers that have keys and values of their own."""
    loops = self.loops if self.loop_keys else 1
    return self.prelude + loops * self.layers_per_loop + self.coda

  @property
  def has_loop_vectors(self) -> bool:
    """Whether norms and biases live in the adapters, one set per loop."""
    return self.loop_norms and self.loops > 1

  @property
  def kernels(self) -> dict[str, str]:
    """Einsum of each linear this model has."""
    return {k: v for k, v in KERNELS.items() if self.gated or k != 'gate'}

  @property
  def ranks(self) -> dict[str, int]:
    """Rank of each kernel's adapter, capped at min(in, out); 0 is none."""
    wanted = parse_rank(self.rank)
    caps = {k: min(self.in_out(k)) for k in self.kernels}
    return {k: min(cap, wanted.get(k, 0)) for k, cap in caps.items()}

  def has_bias(self, kernel: str) -> bool:
    """Whether a linear has a bias."""
    if kernel in GROUPS['attn']:
      return self.attention_bias or self.qkv_bias and kernel != 'o'
    return self.mlp_bias

  @property
  def norms(self) -> dict[str, str]:
    """The norms of a layer, and the letters of what each is over."""
    inputs = {'attn_norm': 'D', 'mlp_norm': 'D'}
    outputs = {'attn_post_norm': 'D', 'mlp_post_norm': 'D'}
    heads = {'q_norm': 'NH', 'k_norm': 'KH'}
    if self.qk_norm == 'head':
      heads = dict.fromkeys(heads, 'H')
    return {**(inputs if self.norm_place != 'post' else {}),
            **(outputs if self.norm_place != 'pre' else {}),
            **(heads if self.qk_norm != 'none' else {})}

  @property
  def score_scale(self) -> float:
    """What a query's product with a key is multiplied by."""
    return self.query_scale or self.H**-0.5

  @property
  def rotated(self) -> int:
    """Dimensions of a head that are rotated, from its start."""
    return int(self.H * self.rope_fraction)

  def rope_divisors(self, long: bool) -> tuple[float, ...]:
    """Of `long_rope`: what divides each pair's frequency, in long contexts."""
    first = 2 + long * (self.rotated // 2)
    return self.long_rope[first:first + self.rotated // 2]

  @property
  def mixed_kinds(self) -> bool:
    """Whether layers differ in what they attend to."""
    return len(set(self.pattern)) > 1

  def opened_for(self, context: int) -> 'ModelConfig':
    """The model with `context`, where that changes what it computes.

    Raises:
      UserError: it has no so many positions.
    """
    if self.positions and context > self.positions:
      raise UserError(
          f'{context} tokens are more than the {self.positions} positions'
          ' that this model has learned; ask for fewer')
    if not self.long_rope:
      return self
    return dataclasses.replace(self, context=context)

  @property
  def rare(self) -> dict[str, object]:
    """The fields of RARE that are set, and their values."""
    return {
        field.name: getattr(self, field.name)
        for field in dataclasses.fields(self) if field.name in RARE
        and getattr(self, field.name) != field.default}

  def kind(self, layer: int) -> str:
    """The letter of KINDS of a virtual layer."""
    if self.pattern:
      return self.pattern[layer % len(self.pattern)]
    return 'w' if self.window else 'g'

  def shape(self, letters: str) -> tuple[int, ...]:
    """Sizes of the dimensions that `letters` name."""
    return tuple(getattr(self, letter) for letter in letters)

  def in_out(self, kernel: str) -> tuple[int, int]:
    """Rows and columns of a kernel seen as a matrix."""
    rows, columns = 1, 1
    for letter in split(KERNELS[kernel])[0]:
      rows *= getattr(self, letter)
    for letter in split(KERNELS[kernel])[1]:
      columns *= getattr(self, letter)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Run:
  """How a model is executed. No field changes a result beyond rounding.

  Attributes:
    dtype: compute dtype of activations and matmuls; parameters keep theirs.
    remat: what the backward pass recomputes: 'none', 'full' (all of a layer)
      or 'dots' (all but matmul results).
    unroll: unroll the loops and layers instead of looping on the device:
      faster on CPU, slower to compile.
    attention: 'plain' holds all [T, S] scores; 'blocks' those of one block of
      queries at a time; 'splash' (TPU) and 'pallas' (GPU) are kernels for
      lengths that are multiples of 128, the latter without windows; where one
      does not cover a case, and for 'auto', the best that does is taken.
    layout: 'plain', or 'cpu': products and argmax in the forms of which XLA's
      CPU backend makes faster programs, see model/cpu.py; 'auto' takes those
      on CPU.
    logits_mib: MiB of fp32 logits of one loop that a device may hold at once
      in training, in [1, inf); sequences are cut into chunks to keep to it.
  """
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: bool = False
  attention: str = 'auto'
  layout: str = 'auto'
  logits_mib: int = 256

  RANGES = dict(logits_mib='[1, inf)')

  def __post_init__(self):
    one_of('run.dtype', self.dtype, DTYPES)
    one_of('run.remat', self.remat, REMATS)
    one_of('run.attention', self.attention, ATTENTIONS)
    one_of('run.layout', self.layout, LAYOUTS)
    check_ranges('run', self)

  def chunk(self, T: int, size: float) -> int:
    """Positions whose logits are made at once: a divisor of T, at least 1.

    Args:
      T: positions of a sequence.
      size: bytes that a device holds for the logits of one position of all
        its sequences.
    """
    most = max(1, (self.logits_mib << 20) // size)
    return max(n for n in range(1, T + 1) if T % n == 0 and n <= most)


def split(spec: str) -> tuple[str, str]:
  """Letters of a linear's kernel that are summed over, and those that stay.

  Args:
    spec: an einsum such as 'BTD,DNH->BTNH'.

  Returns:
    ('D', 'NH') for it: the kernel's letters are always the one then the other.
  """
  inputs, kernel = spec.split('->')[0].split(',')
  inner = ''.join(c for c in kernel if c in inputs)
  return inner, kernel[len(inner):]


def parse_rank(rank: str) -> dict[str, int]:
  """Wanted rank by kernel name, before capping.

  Args:
    rank: '64', 'full', or parts such as 'q64+mlp128', where 'attn' and 'mlp'
      name groups; a kernel that is not named has none. The head, which is no
      kernel of a layer, only where it is named.

  Raises:
    UserError: a part is not a kernel's name and a number, or names it twice.
  """
  way_out = "a number, 'full', or parts like 'q64+k32+v32+o64+mlp128'"
  if rank == 'full':
    return dict.fromkeys(KERNELS, 1 << 62)
  if rank.isascii() and rank.isdecimal():
    return dict.fromkeys(KERNELS, int(rank))
  wanted = {}
  for part in rank.split('+'):
    match = re.fullmatch(r'([a-z]+)(\d+)', part)
    if not match:
      raise UserError(f'rank={rank!r}: {part!r} is not a rank; give {way_out}')
    name, number = match.groups()
    one_of(f'rank={rank!r}: kernel', name, (*KERNELS, *GROUPS, HEAD))
    for kernel in GROUPS.get(name, (name,)):
      if kernel in wanted:
        raise UserError(f'rank={rank!r}: {kernel!r} is named twice')
      wanted[kernel] = int(number)
  return wanted


def _check(cfg: ModelConfig) -> None:
  for field in dataclasses.fields(cfg):
    value = getattr(cfg, field.name)
    if field.type in (bool, str) and not isinstance(value, field.type):
      raise UserError(
          f'model.{field.name} is {value!r}, expected {field.type.__name__}')
  check_ranges('model', cfg)
  one_of('model.norm', cfg.norm, NORMS)
  one_of('model.act', cfg.act, ACTS)
  one_of('model.norm_place', cfg.norm_place, PLACES)
  one_of('model.qk_norm', cfg.qk_norm, QK_NORMS)
  if set(cfg.pattern) - set(KINDS):
    raise UserError(
        f'model.pattern={cfg.pattern!r}: expected letters of '
        f'{", ".join(map(repr, KINDS))}, one for each layer, repeated')
  if cfg.pattern and ('w' in cfg.pattern) != bool(cfg.window):
    raise UserError(
        f'model.pattern={cfg.pattern!r} and model.window={cfg.window}: give a'
        " window where the pattern has a 'w', and 0 where it has none")
  if cfg.N % cfg.K:
    raise UserError(
        f'model.N={cfg.N} heads do not share model.K={cfg.K} key heads '
        f'evenly; K must divide N')
  if cfg.rotated % 2:
    raise UserError(
        f'model.rope_fraction={cfg.rope_fraction} of H={cfg.H} must be an '
        f'even number of dimensions')
  if len(cfg.long_rope) not in (0, 2 + cfg.rotated):
    raise UserError(
        f'model.long_rope has {len(cfg.long_rope)} numbers; expected'
        f' {2 + cfg.rotated}: two, and two of each of {cfg.rotated // 2}'
        ' rotated pairs')
  if cfg.long_rope and cfg.rope_scaling:
    raise UserError(
        f'model.rope_scaling={cfg.rope_scaling} and model.long_rope are both'
        ' given; empty one')
  if len(cfg.rope_scaling) not in (0, 1, 4):
    raise UserError(
        f'model.rope_scaling={cfg.rope_scaling} must have 0, 1 (linear) or '
        f'4 (Llama 3) numbers')
