"""Which rank of a pipeline has which layers, and how it gets them.

At rest every parameter is one array in the canonical layout, [L, ...], and each
rank stores a part of every layer: that needs no divisible number of layers, and
a checkpoint knows nothing of pipelines.  For the length of a step a rank
collects its own layers whole (for DualPipe those of both directions), and gives
the parts of their gradients back.  All of it runs in a manual region.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import rules, sharding, ticks
from deepseek_jax.parallel.schedules import Schedule

AXIS = 'stage'
Layer = tuple[str, int]  # (kind, index among the layers of that kind)
Signature = tuple[str, ...]  # The kinds of a stage's layers.


def cut(layers: Sequence[Layer], sizes: Sequence[int]) -> list[list[Layer]]:
  """Cuts the layers of a model, in order, into stages of the given sizes."""
  assert sum(sizes) == len(layers), (sizes, layers)
  ends = np.cumsum(sizes)
  return [list(layers[end - n : end]) for n, end in zip(sizes, ends)]


class Layout:
  """Where the layers are: on which rank, and in which of its slots.

  Attributes:
    kinds: of layers.
    sources: kind -> int [ranks, slots], the layer in a slot; -1: none.
    slots: kind -> int [ranks, chunks, layers of a stage]; -1: no more.
    signatures: (rank, chunk) -> kinds of the stage's layers.
  """

  def __init__(self, schedule: Schedule, stages: Sequence[Sequence[Layer]]):
    """`stages`: the layers of each stage of the model, in order."""
    assert len(stages) == schedule.stages, (len(stages), schedule.stages)
    self.kinds = sorted({kind for stage in stages for kind, _ in stage})
    self.signatures: dict[tuple[int, int], Signature] = {}
    held = collections.defaultdict(list)
    slots = collections.defaultdict(list)
    for rank, chunk in sorted(schedule.places):
      stage = stages[ticks.stage_of(schedule, rank, chunk)]
      self.signatures[rank, chunk] = tuple(kind for kind, _ in stage)
      for kind, index in stage:
        slots[kind, rank, chunk].append(len(held[kind, rank]))
        held[kind, rank].append(index)
    ranks, chunks = range(schedule.ranks), range(schedule.chunks)
    self.sources = {
      k: _rectangle([held[k, r] for r in ranks]) for k in self.kinds
    }
    self.slots = {
      k: _rectangle([slots[k, r, c] for r in ranks for c in chunks]).reshape(
        schedule.ranks, schedule.chunks, -1
      )
      for k in self.kinds
    }


def _rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
  width = max(1, *map(len, rows))
  return np.array([[*row, *[-1] * (width - len(row))] for row in rows])


def divide(
  spec: PartitionSpec,
  shape: Sequence[int],
  sizes: Mapping[str, int],
  is_stack: bool,
) -> PartitionSpec:
  """`spec` with the largest dimension that allows it divided over the stages.

  Vectors and stacks of vectors stay whole.  A matrix that did would be as large
  on every rank as without a pipeline, with both its moments.

  Args:
    spec: of the canonical array, without stages.
    shape: of the whole array.
    sizes: of the mesh axes.
    is_stack: the first dimension is that of the layers, which stays whole.

  Raises:
    ValueError: a matrix of which no dimension can be divided.
  """
  ranks, entries = sizes[AXIS], [rules.axes_of(entry) for entry in spec]
  entries += [()] * (len(shape) - len(entries))
  parts = [int(np.prod([sizes[a] for a in axes])) for axes in entries]
  local = [n // p for n, p in zip(shape, parts)]
  own = range(int(is_stack), len(shape))
  able = [i for i in own if local[i] % ranks == 0]
  if ranks == 1 or len(own) < 2:
    return spec
  if not able:
    raise ValueError(f'none of {[local[i] for i in own]} is a multiple')
  best = max(able, key=lambda i: local[i])
  entries[best] = (*entries[best], AXIS)
  return PartitionSpec(*(axes or None for axes in entries))


def _extra(stored: PartitionSpec, used: PartitionSpec):
  """(dimension, axis) that divide what is stored, but not what is used.

  The stages come first, which are the innermost axis of their dimension: ranks
  then exchange parts of their layers, which are collected over other axes.
  """
  used = [*used, *[None] * len(stored)]
  extra = [
    (dim, axis)
    for dim, entry in enumerate(stored)
    for axis in reversed(rules.axes_of(entry))
    if axis not in rules.axes_of(used[dim])
  ]
  return sorted(extra, key=lambda e: e[1] != AXIS)


def collect(
  x: jax.Array,
  stored: PartitionSpec,
  used: PartitionSpec,
  sources: np.ndarray | None,
) -> jax.Array:
  """This rank's layers [slots, ...] of a stored stack, or a whole other array.

  Args:
    x: the part of the canonical array that is stored here.
    stored: its division.
    used: of the result, which is whole along the stages.
    sources: of `Layout`; None: no stack.
  """
  if sources is not None and AXIS not in _all_axes(stored):
    x = _take(x, jnp.asarray(sources)[lax.axis_index(AXIS)])
  for dim, axis in _extra(stored, used):
    if axis == AXIS and sources is not None:
      x = _take(x, jnp.asarray(sources).reshape(-1))
      x = lax.all_to_all(x, AXIS, 0, dim, tiled=True)
    else:
      x = sharding.all_gather(x, axis, dim)
  return x


def give_back(
  grad: jax.Array,
  stored: PartitionSpec,
  used: PartitionSpec,
  sources: np.ndarray | None,
  batch_axes: Sequence[str],
) -> jax.Array:
  """The transpose of `collect`, summed over all that computed the gradient.

  Args:
    grad: of what `collect` returned, from this rank's micro-batches.
    stored: as for `collect`, and
    used: likewise, and
    sources: likewise.
    batch_axes: over which the batch is divided.
  """
  n_layers = 0 if sources is None else int(sources.max()) + 1
  summed = set(_all_axes(used))
  for dim, axis in reversed(_extra(stored, used)):
    if axis == AXIS and sources is not None:
      grad = lax.all_to_all(grad, AXIS, dim, 0, tiled=True)
      grad = _put(grad, jnp.asarray(sources).reshape(-1), n_layers)
    else:
      grad = sharding.psum_scatter(grad, axis, dim)
    summed.add(axis)
  if sources is not None and AXIS not in summed:
    own = jnp.asarray(sources)[lax.axis_index(AXIS)]
    grad = _put(grad, own, n_layers)
  rest = [axis for axis in (AXIS, *batch_axes) if axis not in summed]
  return lax.psum(grad, tuple(rest)) if rest else grad


def _all_axes(spec: PartitionSpec) -> tuple[str, ...]:
  return tuple(axis for entry in spec for axis in rules.axes_of(entry))


def _take(x, indices):
  """Rows of x; zeros for -1."""
  rows = x[jnp.maximum(indices, 0)]
  exists = (indices >= 0).reshape(-1, *[1] * (x.ndim - 1))
  return jnp.where(exists, rows, 0)


def _put(x, indices, size):
  """The transpose of `_take`."""
  exists = (indices >= 0).reshape(-1, *[1] * (x.ndim - 1))
  zeros = jnp.zeros((size, *x.shape[1:]), x.dtype)
  return zeros.at[jnp.maximum(indices, 0)].add(jnp.where(exists, x, 0))


def map_by_kind(
  function: Callable[..., Any], layout: Layout, tree: Mapping[str, Any], *rest
) -> dict[str, Any]:
  """`function(leaf, *leaves, sources=...)` on trees keyed by kind first.

  `sources` is None under the keys that are no kind of layer.
  """

  def one(key, *trees):
    sources = layout.sources.get(key)
    return jax.tree.map(functools.partial(function, sources=sources), *trees)

  return {k: one(k, v, *(other[k] for other in rest)) for k, v in tree.items()}
