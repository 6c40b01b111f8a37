"""Every setting of a run as frozen dataclasses; each leaf is also a flag.

The names are those of DeepSeek's own `ModelArgs`.  Defaults are DeepSeek-V3's
published values (technical report, section 4.2), so that a preset reads as a
visible difference from the paper.  Only the standard library is imported.

A bad value raises `ValueError` when the dataclass is built, naming the field,
the value and what would be accepted.
"""

import dataclasses
import json
import math
import re
from typing import Any

ATTENTIONS = ('mla', 'mha', 'gqa', 'mqa')
SCORE_FUNCS = ('sigmoid', 'softmax')
GROUP_SCORES = ('top2_sum', 'max')
BALANCES = ('aux_free', 'aux_loss', 'none')
AUX_LOSSES = ('sequence', 'batch', 'expert', 'gshard')
DTYPES = ('float32', 'bfloat16', 'float16')
MOMENT_DTYPES = ('float32', 'bfloat16')  # Float16 makes small ones 0.
LR_SCHEDULES = ('v3', 'v2', 'v2_lite', 'cosine', 'constant')
REMATS = ('none', 'full', 'alternate', 'selective')
TILES = ('1x128', '128x128', 'tensor')
SCALES = ('float32', 'ceil', 'floor')
ACCUMULATE = ('exact', 'hopper14')
HOPPER14_MANTISSA_BITS = 3  # Of its operands, at most.
NONFINITES = ('stop', 'skip')
PIPELINES = ('gpipe', '1f1b', 'interleaved', 'zb_h1', 'dualpipe', 'dualpipe_v')
KERNELS = ('auto', 'xla')


def _require(ok: bool, field: str, value: Any, fix: str) -> None:
  if not ok:
    raise ValueError(f'{field}={value!r}: {fix}')


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
  _require(value in choices, field, value, f'use one of {", ".join(choices)}')


def _at_least(field: str, value: float, low: float) -> None:
  _require(
    math.isfinite(value) and value >= low, field, value, f'use at least {low}'
  )


def _float32(field: str, value: float) -> None:
  _require(
    value == 0 or 1.2e-38 < abs(value) < 3.4e38,
    field,
    value,
    'float32 has no such number; use 0, or a size from 1.2e-38 to 3.4e38',
  )


def _positive(field: str, value: float) -> None:
  _require(value > 0, field, value, 'use a number above 0')
  _float32(field, value)


def _divisors(value: int, limit: int | None = None) -> list[int]:
  limit = value if limit is None else min(value, limit)
  return [n for n in range(1, limit + 1) if value % n == 0]


def microbatch_grid(schedule: str, ranks: int) -> tuple[int, int]:
  """(step, least): multiples of `step` from `least` on fit a pipeline."""
  return {
    'interleaved': (ranks, ranks),
    'dualpipe': (2, 2 * ranks),
    'dualpipe_v': (1, 2 * ranks),
  }.get(schedule, (1, 1))


def microbatches_for(schedule: str, ranks: int, n: int) -> tuple[int, str]:
  """The nearest to n for which a pipeline is defined, and what it needs."""
  step, least = microbatch_grid(schedule, ranks)
  needs = f'{schedule} on {ranks} ranks needs at least {least}'
  if step > 1:
    needs += f', a multiple of {step}'
  return max(least, round(n / step) * step), needs


def stage_sizes(
  n_layers: int, stages: int, asked: tuple[int, ...] = ()
) -> tuple[int, ...]:
  """Layers of each stage of a pipeline: as asked, or as equal as can be.

  Of equal ones the last stages, beside the head, get fewer.

  Raises:
    ValueError: those asked for are other in number, or in sum.
  """
  _require(
    not asked or (len(asked) == stages and sum(asked) == n_layers),
    'parallel.stage_layers',
    ','.join(map(str, asked)),
    f'use {stages} numbers that add up to model.n_layers={n_layers}',
  )
  each, more = divmod(n_layers, stages)
  return asked or tuple(each + (s < more) for s in range(stages))


def require_even_ranks(schedule: str, field: str, ranks: int) -> None:
  """Raises `ValueError` if a pipeline needs an even number, and has none."""
  near = [str(n) for n in (ranks - 1, ranks + 1) if n > 0]
  _require(
    schedule != 'dualpipe' or ranks % 2 == 0,
    field,
    ranks,
    f'{schedule} needs an even number; the nearest '
    f'{"are" if len(near) > 1 else "is"} {" and ".join(near)}',
  )


