"""What a compiled program communicates, read from its HLO (V3 section 3.2.2).

XLA prints a program as computations of instructions.  Here they become a graph:
which collectives there are, over which mesh axes, with how many bytes and how
often; and what may run beside what.  Only the standard library is used.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# The `jax.named_scope` of a loop of no pass or one: a conditional in place.
AT_MOST_ONCE = 'at_most_once'
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_LISTED = re.compile(
  r'\b(?:branch_computations|called_computations)=\{([^}]*)\}'
)
_CONDITIONAL = re.compile(rf'\bop_name="(?:[^"]*/)?{AT_MOST_ONCE}/while"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: unique in the program.
    opcode: such as `fusion` or `all-gather-start`.
    shape: of the result, as printed.
    operands: names.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs."""
    listed = ','.join(_LISTED.findall(self.attributes))
    names = re.findall(r'%?([\w.\-]+)', listed)
    return (*_CALLED.findall(self.attributes), *names)


Computation = dict[str, Instruction]


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    entry: name of the computation where it starts.
    computations: instructions by name, in the order of the text.
  """

  entry: str
  computations: dict[str, Computation]

  def has(self, instruction: Instruction, opcodes: tuple[str, ...]) -> bool:
    """Whether it, or what it calls, has an opcode or custom call's target."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    own = (instruction.opcode, target.group(1) if target else '')
    return any(o in opcodes for o in own) or any(
      self.has(inner, opcodes)
      for name in instruction.called
      for inner in self.computations[name].values()
    )


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`."""
  entry, computations, current = '', {}, {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header.group(2), {})
      entry = header.group(2) if header.group(1) else entry
    elif found := _INSTRUCTION.match(line):
      instruction = _instruction(*found.groups())
      current[instruction.name] = instruction
  return Program(entry, computations)


def _instruction(name: str, rest: str) -> Instruction:
  shape, rest = _split_shape(rest)
  opcode, _, rest = rest.partition('(')
  end = _closing(rest)
  operands = tuple(re.findall(r'%([\w.\-]+)', rest[:end]))
  return Instruction(name, opcode.strip(), shape, operands, rest[end + 1 :])


def _split_shape(text: str) -> tuple[str, str]:
  if text.startswith('('):
    end = _closing(text[1:]) + 2
    return text[:end], text[end:]
  shape, _, rest = text.partition(' ')
  return shape, rest


def _closing(text: str) -> int:
  """Where the parenthesis that is open before `text` closes."""
  depth = 1
  for found in re.finditer('[()]', text):
    depth += 1 if found.group() == '(' else -1
    if not depth:
      return found.start()
  return len(text)


def shape_bytes(shape: str) -> float:
  """Bytes of an array, or of all arrays of a tuple."""
  total = 0.0
  for kind, sizes in _ARRAY.findall(shape):
    bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind).group())
    total += math.prod(map(int, filter(None, sizes.split(',')))) * bits / 8
  return total


def dimensions(shape: str) -> list[int]:
  """Sizes of an array, or of the first of a tuple."""
  found = _ARRAY.search(shape)
  return [int(n) for n in found.group(2).split(',') if n] if found else []


def known_trips(instruction: Instruction) -> int | None:
  """How often a `while` runs, if that does not depend on data."""
  trips = _TRIPS.search(instruction.attributes)
  return int(trips.group(1)) if trips else None


def is_at_most_once(instruction: Instruction) -> bool:
  """Whether it is a `while` that stands for a conditional.

  The name is that of the loop itself, not of one within its body.
  """
  return instruction.opcode == 'while' and bool(
    _CONDITIONAL.search(instruction.attributes)
  )


class Collective(NamedTuple):
  """One collective instruction.

  Attributes:
    kind: of `KINDS`.
    axes: the mesh axes along which its groups lie; empty for one device.
    group: devices that take part together.
    payload: bytes, on one device, of the whole array: what an all-gather gives,
      a reduce-scatter takes, an all-to-all exchanges.  Of a ragged one, the
      smaller of its two buffers: it cannot move more.
    dtypes: of what is moved.
    times: executions, by the known trip counts of the loops around it; a
      conditional's branch, or a loop `AT_MOST_ONCE`, counts as one.
    is_counted: False within a loop whose trip count is decided at run time and
      may be above one, of which `times` counts one.
    name: of the instruction.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  payload: float
  dtypes: tuple[str, ...]
  times: int
  is_counted: bool
  name: str

  @property
  def sent(self) -> float:
    """Bytes that one device sends to others in all executions.

    Rings for gathers and reductions; even traffic for all-to-alls.
    """
    share = (self.group - 1) / self.group
    if self.kind in ('collective-permute', 'collective-broadcast'):
      share = float(self.group > 1)
    if self.kind == 'all-reduce':
      share *= 2
    return self.payload * share * self.times


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
  """All collectives among several devices, in the order of the text.

  Args:
    program: from `parse`.
    mesh: sizes of the mesh's axes, outermost first, as `Mesh.shape`.
  """
  runs, found = _executions(program), []
  for name, computation in program.computations.items():
    times, is_counted = runs.get(name, (0, True))
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix('-start')
      if kind not in KINDS or not times:
        continue
      axes, group = _axes(instruction, mesh)
      payload, dtypes = _payload(kind, instruction, computation)
      found.append(
        Collective(
          kind, axes, group, payload, dtypes, times, is_counted,
          instruction.name,
        )
      )  # fmt: skip
  return [c for c in found if c.group > 1]


def sent_by_axis(found: list[Collective]) -> dict[tuple[str, ...], float]:
  """Bytes that a device sends along each set of axes, further rounds aside."""
  total = Counter()
  for collective in found:
    if collective.is_counted:
      total[collective.axes] += collective.sent
  return dict(total)


def _executions(program: Program) -> dict[str, tuple[int, bool]]:
  """How often each computation runs, and whether that is known."""
  callers = defaultdict(list)
  for name, computation in program.computations.items():
    for instruction in computation.values():
      for called in instruction.called:
        callers[called].append((name, instruction))

  @functools.cache
  def count(name):
    if name == program.entry:
      return 1, True
    times, is_counted = 0, True
    for caller, instruction in callers[name]:
      outer, known = count(caller)
      if instruction.opcode == 'while':
        trips = 1 if is_at_most_once(instruction) else known_trips(instruction)
        known &= trips is not None
        outer *= 1 if trips is None else trips
      times, is_counted = times + outer, is_counted and known
    return times, is_counted

  return {name: count(name) for name in program.computations}


def _payload(kind, instruction, computation):
  """Bytes and dtypes of what a collective moves."""
  shapes = [
    computation[o].shape for o in instruction.operands if o in computation
  ]
  if kind == 'ragged-all-to-all':
    payload, shapes = min(map(shape_bytes, shapes[:2])), shapes[:1]
  else:
    payload = sum(map(shape_bytes, shapes))
  if kind == 'all-gather':
    result = shape_bytes(instruction.shape)
    # The asynchronous one's result holds its operands, too.
    started = instruction.opcode.endswith('-start')
    payload = result - payload if started else result
  found = _ARRAY.findall(' '.join(shapes))
  return payload, tuple(sorted({kind for kind, _ in found}))


def _axes(instruction, mesh):
  """The axes of a collective's groups, and the devices of one group."""
  sizes = list(mesh.values())
  pairs = re.search(r'source_target_pairs=\{(.*?\})\}', instruction.attributes)
  groups = _braces(pairs.group(1)) if pairs else _groups(instruction, sizes)
  varying = set()
  for group in groups:
    places = [_coordinates(device, sizes) for device in group]
    varying |= {i for i, seen in enumerate(zip(*places)) if len(set(seen)) > 1}
  axes = tuple(name for i, name in enumerate(mesh) if i in varying)
  if pairs:
    return axes, 2 if axes else 1
  return axes, max(map(len, groups))


def _groups(instruction, sizes) -> list[list[int]]:
  text = instruction.attributes
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  )
  if iota:
    shape, dims, order = map(_numbers, iota.groups())
    flat = list(_iota(dims, order))
    size = shape[-1]
    return [flat[i : i + size] for i in range(0, len(flat), size)]
  named = re.search(
    r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((\S+)\))? \{(.*?)\}', text
  )
  if named:
    return _along(*named.groups())
  listed = re.search(r'replica_groups=\{(.*?\})\}', text)
  if listed:
    return _braces(listed.group(1))
  if 'replica_groups=' in text and 'replica_groups={}' not in text:
    raise ValueError(f'replica_groups in a form that is not known: {text}')
  return [list(range(math.prod(sizes)))]


def _along(mesh: str, ids: str | None, axes: str) -> list[list[int]]:
  """Devices that differ in `axes` only, as `'a','b':(2)4`, of `'a'=2,'b'=8`.

  `(2)4` is the second of an axis' parts, 4 devices, after a first one of 2.
  `ids`, as `[2,8]T(1,0)`, are the mesh's devices, in its own order if None.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
  parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
  devices = range(math.prod(sizes.values()))
  if ids:
    listed = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', ids)
    if not listed:
      raise ValueError(f'device_ids in a form that is not known: {ids}')
    devices = list(_iota(*map(_numbers, listed.groups())))
  groups = defaultdict(list)
  for i, device in enumerate(devices):
    place = dict(zip(sizes, _coordinates(i, list(sizes.values()))))
    for name, before, size in parts:
      size = int(size or sizes[name])
      stride = sizes[name] // (int(before or 1) * size)
      place[name] -= place[name] // stride % size * stride
    groups[tuple(place.values())].append(device)
  return list(groups.values())


def _braces(text: str) -> list[list[int]]:
  groups = re.findall(r'\{([\d,]*)\}', text)
  return [_numbers(group) for group in groups]


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in (text or '').split(',') if n]


def _iota(dims: list[int], order: list[int]) -> Iterator[int]:
  """0, 1, 2, ... as an array of `dims`, transposed by `order` if any; flat."""
  order = order or list(range(len(dims)))
  strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
  total = math.prod(dims)
  for flat in range(total):
    index = _coordinates(flat, [dims[i] for i in order])
    yield sum(strides[i] * n for i, n in zip(order, index))


def _coordinates(flat: int, sizes: list[int]) -> list[int]:
  place = []
  for size in reversed(sizes):
    flat, rest = divmod(flat, size)
    place.append(rest)
  return place[::-1]


def beside(computation: Computation, name: str) -> list[Instruction]:
  """Instructions that neither need `name` nor are needed by it.

  They may run at the same time.  Of an asynchronous collective, `name` is its
  start; what needs its result needs the start.
  """
  users = defaultdict(list)
  for instruction in computation.values():
    for operand in instruction.operands:
      users[operand].append(instruction.name)

  def reach(step):
    seen, todo = set(), [name]
    while todo:
      for other in step(todo.pop()):
        if other in computation and other not in seen:
          seen.add(other)
          todo.append(other)
    return seen

  ordered = reach(lambda n: computation[n].operands) | reach(users.__getitem__)
  return [i for i in computation.values() if i.name not in ordered | {name}]
