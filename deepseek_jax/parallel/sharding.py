"""What per-device code asks and does: the collectives of one `shard_map`.

Losses and gradients are computed by a function that runs on every device with
the device's own sequences and its parts of the parameters (`jax.shard_map`,
manual over all axes): every collective is written down, here and in `expert`,
so that what crosses a link does not depend on a partitioner, a Pallas kernel
needs no wrapper, and a pipeline stage can take any branch.  A device's sums are
its share of a total, exactly as a micro-batch's are.

Without a mesh, nothing here does anything.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import rules


def axis_sizes() -> Mapping[str, int]:
  """The axes on which the code being traced runs device by device."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: mesh.shape[axis] for axis in mesh.manual_axes}


def shards(axes: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axes` that divide something here; none without a mesh."""
  sizes = axis_sizes()
  return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def local_experts(n_experts: int) -> int:
  """How many of a layer's experts this device holds."""
  for axis in shards(rules.EXPERTS):
    n_experts //= axis_sizes()[axis]
  return n_experts


def batch_sum(tree: Any) -> Any:
  """Sums each leaf over all devices that have sequences of their own."""
  axes = shards(rules.BATCH)
  return lax.psum(tree, axes) if axes else tree


def apart(x: jax.Array) -> jax.Array:
  """`x`, which is added to what comes back from the experts of other devices.

  Else XLA lets the product that makes `x` add to that, and so wait for it.
  """
  return lax.optimization_barrier(x) if shards(rules.EXPERTS) else x


def gather(x: jax.Array, have: PartitionSpec, want: PartitionSpec) -> jax.Array:
  """A device's part by `have` to its part by `want`, which divides less.

  The derivative of this is the matching reduce-scatter.
  """
  for dim, axes in _extra(have, want):
    x = lax.all_gather(x, axes, axis=dim, tiled=True)
  return x


def reduce(
  gradient: jax.Array, have: PartitionSpec, want: PartitionSpec
) -> jax.Array:
  """Sums the devices' gradients of one parameter.

  Args:
    gradient: of this device's sequences, with respect to its part by `have`.
    have: its axes are already summed over, by the derivative of `gather` and
      of the experts' all-to-all.
    want: divides more than `have`.

  Returns:
    This device's part by `want` of the sum over the whole batch.
  """
  for dim, axes in _extra(want, have):
    gradient = lax.psum_scatter(
      gradient, axes, scatter_dimension=dim, tiled=True
    )
  done = {axis for entry in want for axis in _axes(entry)}
  rest = tuple(axis for axis in shards(rules.BATCH) if axis not in done)
  return lax.psum(gradient, rest) if rest else gradient


def _extra(
  more: PartitionSpec, fewer: PartitionSpec
) -> Iterator[tuple[int, tuple[str, ...]]]:
  """(dimension, axes) that divide by `more` and not by `fewer`."""
  for dim, (a, b) in enumerate(zip(more, fewer)):
    a, b = _axes(a), _axes(b)
    assert a[: len(b)] == b, (more, fewer)
    if len(a) > len(b):
      yield dim, a[len(b) :]


def _axes(entry: Any) -> tuple[str, ...]:
  """The axes of one entry of a `PartitionSpec`, outermost first."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)