def _fraction(field: str, value: float) -> None:
  _require(0 <= value < 1, field, value, 'use a fraction in [0, 1)')


def parse_piecewise(text: str) -> tuple[tuple[float, float], ...]:
  """Reads `value[@start], value@start, ...` into `((start, value), ...)`.

  A piecewise-constant schedule; `start` is the fraction of all training tokens
  from which `value` holds.  `'0.3,0.1@0.676'` is 0.3, then 0.1 from 67.6 %.

  Raises:
    ValueError: on bad syntax, or starts that do not begin at 0 and increase.
  """
  fix = "write 'value' or 'value,value@fraction', fractions increasing below 1"
  try:
    pieces = [part.split('@') for part in text.split(',')]
    steps = tuple(
      (float(rest[0]) if rest else 0.0, float(value)) for value, *rest in pieces
    )
  except (ValueError, AttributeError):
    raise ValueError(f'schedule {text!r}: {fix}') from None
  starts = [start for start, _ in steps]
  ok = starts[0] == 0 and all(0 <= s < 1 for s in starts)
  ok = ok and all(a < b for a, b in zip(starts, starts[1:]))
  ok = ok and all(math.isfinite(value) for _, value in steps)
  ok = ok and all(len(part) <= 2 for part in pieces)
  _require(ok, 'schedule', text, fix)
  return steps


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention (V3 section 2.1.1)."""

  q_lora_rank: int = 1536  # 0: full-rank queries, as in V2-Lite.
  kv_lora_rank: int = 512
  qk_nope_head_dim: int = 128
  qk_rope_head_dim: int = 64
  v_head_dim: int = 128

  def __post_init__(self):
    _at_least('model.mla.q_lora_rank', self.q_lora_rank, 0)
    for name in ('kv_lora_rank', 'qk_nope_head_dim', 'v_head_dim'):
      _at_least(f'model.mla.{name}', getattr(self, name), 1)
    rope = self.qk_rope_head_dim
    _require(
      rope >= 2 and rope % 2 == 0,
      'model.mla.qk_rope_head_dim',
      rope,
      'use an even number: RoPE rotates pairs',
    )


@dataclasses.dataclass(frozen=True)
class GQAConfig:
  """Grouped-query attention, the baseline of V2 section 2.1.

  Read when `model.attention` is mha, gqa or mqa.
  """

  n_kv_heads: int = 8  # gqa only; mha has n_heads of them, mqa one.
  head_dim: int = 128

  def __post_init__(self):
    _at_least('model.gqa.n_kv_heads', self.n_kv_heads, 1)
    _require(
      self.head_dim >= 2 and self.head_dim % 2 == 0,
      'model.gqa.head_dim',
      self.head_dim,
      'use an even number: RoPE rotates pairs',
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary embedding and YaRN (V3 section 4.3)."""

  theta: float = 10000.0
  factor: float = 1.0  # Context extension s; 1 turns YaRN off, V3 ends at 40.
  original_seq_len: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0  # Softmax scale x (0.1 mscale ln(factor) + 1)^2.

  def __post_init__(self):
    _require(self.theta > 1, 'model.rope.theta', self.theta, 'use more than 1')
    _at_least('model.rope.factor', self.factor, 1)
    _at_least('model.rope.original_seq_len', self.original_seq_len, 1)
    _require(
      self.beta_fast > self.beta_slow > 0,
      'model.rope.beta_fast',
      self.beta_fast,
      f'use more than beta_slow={self.beta_slow}, which is above 0',
    )
    for name in ('theta', 'factor', 'beta_fast', 'beta_slow', 'mscale'):
      _float32(f'model.rope.{name}', getattr(self, name))


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """DeepSeekMoE and its routing (V3 section 2.1.2, V2 section 2.2)."""

  n_routed_experts: int = 256  # 0: every layer has a dense FFN.
  n_shared_experts: int = 1
  n_activated_experts: int = 8
  moe_inter_dim: int = 2048
  n_expert_groups: int = 8
  n_limited_groups: int = 4
  score_func: str = 'sigmoid'
  group_score: str = 'top2_sum'
  norm_topk: bool = True  # Renormalise the selected scores to sum to 1.
  route_scale: float = 2.5
  balance: str = 'aux_free'  # aux_free: bias + aux loss; aux_loss: loss alone.
  aux_loss: str = 'sequence'
  capacity_factor: float = 0.0  # 0: dropless; GShard drops above the capacity.

  def __post_init__(self):
    p = 'model.moe.'
    for name in ('n_routed_experts', 'n_shared_experts', 'capacity_factor'):
      _at_least(p + name, getattr(self, name), 0)
    _positive(p + 'route_scale', self.route_scale)
    _choice(p + 'score_func', self.score_func, SCORE_FUNCS)
    _choice(p + 'group_score', self.group_score, GROUP_SCORES)
    _choice(p + 'balance', self.balance, BALANCES)
    _choice(p + 'aux_loss', self.aux_loss, AUX_LOSSES)
    if self.n_routed_experts:
      self._check_groups()

  def _check_groups(self):
    p = 'model.moe.'
    experts, groups = self.n_routed_experts, self.n_expert_groups
    for name in ('n_activated_experts', 'moe_inter_dim', 'n_expert_groups'):
      _at_least(p + name, getattr(self, name), 1)
    _require(
      experts % groups == 0,
      p + 'n_expert_groups',
      groups,
      f'must divide n_routed_experts={experts}; use one of '
      f'{_divisors(experts)}',
    )
    _require(
      1 <= self.n_limited_groups <= groups,
      p + 'n_limited_groups',
      self.n_limited_groups,
      f'use 1 to n_expert_groups={groups}',
    )
    open_experts = self.n_limited_groups * experts // groups
    _require(
      self.n_activated_experts <= open_experts,
      p + 'n_activated_experts',
      self.n_activated_experts,
      f'only {open_experts} experts lie in {self.n_limited_groups} groups; '
      'activate fewer or raise n_limited_groups',
    )
    if groups > 1 and self.group_score == 'top2_sum':
      _require(
        experts // groups >= 2,
        p + 'n_expert_groups',
        groups,
        'group_score=top2_sum needs two experts a group; use fewer groups',
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The Transformer (V3 section 2)."""

  vocab_size: int = 129280
  dim: int = 7168
  inter_dim: int = 18432
  n_layers: int = 61
  n_dense_layers: int = 3
  n_heads: int = 128
  norm_eps: float = 1e-6
  init_std: float = 0.006
  tie_embeddings: bool = False
  n_mtp_layers: int = 1  # Depth D of multi-token prediction (section 2.2).
  attention: str = 'mla'
  mla: MLAConfig = MLAConfig()
  gqa: GQAConfig = GQAConfig()
  rope: RopeConfig = RopeConfig()
  moe: MoEConfig = MoEConfig()

  def __post_init__(self):
    p = 'model.'
    for name in ('vocab_size', 'dim', 'inter_dim', 'n_layers', 'n_heads'):
      _at_least(p + name, getattr(self, name), 1)
    _at_least(p + 'n_mtp_layers', self.n_mtp_layers, 0)
    _require(
      0 <= self.n_dense_layers <= self.n_layers,
      p + 'n_dense_layers',
      self.n_dense_layers,
      f'use 0 to n_layers={self.n_layers}',
    )
    for name in ('norm_eps', 'init_std'):
      value = getattr(self, name)
      _require(0 < value < 1, p + name, value, 'use a number in (0, 1)')
    _choice(p + 'attention', self.attention, ATTENTIONS)
    _require(
      self.attention == 'mla' or self.n_heads % self.n_kv_heads == 0,
      'model.gqa.n_kv_heads',
      self.n_kv_heads,
      f'must divide n_heads={self.n_heads}',
    )

  @property
  def n_kv_heads(self) -> int:
    """Key-value heads of the MHA, GQA and MQA baselines."""
    return {'mha': self.n_heads, 'mqa': 1}.get(
      self.attention, self.gqa.n_kv_heads
    )

  @property
  def n_moe_layers(self) -> int:
    """Main-model layers whose FFN is a mixture of experts."""
    return self.n_layers - self.n_first_dense

  @property
  def n_first_dense(self) -> int:
    """Leading layers with a dense FFN; all of them when there is no MoE."""
    return self.n_dense_layers if self.moe.n_routed_experts else self.n_layers


@dataclasses.dataclass(frozen=True)
class FP8Config:
  """FP8 linears (V3 sections 3.3.1 to 3.3.3); the defaults are V3's recipe.

  A format is written e4m3, e5m2, e5m6, e8m7 (bfloat16), or as any such pair;
  hopper14 takes operands, fmt and gradient_fmt, of at most 3 mantissa bits.
  """

  enabled: bool = False  # Linears in FP8; where: attention, dense, experts.
  attention: bool = True  # The projections of attention.
  dense: bool = True  # Dense FFN and shared experts.
  experts: bool = True  # Routed experts, and what is sent to them.
  fmt: str = 'e4m3'  # Operands of all three products.
  gradient_fmt: str = 'e4m3'  # Output gradients, also as sent; elsewhere e5m2.
  attn_out_fmt: str = 'e5m6'  # What is kept of attention's output.
  swiglu_fmt: str = 'e4m3'  # What is kept of SwiGLU: inputs, not the output.
  dispatch_fmt: str = 'e4m3'  # Tokens sent to experts.
  scale: str = 'float32'  # float32: amax / max; ceil, floor: powers of two.
  turned_scale: str = 'ceil'  # Of attention's output and of what is dispatched.
  amax_history: int = 0  # Steps whose amax scales a tensor: delayed; 0: online.
  activation_tile: str = '1x128'
  weight_tile: str = '128x128'
  gradient_tile: str = '1x128'  # Of Dgrad; V3 saw 128x128 diverge.
  accumulate: str = 'exact'  # hopper14: as a tensor core, 14 bits.
  promote: int = 128  # Products summed before float32 takes over; 0: all.

  def __post_init__(self):
    p = 'precision.fp8.'
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if name.endswith('fmt'):
        _format(p + name, value)
      elif name.endswith('scale'):
        _choice(p + name, value, SCALES)
      elif name.endswith('tile'):
        _choice(p + name, value, TILES)
    _choice(p + 'weight_tile', self.weight_tile, TILES[1:])
    _choice(p + 'accumulate', self.accumulate, ACCUMULATE)
    for name in ('fmt', 'gradient_fmt'):
      value = getattr(self, name)
      _require(
        self.accumulate != 'hopper14'
        or _format(p + name, value) <= HOPPER14_MANTISSA_BITS,
        p + name,
        value,
        f'{p}accumulate=hopper14 takes {HOPPER14_MANTISSA_BITS} mantissa bits '
        'at most; use e4m3, e5m2, or accumulate=exact',
      )
    tiles = {self.activation_tile, self.weight_tile, self.gradient_tile}
    _require(
      self.amax_history == 0 or self.amax_history > 0 and tiles == {'tensor'},
      p + 'amax_history',
      self.amax_history,
      'use 0, or a number of steps with all three tiles tensor: there is an '
      'amax for each tensor, not for each tile',
    )
    _require(
      self.amax_history == 0 or self.attention and self.dense and self.experts,
      p + 'amax_history',
      self.amax_history,
      f'use 0, or leave {p}attention, dense and experts on: all have amaxes',
    )
    divides = self.promote > 0 and 128 % self.promote == 0
    _require(
      divides or tiles == {'tensor'} and self.promote >= 0,
      p + 'promote',
      self.promote,
      'use a divisor of 128, where scales change, or all three tiles tensor',
    )


def _format(field: str, value: str) -> int:
  """The mantissa bits of a format that there is."""
  match = re.fullmatch(r'e(\d+)m(\d+)(fn)?', value)
  E, M = (int(match[1]), int(match[2])) if match else (0, 0)
  _require(
    2 <= E <= 8 and 1 <= M <= 12 and E + M <= 15 and not (E == 8 and match[3]),
    field,
    value,
    'use e4m3, e5m2, e5m6, e8m7, or another eXmY of at most 16 bits, with 2 to '
    '8 exponent and 1 to 12 mantissa bits, and eXmYfn up to 7',
  )
  return M


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
  """Number formats (V3 section 3.3).  Master weights and sums are FP32."""

  compute_dtype: str = 'bfloat16'  # Linears and the residual stream.
  mu_dtype: str = 'bfloat16'  # Adam's first moment.
  nu_dtype: str = 'bfloat16'  # Adam's second moment.
  fp8: FP8Config = FP8Config()
  kernels: str = 'auto'  # Our kernels where they can run; xla: nowhere.

  def __post_init__(self):
    _choice('precision.compute_dtype', self.compute_dtype, DTYPES)
    for name in ('mu_dtype', 'nu_dtype'):
      _choice(f'precision.{name}', getattr(self, name), MOMENT_DTYPES)
    _choice('precision.kernels', self.kernels, KERNELS)

  def of(self, module: str) -> 'PrecisionConfig':
    """That of the linears of one module, 'attention', 'dense' or 'experts'."""
    enabled = self.fp8.enabled and getattr(self.fp8, module)
    fp8 = dataclasses.replace(self.fp8, enabled=enabled)
    return dataclasses.replace(self, fp8=fp8)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read, how it becomes tokens, and how tokens become batches."""

  source: str = 'stdlib'  # stdlib, or a path or glob: see data/corpora.py.
  text_field: str = 'text'  # The column of JSONL, Parquet and datasets.
  tokenizer: str = ''  # tokenizer.json; empty: train a byte-level BPE.
  val_fraction: float = 0.02  # Of documents, chosen by a hash of their name.
  seq_len: int = 4096
  batch_size: int = 15360  # Sequences per optimizer step.
  batch_size_start: int = 0  # Above 0: grow from this to batch_size.
  batch_ramp_fraction: float = 0.0317  # Share of tokens while the batch grows.
  mask_documents: bool = False  # True: attention stays within a document.
  fim_rate: float = 0.1  # Share of documents in prefix-suffix-middle order.
  seed: int = 0
  cache_dir: str = '~/.cache/deepseek_jax'

  def __post_init__(self):
    _require(bool(self.source), 'data.source', self.source, 'name a source')
    _require(
      0 < self.val_fraction < 1,
      'data.val_fraction',
      self.val_fraction,
      'use a fraction in (0, 1)',
    )
    _require(
      0 <= self.fim_rate <= 1,
      'data.fim_rate',
      self.fim_rate,
      'use a share in [0, 1]',
    )
    _at_least('data.seq_len', self.seq_len, 2)
    _at_least('data.batch_size', self.batch_size, 1)
    _at_least('data.seed', self.seed, 0)
    _require(
      0 <= self.batch_size_start <= self.batch_size,
      'data.batch_size_start',
      self.batch_size_start,
      f'use 0 (no ramp) to batch_size={self.batch_size}',
    )
    _fraction('data.batch_ramp_fraction', self.batch_ramp_fraction)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, its schedule and the weights of the losses (V3 section 4.2).

  `gamma`, `alpha` and `mtp_weight` are piecewise constant over the fraction of
  training tokens: see `parse_piecewise`.
  """

  lr: float = 2.2e-4
  schedule: str = 'v3'
  warmup_steps: int = 2000
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # On matrices only.
  clip_norm: float = 1.0
  ema_decay: float = 0.0  # Parameter EMA in host memory; 0 turns it off.
  gamma: str = '0.001,0@0.96622'  # Speed of the router bias (section 2.1.2).
  alpha: str = '0.0001'  # Weight of the balance loss (equation 17).
  mtp_weight: str = '0.3,0.1@0.67568'  # Lambda of equation 25.
  z_loss: float = (
    0.0  # Weight of mean(logsumexp(logits)^2); the paper has none.
  )

  def __post_init__(self):
    p = 'optim.'
    for name in ('lr', 'warmup_steps', 'weight_decay', 'z_loss'):
      _at_least(p + name, getattr(self, name), 0)
    _positive(p + 'eps', self.eps)
    if self.clip_norm != math.inf:  # Of no clipping.
      _positive(p + 'clip_norm', self.clip_norm)
    for name in ('b1', 'b2', 'ema_decay'):
      _fraction(p + name, getattr(self, name))
    for name in ('lr', 'weight_decay', 'z_loss'):
      _float32(p + name, getattr(self, name))
    _choice(p + 'schedule', self.schedule, LR_SCHEDULES)
    for name in ('gamma', 'alpha', 'mtp_weight'):
      try:
        for _, value in parse_piecewise(getattr(self, name)):
          _float32('value', value)
      except ValueError as error:
        raise ValueError(f'{p}{name}: {error}') from None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop: how long, how much at a time, what is kept."""

  steps: int = 245103
  seed: int = 0
  micro_batch_size: int = 0  # Sequences per forward; 0: the whole batch.
  remat: str = 'selective'  # What the backward pass computes again.
  scan_layers: bool = True  # One compiled layer instead of n_layers.
  nonfinite: str = 'stop'  # On a NaN or infinity: stop, or skip the step.
  log_every: int = 10
  eval_every: int = 1000
  eval_batches: int = 16  # Of batch_size sequences; 0: all there are.
  save_every: int = 1000
  keep: int = 3  # Checkpoints kept.

  def __post_init__(self):
    p = 'train.'
    for name in ('steps', 'log_every', 'eval_every', 'save_every', 'keep'):
      _at_least(p + name, getattr(self, name), 1)
    for name in ('micro_batch_size', 'eval_batches'):
      _at_least(p + name, getattr(self, name), 0)
    # JAX takes as many bits, and of more the low ones.
    _require(
      0 <= self.seed < 2**32, p + 'seed', self.seed, 'use 0 to 4294967295'
    )
    _choice(p + 'remat', self.remat, REMATS)
    _choice(p + 'nonfinite', self.nonfinite, NONFINITES)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """How many devices share a run, and what they divide among them.

  Every device but those of other stages has sequences of its own.  All axes of
  1 is one device; otherwise their product is the number of devices.
  """

  data: int = 1  # Copies of the model.
  fsdp: int = 1  # Parts of each matrix; with stages, of what is stored alone.
  node: int = 1  # Nodes that divide the experts.
  expert: int = 1  # Devices of a node that divide its experts.
  stage: int = 1  # Pipeline ranks.
  schedule: str = 'dualpipe'  # Of the pipeline.
  microbatches: int = 0  # Parts of a step; 0: train.micro_batch_size says.
  stage_layers: str = ''  # Layers of each stage, 4,4,3; empty: equally many.
  interleave: bool = False  # Halves of a micro-batch: one sends, one computes.
  expert_buffer: float = 2.0  # Room for received rows, in means; 0: for all.
  zero1: bool = False  # Divide FP32 weights and moments over all copies.
  cpu_devices: int = 0  # Above 0: try the layout on as many CPU devices.
  num_processes: int = 1  # 0: as SLURM, Open MPI or Kubernetes says.
  process_id: int = -1  # Number of this process, from 0; -1: the cluster's.
  coordinator: str = ''  # host:port of process 0; empty: the cluster's.

  def __post_init__(self):
    p = 'parallel.'
    for name in ('data', 'fsdp', 'node', 'expert', 'stage'):
      _at_least(p + name, getattr(self, name), 1)
    for name in (
      'cpu_devices', 'num_processes', 'expert_buffer', 'microbatches',
    ):  # fmt: skip
      _at_least(p + name, getattr(self, name), 0)
    _choice(p + 'schedule', self.schedule, PIPELINES)
    sizes = self.stage_layers.split(',') if self.stage_layers else []
    _require(
      all(size.strip().isdecimal() for size in sizes),
      p + 'stage_layers',
      self.stage_layers,
      'write one number per stage, such as 4,4,3',
    )
    _at_least(p + 'process_id', self.process_id, -1)
    _require(
      self.num_processes == 0 or self.process_id < self.num_processes,
      p + 'process_id',
      self.process_id,
      f'use 0 to {self.num_processes - 1}, for num_processes='
      f'{self.num_processes}',
    )
    host, _, port = self.coordinator.rpartition(':')
    _require(
      not self.coordinator
      or (bool(host) and port.isdecimal() and 0 < int(port) < 2**16),
      p + 'coordinator',
      self.coordinator,
      'write host:port of process 0, with a port up to 65535',
    )

  @property
  def stage_sizes(self) -> tuple[int, ...]:
    """`stage_layers` as numbers."""
    return tuple(int(size) for size in self.stage_layers.split(',') if size)

  @property
  def n_stages(self) -> int:
    """Pieces that the pipeline cuts the model into."""
    has_two = self.schedule in ('interleaved', 'dualpipe_v')
    return self.stage * (2 if has_two else 1)

  @property
  def n_devices(self) -> int:
    """Devices of all processes."""
    return self.n_batch_shards * self.stage

  @property
  def n_batch_shards(self) -> int:
    """Devices that have sequences of their own."""
    return self.data * self.fsdp * self.node * self.expert


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: ModelConfig = ModelConfig()
  precision: PrecisionConfig = PrecisionConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  parallel: ParallelConfig = ParallelConfig()

  def __post_init__(self):
    micro, batch = self.micro_batch_size, self.data.batch_size
    given, n = self.train.micro_batch_size, self.parallel.microbatches
    cut = f'cuts into parts of {micro}, which ' if n and not given else ''
    for name in ('batch_size', 'batch_size_start'):
      value = getattr(self.data, name)
      _require(
        value % micro == 0,
        'parallel.microbatches' if cut else 'train.micro_batch_size',
        n if cut else given,
        f'{cut}must divide data.{name}={value}; set it to a common divisor',
      )
    moe = self.model.moe
    batch_wise = moe.n_routed_experts and moe.aux_loss == 'batch'
    _require(
      not batch_wise or moe.balance == 'none' or micro == batch,
      'model.moe.aux_loss',
      moe.aux_loss,
      'is defined over the whole batch, which accumulation would change; '
      f'use train.micro_batch_size=0 (now {micro} of {batch})',
    )
    _require(
      self.model.n_mtp_layers < self.data.seq_len,
      'model.n_mtp_layers',
      self.model.n_mtp_layers,
      f'use fewer than data.seq_len={self.data.seq_len}',
    )
    self._check_parallel()
    self._check_pipeline()

  def _check_parallel(self):
    parallel, micro = self.parallel, self.micro_batch_size
    shards, parts = parallel.n_batch_shards, parallel.node * parallel.expert
    experts = self.model.moe.n_routed_experts
    _require(
      parts == 1 or (experts > 0 and experts % parts == 0),
      'parallel.expert',
      parallel.expert,
      f'node x expert = {parts} must divide n_routed_experts={experts}; use '
      f'a product among {_divisors(experts, parts) or [1]}',
    )
    _require(
      micro % shards == 0,
      'train.micro_batch_size'
      if self.train.micro_batch_size
      else 'data.batch_size',
      micro,
      f'data x fsdp x node x expert = {shards} devices share the sequences '
      f'of a micro-batch; use a multiple of {shards}, or a product among '
      f'{_divisors(micro, shards)}',
    )
    _require(
      self.precision.fp8.amax_history == 0
      or parallel.n_devices == 1
      and not parallel.interleave,
      'precision.fp8.amax_history',
      self.precision.fp8.amax_history,
      'histories are those of one device and of whole micro-batches; use 0, or '
      f'no parallel.interleave and one device (now {parallel.n_devices})',
    )
    self._check_interleave()

  def _check_interleave(self):
    parallel, micro = self.parallel, self.micro_batch_size
    moe, shards = self.model.moe, parallel.n_batch_shards
    _require(
      not parallel.interleave or parallel.node * parallel.expert > 1,
      'parallel.interleave',
      parallel.interleave,
      'lets one half compute while the other is sent to its experts, which all '
      'lie on every device; use a node or expert above 1, or False',
    )
    _require(
      not parallel.interleave or micro % (2 * shards) == 0,
      'parallel.interleave',
      parallel.interleave,
      f'halves the sequences that a device has of a micro-batch, {micro} // '
      f'{shards}; use a train.micro_batch_size that {2 * shards} divides',
    )
    _require(
      not (parallel.interleave and moe.aux_loss == 'batch')
      or moe.balance == 'none',
      'parallel.interleave',
      parallel.interleave,
      'would halve the batch over which model.moe.aux_loss=batch is defined; '
      'use another aux_loss, or False',
    )

  def _check_pipeline(self):
    parallel, n = self.parallel, self.parallel.microbatches
    _require(
      not (n and self.train.micro_batch_size),
      'parallel.microbatches',
      n,
      'says the same as train.micro_batch_size='
      f'{self.train.micro_batch_size}; set one of them to 0',
    )
    _require(
      n == 0 or self.data.batch_size % n == 0,
      'parallel.microbatches',
      n,
      f'must divide data.batch_size={self.data.batch_size}',
    )
    _require(
      parallel.stage == 1 or not parallel.interleave,
      'parallel.interleave',
      parallel.interleave,
      'a pipeline overlaps whole micro-batches; use False',
    )
    _require(
      parallel.stage == 1 or self.train.remat != 'alternate',
      'train.remat',
      self.train.remat,
      'the layers of a pipeline are alike; use full, selective or none',
    )
    _require(
      parallel.stage > 1 or not parallel.stage_layers,
      'parallel.stage_layers',
      parallel.stage_layers,
      'are those of a pipeline; set parallel.stage, or leave it empty',
    )
    if parallel.stage > 1:
      require_even_ranks(parallel.schedule, 'parallel.stage', parallel.stage)
      self._check_microbatches()
      self._check_stage_layers()

  def _check_microbatches(self):
    """The first and the last batch have as many as the pipeline needs."""
    parallel, micro = self.parallel, self.micro_batch_size
    given, last = self.train.micro_batch_size, self.data.batch_size
    first, shards = self.data.batch_size_start or last, parallel.n_batch_shards

    def nearest(n):
      return microbatches_for(parallel.schedule, parallel.stage, n)

    def fits(size):
      return all(b // size == nearest(b // size)[0] for b in (first, last))

    sizes = [s * shards for s in _divisors(math.gcd(first, last) // shards)]
    sizes = [size for size in sizes if fits(size)]
    allowed = sizes if given else [last // size for size in reversed(sizes)]
    ramp = f' from data.batch_size_start={first}' if first != last else ''
    for name, batch in ('batch_size', last), ('batch_size_start', first):
      count, (wanted, needs) = batch // micro, nearest(batch // micro)
      _require(
        count == wanted,
        'train.micro_batch_size' if given else 'parallel.microbatches',
        given or last // micro,
        f'gives data.{name}={batch} {count} micro-batches, and {needs}; the '
        f'nearest is {wanted}, as {wanted * micro} sequences would have, and '
        f'data.batch_size={last}{ramp} on {shards} shards allows '
        f'{allowed or "none"}',
      )

  def _check_stage_layers(self):
    parallel, sizes = self.parallel, self.parallel.stage_sizes
    _require(
      not sizes or len(sizes) == parallel.n_stages,
      'parallel.stage_layers',
      parallel.stage_layers,
      f'{parallel.schedule} has {parallel.n_stages} stages on '
      f'{parallel.stage} ranks; give as many numbers',
    )
    stage_sizes(self.model.n_layers, parallel.n_stages, sizes)

  @property
  def micro_batch_size(self) -> int:
    """Sequences per forward pass, the default resolved."""
    batch, n = self.data.batch_size, self.parallel.microbatches
    return self.train.micro_batch_size or (batch // n if n else batch) or 1

  @property
  def batch_step(self) -> int:
    """Sequences by which a batch that ramps up can grow."""
    parallel, step = self.parallel, 1
    if parallel.stage > 1:
      step, _ = microbatch_grid(parallel.schedule, parallel.stage)
    return self.micro_batch_size * step


def to_dict(config: Any) -> dict[str, Any]:
  """A config as nested dictionaries of plain values, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any], prefix: str = '') -> Any:
  """Builds `cls` from nested dictionaries; the inverse of `to_dict`.

  Keys that are left out keep their defaults.

  Raises:
    ValueError: on a key that is no field, or a value of the wrong type.
  """
  section = prefix.rstrip('.') or 'config'
  _require(
    isinstance(values, dict), section, values, 'must be a section of fields'
  )
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise ValueError(
      f'unknown config field {prefix}{unknown[0]}; {cls.__name__} has '
      f'{", ".join(fields)}'
    )
  built = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(fields[name].type):
      value = from_dict(fields[name].type, value, f'{prefix}{name}.')
    else:
      value = cast_leaf(f'{prefix}{name}', value, fields[name].type)
    built[name] = value
  return cls(**built)


def to_json(config: Config) -> str:
  """A config as indented JSON."""
  return json.dumps(to_dict(config), indent=2) + '\n'


def cast_leaf(name: str, value: Any, kind: type) -> Any:
  """Checks that `value` is of type `kind`; a float field accepts an integer."""
  if kind is float and type(value) is int:
    return float(value)
  _require(type(value) is kind, name, value, f'must be of type {kind.__name__}')
  return value


def leaves(config: Any, prefix: str = '') -> dict[str, Any]:
  """`{'model.mla.q_lora_rank': 1536, ...}`: every leaf by its dotted name."""
  result = {}
  for field in dataclasses.fields(config):
    name, value = f'{prefix}{field.name}', getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      result.update(leaves(value, f'{name}.'))
    else:
      result[name] = value
  return result


def replace(config: Any, updates: dict[str, Any]) -> Any:
  """A copy with dotted leaves replaced: `{'model.moe.balance': 'none'}`."""
  tree = to_dict(config)
  for name, value in updates.items():
    *path, leaf = name.split('.')
    node = tree
    for key in path:
      node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
      raise ValueError(f'unknown config field {name}')
    node[leaf] = value
  return from_dict(type(config), tree)


def diff(base: Any, other: Any) -> dict[str, tuple[Any, Any]]:
  """Leaves that differ: `{'optim.lr': (0.00022, 0.0003)}`."""
  old, new = leaves(base), leaves(other)
  return {k: (old[k], new[k]) for k in old if old[k] != new[k]}
