"""Kernels of `ops/grouped.py`: products of rows grouped by expert.

Choice: own kernels.  jax's `ragged_dot_mgpu` reaches about 45 % of the BF16
peak, its `transposed_ragged_dot_mgpu` (a weight gradient) 11 % (FACTS 7.4), and
neither takes FP8; `lax.ragged_dot` multiplies every row with every expert.
Here the groups are padded to 128, so that no tile has rows of two experts, and
nothing is masked.  FP8 goes to `fp8_gemm`.

BF16: a persistent block of three warpgroups, one for TMA and two that multiply
128 x 128 each, side by side: 128 accumulators a thread.  A stage of 64 of K is
48 KiB; 4 of them beside 32 KiB of bfloat16 results, 3 beside 64 KiB of float32.
A wgmma may run while the next is issued (`delay_release`).  16-bit operands may
lie along either axis: the weights of a backward product, and the rows of a
weight gradient, are read transposed, as they are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, fp8_gemm, fp8_matmul, mosaic
from deepseek_jax.ops import grouped as reference
from deepseek_jax.ops.fp8_matmul import Accumulation
from deepseek_jax.ops.grouped import Groups
from deepseek_jax.ops.quantize import (
  BLOCK,
  COLUMN_TILE,
  ROW_TILE,
  SQUARE_TILE,
  Quantized,
)

_ROWS, _COLUMNS, _STEP = 128, 256, 64
_HALF = 64  # Rows that are stored at a time.


def obstacles(x: jax.Array, y: jax.Array) -> list[str]:
  """Why the BF16 kernel does not multiply rows `x` with `y`."""
  found = []
  if not x.dtype == y.dtype == jnp.bfloat16:
    found.append(f'the operands are {x.dtype.name} and {y.dtype.name}')
  sizes = *x.shape[-2:], *y.shape[-2:]
  if any(size % 8 for size in sizes) or x.shape[0] % BLOCK:
    found.append(f'{x.shape} and {y.shape} are not multiples of 8')
  return found


def dot(
  x_RK: jax.Array,
  w_EKN: jax.Array,
  groups: Groups,
  turned: bool = False,
  dtype: Any = None,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.dot`; rows of blocks beyond the groups are not written.

  Args:
    x_RK: rows.
    w_EKN: weights.
    groups: of the rows.
    turned: the weights are given as [E, N, K]: those of the forward product in
      Dgrad.
    dtype: of the result; None: that of the rows.
    implementation: see `dispatch`.
  """
  pairs = [(x_RK, w_EKN)]
  return dots(pairs, groups, turned, dtype or x_RK.dtype, implementation)


