"""The plan of a run as text: memory, bytes sent, and bounds of a step.

V3's own layout (V3 section 3.1) is tests/planner_test.py's example.
"""

from deepseek_jax.config import Config
from deepseek_jax.parallel import simulate
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.planner import (
  activations,
  communication,
  cost,
  memory,
  placement,
)
from deepseek_jax.planner.devices import DEVICES

_GB = 1e9
_AXES = ('stage', 'data', 'fsdp', 'node', 'expert')


def text(config: Config, device: str, schedule: Schedule | None = None) -> str:
  """Everything that the planner knows of a run on devices of a name.

  Raises:
    ValueError: no such device, or a pipeline that does not fit the model.
  """
  if device not in DEVICES:
    raise ValueError(f'device={device!r}: use one of {", ".join(DEVICES)}')
  ranks = range(schedule.ranks if schedule else 1)
  per_rank = [memory.of_rank(config, schedule, rank) for rank in ranks]
  fullest = max(ranks, key=lambda rank: per_rank[rank].total)
  parts = [
    _title(config, device, schedule),
    _ranks(config, schedule, per_rank),
    _verdict(memory.of_program(config, schedule).total, device),
    _experts(config),
    _traffic(config, device, schedule, fullest),
    _bounds(config, device, schedule, fullest),
  ]
  return '\n\n'.join(filter(None, parts))


def _title(config, device, schedule) -> str:
  parallel, data = config.parallel, config.data
  axes = [f'{a}={n}' for a in _AXES if (n := getattr(parallel, a)) > 1]
  axes += ['ZeRO-1'] if parallel.zero1 else []
  axes += [schedule.name] if schedule else []
  count = communication.microbatches(config)
  each = config.micro_batch_size / parallel.n_batch_shards
  return (
    f'{parallel.n_devices} x {device}: {", ".join(axes) or "one device"}\n'
    f'{data.batch_size * data.seq_len:,} tokens a step; '
    f'micro-batches: {count}, each of {each:g} x {data.seq_len} tokens a device'
  )


def _ranks(config, schedule, per_rank) -> str:
  """What the devices of each rank hold."""
  lines = [
    'What one device holds, in GB, by its place in the pipeline:',
    '| rank | layers | parameters | live stages | state | weights | '
    'gradients | activations | deferred | working | total |',
    '|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for rank, m in enumerate(per_rank):
    hosted = list(placement.hosted(config, schedule, rank).values())
    held = placement.held(config.model, hosted)
    live = simulate.peak_activations(schedule, rank) if schedule else 1
    count = round(memory.on_device(held, config.parallel))
    layers = ', '.join(map(_layers, hosted))
    lines.append(f'| {rank} | {layers} | {count:,} | {live} | {_sizes(m)} |')
  if schedule:
    program = _sizes(memory.of_program(config, schedule))
    lines.append(f'| all | one program with room for each | | | {program} |')
  return '\n'.join(lines)


def _sizes(m: memory.Memory) -> str:
  return ' | '.join(f'{size / _GB:.4g}' for size in (*m, m.total))


def _layers(stage: placement.Stage) -> str:
  """`embedding + 3 dense`, for instance."""
  counts = zip((stage.dense, stage.moe, stage.mtp), ('dense', 'MoE', 'MTP'))
  words = [f'{n} {kind}' for n, kind in counts if n]
  first, last = ['embedding'] * stage.embeds, ['head'] * stage.heads
  return ' + '.join([*first, *words, *last])


def _verdict(total: float, device: str) -> str:
  room = DEVICES[device].memory
  fits = 'fits into' if total <= room else 'does NOT fit into'
  return f'The fullest device {fits} {device}: {total / _GB:.4g} of ' + (
    f'{room / _GB:.4g} GB, before what the runtime itself takes.'
  )


def _experts(config) -> str:
  if config.parallel.node * config.parallel.expert == 1:
    return ''
  rows = activations.expert_rows(config)
  size = sum(communication.token_bytes(config)) / _GB
  return (
    'Rows for the experts of a device, of a layer and micro-batch: '
    f'{rows.expected:,.0f} on average,\n{rows.worst:,} at worst '
    f'({rows.worst * size:.4g} GB in and out); room for {rows.allocated:,.0f} '
    f'({rows.allocated * size:.4g} GB).'
  )


def _traffic(config, device, schedule, rank) -> str:
  named = DEVICES[device]
  lines = [
    'What one device sends in a step:',
    '| over | what | GB | of it between nodes | seconds at least |',
    '|---|---|---:|---:|---:|',
  ]
  for t in cost.traffic(config, schedule, rank):
    seconds = communication.lower_bound([t], named)
    lines.append(
      f'| {t.axis} | {t.what} | {t.sent / _GB:.4g} | {t.crossing / _GB:.4g} '
      f'| {seconds:.3g} |'
    )
  return '\n'.join(lines) if len(lines) > 3 else ''


def _bounds(config, device, schedule, rank) -> str:
  named = DEVICES[device]
  c = cost.of_rank(config, named, schedule, rank)
  rate = c.tokens / c.step / config.parallel.n_devices
  mfu = c.flops / c.step / named.bf16
  bubble = ''
  if schedule:
    bubble = (
      f'{c.bubble:.3g} s of bubble\non paper and {c.lockstep:.3g} s in '
      'lockstep, as it runs here, '
    )
  return (
    f'A step: {c.compute:.3g} s of computation at peak, {bubble}'
    f'{c.sending:.3g} s of sending\non the busier link. It takes at '
    f'least {c.step:.3g} s: at most {rate:,.0f} tokens/s a device,\n'
    f'{mfu:.1%} of its BF16 peak.'
  )
