"""When each step of a schedule runs, and what it holds (V3 table 2).

Costs are in any unit of time.  A rank starts its next step when the one before
is over and what it needs has arrived; nothing else delays it.
"""

import dataclasses

from deepseek_jax.parallel import schedules
from deepseek_jax.parallel.schedules import (
  BACKWARD,
  FORWARD,
  INPUT,
  WEIGHT,
  Schedule,
  Step,
)

_MOST = 1e100  # A cost, so that no sum of them is infinite.


@dataclasses.dataclass(frozen=True)
class Costs:
  """Time of one stage and micro-batch.

  Attributes:
    forward: F.
    backward: B, the whole backward; its input gradient takes backward - weight.
    weight: W, the gradient of the weights alone.
    pair: F&B, a forward and a whole backward that overlap.
    latency: from the end of a step until another rank can use its result.
  """

  forward: float = 1.0
  backward: float = 2.0
  weight: float = 1.0
  pair: float = 3.0
  latency: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 <= value <= _MOST:
        raise ValueError(
          f'costs.{field.name}={value}: use a number from 0 to {_MOST:g}'
        )
    if not self.forward and not self.backward:
      raise ValueError('costs.forward=0 and costs.backward=0: use more')
    if self.weight > self.backward:
      raise ValueError(
        f'costs.weight={self.weight}: is a part of backward={self.backward}; '
        'use no more'
      )

  def of(self, step: Step) -> float:
    """The time that a step takes."""
    if len(step) > 1:
      # A pair whose weight gradient is deferred saves just that.
      deferred = self.weight if step[1].kind == INPUT else 0.0
      return self.pair - deferred
    return {
      FORWARD: self.forward,
      BACKWARD: self.backward,
      INPUT: self.backward - self.weight,
      WEIGHT: self.weight,
    }[step[0].kind]


EQUAL = Costs()  # F = W = B - W, and the pair without any gain.


@dataclasses.dataclass(frozen=True)
class Timeline:
  """A simulated run.

  Attributes:
    schedule: what ran.
    costs: with these.
    starts: of each step of each rank.
    ends: likewise.
  """

  schedule: Schedule
  costs: Costs
  starts: tuple[tuple[float, ...], ...]
  ends: tuple[tuple[float, ...], ...]

  @property
  def makespan(self) -> float:
    """From the first start to the last end."""
    return max(ends[-1] for ends in self.ends)

  def busy(self, rank: int) -> float:
    """Time in which the rank computes."""
    return sum(self.costs.of(step) for step in self.schedule.rows[rank])

  def bubble(self, rank: int) -> float:
    """Time in which the rank computes nothing."""
    return self.makespan - self.busy(rank)


def simulate(schedule: Schedule, costs: Costs = EQUAL) -> Timeline:
  """Runs a schedule on paper.

  Raises:
    ValueError: if the ranks wait for each other for ever.
  """
  done: dict[tuple, float] = {}
  starts: list[list[float]] = [[] for _ in schedule.rows]
  ends: list[list[float]] = [[] for _ in schedule.rows]
  for rank, index in schedules.order(schedule):
    step = schedule.rows[rank][index]
    start = ends[rank][-1] if ends[rank] else 0.0
    for task in step:
      for where, need in schedule.needs(rank, task):
        delay = costs.latency if where != rank else 0.0
        start = max(start, done[where, schedules.done_as(need)] + delay)
    end = start + costs.of(step)
    starts[rank].append(start)
    ends[rank].append(end)
    done |= {(rank, schedules.done_as(task)): end for task in step}
  return Timeline(
    schedule, costs, tuple(map(tuple, starts)), tuple(map(tuple, ends))
  )


def live_activations(
  schedule: Schedule, rank: int, chunk: int | None = None
) -> list[int]:
  """How many micro-batches' activations a rank holds during each step.

  A forward begins to hold them; a whole backward, or a weight gradient, lets go
  of them when it ends.  During a pair both its micro-batches are held.

  Args:
    schedule: any.
    rank: whose.
    chunk: count this stage alone; None: all of the rank.
  """
  live, result = 0, []
  for step in schedule.rows[rank]:
    tasks = [t for t in step if chunk is None or t.chunk == chunk]
    live += sum(t.kind == FORWARD for t in tasks)
    result.append(live)
    live -= sum(t.kind in (BACKWARD, WEIGHT) for t in tasks)
  return result


def peak_activations(schedule: Schedule, rank: int) -> int:
  """The most micro-batches whose activations a rank holds at once."""
  return max(live_activations(schedule, rank))


def peak_deferred(schedule: Schedule, rank: int) -> int:
  """The most weight gradients that wait at once for their input gradient's cut.

  A whole backward outside a pair is cut too: it takes two ticks (`ticks.py`).
  """
  live = peak = 0
  for step in schedule.rows[rank]:
    kinds = [task.kind for task in step]
    is_cut = INPUT in kinds or kinds == [BACKWARD]
    live += is_cut
    peak = max(peak, live)
    live -= WEIGHT in kinds or kinds == [BACKWARD]
  return peak


def bubble_formula(schedule: Schedule, costs: Costs) -> float:
  """Table 2's bubble of a rank, in closed form.

  Of gpipe, 1f1b and interleaved (in costs of one chunk) it is exact for all
  costs.  Of zb_h1 it is for W no larger than F and B - W, and no fewer
  micro-batches than ranks.  Of dualpipe and dualpipe_v it is when F, W and
  B - W are equal: on every rank if a pair takes F + B, on the middle ranks if
  it takes less.  Otherwise the simulated bubble lies above it or below.
  """
  c, ranks = costs, schedule.ranks
  if schedule.name in ('gpipe', '1f1b', 'interleaved'):
    return (ranks - 1) * (c.forward + c.backward)
  if schedule.name == 'zb_h1':
    return (ranks - 1) * (c.forward + c.backward - 2 * c.weight)
  half = schedule.stages // 2
  return (half - 1) * (c.pair + c.backward - 3 * c.weight)