def dots(
  pairs: Sequence[tuple[jax.Array, jax.Array]],
  groups: Groups,
  turned: bool,
  dtype: Any,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.dots` of pairs that are as large, else as `dot`.

  A stage has a share of K of each pair, in one accumulator.
  """
  (x_RK, w_EKN), *_ = pairs
  found = obstacles(x_RK, w_EKN)
  if len(pairs) > 1 and not turned:
    found.append('a stage of several pairs has 32 of K, too few across K')
  choice = dispatch.choose(implementation, found, 'grouped', x_RK, w_EKN)
  if not choice.is_kernel:
    pairs = [(x, w.mT if turned else w) for x, w in pairs]
    return reference.dots(pairs, groups, dtype)
  return _dots(pairs, groups, turned, dtype)


@mosaic.traced_once
def _dots(pairs, groups, turned, dtype):
  (x_RK, w_EKN), *_ = pairs
  R, K = x_RK.shape
  N = w_EKN.shape[1 if turned else 2]
  length = _STEP // len(pairs)
  block = (_COLUMNS, length) if turned else (length, _COLUMNS)
  rows, columns = -(-R // _ROWS), -(-N // _COLUMNS)

  def body(*refs):
    *operands, expert_B, count, o = refs
    pairs = list(zip(operands[::2], operands[1::2]))

    def run(index, multiply):
      mi = lax.div(index, jnp.int32(columns))
      ni = lax.rem(index, jnp.int32(columns))
      here, there = pl.ds(mi * _ROWS, _ROWS), pl.ds(ni * _COLUMNS, _COLUMNS)
      streams = []
      for x, w in pairs:
        weight = w.at[expert_B[mi]]
        weight = weight.at[there] if turned else weight.at[:, there]
        streams += [x.at[here], weight]
      multiply(streams, o.at[here, there], -(-K // length))

    specs = [
      ((_ROWS, length), lambda k: (0, k)),
      (block, (lambda k: (0, k)) if turned else (lambda k: (k, 0))),
    ] * len(pairs)
    like = [ref for x, w in pairs for ref in (x, w.at[0])]
    a = (False, turned)
    _persistent(run, count[0] * columns, specs, a, like, o.dtype)

  return mosaic.launch(
    body,
    jax.ShapeDtypeStruct((R, N), dtype),
    grid=(mosaic.processors(rows * columns),),
    grid_names=('sm',),
    warpgroups=3,
  )(*(v for pair in pairs for v in pair), groups.expert_B, groups.count)


def outer(
  x_RM: jax.Array,
  y_RN: jax.Array,
  groups: Groups,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.outer`."""
  found = obstacles(x_RM, y_RN)
  choice = dispatch.choose(implementation, found, 'grouped wgrad', x_RM, y_RN)
  if not choice.is_kernel:
    return reference.outer(x_RM, y_RN, groups)
  return _outer(x_RM, y_RN, groups)


@mosaic.traced_once
def _outer(x_RM, y_RN, groups):
  M, N, E = x_RM.shape[1], y_RN.shape[1], groups.first_E.size
  grid = -(-M // _ROWS), -(-N // _COLUMNS)

  def body(x, y, first_E, blocks_E, o):
    def run(index, multiply):
      area = jnp.int32(grid[0] * grid[1])
      e = lax.div(index, area)
      mi, ni = mosaic.snake(lax.rem(index, area), *grid)
      at = e, pl.ds(mi * _ROWS, _ROWS), pl.ds(ni * _COLUMNS, _COLUMNS)
      steps = blocks_E[e] * (BLOCK // _STEP)
      first = first_E[e] * (BLOCK // _STEP)
      operands = x.at[:, at[1]], y.at[:, at[2]]
      multiply(operands, o.at[at], steps, first)

    specs = [
      ((_STEP, _ROWS), lambda k: (k, 0)),
      ((_STEP, _COLUMNS), lambda k: (k, 0)),
    ]
    _persistent(
      run, E * grid[0] * grid[1], specs, (True, False), (x, y), o.dtype
    )

  return mosaic.launch(
    body,
    jax.ShapeDtypeStruct((E, M, N), jnp.float32),
    grid=(mosaic.processors(E * grid[0] * grid[1]),),
    grid_names=('sm',),
    warpgroups=3,
  )(x_RM, y_RN, groups.first_E, groups.blocks_E)


def _persistent(run, tiles, specs, turned, like, dtype):
  """Within a kernel: `run(index, multiply)` for the tiles of this block.

  `multiply(operands, target, steps, first)` forms one tile: the sum over
  `steps` of K from step `first`, and over the pairs of operands.

  Args:
    run: calls `multiply` once.
    tiles: how many there are.
    specs: (block, index of step k) of the operands, a and b of each pair.
    turned: whether an a and a b lie across K: [K, M] of a, [N, K] of b.
    like: operands whose types the stages have.
    dtype: of the result.
  """
  size = jnp.dtype(dtype).itemsize
  stages = 4 if size == 2 else 3

  def make_pipeline(step, context, steps, first=0):
    def shifted(index_map):
      return lambda k: index_map(first + k)

    return plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      memory_registers=40,
      in_specs=[
        plgpu.BlockSpec(
          block,
          shifted(index_map),
          transforms=mosaic.swizzle(block[1], jnp.bfloat16),
          delay_release=1,
        )
        for block, index_map in specs
      ],
      wg_axis='wg',
      num_compute_wgs=2,
      max_concurrent_steps=stages,
      compute_context=context,
    )

  def nothing(*_):
    pass

  allocations = make_pipeline(nothing, nothing, 8).get_allocations(*like)

  @functools.partial(
    pl.run_scoped,
    allocations=allocations,
    o_smem=mosaic.tile(_HALF, BLOCK, dtype, buffers=(2,)),
    collective_axes='wg',
  )
  def _(allocations, o_smem):
    warpgroup = lax.axis_index('wg')
    half = pl.ds(warpgroup * BLOCK, BLOCK)

    def multiply(operands, target, steps, first=0):
      def step(_, *refs):
        *smem, accumulator = refs
        for a_smem, b_smem in zip(smem[::2], smem[1::2]):
          a = a_smem.T if turned[0] else a_smem
          b = b_smem.at[half].T if turned[1] else b_smem.at[:, half]
          plgpu.wgmma(accumulator, a, b)
        plgpu.wgmma_wait(len(smem) // 2)  # For those of the step before.
        return accumulator

      def context(run_pipeline):
        def scope(accumulator):
          run_pipeline(accumulator)
          return accumulator[...]

        total = pl.run_scoped(scope, plgpu.ACC((_ROWS, BLOCK), jnp.float32))
        mine = o_smem.at[warpgroup]
        for row in range(0, _ROWS, _HALF):
          part, at = total[row : row + _HALF], (pl.ds(row, _HALF), half)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          mine[...] = part.astype(dtype)
          mosaic.store(mine, target.at[at])

      make_pipeline(step, context, steps, first)(
        *operands, allocations=allocations
      )

    mosaic.for_each(tiles)(lambda index: run(index, multiply))
    plgpu.wait_smem_to_gmem(0)


def fp8_dot(
  x_RK: Quantized,
  w_EKN: Quantized,
  groups: Groups,
  dtype: Any = jnp.float32,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.fp8_dot`; rows of blocks beyond the groups are not written.

  The weights are read as [E, N, K]: see `fp8_matmul.dot`.
  """
  return fp8_dots([(x_RK, w_EKN)], groups, dtype, implementation)


def fp8_dots(
  pairs: Sequence[tuple[Quantized, Quantized]],
  groups: Groups,
  dtype: Any,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.fp8_dots` of pairs that are as large, else as `fp8_dot`."""
  (x_RK, w_EKN), *_ = pairs
  found = fp8_matmul.obstacles(x_RK, w_EKN, Accumulation())
  if (x_RK.tile, w_EKN.tile) != (ROW_TILE, SQUARE_TILE):
    found.append(f'the tiles are {x_RK.tile} and {w_EKN.tile}')
  choice = dispatch.choose(implementation, found, 'fp8 grouped', x_RK, w_EKN)
  if not choice.is_kernel:
    return reference.fp8_dots(pairs, groups, dtype)
  first, *more = (
    (x.codes, w.codes.mT, x.scales.mT, w.scales.mT) for x, w in pairs
  )
  experts = fp8_gemm.Experts(groups.expert_B, groups.count)
  return fp8_gemm.multiply(*first, dtype=dtype, groups=experts, more=more)


def fp8_outer(
  x_RM: Quantized,
  y_RN: Quantized,
  groups: Groups,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.grouped.fp8_outer`."""
  found = fp8_matmul.obstacles(x_RM.mT, y_RN, Accumulation())
  if y_RN.tile != COLUMN_TILE:
    found.append(f'the tiles are {x_RM.tile} and {y_RN.tile}')
  choice = dispatch.choose(
    implementation, found, 'fp8 grouped wgrad', x_RM, y_RN
  )
  if not choice.is_kernel:
    return reference.fp8_outer(x_RM, y_RN, groups)
  return fp8_gemm.multiply(
    x_RM.codes.mT,
    y_RN.codes.mT[None],
    x_RM.scales,
    y_RN.scales,
    dtype=jnp.float32,
    groups=fp8_gemm.Segments(groups.first_E, groups.blocks_E),
  )
