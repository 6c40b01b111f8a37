"""Pipeline schedules as data: who does what, in which order (V3 section 3.2.1).

A schedule is a row of steps for each rank; a step is one task, or the pair of a
forward and a backward task that DualPipe runs at the same time.  Nothing here
computes: the same rows are printed, drawn, simulated (`simulate.py`) and
executed (`pipeline.py`).

DualPipe's generator follows the eight phases of the authors' implementation;
the figure of the paper (ranks=8, microbatches=20) is a test.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from deepseek_jax import config

# Kinds of tasks.  A backward is whole, or cut into the gradient of the input,
# which the previous stage waits for, and that of the weights, which can wait.
FORWARD, BACKWARD, INPUT, WEIGHT = 'F', 'B', 'b', 'w'


@dataclasses.dataclass(frozen=True, order=True)
class Task:
  """One micro-batch through one of a rank's stages.

  Attributes:
    kind: F, B (whole), b (gradient of the input) or w (of the weights).
    microbatch: counted from 0 within its stream.
    chunk: which of the rank's stages; for DualPipe the direction.
  """

  kind: str
  microbatch: int
  chunk: int = 0


Step = tuple[Task, ...]  # One task, or (forward, backward).
Place = tuple[int, int]  # (rank, chunk)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The work of every rank, in order.

  Attributes:
    name: in `SCHEDULES`.
    microbatches: of all streams.
    paths: for each stream of micro-batches, the places of stages 0, 1, ...
      Both streams of DualPipe pass through copies of the same stages.
    rows: the steps of each rank.
  """

  name: str
  microbatches: int
  paths: tuple[tuple[Place, ...], ...]
  rows: tuple[tuple[Step, ...], ...]

  @property
  def ranks(self) -> int:
    """Devices along the pipeline."""
    return len(self.rows)

  @property
  def stages(self) -> int:
    """Pieces that the model is cut into."""
    return len(self.paths[0])

  @property
  def chunks(self) -> int:
    """Stages that one rank holds."""
    return 1 + max(chunk for path in self.paths for _, chunk in path)

  @property
  def stream_length(self) -> int:
    """Micro-batches of one stream."""
    return self.microbatches // len(self.paths)

  @functools.cached_property
  def places(self) -> dict[Place, tuple[int, int]]:
    """(rank, chunk) -> (stream, stage)."""
    return {
      place: (stream, stage)
      for stream, path in enumerate(self.paths)
      for stage, place in enumerate(path)
    }

  def tasks(self, rank: int) -> Iterator[tuple[int, Task]]:
    """(index of the step, task) in the order of the rank."""
    for i, step in enumerate(self.rows[rank]):
      for task in step:
        yield i, task

  def needs(self, rank: int, task: Task) -> list[tuple[int, Task]]:
    """What must be done before: (rank, task); a backward matches B and b."""
    stream, stage = self.places[rank, task.chunk]
    path, m = self.paths[stream], task.microbatch
    if task.kind == FORWARD:
      before = path[stage - 1 : stage]
      return [(r, Task(FORWARD, m, c)) for r, c in before]
    if task.kind == WEIGHT:
      return [(rank, Task(INPUT, m, task.chunk))]
    after = path[stage + 1 : stage + 2]
    own = [(rank, Task(FORWARD, m, task.chunk))]
    return own + [(r, Task(BACKWARD, m, c)) for r, c in after]


class _Row:
  """Builds one rank's row, counting micro-batches and deferred weights."""

  def __init__(self):
    self.steps: list[Step] = []
    self._forwards: dict[int, int] = {}
    self._backwards: dict[int, int] = {}
    self._deferred: list[Task] = []

  def _next(self, counts, kind, chunk) -> Task:
    m = counts.get(chunk, 0)
    counts[chunk] = m + 1
    return Task(kind, m, chunk)

  def forward(self, chunk: int = 0) -> None:
    self.steps.append((self._next(self._forwards, FORWARD, chunk),))

  def backward(self, chunk: int = 0, defer: bool = False) -> None:
    task = self._next(self._backwards, INPUT if defer else BACKWARD, chunk)
    self.steps.append((task,))
    if defer:
      self._deferred.append(dataclasses.replace(task, kind=WEIGHT))

  def weight(self) -> None:
    self.steps.append((self._deferred.pop(0),))

  def pair(self, forward: int, backward: int) -> None:
    self.forward(forward)
    self.backward(backward)
    self.steps[-2:] = [self.steps[-2] + self.steps[-1]]


