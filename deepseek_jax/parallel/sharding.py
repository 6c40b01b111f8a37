"""What per-device code asks and does: the collectives of one `shard_map`.

Losses and gradients are computed by a function that runs on every device with
the device's own sequences and its parts of the parameters (`jax.shard_map`,
manual over all axes): every collective is written down, here and in `expert`,
so that what crosses a link does not depend on a partitioner, a Pallas kernel
needs no wrapper, and a pipeline stage can take any branch.  A device's sums are
its share of a total, exactly as a micro-batch's are.

Without a mesh, nothing here does anything.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copy:
  """A parameter for the length of a step, and the place of its gradient.

  Attributes:
    values: a device's part in the compute dtype.
    slot: float32 zeros of that shape, which nobody reads.  The gradient comes
      back as theirs: one of `values` would have their dtype, and so be rounded
      before it is added to others (V3 section 3.3.3 keeps them in float32).
  """

  values: jax.Array
  slot: jax.Array


def slots(params: Any) -> Any:
  """Zeros like `params` in float32, by which to differentiate."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)


def axis_sizes() -> Mapping[str, int]:
  """The axes on which the code being traced runs device by device."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: mesh.shape[axis] for axis in mesh.manual_axes}


def on_cpu() -> bool:
  """Whether the devices of the mesh are CPUs.

  Not `lax.platform_dependent`: within a loop it leaves a conditional of one
  branch, beside which XLA schedules nothing.
  """
  return jax.sharding.get_abstract_mesh().abstract_device.platform == 'cpu'


def shards(axes: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axes` that divide something here; none without a mesh."""
  sizes = axis_sizes()
  return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def sequence_axes(count: int) -> tuple[str, ...]:
  """The ambient mesh's axes that divide `count` sequences in inference.

  There XLA divides the program, but for what is written device by device.
  """
  mesh, axes = jax.sharding.get_abstract_mesh(), ()
  for axis in rules.BATCH:
    size = math.prod(mesh.shape.get(a, 1) for a in (*axes, axis))
    if axis in mesh.auto_axes and count % size == 0:
      axes += (axis,)
  return axes


def by_sequence(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of arrays [B, ...], device by device where XLA divides them.

  XLA cannot divide a kernel, and does not divide every `top_k`.  Sequences that
  not all devices can share are computed by several of them.
  """

  def divided(*arrays):
    auto = jax.sharding.get_abstract_mesh().auto_axes
    if not auto:
      return function(*arrays)
    spec = PartitionSpec(sequence_axes(arrays[0].shape[0]))
    return jax.shard_map(
      function,
      in_specs=spec,
      out_specs=spec,
      axis_names=set(auto),
      check_vma=False,
    )(*arrays)

  return divided


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
  """A device's part by `have` to its part by `want`, which divides less."""
  for dim, axes in _extra(have, want):
    x = all_gather(x, axes, dim)
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def collect(copy: Copy, have: PartitionSpec, want: PartitionSpec) -> jax.Array:
  """`gather` of the values, as float32: for layers a master weight like others.

  Who casts it to the compute dtype again gets the copy itself.  The derivative
  is the matching reduce-scatter, in float32, to the slot.
  """
  return gather(copy.values, have, want).astype(jnp.float32)


def _collect_fwd(copy, have, want):
  return collect(copy, have, want), None


def _collect_bwd(have, want, _, gradient):
  return (Copy(None, _scatter(gradient, want, have)),)


collect.defvjp(_collect_fwd, _collect_bwd)


def widen(params: Any, slots: Any) -> Any:
  """`collect` of what is whole already."""
  whole = PartitionSpec()
  return jax.tree.map(
    lambda x, slot: collect(Copy(x, slot), whole, whole), params, slots
  )


def _scatter(
  gradient: jax.Array, have: PartitionSpec, want: PartitionSpec
) -> jax.Array:
  """This device's part by `want` of the sum of all devices' parts by `have`."""
  for dim, axes in _extra(want, have):
    gradient = psum_scatter(gradient, axes, dim)
  return gradient


def reduce(
  gradient: jax.Array, have: PartitionSpec, want: PartitionSpec
) -> jax.Array:
  """Sums the devices' gradients of one parameter.

  Args:
    gradient: of this device's sequences, with respect to its part by `have`.
    have: its axes are already summed over, by the derivative of `collect` and
      of the experts' all-to-all.
    want: divides more than `have`.

  Returns:
    This device's part by `want` of the sum over the whole batch.
  """
  gradient = _scatter(gradient, have, want)
  done = {axis for entry in want for axis in rules.axes_of(entry)}
  rest = tuple(axis for axis in shards(rules.BATCH) if axis not in done)
  return lax.psum(gradient, rest) if rest else gradient


def all_gather(
  x: jax.Array, axes: str | tuple[str, ...], dim: int
) -> jax.Array:
  """Puts all devices' `x` in a row along `dim`."""
  if not _reduces_through_gloo():
    return lax.all_gather(x, axes, axis=dim, tiled=True)
  copies = jnp.broadcast_to(x, (lax.axis_size(axes), *x.shape))
  parts = lax.all_to_all(copies, axes, 0, 0, tiled=True)
  return lax.collapse(jnp.moveaxis(parts, 0, dim), dim, dim + 2)


def psum_scatter(
  x: jax.Array, axes: str | tuple[str, ...], dim: int
) -> jax.Array:
  """This device's part, along `dim`, of the sum of all devices' `x`."""
  if not _reduces_through_gloo():
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
  n = lax.axis_size(axes)
  shape = (*x.shape[:dim], n, x.shape[dim] // n, *x.shape[dim + 1 :])
  parts = jnp.moveaxis(x.reshape(shape), dim, 0)
  return lax.all_to_all(parts, axes, 0, 0, tiled=True).sum(0)


def _reduces_through_gloo():
  """Whether lax.psum_scatter is not to be trusted: of processes on CPUs.

  Gloo overwrites what it is still sending, if that is megabytes, and so sums
  wrong numbers in silence (jax-ml/jax issue 40830; here in 4 of 96 sums).  An
  all-to-all moves the same bytes.
  """
  return jax.distributed.is_initialized() and on_cpu()


def _extra(
  more: PartitionSpec, fewer: PartitionSpec
) -> Iterator[tuple[int, tuple[str, ...]]]:
  """(dimension, axes) that divide by `more` and not by `fewer`."""
  for dim, (a, b) in enumerate(zip(more, fewer)):
    a, b = rules.axes_of(a), rules.axes_of(b)
    assert a[: len(b)] == b, (more, fewer)
    if len(a) > len(b):
      yield dim, a[len(b) :]
