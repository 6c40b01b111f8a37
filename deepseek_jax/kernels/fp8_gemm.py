"""The FP8 product behind `fp8_matmul` and `grouped`: scales, promotion, groups.

Structure (V3 section 3.3.2; DeepGEMM's published pattern).  A persistent block
of three warpgroups: one issues TMA copies, two multiply.  For each 128 of K a
multiplying warpgroup clears an accumulator of 64 x 128, adds four wgmmas to it,
reads it, and adds it times its scales to float32 registers: the promotion to
CUDA cores.  The two run out of step, one multiplying while the other promotes.

  wide    128 x 256: each warpgroup has all 128 rows (two accumulators, one
          after the other) and half of the columns.  Registers of a thread:
          128 sums, 64 accumulators.  A stage is 48.5 KiB; 4 of them, and 32 KiB
          for two bfloat16 results, are all that a block has.
  narrow  128 x 128: each has 64 rows.  64 sums, 64 accumulators, and 32 for the
          scales of the columns in a weight gradient.  33 KiB a stage.

An FP8 wgmma takes operands along K only: `b` is [N, K].  Rows and columns need
not divide: TMA reads zeros, and writes nothing, beyond an edge.  Along K its
tiles are whole ones, so that zeros are appended to codes, as to the 576 columns
of `wkv_a`'s output gradient: a copy, of megabytes.

Groups.  With `Experts`, row i of tiles is of expert `of_block[i]`, and only the
first `count` rows of tiles exist (groups of rows are padded to 128).  With
`Segments`, the result is one matrix for each expert, over its own stretch of K
(a weight gradient).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import mosaic

BLOCK = 128
_WAVE = 64  # Rows of a wgmma.


class Experts(NamedTuple):
  """Rows grouped by expert.

  Attributes:
    of_block: int32 [M / 128], the expert of each 128 rows.
    count: int32 [1], how many of those blocks hold rows.
  """

  of_block: jax.Array
  count: jax.Array


class Segments(NamedTuple):
  """K grouped by expert.

  Attributes:
    first: int32 [E], the first block of 128 of each.
    count: int32 [E], its number of blocks.
  """

  first: jax.Array
  count: jax.Array


class Shape(NamedTuple):
  """The tile of a block.

  Attributes:
    rows: 128.
    columns: 256 if wide.
    waves: wgmmas of 64 rows that a warpgroup does one after the other.
  """

  rows: int
  columns: int
  waves: int

  def place(self, warpgroup, wave: int):
    """First row and first column of a wave of a warpgroup."""
    if self.waves == 2:
      return wave * _WAVE, warpgroup * BLOCK
    return warpgroup * _WAVE, 0


WIDE, NARROW = Shape(128, 256, 2), Shape(128, 128, 1)


def best_shape(M: int, N: int, has_column_scales: bool) -> Shape:
  """The tile that leaves the fewest SMs without work; wide if both do."""
  if has_column_scales:
    return NARROW

  def cost(shape):
    tiles = -(-M // shape.rows) * -(-N // shape.columns)
    return -(-tiles // mosaic.processors(tiles)) * shape.columns

  return WIDE if cost(WIDE) <= cost(NARROW) else NARROW


@mosaic.traced_once
def multiply(
  a_MK: jax.Array,
  b_ENK: jax.Array,
  a_scales: jax.Array,
  b_scales: jax.Array,
  *,
  dtype: Any,
  groups: Experts | Segments | None = None,
  shape: Shape | None = None,
  more: Sequence[tuple[jax.Array, ...]] = (),
) -> jax.Array:
  """`a @ b^T` with scales: [M, N], or [E, M, N] for segments of K.

  Args:
    a_MK: E4M3 codes, or integers of the same bits.
    b_ENK: likewise; E is 1 if there are no experts or there are segments.
    a_scales: float32 [K / 128, M].
    b_scales: float32 [E, N / 128, K / 128], or [K / 128, N]: of each column.
    dtype: of the result.
    groups: see the module.
    shape: of the tile; None: the best.
    more: operands like the first four, whose products are added in float32.
  """
  pairs = [
    (*(_whole_blocks(v) for v in (a, b)), *scales)
    for a, b, *scales in ((a_MK, b_ENK, a_scales, b_scales), *more)
  ]
  M, K = pairs[0][0].shape
  N = b_ENK.shape[1]
  has_column_scales = b_scales.ndim == 2
  shape = shape or best_shape(M, N, has_column_scales)
  out = (M, N)
  if isinstance(groups, Segments):
    out = (groups.first.size, M, N)
  body = functools.partial(
    _body,
    shape=shape,
    groups=type(groups) if groups is not None else None,
    pairs=len(pairs),
    stages=_stages(shape, dtype, has_column_scales, K, len(pairs)),
  )
  tiles = -(-M // shape.rows) * -(-N // shape.columns)
  tiles *= out[0] if len(out) == 3 else 1
  return mosaic.launch(
    body,
    jax.ShapeDtypeStruct(out, dtype),
    grid=(mosaic.processors(tiles),),
    grid_names=('sm',),
    warpgroups=3,
  )(*itertools.chain(*pairs), *(groups or ()))


def _whole_blocks(codes: jax.Array) -> jax.Array:
  """E4M3, with zeros appended along the last axis, K, to a multiple of 128."""
  missing = -codes.shape[-1] % BLOCK
  if missing:
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
    codes = jnp.pad(codes, (*[(0, 0)] * (codes.ndim - 1), (0, missing)))
  return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)


def _stages(
  shape: Shape, dtype, has_column_scales: bool, K: int, pairs: int
) -> int:
  """Steps of K in flight: as many as fit beside the results, at most 6."""
  scales = shape.rows + shape.columns * has_column_scales
  stage = ((shape.rows + shape.columns) * BLOCK + 4 * scales) * pairs
  result = 2 * _WAVE * BLOCK * jnp.dtype(dtype).itemsize
  left = mosaic.SMEM_BYTES - result - 1024  # Barriers and alignment.
  return min(left // stage, 6, max(2, -(-K // BLOCK)))


def _body(*refs, shape, groups, pairs, stages):
  """The kernel of one block; `refs` as `multiply` gives them."""
  operands = [refs[4 * i : 4 * i + 4] for i in range(pairs)]
  *group_refs, o_gmem = refs[4 * pairs :]
  a, b, _, b_scales = operands[0]
  (M, K), N = a.shape, b.shape[1]
  rows, columns, waves = shape
  has_column_scales = len(b_scales.shape) == 2
  grid = -(-M // rows), -(-N // columns)

  def make_pipeline(step, context, first=0, steps=-(-K // BLOCK)):
    specs = [
      _operand((rows, BLOCK), lambda k: (0, first + k), a.dtype),
      _operand((columns, BLOCK), lambda k: (0, first + k), b.dtype),
      plgpu.BlockSpec((1, rows), lambda k: (first + k, 0)),
    ]
    if has_column_scales:
      specs.append(plgpu.BlockSpec((1, columns), lambda k: (first + k, 0)))
    specs *= pairs
    return plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      memory_registers=mosaic.producer_registers(),
      in_specs=specs,
      wg_axis='wg',
      num_compute_wgs=2,
      max_concurrent_steps=stages,
      compute_context=context,
    )

  def nothing(*_):
    pass

  streams = []
  for a, b, a_scales, b_scales in operands:
    streams += [a, b.at[0], a_scales] + [b_scales] * has_column_scales
  allocations = make_pipeline(nothing, nothing).get_allocations(*streams)

  @functools.partial(
    pl.run_scoped,
    allocations=allocations,
    o_smem=mosaic.tile(_WAVE, BLOCK, o_gmem.dtype, buffers=(2,)),
    collective_axes='wg',
  )
  def _(allocations, o_smem):
    warpgroup = lax.axis_index('wg')

    def tile(expert, mi, ni, first=0, steps=-(-K // BLOCK)):
      """One tile of the result; its operands are of `expert`."""
      is_segment = groups is Segments
      target = o_gmem.at[expert] if is_segment else o_gmem
      weight = 0 if is_segment else expert

      def step(k, *refs):
        *smem, totals = refs
        size = len(smem) // pairs
        for i, (*_, b_scales) in enumerate(operands):
          mine = smem[size * i : size * (i + 1)]
          totals = added(k, totals, b_scales, *mine)
        return totals

      def added(k, totals, b_scales, a_smem, b_smem, as_smem, *bs_smem):
        """`totals` and 128 of K of one pair."""
        new = []
        if not has_column_scales:  # One of all waves: see `Shape.place`.
          # Read here, it arrives while the products are formed.
          block = ni * (columns // BLOCK)
          block += shape.place(warpgroup, 0)[1] // BLOCK
          block = jnp.minimum(block, b_scales.shape[1] - 1)
          scale = b_scales[weight, block, k[0]]
        for wave in range(waves):
          row, column = shape.place(warpgroup, wave)
          if has_column_scales:
            scale = bs_smem[0][0, pl.ds(column, BLOCK)]
            scale = lax.broadcast_in_dim(scale, (_WAVE, BLOCK), (1,))
          partial = _products(
            a_smem.at[pl.ds(row, _WAVE)], b_smem.at[pl.ds(column, BLOCK)]
          )
          row_scale = as_smem[0, pl.ds(row, _WAVE)]
          if not has_column_scales:
            row_scale = row_scale * scale
          row_scale = lax.broadcast_in_dim(row_scale, partial.shape, (0,))
          if has_column_scales:
            row_scale = row_scale * scale
          new.append(totals[wave] + partial * row_scale)
        return tuple(new)

      def context(run):
        zeros = jnp.zeros((_WAVE, BLOCK), jnp.float32)
        totals = run((zeros,) * waves)
        for wave, total in enumerate(totals):
          row, column = shape.place(warpgroup, wave)
          at = (
            pl.ds(mi * rows + row, _WAVE),
            pl.ds(ni * columns + column, BLOCK),
          )
          mine = o_smem.at[warpgroup]
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          mine[...] = total.astype(o_gmem.dtype)
          mosaic.store(mine, target.at[at])

      here = pl.ds(mi * rows, rows)
      there = pl.ds(ni * columns, columns)
      streams = []
      for a, b, a_scales, b_scales in operands:
        streams += [a.at[here], b.at[weight].at[there], a_scales.at[:, here]]
        streams += [b_scales.at[:, there]] * has_column_scales
      make_pipeline(step, context, first, steps)(
        *streams, allocations=allocations
      )

    _for_each_tile(tile, groups, group_refs, grid, o_gmem.shape)
    plgpu.wait_smem_to_gmem(0)


def _for_each_tile(tile, groups, refs, grid, out_shape):
  """Calls `tile` for the tiles of this block."""
  if groups is Experts:
    of_block, count = refs

    @mosaic.for_each(count[0] * grid[1])
    def _(index):  # All columns of a row of tiles at about the same time.
      mi = lax.div(index, jnp.int32(grid[1]))
      tile(of_block[mi], mi, lax.rem(index, jnp.int32(grid[1])))

  elif groups is Segments:
    first, count = refs
    area = jnp.int32(grid[0] * grid[1])

    @mosaic.for_each(out_shape[0] * grid[0] * grid[1])
    def _(index):
      expert = lax.div(index, area)
      at = mosaic.snake(lax.rem(index, area), *grid)
      tile(expert, *at, first[expert], count[expert])

  else:

    @mosaic.for_each(grid[0] * grid[1])
    def _(index):
      tile(0, *mosaic.snake(index, *grid))


def _operand(block, index_map, dtype):
  transforms = mosaic.swizzle(block[1], dtype)
  return plgpu.BlockSpec(block, index_map, transforms=transforms)


def _products(a_smem, b_smem):
  """128 of K with a fresh accumulator: float32 [64, 128]."""

  def scope(accumulator):
    plgpu.wgmma(accumulator, a_smem, b_smem.T)
    plgpu.wgmma_wait(0)
    return accumulator[...]

  return pl.run_scoped(scope, plgpu.ACC((_WAVE, BLOCK), jnp.float32))
