"""Bytes that a training step takes on one device: arithmetic only.

State (master weights, moments), the step's own copy of the weights, gradients,
what the recomputation policy keeps for the backward pass (V3 section 3.2.3) of
as many micro-batches as the pipeline holds, and the widest layer's working set.
"""

from typing import NamedTuple

from deepseek_jax.config import Config, ParallelConfig
from deepseek_jax.parallel import simulate
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.planner import (
  activations,
  communication,
  formats,
  parameters,
  placement,
)
from deepseek_jax.planner.placement import Held, Stage


class Memory(NamedTuple):
  """Bytes on the fullest device.

  Attributes:
    state: float32 master weights and the moments.
    weights: the copy in the compute dtype; of a pipeline's program FP8 codes,
      too.
    gradients: float32, summed over micro-batches.
    activations: kept for backward passes.
    deferred: kept besides for gradients of weights, in a pipeline's program.
    working: of the layer or head that needs most.
  """

  state: float
  weights: float
  gradients: float
  activations: float
  deferred: float
  working: float

  @property
  def total(self) -> float:
    """All of it."""
    return sum(self)


def of_rank(
  config: Config, schedule: Schedule | None = None, rank: int = 0
) -> Memory:
  """What one rank of a pipeline needs, or any device without one.

  A pipeline's program takes more: see `of_program`.
  """
  parallel, precision = config.parallel, config.precision
  hosted = placement.hosted(config, schedule, rank)
  held = placement.held(config.model, list(hosted.values()))
  step, stored = on_device(held, parallel), stored_on_device(config)
  moments = [formats.BYTES[d] for d in (precision.mu_dtype, precision.nu_dtype)]
  width, is_alone = formats.width(config), parallel.n_devices == 1
  rows = activations.expert_rows(config).allocated
  kept = {c: activations.of_stage(config, s, rows) for c, s in hosted.items()}
  # One micro-batch's gradients beside the sum; a pipeline adds in place.
  accumulates = communication.microbatches(config) > 1 and schedule is None
  gradients = 4 * (1 + accumulates) * step
  # The losses come first: then there are no other gradients yet, unless some
  # micro-batch is over.
  later = 0 if schedule or accumulates else gradients
  return Memory(
    state=(4 + sum(moments)) * stored,
    weights=0 if is_alone and width == 4 else width * step,
    gradients=gradients,
    activations=_peak(schedule, rank, kept),
    deferred=0,
    working=max(_working(config, s, rows, later) for s in hosted.values()),
  )


def of_program(config: Config, schedule: Schedule | None = None) -> Memory:
  """What a device holds, whose ranks run one program (`parallel/pipeline.py`).

  Every buffer has room for what any rank needs: layers of each kind, residuals
  and what is deferred of the largest stage, embedding, head and MTP.  MTP and
  head run forwards and backwards at once, beside what a branch has given.
  """
  if schedule is None:
    return of_rank(config)
  whole, stage = placement.of_program(config, schedule)
  step = on_device(placement.held(config.model, [whole]), config.parallel)
  width, ranks = formats.width(config), range(schedule.ranks)
  rows = activations.expert_rows(config).allocated
  cut = [
    s for r in ranks for s in placement.hosted(config, schedule, r).values()
  ]
  layers = [s._replace(mtp=0, heads=False) for s in cut]
  kept = max(activations.of_stage(config, s, rows) for s in layers)
  deferred = max(
    s.dense * activations.deferred(config, False, rows)
    + s.moe * activations.deferred(config, True, rows)
    for s in layers
  )
  given = 4 * on_device(placement.held(config.model, [stage]), config.parallel)
  mtp = Stage(0, 0, config.model.n_mtp_layers, True, True)
  head = activations.of_stage(config, mtp, rows) + _working(
    config, mtp, rows, 0
  )
  branch = kept + max(_working(config, s, rows, 0) for s in layers)
  return Memory(
    state=of_rank(config, schedule).state,
    weights=width * step + _codes(config, whole),
    gradients=4 * step,
    activations=kept
    * max(simulate.peak_activations(schedule, r) for r in ranks),
    deferred=deferred * max(simulate.peak_deferred(schedule, r) for r in ranks),
    working=kept + deferred + max(given + head, branch),
  )


def _codes(config: Config, stage: Stage) -> float:
  """Bytes of FP8 weights, made once a step, and once more turned.

  Forwards and backwards products read them along different dimensions.  MTP's
  are made anew for every micro-batch, with the head.
  """
  layers = stage._replace(mtp=0, embeds=False, heads=False)
  held = placement.held(config.model, [layers])
  attention = (stage.dense + stage.moe) * parameters.attention(config.model)
  routed = on_device(held._replace(other=0), config.parallel)
  counts = {
    'attention': attention,
    'dense': held.other - attention,
    'experts': routed,
  }
  return 2 * sum(
    formats.stored(config, module, 'fmt', count)
    for module, count in counts.items()
    if config.precision.of(module).fp8.enabled
  )


def _working(config: Config, stage: Stage, rows: float, later: float) -> float:
  """Bytes of a stage's hungriest part; `later`: not yet there at its losses."""
  is_moe = config.model.moe.n_routed_experts > 0
  has = {False: stage.dense, True: stage.moe}
  has[is_moe] += stage.mtp
  layers = [
    activations.of_layer(config, kind, rows) for kind, n in has.items() if n
  ]
  return max(*layers, activations.of_heads(config, stage) - later, 0)


def _peak(
  schedule: Schedule | None, rank: int, kept_by: dict[int, float]
) -> float:
  """The most that a rank's chunks keep at once, by a micro-batch of each."""
  if schedule is None:
    return sum(kept_by.values())
  live = {c: simulate.live_activations(schedule, rank, c) for c in kept_by}
  steps = len(schedule.rows[rank])
  return max(
    sum(live[c][i] * size for c, size in kept_by.items()) for i in range(steps)
  )


def on_device(held: Held, parallel: ParallelConfig) -> float:
  """Parameters of `held` that one device has for a step.

  A pipeline's rank has its layers whole: FSDP divides what it stores alone.
  """
  whole = _whole(held, parallel)
  return whole if parallel.stage > 1 else whole / parallel.fsdp


def _whole(held, parallel):
  """Parameters of `held` beside those of other devices' experts."""
  return held.other + held.routed / (parallel.node * parallel.expert)


def stored_on_device(config: Config) -> float:
  """Parameters whose master weights a device stores.

  The ranks of a pipeline divide those of every layer; ZeRO-1 divides them over
  all copies.
  """
  parallel, model = config.parallel, config.model
  whole = placement.held(model, placement.stages(model, 1))
  if parallel.zero1:
    return sum(whole) / parallel.n_devices
  return _whole(whole, parallel) / parallel.fsdp / parallel.stage
