"""What runs beside each collective of a compiled program (V3 section 3.2.1).

An asynchronous collective is two instructions, a start and a done.  Without a
device two things can be said of it: which arithmetic depends neither on it nor
it on that, so that it may run meanwhile; and which of that XLA's scheduler has
put between start and done, so that it will.  Only the standard library is used.
"""

import functools
import math
import re
from typing import NamedTuple

from deepseek_jax.parallel import hlo

_GEMM = 'custom_call_target="__cublas'
_KERNEL = 'custom_call_target="mosaic'
_CONTRACTED = re.compile(
  r'lhs_contracting_dim(?:s|ensions)"?[=:]\s*[{\[]([\d,"]*)[}\]]'
)
_COLLECTIVES = (*hlo.KINDS, *(f'{kind}-start' for kind in hlo.KINDS))


class Work(NamedTuple):
  """An amount of arithmetic.

  Attributes:
    flops: of matrix products.
    kernels: calls of kernels written here, whose FLOPs the program hides.
  """

  flops: float = 0.0
  kernels: int = 0

  def __add__(self, other: 'Work') -> 'Work':
    return Work(self.flops + other.flops, self.kernels + other.kernels)

  def __mul__(self, times: int) -> 'Work':
    return Work(self.flops * times, self.kernels * times)

  def __bool__(self) -> bool:
    return self.flops > 0 or self.kernels > 0


class Beside(NamedTuple):
  """What surrounds a collective, in one execution of its computation.

  Attributes:
    computation: its name; a loop's body or a branch is one.
    whole: all arithmetic of the computation.
    free: what of it depends neither on the collective nor that on it.
    hidden: what of it is scheduled between the collective's start and done.
  """

  computation: str
  whole: Work
  free: Work
  hidden: Work


def beside(program: hlo.Program) -> dict[str, Beside]:
  """By the name of every collective, its start's if it is asynchronous.

  Of a loop whose length is decided at run time one pass is counted; none if it
  communicates, for that is a further round of experts, which rarely exists; and
  none of one that stands for a conditional, `hlo.AT_MOST_ONCE`.  Of a
  conditional's branches the one with the fewest FLOPs is counted.
  """
  counter, found = _Counter(program), {}
  for name, computation in program.computations.items():
    for instruction in computation.values():
      if instruction.opcode in _COLLECTIVES:
        free = hlo.beside(computation, instruction.name)
        found[instruction.name] = Beside(
          name,
          counter.whole(name),
          counter.sum(computation, free),
          counter.sum(computation, _between(computation, instruction)),
        )
  return found


def _between(computation, start):
  """The instructions after a start and before its done, in text order."""
  inside, found = False, []
  for instruction in computation.values():
    if instruction.opcode.endswith('-done') and (
      start.name in instruction.operands
    ):
      return found
    if inside:
      found.append(instruction)
    inside |= instruction is start
  return []  # Not asynchronous.


class _Counter:
  """Adds up the arithmetic of instructions."""

  def __init__(self, program: hlo.Program):
    self._program = program
    self.whole = functools.cache(self._whole)

  def sum(self, computation, instructions) -> Work:
    """Of some instructions of a computation."""
    return sum((self._one(computation, i) for i in instructions), Work())

  def _whole(self, name):
    computation = self._program.computations[name]
    return self.sum(computation, computation.values())

  def _one(self, computation, instruction):
    i = instruction
    if i.opcode == 'dot' or _GEMM in i.attributes:
      return Work(flops=_product(computation, i))
    if _KERNEL in i.attributes:
      return Work(kernels=1)
    if hlo.is_at_most_once(i):
      return Work()
    inner = [self.whole(name) for name in i.called]
    if i.opcode == 'conditional':
      return min(inner)
    total = sum(inner, Work())
    if i.opcode == 'while':
      trips = hlo.known_trips(i)
      if trips is None:
        trips = 0 if self._program.has(i, _COLLECTIVES) else 1
      return total * trips
    return total


def _product(computation, instruction):
  """FLOPs of a `dot`, or of a call of cuBLAS."""
  sizes = hlo.dimensions(computation[instruction.operands[0]].shape)
  contracted = _CONTRACTED.search(instruction.attributes).group(1)
  over = [int(dim.strip('"')) for dim in contracted.split(',')]
  result = hlo.dimensions(instruction.shape)
  return 2.0 * math.prod(result) * math.prod(sizes[dim] for dim in over)
