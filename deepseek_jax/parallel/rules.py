"""Which mesh axes divide which dimension (V3 section 3.2).

One table serves every layout: an axis of size 1 divides nothing, so data
parallelism, FSDP, expert parallelism and their products are cases of it.

    batch     data, fsdp, node and expert: outside the experts, every device
              but those of other stages has sequences of its own
    experts   node and expert
    layers    never: a loop runs over them
    dim, heads, mlp, vocab, None: fsdp divides one of them, `dim` if it can

With ZeRO-1, what is stored for the optimizer is divided once more, over all
axes of the batch on which it would be the same.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jax.sharding import PartitionSpec

BATCH = ('data', 'fsdp', 'node', 'expert')
EXPERTS = ('node', 'expert')
_FIXED = {'batch': BATCH, 'experts': EXPERTS, 'layers': ()}
_FREE = ('dim', 'heads', 'mlp', 'vocab', None)

# Per dimension, the mesh axes that divide it, outermost first.
_Dims = list[tuple[str, ...]]


class Placement(NamedTuple):
  """How one parameter lies on the mesh, in the three states that it has.

  Each is divided over no more axes than the one before.

  Attributes:
    stored: float32 master weight, its moments and its gradient.
    step: the copy in the compute dtype, for the length of a step.
    used: what a layer computes with; only experts are divided.
  """

  stored: PartitionSpec
  step: PartitionSpec
  used: PartitionSpec


def spec(
  names: Iterable[str | None], shape: Iterable[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """The division of an array by the names of its dimensions.

  Args:
    names: one of this page's per dimension.
    shape: of the whole array.
    sizes: of every mesh axis.

  Raises:
    ValueError: an unknown name, an axis twice, or a size that does not divide.
  """
  return _spec(_fixed_dims(tuple(names), tuple(shape), sizes))


def place(
  names: Iterable[str | None],
  shape: Iterable[int],
  sizes: Mapping[str, int],
  zero1: bool = False,
) -> Placement:
  """Where a parameter lies; arguments and errors as for `spec`.

  Vectors, such as the norms' scales, stay whole: they are nothing to store, and
  each would need a collective.
  """
  names, shape = tuple(names), tuple(shape)
  used = _fixed_dims(names, shape, sizes)
  step = stored = used  # Of a vector.
  free = [i for i, name in enumerate(names) if name not in _FIXED]
  if len(free) > 1:
    step = stored = _divide(used, free, names, shape, sizes, ['fsdp'])
    taken = {axis for axes in step for axis in axes}
    if zero1:
      rest = [axis for axis in BATCH if axis not in taken]
      stored = _divide(step, free, names, shape, sizes, rest)
  return Placement(_spec(stored), _spec(step), _spec(used))


def axes_of(entry: str | Iterable[str] | None) -> tuple[str, ...]:
  """The axes of one entry of a `PartitionSpec`, outermost first."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _fixed_dims(names, shape, sizes) -> _Dims:
  if len(names) != len(shape):
    raise ValueError(f'{len(names)} names {names} for the shape {shape}')
  dims, taken = [], set()
  for name, size in zip(names, shape):
    if name not in _FIXED and name not in _FREE:
      known = ', '.join(map(str, (*_FIXED, *_FREE)))
      raise ValueError(f'unknown dimension {name!r}; use one of {known}')
    axes = _real(_FIXED.get(name, ()), sizes)
    if taken & set(axes):
      raise ValueError(f'{names}: the mesh axes {axes} divide two dimensions')
    taken |= set(axes)
    parts = _count(axes, sizes)
    if size % parts:
      raise ValueError(
        f'{name}={size} of {names}: the axes {axes} divide it into {parts}; '
        'use sizes whose product divides it'
      )
    dims.append(axes)
  return dims


def _divide(dims, free, names, shape, sizes, axes) -> _Dims:
  """Divides one of the dimensions `free` over as many of `axes` as it can."""
  axes = _real(axes, sizes)
  local = [n // _count(dims[i], sizes) for i, n in enumerate(shape)]
  best_first = sorted(free, key=lambda i: (names[i] != 'dim', -local[i]))
  while axes:
    for i in best_first:
      if local[i] % _count(axes, sizes) == 0:
        return [d + axes if i == j else d for j, d in enumerate(dims)]
    axes = axes[:-1]
  return dims


def _real(axes, sizes) -> tuple[str, ...]:
  return tuple(axis for axis in axes if sizes[axis] > 1)


def _count(axes, sizes) -> int:
  return math.prod(sizes[axis] for axis in axes)


def _spec(dims: _Dims) -> PartitionSpec:
  entries = [axes[0] if len(axes) == 1 else axes or None for axes in dims]
  return PartitionSpec(*entries)
