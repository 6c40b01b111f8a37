"""A schedule as a table: what every rank does at each tick, and where it looks.

In one compiled program all ranks go through the same loop.  A tick is one pass
of it: each rank takes at most one step, then all messages are exchanged.  This
module gives steps to ticks, and arrays to slots of as few buffers as suffice.

Three things differ from the schedule on paper.  A whole backward outside a pair
takes two ticks, its input gradient and its weight gradient, so that ticks are
about equally long; its message leaves after the first.  A rank cannot be ahead
of its neighbours by part of a tick.  A tick takes as long as its slowest step.
"""

import dataclasses
import functools

from deepseek_jax.parallel import schedules
from deepseek_jax.parallel.schedules import (
  BACKWARD,
  FORWARD,
  INPUT,
  WEIGHT,
  Schedule,
  Step,
  Task,
)
from deepseek_jax.parallel.simulate import EQUAL, Costs

# Messages between neighbours: activations and gradients, to the next rank and
# to the one before.  'local' stays on the rank.
CHANNELS = ('y_up', 'y_down', 'g_up', 'g_down')


@dataclasses.dataclass
class Cell:
  """What a rank does at a tick; None and -1: nothing.

  Attributes:
    forward: task.
    backward: gradient of the input.
    weight: gradient of the weights; in a pair all three are set.
    x_slot: of the inbox of activations, where `forward` finds its input.
    g_slot: of the inbox of gradients, likewise for `backward`.
    save_slot: of the residuals of `forward`.
    load_slot: of the residuals that `backward` or `weight` reads.
    cut_slot: of what `backward` leaves for a later `weight`.
    arrivals: channel -> slot of the inbox where a message is put, at the end.
    y_local: slot of the own inbox where the output of `forward` is put.
    g_local: likewise for the gradient: of `backward` at DualPipeV's turn, of
      the loss on the last stage.
  """

  forward: Task | None = None
  backward: Task | None = None
  weight: Task | None = None
  x_slot: int = -1
  g_slot: int = -1
  save_slot: int = -1
  load_slot: int = -1
  cut_slot: int = -1
  arrivals: dict[str, int] = dataclasses.field(default_factory=dict)
  y_local: int = -1
  g_local: int = -1

  def cost(self, costs: Costs = EQUAL) -> float:
    """The time that the cell takes."""
    if self.forward and self.backward:
      return costs.pair
    return (
      costs.forward * bool(self.forward)
      + (costs.backward - costs.weight) * bool(self.backward)
      + costs.weight * bool(self.weight)
    )


@dataclasses.dataclass(frozen=True)
class Table:
  """The whole run.

  Attributes:
    schedule: of which this is the table.
    cells: [tick][rank].
    residual_slots: of each rank's buffer; at a pair's tick the residuals of its
      forward still lie outside.
    cut_slots: likewise.
    x_slots: likewise, of the inbox of activations.
    g_slots: likewise, of gradients.
  """

  schedule: Schedule
  cells: tuple[tuple[Cell, ...], ...]
  residual_slots: int
  cut_slots: int
  x_slots: int
  g_slots: int

  @property
  def channels(self) -> tuple[str, ...]:
    """Those over which anything is ever sent."""
    used = {c for row in self.cells for cell in row for c in cell.arrivals}
    return tuple(c for c in CHANNELS if c in used)

  def links(self, channel: str) -> list[tuple[int, int]]:
    """(source, target): ranks between which a channel ever carries anything."""
    ahead = 1 if channel.endswith('_up') else -1
    targets = {
      rank
      for row in self.cells
      for rank, cell in enumerate(row)
      if channel in cell.arrivals
    }
    return [((t - ahead) % self.schedule.ranks, t) for t in sorted(targets)]

  def makespan(self, costs: Costs = EQUAL) -> float:
    """Time of all ticks, each as long as its slowest cell."""
    return sum(max(cell.cost(costs) for cell in row) for row in self.cells)

  def bubble(self, rank: int, costs: Costs = EQUAL) -> float:
    """Time in which a rank waits, for neighbours or for the end of a tick."""
    busy = sum(row[rank].cost(costs) for row in self.cells)
    return self.makespan(costs) - busy


def microbatch(schedule: Schedule, rank: int, task: Task) -> int:
  """Which of all micro-batches a task's is: DualPipe's streams share them."""
  stream, _ = schedule.places[rank, task.chunk]
  return stream * schedule.stream_length + task.microbatch


def stage_of(schedule: Schedule, rank: int, chunk: int) -> int:
  """The stage of the model that a rank holds as `chunk`."""
  return schedule.places[rank, chunk][1]


@functools.lru_cache(1)
def build(schedule: Schedule) -> Table:
  """The table with the shortest makespan at equal costs."""
  tables = [_build(schedule, pair_ticks) for pair_ticks in (1, 2, 3)]
  return min(tables, key=lambda table: table.makespan())


def _build(schedule: Schedule, pair_ticks: int) -> Table:
  cells = _cells(schedule, pair_ticks)
  _send(schedule, cells)
  slots = [_allocate(schedule, rank, cells) for rank in range(schedule.ranks)]
  most = [max(column) for column in zip(*slots)]
  return Table(schedule, tuple(map(tuple, cells)), *most)