def _line(ranks: int) -> tuple[Place, ...]:
  return tuple((rank, 0) for rank in range(ranks))


def _require(ok: bool, field: str, value: int, fix: str) -> None:
  if not ok:
    raise ValueError(f'{field}={value}: {fix}')


def _require_microbatches(name: str, ranks: int, microbatches: int) -> None:
  nearest, needs = config.microbatches_for(name, ranks, microbatches)
  fix = f'{needs}; the nearest is {nearest}'
  _require(microbatches == nearest, 'microbatches', microbatches, fix)


def _make(name, microbatches, paths, rows) -> Schedule:
  rows = tuple(tuple(row.steps) for row in rows)
  return Schedule(name, microbatches, tuple(paths), rows)


def gpipe(ranks: int, microbatches: int) -> Schedule:
  """All forwards, then all backwards (arXiv 1811.06965)."""

  def row():
    r = _Row()
    for _ in range(microbatches):
      r.forward()
    for _ in range(microbatches):
      r.backward()
    return r

  rows = [row() for _ in range(ranks)]
  return _make('gpipe', microbatches, [_line(ranks)], rows)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
  """1F1B: as few forwards ahead as keep the pipe full (arXiv 1806.03377)."""

  def row(rank):
    r, ahead = _Row(), min(ranks - rank - 1, microbatches)
    for _ in range(ahead):
      r.forward()
    for i in range(microbatches):
      if i + ahead < microbatches:
        r.forward()
      r.backward()
    return r

  rows = [row(rank) for rank in range(ranks)]
  return _make('1f1b', microbatches, [_line(ranks)], rows)


