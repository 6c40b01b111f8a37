"""How long a step takes at least on named devices, and why: arithmetic only."""

from typing import NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.parallel import simulate, ticks
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.planner import communication, flops, placement
from deepseek_jax.planner.communication import Traffic
from deepseek_jax.planner.devices import Device


class Cost(NamedTuple):
  """Bounds of an optimizer step, in seconds.

  Attributes:
    tokens: of the whole batch.
    flops: of one device; recomputation not counted.
    compute: these at the device's peak.
    bubble: time in which a pipeline's rank waits, at that speed, on paper.
    lockstep: likewise, in one program for all ranks (`parallel/ticks.py`).
    sending: time of the busiest link.
  """

  tokens: int
  flops: float
  compute: float
  bubble: float
  lockstep: float
  sending: float

  @property
  def step(self) -> float:
    """No step is shorter, however well sending is hidden."""
    return max(self.compute + self.bubble, self.sending)


def traffic(
  config: Config, schedule: Schedule | None = None, rank: int = 0
) -> list[Traffic]:
  """All that one device sends in an optimizer step."""
  layers = placement.hosted(config, schedule, rank)
  forwards = communication.microbatches(config)
  if schedule:
    forwards = schedule.stream_length
  moe = config.model.moe.n_routed_experts > 0
  routed = sum(s.moe + s.mtp * moe for s in layers.values())
  # Both ways forward, and both ways backward.
  times = 2 * forwards * routed
  result = [
    t._replace(sent=times * t.sent, crossing=times * t.crossing)
    for t in communication.expert_traffic(config)
  ]
  if schedule:
    room, _ = placement.of_program(config, schedule)
    held = placement.held(config.model, [room])
    result.append(communication.stage_traffic(config, schedule, rank))
    return result + communication.collected_traffic(config, held)
  held = placement.held(config.model, list(layers.values()))
  return result + communication.parameter_traffic(config, held, forwards)


def of_rank(
  config: Config,
  device: Device,
  schedule: Schedule | None = None,
  rank: int = 0,
) -> Cost:
  """The bounds for one rank of a pipeline, or for any device without one.

  Layers are taken to be spread evenly.  The linears of the modules that are in
  FP8 run at the device's FP8 peak.
  """
  model, seq_len = config.model, config.data.seq_len
  tokens = config.data.batch_size * seq_len
  share = tokens / config.parallel.n_devices
  total = flops.train_per_token(model, seq_len)
  fast = sum(
    part
    for module, part in flops.linears_per_token(model).items()
    if config.precision.of(module).fp8.enabled
  )
  compute = share * ((total - fast) / device.bf16 + fast / device.fp8)
  bubble = lockstep = 0.0
  if schedule:
    run, table = simulate.simulate(schedule), ticks.build(schedule)
    bubble, lockstep = (
      compute * r.bubble(rank) / run.busy(rank) for r in (run, table)
    )
  sent = traffic(config, schedule, rank)
  sending = communication.lower_bound(sent, device)
  return Cost(tokens, share * total, compute, bubble, lockstep, sending)
