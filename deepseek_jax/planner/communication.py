"""Bytes that a device sends in one optimizer step, and how long they must take.

For each mesh axis, what V3 sends (sections 3.2.1, 3.2.2 and 3.3.3): tokens to
the experts in FP8 and back in BF16, and in the backward pass the gradients
likewise; activations between stages; gradients and weights for ZeRO-1.  Counted
is what leaves a device; recomputation sends nothing again.
"""

import math
from typing import NamedTuple

from deepseek_jax.config import Config, ModelConfig, ParallelConfig
from deepseek_jax.parallel import ticks
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.planner import formats, placement
from deepseek_jax.planner.devices import NODE, Device


class Traffic(NamedTuple):
  """What one device sends over one mesh axis in a step.

  Attributes:
    axis: name; several joined by '+'.
    what: what it is.
    sent: bytes.
    crossing: bytes of these that leave the node.
  """

  axis: str
  what: str
  sent: float
  crossing: float


def destinations(model: ModelConfig, parts: int) -> float:
  """How many of `parts` nodes or devices hold experts of one token, expected.

  The experts are divided equally, in order.  Every choice of expert groups, and
  of experts within them, is equally likely, and every open group is used: V3's
  256 experts on 8 nodes make it 4, on 8 x 8 devices 7.6.
  """
  moe = model.moe
  groups, limit = moe.n_expert_groups, moe.n_limited_groups
  if parts <= groups:
    return _hit(parts, groups, limit)
  experts = moe.n_routed_experts / groups
  return limit * _hit(parts / groups, experts, moe.n_activated_experts / limit)


def _hit(parts: float, items: float, drawn: float) -> float:
  """Parts of equally many `items` of which one is drawn; may be fractions."""
  left = items - items / parts
  if left < drawn:
    return parts
  missed = (
    math.lgamma(left + 1)
    - math.lgamma(left - drawn + 1)
    - math.lgamma(items + 1)
    + math.lgamma(items - drawn + 1)
  )
  return parts * (1 - math.exp(missed))


def token_bytes(config: Config) -> tuple[float, float]:
  """Bytes of one token dispatched, and combined."""
  dim = config.model.dim
  dispatched = formats.stored(config, 'experts', 'dispatch_fmt', dim)
  return dispatched, dim * formats.width(config)


def expert_traffic(config: Config) -> list[Traffic]:
  """Dispatch and combine of one MoE layer, forward, for a device's tokens.

  A token crosses to each node of its experts once, to the device of the same
  index (over `node`), and from there to each of its experts (over `expert`);
  with node=1 straight to each of its experts.
  """
  parallel, model = config.parallel, config.model
  node, expert = parallel.node, parallel.expert
  if node * expert == 1 or not model.moe.n_routed_experts:
    return []
  tokens = tokens_per_device(config)
  chosen = model.moe.n_activated_experts
  hops = []
  if node > 1:
    remote = destinations(model, node) * (node - 1) / node
    hops.append(('node', remote, remote))
  if expert > 1:
    inside = min(expert, NODE)
    share = (expert - inside) / expert
    hops.append(('expert', chosen * (expert - 1) / expert, chosen * share))
  dispatched, combined = token_bytes(config)
  return [
    Traffic(axis, what, tokens * copies * size, tokens * crossing * size)
    for axis, copies, crossing in hops
    for what, size in (('dispatch', dispatched), ('combine', combined))
  ]


def tokens_per_device(config: Config) -> float:
  """Of one micro-batch."""
  sequences = config.micro_batch_size / config.parallel.n_batch_shards
  return sequences * config.data.seq_len


def microbatches(config: Config) -> int:
  """Forward passes of one optimizer step."""
  return config.data.batch_size // config.micro_batch_size


def lower_bound(traffic: list[Traffic], device: Device) -> float:
  """Seconds that sending takes at least, if both links are always busy.

  What crosses goes over InfiniBand, the rest over NVLink, at the same time.
  """
  crossing = sum(t.crossing for t in traffic)
  inside = sum(t.sent - t.crossing for t in traffic)
  return max(crossing / device.network, inside / device.nvlink)