def _cells(schedule: Schedule, pair_ticks: int) -> list[list[Cell]]:
  """Every step at its earliest tick; ticks in which nothing starts left out."""
  free, done = [0] * schedule.ranks, {}
  placed: dict[int, list[tuple[int, Cell]]] = {}
  for rank, index in schedules.order(schedule):
    step = schedule.rows[rank][index]
    start = free[rank]
    for task in step:
      for where, need in schedule.needs(rank, task):
        start = max(start, done[where, schedules.done_as(need)])
    parts = _parts(step)
    length = pair_ticks if len(step) > 1 else len(parts)
    for i, cell in enumerate(parts):
      placed.setdefault(start + i, []).append((rank, cell))
    free[rank] = start + length
    for task in step:
      is_early = task.kind == BACKWARD and len(step) == 1
      end = start + 1 if is_early else free[rank]
      done[rank, schedules.done_as(task)] = end
  table = []
  for tick in sorted(placed):
    table.append([Cell() for _ in range(schedule.ranks)])
    for rank, cell in placed[tick]:
      table[-1][rank] = cell
  return table


def _parts(step: Step) -> list[Cell]:
  if len(step) > 1:
    forward, backward = step
    is_whole = backward.kind == BACKWARD
    weight = dataclasses.replace(backward, kind=WEIGHT) if is_whole else None
    return [Cell(forward, _as_input(backward), weight)]
  (task,) = step
  if task.kind == FORWARD:
    return [Cell(forward=task)]
  if task.kind == WEIGHT:
    return [Cell(weight=task)]
  first = Cell(backward=_as_input(task))
  if task.kind == INPUT:
    return [first]
  return [first, Cell(weight=dataclasses.replace(task, kind=WEIGHT))]


def _as_input(task: Task) -> Task:
  return dataclasses.replace(task, kind=INPUT)


def _send(schedule: Schedule, cells: list[list[Cell]]) -> None:
  """Notes each message where it arrives; the slot is found later."""
  for row in cells:
    for target, _, channel in _messages(schedule, row):
      if channel.endswith('_local'):
        setattr(row[target], channel, 0)
      else:
        row[target].arrivals[channel] = 0


def _way(schedule: Schedule, source: int, target: int) -> str:
  if target == source + 1:
    return 'up'
  if target == source - 1:
    return 'down'
  return 'up' if target == (source + 1) % schedule.ranks else 'down'


class _Slots:
  """Gives the lowest free slot."""

  def __init__(self):
    self.size, self._free = 0, []

  def take(self) -> int:
    if not self._free:
      self._free.append(self.size)
      self.size += 1
    self._free.sort()
    return self._free.pop(0)

  def give(self, slot: int) -> None:
    self._free.append(slot)


def _allocate(schedule, rank, cells) -> tuple[int, int, int, int]:
  """Fills in one rank's slots; the sizes of its four buffers.

  Within a tick, what is read is read before anything is written.
  """
  residuals, cuts, xs, gs = (_Slots() for _ in range(4))
  saved: dict[tuple, int] = {}
  cut: dict[tuple, int] = {}
  x_waiting: dict[tuple, int] = {}
  g_waiting: dict[tuple, int] = {}
  for row in cells:
    cell = row[rank]
    forward, backward, weight = cell.forward, cell.backward, cell.weight
    if forward and schedule.places[rank, forward.chunk][1] > 0:
      cell.x_slot = x_waiting.pop(_key(forward))
      xs.give(cell.x_slot)
    if backward:
      cell.g_slot = g_waiting.pop(_key(backward))
      gs.give(cell.g_slot)
      cell.load_slot = saved[_key(backward)]
    if weight:
      cell.load_slot = saved.pop(_key(weight))
      residuals.give(cell.load_slot)
      if not backward:
        cell.cut_slot = cut.pop(_key(weight))
        cuts.give(cell.cut_slot)
    if forward:
      cell.save_slot = saved[_key(forward)] = residuals.take()
    if backward and not weight:
      cell.cut_slot = cut[_key(backward)] = cuts.take()
    for target, task, channel in _messages(schedule, row):
      if target != rank:
        continue
      is_y = channel[0] == 'y'
      slot = (xs if is_y else gs).take()
      (x_waiting if is_y else g_waiting)[_key(task)] = slot
      if channel in ('y_local', 'g_local'):
        setattr(cell, channel, slot)
      else:
        cell.arrivals[channel] = slot
  assert not (saved or cut or x_waiting or g_waiting), 'something is left over'
  return residuals.size, cuts.size, xs.size, gs.size


def _key(task: Task) -> tuple[int, int]:
  return task.microbatch, task.chunk


def _messages(schedule, row):
  """(rank, task of it that will want it, channel) of a tick's messages."""
  for source, cell in enumerate(row):
    for task, kind, ahead in (
      (cell.forward, 'y', 1),
      (cell.backward, 'g', -1),
    ):
      if task is None:
        continue
      stream, stage = schedule.places[source, task.chunk]
      path = schedule.paths[stream]
      if not 0 <= stage + ahead < len(path):
        if kind == 'y':
          yield source, task, 'g_local'  # The loss gives the gradient at once.
        continue
      target, chunk = path[stage + ahead]
      way = _way(schedule, source, target) if source != target else 'local'
      yield target, Task(task.kind, task.microbatch, chunk), f'{kind}_{way}'