def interleaved(ranks: int, microbatches: int) -> Schedule:
  """Interleaved 1F1B: stage s is on rank s mod ranks (arXiv 2104.04473).

  Micro-batches pass in groups of `ranks`, each group through both chunks.
  """
  _require_microbatches('interleaved', ranks, microbatches)
  chunks = 2
  total = microbatches * chunks

  def chunk(i):
    return i // ranks % chunks

  def row(rank):
    r = _Row()
    ahead = min((ranks - rank - 1) * 2 + (chunks - 1) * ranks, total)
    for i in range(ahead):
      r.forward(chunk(i))
    for i in range(total):
      if i + ahead < total:
        r.forward(chunk(i + ahead))
      r.backward(chunks - 1 - chunk(i))
    return r

  path = tuple((s % ranks, s // ranks) for s in range(ranks * chunks))
  rows = [row(rank) for rank in range(ranks)]
  return _make('interleaved', microbatches, [path], rows)


def zb_h1(ranks: int, microbatches: int) -> Schedule:
  """1F1B with weight gradients in the bubble, at 1F1B's memory (2401.10241).

  Rank r runs r weight gradients late: so much earlier than on rank 0 are its
  input gradients wanted.
  """

  def row(rank):
    r, ahead = _Row(), min(ranks - rank - 1, microbatches)
    for _ in range(ahead):
      r.forward()
    for i in range(microbatches):
      if i + ahead < microbatches:
        r.forward()
      r.backward(defer=True)
      if i >= rank:
        r.weight()
    for _ in range(min(rank, microbatches)):
      r.weight()
    return r

  rows = [row(rank) for rank in range(ranks)]
  return _make('zb_h1', microbatches, [_line(ranks)], rows)


def _bidirectional(half: int, near: int, n: int, place: int, middle) -> _Row:
  """The eight phases that DualPipe and DualPipeV share.

  Args:
    half: ranks from an end to the middle, H.
    near: the chunk whose first stage is on this half; the other is 1 - near.
    n: as N / 2 of DualPipe and N of DualPipeV count micro-batches of a chunk.
    place: distance to the near end, h.
    middle: whether this rank passes its own output on to the other half.
  """
  r, far = _Row(), 1 - near
  for _ in range(2 * (half - place - 1)):  # 1. Forwards of the near stream.
    r.forward(near)
  for _ in range(place + 1):  # 2. Forwards of both.
    r.forward(near)
    r.forward(far)
  for _ in range(half - place - 1):  # 3. Weight gradients fill the bubble.
    r.backward(far, defer=True)
    r.weight()
    r.forward(far)
  for i in range(n - 2 * half + place + 1):  # 4. Everything overlaps.
    if middle and i == 0:  # Nothing to wait for: apart is earlier.
      r.forward(near)
      r.backward(far)
    else:
      r.pair(near, far)
    r.pair(far, near)
  for _ in range(half - place - 1):  # 5. The near forwards are over.
    r.backward(far)
    r.pair(far, near)
  for i in range(2 * (place + 1)):  # 6. Both drain; the second half defers.
    r.backward(near if i % 2 else far, defer=i > place)
  for _ in range(half - place - 1):  # 7. Each makes room for the other.
    r.weight()
    r.backward(near, defer=True)
  for _ in range(place + 1):  # 8. The weight gradients that are left.
    r.weight()
  return r


def dualpipe(ranks: int, microbatches: int) -> Schedule:
  """DualPipe: micro-batches enter at both ends (V3 section 3.2.1, figure 5).

  Chunk 0 of rank r is stage r, for micro-batches that start on rank 0; chunk 1
  is stage ranks - 1 - r, for those that start on the last rank.
  """
  config.require_even_ranks('dualpipe', 'ranks', ranks)
  _require_microbatches('dualpipe', ranks, microbatches)
  half = ranks // 2

  def row(rank):
    place = min(rank, ranks - 1 - rank)
    near = int(rank >= half)
    is_middle = place == half - 1
    return _bidirectional(half, near, microbatches // 2, place, is_middle)

  paths = (
    tuple((rank, 0) for rank in range(ranks)),
    tuple((rank, 1) for rank in reversed(range(ranks))),
  )
  rows = [row(rank) for rank in range(ranks)]
  return _make('dualpipe', microbatches, paths, rows)


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
  """DualPipeV: one half of DualPipe, folded; no stage is there twice.

  Rank r holds stage r (chunk 0) and stage 2 ranks - 1 - r (chunk 1).
  """
  _require_microbatches('dualpipe_v', ranks, microbatches)
  path = tuple((rank, 0) for rank in range(ranks))
  path += tuple((rank, 1) for rank in reversed(range(ranks)))
  rows = [
    _bidirectional(ranks, 0, microbatches, rank, rank == ranks - 1)
    for rank in range(ranks)
  ]
  return _make('dualpipe_v', microbatches, [path], rows)


# By the values of --schedule.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
  'gpipe': gpipe,
  '1f1b': one_f_one_b,
  'interleaved': interleaved,
  'zb_h1': zb_h1,
  'dualpipe': dualpipe,
  'dualpipe_v': dualpipe_v,
}


def make(name: str, ranks: int, microbatches: int) -> Schedule:
  """A schedule by name.

  Raises:
    ValueError: no such schedule, or sizes for which it is not defined; the
      message names the nearest that are.
  """
  if name not in SCHEDULES:
    raise ValueError(f'schedule={name!r}: use one of {", ".join(SCHEDULES)}')
  _require(ranks >= 1, 'ranks', ranks, 'use at least 1')
  _require(microbatches >= 1, 'microbatches', microbatches, 'use at least 1')
  return SCHEDULES[name](ranks, microbatches)


def done_as(task: Task) -> Task:
  """The task by the name `needs` gives it: a backward, whole or cut, is B."""
  return (
    dataclasses.replace(task, kind=BACKWARD) if task.kind == INPUT else task
  )


def _check_complete(schedule: Schedule, rank: int) -> None:
  """Every micro-batch once forwards and once backwards through each stage."""
  tasks = [task for _, task in schedule.tasks(rank)]
  if len(set(tasks)) != len(tasks):
    raise ValueError(f'rank {rank} runs a task twice')
  whole = {t for t in tasks if t.kind == BACKWARD}
  cut = [{(t.microbatch, t.chunk) for t in tasks if t.kind == k} for k in 'bw']
  if cut[0] != cut[1] or cut[0] & {(t.microbatch, t.chunk) for t in whole}:
    raise ValueError(f'rank {rank}: gradients of input and weights differ')
  wanted = {
    Task(kind, m, chunk)
    for r, chunk in schedule.places
    if r == rank
    for m in range(schedule.stream_length)
    for kind in (FORWARD, BACKWARD)
  }
  got = {done_as(t) for t in tasks if t.kind != WEIGHT}
  if got != wanted:
    raise ValueError(f'rank {rank}: {sorted(got ^ wanted)} missing or unknown')


def _check_deferred(schedule: Schedule, rank: int) -> None:
  """Weight gradients run in the order of their input gradients, after them."""
  waiting = []
  for _, task in schedule.tasks(rank):
    if task.kind == INPUT:
      waiting.append((task.microbatch, task.chunk))
    elif task.kind == WEIGHT:
      oldest = waiting.pop(0) if waiting else None
      if oldest != (task.microbatch, task.chunk):
        raise ValueError(f'rank {rank}: {task} runs, {oldest} is the oldest')


def _check_messages(schedule: Schedule) -> None:
  """What a rank sends to another is what that one next wants from it.

  Activations and gradients are two channels of a link; each must be first in,
  first out, so that no message needs a name.
  """
  sent: dict[tuple, list] = {}
  wanted: dict[tuple, list] = {}
  for rank in range(schedule.ranks):
    for _, task in schedule.tasks(rank):
      if task.kind == WEIGHT:
        continue
      stream, stage = schedule.places[rank, task.chunk]
      path = schedule.paths[stream]
      ahead = 1 if task.kind == FORWARD else -1
      is_forward = task.kind == FORWARD
      if 0 <= stage + ahead < len(path):
        link = (rank, path[stage + ahead][0], is_forward)
        message = (stream, task.microbatch, stage)
        sent.setdefault(link, []).append(message)
      if 0 <= stage - ahead < len(path):
        link = (path[stage - ahead][0], rank, is_forward)
        message = (stream, task.microbatch, stage - ahead)
        wanted.setdefault(link, []).append(message)
  for link in sent.keys() | wanted.keys():
    if link[0] != link[1] and sent.get(link) != wanted.get(link):
      raise ValueError(f'ranks {link[0]} -> {link[1]}: order differs')


def order(schedule: Schedule) -> list[tuple[int, int]]:
  """(rank, index of the step) of all steps, each after what it needs.

  Raises:
    ValueError: if the ranks wait for each other for ever.
  """
  done, result = set(), []
  at = [0] * schedule.ranks
  is_moving = True
  while is_moving:
    is_moving = False
    for rank, row in enumerate(schedule.rows):
      while at[rank] < len(row) and _is_ready(schedule, rank, at[rank], done):
        done |= {(rank, done_as(task)) for task in row[at[rank]]}
        result.append((rank, at[rank]))
        at[rank] += 1
        is_moving = True
  for rank, row in enumerate(schedule.rows):
    if at[rank] < len(row):
      raise ValueError(f'rank {rank} waits for ever at {row[at[rank]]}')
  return result


def _is_ready(schedule, rank, index, done):
  needs = [
    (r, done_as(need))
    for task in schedule.rows[rank][index]
    for r, need in schedule.needs(rank, task)
  ]
  return all(need in done for need in needs)


def validate(schedule: Schedule) -> None:
  """Checks that a schedule can run and leaves nothing out.

  Raises:
    ValueError: a task missing or twice; weight gradients out of order; a link
      whose ends disagree; ranks that wait for each other; a step that is
      neither one task nor a forward with a backward.
  """
  for rank, row in enumerate(schedule.rows):
    for step in row:
      kinds = ''.join(task.kind for task in step)
      if len(step) != 1 and kinds not in ('FB', 'Fb'):
        raise ValueError(f'rank {rank}: {kinds} is no pair')
    _check_complete(schedule, rank)
    _check_deferred(schedule, rank)
  _check_messages(schedule)
  order(schedule)


def label(task: Task, schedule: Schedule) -> str:
  """`F3>`: kind, micro-batch, and the direction or chunk if there are two."""
  if schedule.chunks == 1:
    return f'{task.kind}{task.microbatch}'
  if schedule.name.startswith('dualpipe'):
    return f'{task.kind}{task.microbatch}{"><"[task.chunk]}'
  return f'{task.kind}{task.microbatch}.{task.chunk}'


def describe(schedule: Schedule, rank: int) -> str:
  """One rank's row as text: `F0> F1> F0< b0< w0< [F2>B1<] ...`."""
  words = []
  for step in schedule.rows[rank]:
    text = ''.join(label(task, schedule) for task in step)
    words.append(f'[{text}]' if len(step) > 1 else text)
  return ' '.join(words)