def _crossing(parallel: ParallelConfig, axes: tuple[str, ...]) -> float:
  """Share of the bytes of a collective that must leave the node.

  Of the k members that a group has on each node one byte in k need cross.
  """
  stride, inside, size = 1, 1, 1
  per_node = parallel.expert if parallel.node > 1 else NODE
  for axis in ('expert', 'node', 'fsdp', 'data'):
    n = getattr(parallel, axis)
    if axis in axes:
      inside *= min(n, max(1, per_node // stride))
      size *= n
    stride *= n
  return 1 / inside if size > inside else 0.0


def _collective(parallel, axes, what, held) -> list[Traffic]:
  """One reduce-scatter or all-gather of `held` bytes over a group."""
  axes = tuple(a for a in axes if getattr(parallel, a) > 1)
  n = math.prod(getattr(parallel, a) for a in axes)
  if n == 1 or not held:
    return []
  sent = held * (n - 1) / n
  return [Traffic('+'.join(axes), what, sent, sent * _crossing(parallel, axes))]


def parameter_traffic(
  config: Config, held: placement.Held, forwards: int
) -> list[Traffic]:
  """Gradients and weights of a device, in a step without a pipeline.

  Gradients are summed once over all copies, in float32: an all-reduce, or with
  ZeRO-1 a reduce-scatter, after which the new weights are gathered in the
  compute dtype.  With FSDP each forward pass and each backward pass gathers the
  weights, and each backward pass scatters their float32 gradients.
  """
  parallel, width = config.parallel, formats.width(config)
  result = []
  for whose, axes, count in _copies(parallel, held):
    own = count / parallel.fsdp
    name = f'gradients{whose}, scattered'
    result += _collective(parallel, axes, name, 4 * own)
    back = (f'new weights{whose}', width)
    if not parallel.zero1:
      back = (f'gradients{whose}, sums', 4)
    result += _collective(parallel, axes, back[0], back[1] * own)
    for what, size in (
      ('weights{}, forward', width),
      ('weights{}, backward', width),
      ('gradients{}', 4),
    ):
      name, held_bytes = what.format(whose), count * size * forwards
      result += _collective(parallel, ('fsdp',), name, held_bytes)
  return result


def _copies(parallel, held):
  """(whose, axes of devices that have the same, parameters on each)."""
  parts = parallel.node * parallel.expert
  return [
    ('', ('data', 'node', 'expert'), held.other),
    (' of experts', ('data',), held.routed / parts),
  ]


def stage_traffic(config: Config, schedule: Schedule, rank: int) -> Traffic:
  """What a rank of the pipeline sends to others in a step.

  At every tick of the program a message over each of its links, empty or not:
  none waits in a branch (`parallel/pipeline.py`).
  """
  table = ticks.build(schedule)
  sources = [s for c in table.channels for s, _ in table.links(c)]
  messages = len(table.cells) * sources.count(rank)
  _, width = token_bytes(config)
  sent = messages * tokens_per_device(config) * width
  # A stage's devices lie beside each other.
  leaves = config.parallel.n_batch_shards >= NODE
  return Traffic('stage', 'activations and gradients', sent, sent * leaves)


def collected_traffic(config: Config, held: placement.Held) -> list[Traffic]:
  """What the layers of a pipeline's rank cost to bring together, once a step.

  Each rank stores a part of every layer.  It collects its own in the compute
  dtype: from all ranks, from all copies if ZeRO-1 divides what is stored, and
  over `fsdp`.  Their float32 gradients go back the same way; without ZeRO-1 the
  copies then sum the parts that they store.

  Args:
    config: of the run.
    held: what the program has room for.
  """
  parallel, width = config.parallel, formats.width(config)
  stored = placement.held(config.model, placement.stages(config.model, 1))
  leaves = parallel.n_batch_shards >= NODE
  others = (parallel.stage - 1) / parallel.stage
  result = []
  for (whose, axes, count), (*_, whole) in zip(
    _copies(parallel, held), _copies(parallel, stored)
  ):
    own = count / parallel.fsdp
    parts = math.prod(getattr(parallel, a) for a in axes)
    both = (f'weights{whose}, collected', width), (f'gradients{whose}', 4)
    for what, size in both if count else ():
      sent = size * own / (parts if parallel.zero1 else 1) * others
      result.append(Traffic('stage', what, sent, sent * leaves))
      if parallel.zero1:
        result += _collective(parallel, axes, what, size * own)
      result += _collective(parallel, ('fsdp',), what, size * count)
    if not parallel.zero1:
      summed = 2 * 4 * whole / parallel.fsdp / parallel.stage
      result += _collective(parallel, axes, f'gradients{whose}, sums', summed)
  return result
