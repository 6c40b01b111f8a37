"""Products and loads in the register layout of Hopper's wgmma.

A warpgroup holds a [64, n] float32 tile so that row r and its neighbours lie in
one warp; what is reduced over columns, or over rows, has the layout that is
left.  The interpreter knows neither layouts nor operands in registers, so there
the same functions are `jnp` on what the references hold.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import mosaic

TILE = plgpu.Layout.WGMMA  # [64, n]
PER_ROW = TILE.reduce(1)  # [64]
PER_COLUMN = TILE.reduce(0)  # [n]

# Operands of one product, summed: left [m, k] in shared memory or registers,
# right [k, n] in shared memory.
Pairs = list[tuple[Any, Any]]


def transposed(ref: Any) -> Any:
  """[n, k] in shared memory, read as [k, n]."""
  if mosaic.is_interpreted():
    return ref[...].T
  return plgpu.transpose_ref(ref, (1, 0))


def multiply(
  *products: Pairs, issued: Callable[[], None] = lambda: None
) -> list[jax.Array]:
  """Products of pairs, each summed over its pairs, in float32.

  All are issued before the first is waited for.

  Args:
    *products: pairs of operands.
    issued: runs between the two.
  """
  if mosaic.is_interpreted():
    issued()
    return [_sum(pairs) for pairs in products]

  def run(*accumulators):
    for accumulator, pairs in zip(accumulators, products):
      for left, right in pairs:
        plgpu.wgmma(accumulator, left, right)
    issued()
    return [accumulator[...] for accumulator in accumulators]

  shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in products]
  return pl.run_scoped(run, *(plgpu.ACC(s, jnp.float32) for s in shapes))


def multiply_add(sums: list[jax.Array], *products: Pairs) -> list[jax.Array]:
  """`sums` plus the products, added up in the registers of `sums`."""
  if mosaic.is_interpreted():
    return [total + _sum(pairs) for total, pairs in zip(sums, products)]

  def run(accumulators):
    for accumulator, pairs in zip(accumulators, products):
      for left, right in pairs:
        plgpu.wgmma(accumulator, left, right)

  return pl.run_state(run)([plgpu.ACC.init(total) for total in sums])


def _sum(pairs):
  return sum(
    jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
    for left, right in pairs
  )


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
  """A float32 constant."""
  return _cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
  """Indices of a tile along `axis`."""
  return _cast(jax.lax.broadcasted_iota(jnp.int32, shape, axis), TILE)


def load(ref: Any, layout: Any) -> jax.Array:
  """A vector in shared memory."""
  if mosaic.is_interpreted():
    return ref[...]
  return mosaic.load(ref, layout)


def _cast(x, layout):
  return x if mosaic.is_interpreted() else plgpu.layout_cast(x, layout)


def spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
  """A vector per row (`axis=0`) or per column (1), as a tile."""
  return jax.lax.broadcast_in_dim(x, shape, [axis])
