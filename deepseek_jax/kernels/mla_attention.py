"""MLA's training attention, `ops.attention.attend`, on Hopper (V3 2.1.1).

The structure is that of FlashAttention-3 (arXiv 2407.08608): one warpgroup
feeds shared memory by TMA, two compute 64 rows each and take turns, so that one
does its softmax while the other has the tensor cores.  Queries and keys are
cut into pieces [U | H - U] of the head width; so the output is staged where
the first piece of the queries was, and 192/128 fits.

Blocks above the diagonal are not visited.  With documents, neither are blocks
whose ranges of segment ids do not meet, and only blocks at the edge of a
document, or on the diagonal, are masked at all.  Rows beyond T are zeros that
TMA fills in: they give zero gradients, and their results are cut off.

The backward is two kernels, one for dq and one for dk and dv, each of which
computes the scores again: 9 products instead of 7, but no atomic sums, and so
the same gradients to the bit in every run.

Shared memory and registers at 192/128, of 232,448 bytes and, after the
producer gave up its own, 240 registers a thread (accumulators in brackets):

  forward   q 48 K, 2 stages of k 48 K and v 32 K: 208 KiB  (64 + 64 = 128)
  dq        q 48 K, do 32 K, 3 stages of k 24 K and v 16 K: 200 KiB
            (96 + 32 + 32 = 160)
  dk, dv    k 48 K, v 32 K, 4 stages of q 12 K and do 8 K: 160 KiB
            (96 + 64 + 16 + 16 = 192: why its query blocks have 32 rows)

Ready-made kernels: tokamax's Mosaic attention takes unequal widths too, with
493 TFLOP/s forward and 294 backward on an H100 in its own tuning table;
`jax.nn`'s cuDNN refuses them; jax's `attention_mgpu` has equal widths only and
no causal backward.  `experiments/gpu_check.py` times this one beside them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, mosaic, registers
from deepseek_jax.ops import attention
from deepseek_jax.ops.fp8_recipe import Kept
from deepseek_jax.ops.quantize import Packed, Quantized

_TILE = 128  # Rows of a block: two warpgroups of 64.
_ROWS = 64
_FORWARD_STAGES = 2
_DQ_KEYS, _DQ_STAGES = 64, 3
_DKV_QUERIES, _DKV_STAGES = 32, 4
# A running maximum starts here, and not at the -inf of what is masked: a row
# that sees nothing of a block then gets zeros, and no -inf + inf.
_LOWEST = -1e30
_LOG2E = math.log2(math.e)


class _Shape(NamedTuple):
  """Sizes of one call.

  Attributes:
    B: batch.
    T: positions, as given.
    N: heads.
    H: width of queries and keys.
    U: width of values.
    dtype: of the operands.
    documents: whether segments are given.
    scale: of the scores.
  """

  B: int
  T: int
  N: int
  H: int
  U: int
  dtype: Any
  documents: bool
  scale: float

  @property
  def pieces(self) -> tuple[int, ...]:
    """Widths that queries and keys are cut into."""
    return (self.U, self.H - self.U) if self.H > self.U else (self.U,)

  @property
  def tiles(self) -> int:
    """Blocks of `_TILE` rows."""
    return -(-self.T // _TILE)

  def padded(self, width: int) -> jax.ShapeDtypeStruct:
    """[B, T, N, width], T filled up to whole blocks."""
    shape = (self.B, self.tiles * _TILE, self.N, width)
    return jax.ShapeDtypeStruct(shape, self.dtype)

  @property
  def per_query(self) -> jax.ShapeDtypeStruct:
    """[B, N, T] float32, T filled up likewise."""
    shape = (self.B, self.N, self.tiles * _TILE)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def obstacles(
  q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNU: jax.Array, scale: float
) -> list[str]:
  """Why the kernel cannot take these arguments."""
  found = []
  dtypes = {x.dtype.name for x in (q_BTNH, k_BTNH, v_BTNU)}
  if dtypes not in ({'bfloat16'}, {'float16'}):
    found.append(f'dtypes {sorted(dtypes)}, not bfloat16 or float16')
  H, U = q_BTNH.shape[-1], v_BTNU.shape[-1]
  if H % 64 or U % 64 or not U <= H <= 192 or U > 128:
    found.append(
      f'widths {H} and {U} are not multiples of 64 with {U} <= {H} <= 192 '
      'and the second at most 128'
    )
  if q_BTNH.shape != k_BTNH.shape:
    found.append(f'queries {q_BTNH.shape} and keys {k_BTNH.shape} differ')
  if scale <= 0:
    found.append(f'scale {scale} is not above 0')
  return found


def attend(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNU: jax.Array,
  scale: float,
  segments_BT: jax.Array | None = None,
  keep: Kept | None = None,
  *,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, Quantized | Packed]:
  """`ops.attention.attend`, by the kernel where it can run."""
  arguments = (q_BTNH, k_BTNH, v_BTNU, scale, segments_BT, keep)
  found = obstacles(*arguments[:4])
  operands = arguments[:3]
  choice = dispatch.choose(implementation, found, 'attention', *operands)
  if not choice.is_kernel:
    return attention.attend(*arguments)
  out, kept = _attend(*arguments)
  return out if keep is None else (out, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def _attend(q, k, v, scale, segments, keep):
  """The output, and what is kept of it: itself, or its codes."""
  return _attend_fwd(q, k, v, scale, segments, keep)[0]


def _attend_fwd(q, k, v, scale, segments, keep):
  s = _shape(q, v, scale, segments)
  out, lse = _forward(s, *map(_eights, (q, k, v)), *_masks(s, segments))
  out = out[:, : s.T]
  kept = out if keep is None else attention.encode(out, keep)
  kept = checkpoint_name(kept, 'attn_out')
  lse = checkpoint_name(lse, 'attn_lse')
  out = kept if keep is None else out
  return (out, kept), (q, k, v, segments, kept, lse)


def _attend_bwd(scale, keep, residuals, cotangents):
  del keep  # What is kept says it.
  q, k, v, segments, kept, lse = residuals
  s, dout = _shape(q, v, scale, segments), cotangents[0]
  out = attention.decode(kept, dout.shape)
  delta = jnp.einsum(
    'BTNU,BTNU->BNT', *(x.astype(jnp.float32) for x in (dout, out))
  )
  # Zero where TMA gives zeros for the gradient of the output.
  missing = s.tiles * _TILE - s.T
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, missing)))
  operands = map(_eights, (q, k, v, dout.astype(q.dtype)))
  arrays = (*operands, lse, delta, *_masks(s, segments))
  dq = _dq(s, *arrays)
  dk, dv = _dkv(s, *arrays)
  return (*(x[:, : s.T] for x in (dq, dk, dv)), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _eights(x):
  """[B, T, ...] with T a multiple of 8, of which TMA's tiles are made."""
  missing = -x.shape[1] % 8
  if not missing:
    return x
  return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def _shape(q, v, scale, segments):
  B, T, N, H = q.shape
  return _Shape(B, T, N, H, v.shape[-1], q.dtype, segments is not None, scale)


def _masks(s: _Shape, segments_BT):
  """Segments of whole blocks, and which blocks see which; nothing without.

  The latter is int32 [B, tiles, 4]: of a block of queries, the first block of
  keys that any of them can see, and the first from which on all before the
  diagonal are of the queries' one document; of a block of keys, the same
  seen from the end: the first block of queries that has others than its one
  document, and the end of those that can see it.
  """
  if segments_BT is None:
    return ()
  missing = s.tiles * _TILE - s.T
  segments = jnp.pad(
    segments_BT.astype(jnp.int32), ((0, 0), (0, missing)), mode='edge'
  )
  blocks = segments.reshape(s.B, s.tiles, _TILE)
  low, high = blocks.min(-1), blocks.max(-1)
  meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
  same = meet & (low == high)[:, :, None] & (low == high)[:, None]
  i, j = jnp.arange(s.tiles)[:, None], jnp.arange(s.tiles)
  first = jnp.where(meet, j, s.tiles).min(2)
  whole = jnp.where(same | (j >= i), 0, j + 1).max(2)
  same_until = jnp.where(same | (i <= j), s.tiles, i).min(1)
  end = jnp.where(meet, i + 1, 0).max(1)
  extents = jnp.stack([first, whole, same_until, end], -1).astype(jnp.int32)
  return segments, extents


def _pieces(s: _Shape, rows: int, buffers: int, most: int = 128):
  return [
    mosaic.tile(rows, width, s.dtype, buffers=(buffers,), most=most)
    for width in s.pieces
  ]


def _copy_pieces(gmem, index, smems, slot, barrier):
  """Columns of `gmem.at[index]` into the pieces' buffer `slot`."""
  column = 0
  for smem in smems:
    width = smem.shape[-1]
    source = gmem.at[(*index, pl.ds(column, width))]
    plgpu.copy_gmem_to_smem(source, smem.at[slot], barrier)
    column += width


def _store_pieces(values, smems, slot, gmem, index):
  """Registers by way of shared memory to columns of `gmem.at[index]`."""
  for value, smem in zip(values, smems):
    smem.at[slot][...] = value.astype(smem.dtype)
  plgpu.commit_smem()
  column = 0
  for smem in smems:
    width = smem.shape[-1]
    target = gmem.at[(*index, pl.ds(column, width))]
    plgpu.copy_smem_to_gmem(smem.at[slot], target)
    column += width


def _feed(count, stages, loads):
  """The producer's loop: `loads` are (its free barriers, load(i, slot))."""
  plgpu.set_max_registers(24, action='decrease')

  def step(i, _):
    slot = lax.rem(i, jnp.int32(stages))
    for free, load in loads:

      @pl.when(i >= stages)
      def _(free=free):
        plgpu.barrier_wait(free.at[slot])

      load(i, slot)

  lax.fori_loop(0, count, step, None)
  for slot in range(stages):  # No completion may go unobserved.

    @pl.when(slot < count)
    def _(slot=slot):
      for free, _ in loads:
        plgpu.barrier_wait(free.at[slot])


def _mask(scores, first_row, first_column, by_row, by_column, diagonal, wide):
  """Scores that may not be seen are lost.

  Args:
    scores: a tile; queries are its rows, or, unless `wide`, its columns.
    first_row: position of row 0.
    first_column: of column 0.
    by_row: segments of the rows, or None.
    by_column: of the columns.
    diagonal: whether positions are compared.
    wide: see `scores`.
  """
  shape, visible = scores.shape, None
  if diagonal:
    ahead = registers.iota(shape, 0) - registers.iota(shape, 1)
    limit = first_column - first_row
    visible = ahead >= limit if wide else ahead <= limit
  if by_row is not None:
    rows = registers.spread(by_row, shape, 0)
    same = rows == registers.spread(by_column, shape, 1)
    visible = same if visible is None else visible & same
  lost = registers.full(shape, -jnp.inf, registers.TILE)
  return lax.select(visible, scores, lost)


def _in_turns(turn):
  plgpu.barrier_arrive(turn)
  plgpu.barrier_wait(turn)


@mosaic.traced_once
def _forward(s: _Shape, *arrays):
  """Output and logsumexp, both of whole blocks."""
  stages, factor = _FORWARD_STAGES, s.scale * _LOG2E
  arrivals = len(s.pieces) + s.documents

  def body(q, k, v, *refs, q_mem, k_mem, v_mem, lse_mem, seg_mem, barriers):
    segments, extents = refs[:2] if s.documents else (None, None)
    out, lse = refs[-2:]
    q_full, k_full, v_full, k_free, v_free, turn = barriers
    b, head, wg = (lax.axis_index(name) for name in ('b', 'head', 'wg'))
    tile = s.tiles - 1 - lax.axis_index('tile')  # The longest first.
    first = extents[b, tile, 0] if s.documents else jnp.int32(0)
    whole = extents[b, tile, 1] if s.documents else first
    count = tile + 1 - first

    @pl.when(wg == 2)
    def _():
      for half in range(2):
        rows = pl.ds(tile * _TILE + half * _ROWS, _ROWS)
        _copy_pieces(q, (b, rows, head), q_mem, half, q_full.at[half])
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[0].at[half], q_full.at[half])

      def load_k(i, slot):
        rows = pl.ds((first + i) * _TILE, _TILE)
        _copy_pieces(k, (b, rows, head), k_mem, slot, k_full.at[slot])
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[1].at[slot], k_full.at[slot])

      def load_v(i, slot):
        rows = pl.ds((first + i) * _TILE, _TILE)
        source = v.at[b, rows, head]
        plgpu.copy_gmem_to_smem(source, v_mem.at[slot], v_full.at[slot])

      _feed(count, stages, [(k_free, load_k), (v_free, load_v)])

    @pl.when(wg < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      start = tile * _TILE + wg * _ROWS
      plgpu.barrier_wait(q_full.at[wg])
      q_segments = None
      if s.documents:
        q_segments = registers.load(seg_mem[0].at[wg], registers.PER_ROW)

      def step(i, carry, documents=False, diagonal=False):
        top, total, acc = carry
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_full.at[slot])
        [scores] = registers.multiply(
          [
            (x.at[wg], registers.transposed(y.at[slot]))
            for x, y in zip(q_mem, k_mem)
          ],
          issued=lambda: _in_turns(turn),
        )
        if documents:
          theirs = registers.load(seg_mem[1].at[slot], registers.PER_COLUMN)
        plgpu.barrier_arrive(k_free.at[slot])
        if documents or diagonal:
          mine, theirs = (q_segments, theirs) if documents else (None, None)
          column = (first + i) * _TILE
          scores = _mask(scores, start, column, mine, theirs, diagonal, True)
        new_top = jnp.maximum(top, scores.max(1) * factor)
        decay = jnp.exp2(top - new_top)
        probs = jnp.exp2(
          scores * factor - registers.spread(new_top, scores.shape, 0)
        )
        total = total * decay + probs.sum(1)
        acc = acc * registers.spread(decay, acc.shape, 0)
        probs = probs.astype(s.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        _in_turns(turn)
        [acc] = registers.multiply_add([acc], [(probs, v_mem.at[slot])])
        plgpu.barrier_arrive(v_free.at[slot])
        return new_top, total, acc

      carry = (
        registers.full((_ROWS,), _LOWEST, registers.PER_ROW),
        registers.full((_ROWS,), 0, registers.PER_ROW),
        registers.full((_ROWS, s.U), 0, registers.TILE),
      )
      pl.when(wg == 1)(lambda: _in_turns(turn))
      if s.documents:
        edge = functools.partial(step, documents=True)
        carry = lax.fori_loop(0, whole - first, edge, carry)
      carry = lax.fori_loop(whole - first, count - 1, step, carry)
      top, total, acc = step(count - 1, carry, s.documents, True)
      pl.when(wg == 0)(lambda: _in_turns(turn))
      acc = acc * registers.spread(1.0 / total, acc.shape, 0)
      rows = pl.ds(start, _ROWS)
      lse_mem.at[wg][...] = (top + jnp.log(total) * _LOG2E) / _LOG2E
      _store_pieces([acc], q_mem[:1], wg, out, (b, rows, head))
      plgpu.copy_smem_to_gmem(lse_mem.at[wg], lse.at[b, head, rows])
      plgpu.wait_smem_to_gmem(0)

  several = functools.partial(plgpu.Barrier, num_barriers=stages)
  return mosaic.launch(
    body,
    (s.padded(s.U), s.per_query),
    grid=(s.B, s.N, s.tiles),
    grid_names=('b', 'head', 'tile'),
    warpgroups=3,
    scratch={
      'q_mem': _pieces(s, _ROWS, 2),
      'k_mem': _pieces(s, _TILE, stages),
      'v_mem': mosaic.tile(_TILE, s.U, s.dtype, buffers=(stages,)),
      'lse_mem': plgpu.SMEM((2, _ROWS), jnp.float32),
      'seg_mem': _segment_memory(s, _ROWS, _TILE, stages),
      'barriers': [
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=2),
        several(num_arrivals=arrivals),
        several(),
        several(num_arrivals=2),
        several(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
      ],
    },
    lane=True,
    approx_math=True,
  )(*arrays)


def _segment_memory(s: _Shape, fixed: int, streamed: int, stages: int):
  """Of the two warpgroups' own rows, and of the blocks that pass by."""
  if not s.documents:
    return []
  return [
    plgpu.SMEM((2, fixed), jnp.int32),
    plgpu.SMEM((stages, streamed), jnp.int32),
  ]


@mosaic.traced_once
def _dq(s: _Shape, *arrays):
  """Gradient of the queries, of whole blocks."""
  keys, stages, factor = _DQ_KEYS, _DQ_STAGES, s.scale * _LOG2E
  per_tile = _TILE // keys
  arrivals = len(s.pieces) + s.documents

  def body(
    q, k, v, do, lse, delta, *refs, q_mem, do_mem, row_mem, k_mem, v_mem,
    seg_mem, barriers,
  ):  # fmt: skip
    segments, extents = refs[:2] if s.documents else (None, None)
    dq = refs[-1]
    own_full, k_full, v_full, k_free, v_free = barriers
    b, head, wg = (lax.axis_index(name) for name in ('b', 'head', 'wg'))
    tile = s.tiles - 1 - lax.axis_index('tile')
    first = extents[b, tile, 0] if s.documents else jnp.int32(0)
    whole = extents[b, tile, 1] if s.documents else first
    first, whole = first * per_tile, whole * per_tile
    count = (tile + 1) * per_tile - first

    @pl.when(wg == 2)
    def _():
      for half in range(2):
        rows = pl.ds(tile * _TILE + half * _ROWS, _ROWS)
        full = own_full.at[half]
        _copy_pieces(q, (b, rows, head), q_mem, half, full)
        plgpu.copy_gmem_to_smem(do.at[b, rows, head], do_mem.at[half], full)
        for source, smem in zip((lse, delta), row_mem):
          plgpu.copy_gmem_to_smem(source.at[b, head, rows], smem.at[half], full)
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[0].at[half], full)

      def load_k(i, slot):
        rows = pl.ds((first + i) * keys, keys)
        _copy_pieces(k, (b, rows, head), k_mem, slot, k_full.at[slot])
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[1].at[slot], k_full.at[slot])

      def load_v(i, slot):
        rows = pl.ds((first + i) * keys, keys)
        source = v.at[b, rows, head]
        plgpu.copy_gmem_to_smem(source, v_mem.at[slot], v_full.at[slot])

      _feed(count, stages, [(v_free, load_v), (k_free, load_k)])

    @pl.when(wg < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      start = tile * _TILE + wg * _ROWS
      plgpu.barrier_wait(own_full.at[wg])
      row_lse, row_delta = (
        registers.load(x.at[wg], registers.PER_ROW) for x in row_mem
      )
      row_lse = row_lse * _LOG2E
      mine = None
      if s.documents:
        mine = registers.load(seg_mem[0].at[wg], registers.PER_ROW)

      def step(i, sums, documents=False, diagonal=False):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[slot])
        scores, dprobs = registers.multiply(
          [
            (x.at[wg], registers.transposed(y.at[slot]))
            for x, y in zip(q_mem, k_mem)
          ],
          [(do_mem.at[wg], registers.transposed(v_mem.at[slot]))],
        )
        plgpu.barrier_arrive(v_free.at[slot])
        if documents or diagonal:
          theirs = None
          if documents:
            theirs = registers.load(seg_mem[1].at[slot], registers.PER_COLUMN)
          scores = _mask(
            scores, start, (first + i) * keys, mine if documents else None,
            theirs, diagonal, True,
          )  # fmt: skip
        shape = scores.shape
        probs = jnp.exp2(scores * factor - registers.spread(row_lse, shape, 0))
        dscores = probs * (dprobs - registers.spread(row_delta, shape, 0))
        dscores = dscores.astype(s.dtype)
        sums = registers.multiply_add(
          sums, *([(dscores, x.at[slot])] for x in k_mem)
        )
        plgpu.barrier_arrive(k_free.at[slot])
        return sums

      sums = [
        registers.full((_ROWS, width), 0, registers.TILE) for width in s.pieces
      ]
      if s.documents:
        edge = functools.partial(step, documents=True)
        sums = lax.fori_loop(0, whole - first, edge, sums)
      sums = lax.fori_loop(whole - first, count - per_tile, step, sums)
      for i in range(per_tile):
        sums = step(count - per_tile + i, sums, s.documents, True)
      sums = [total * s.scale for total in sums]
      rows = pl.ds(start, _ROWS)
      _store_pieces(sums, q_mem, wg, dq, (b, rows, head))
      plgpu.wait_smem_to_gmem(0)

  own = arrivals + 3  # Gradients of the output, and two vectors.
  several = functools.partial(plgpu.Barrier, num_barriers=stages)
  return mosaic.launch(
    body,
    s.padded(s.H),
    grid=(s.B, s.N, s.tiles),
    grid_names=('b', 'head', 'tile'),
    warpgroups=3,
    scratch={
      'q_mem': _pieces(s, _ROWS, 2),
      'do_mem': mosaic.tile(_ROWS, s.U, s.dtype, buffers=(2,)),
      'row_mem': [plgpu.SMEM((2, _ROWS), jnp.float32)] * 2,
      'k_mem': _pieces(s, keys, stages),
      'v_mem': mosaic.tile(keys, s.U, s.dtype, buffers=(stages,)),
      'seg_mem': _segment_memory(s, _ROWS, keys, stages),
      'barriers': [
        plgpu.Barrier(num_arrivals=own, num_barriers=2),
        several(num_arrivals=arrivals),
        several(),
        several(num_arrivals=2),
        several(num_arrivals=2),
      ],
    },
    lane=True,
    approx_math=True,
  )(*arrays)


@mosaic.traced_once
def _dkv(s: _Shape, *arrays):
  """Gradients of the keys and of the values, of whole blocks.

  Scores are transposed here: keys are rows, queries columns.
  """
  queries, stages, factor = _DKV_QUERIES, _DKV_STAGES, s.scale * _LOG2E
  per_tile = _TILE // queries
  arrivals = len(s.pieces) + 3 + s.documents

  def body(
    q, k, v, do, lse, delta, *refs, k_mem, v_mem, q_mem, do_mem, column_mem,
    seg_mem, barriers,
  ):  # fmt: skip
    segments, extents = refs[:2] if s.documents else (None, None)
    dk, dv = refs[-2:]
    own_full, full, free = barriers
    b, head, wg = (lax.axis_index(name) for name in ('b', 'head', 'wg'))
    tile = lax.axis_index('tile')
    whole = extents[b, tile, 2] if s.documents else jnp.int32(s.tiles)
    end = extents[b, tile, 3] if s.documents else whole
    whole, count = (whole - tile) * per_tile, (end - tile) * per_tile

    @pl.when(wg == 2)
    def _():
      for half in range(2):
        rows = pl.ds(tile * _TILE + half * _ROWS, _ROWS)
        _copy_pieces(k, (b, rows, head), k_mem, half, own_full.at[half])
        source = v.at[b, rows, head]
        plgpu.copy_gmem_to_smem(source, v_mem.at[half], own_full.at[half])
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[0].at[half], own_full.at[half])

      def load(i, slot):
        rows = pl.ds(tile * _TILE + i * queries, queries)
        ready = full.at[slot]
        _copy_pieces(q, (b, rows, head), q_mem, slot, ready)
        plgpu.copy_gmem_to_smem(do.at[b, rows, head], do_mem.at[slot], ready)
        for source, smem in zip((lse, delta), column_mem):
          plgpu.copy_gmem_to_smem(
            source.at[b, head, rows], smem.at[slot], ready
          )
        if s.documents:
          own = segments.at[b, rows]
          plgpu.copy_gmem_to_smem(own, seg_mem[1].at[slot], ready)

      _feed(count, stages, [(free, load)])

    @pl.when(wg < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      start = tile * _TILE + wg * _ROWS
      plgpu.barrier_wait(own_full.at[wg])
      mine = None
      if s.documents:
        mine = registers.load(seg_mem[0].at[wg], registers.PER_ROW)

      def step(i, sums, documents=False, diagonal=False):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(full.at[slot])
        scores, dprobs = registers.multiply(
          [
            (x.at[wg], registers.transposed(y.at[slot]))
            for x, y in zip(k_mem, q_mem)
          ],
          [(v_mem.at[wg], registers.transposed(do_mem.at[slot]))],
        )
        if documents or diagonal:
          theirs = None
          if documents:
            theirs = registers.load(seg_mem[1].at[slot], registers.PER_COLUMN)
          scores = _mask(
            scores, start, tile * _TILE + i * queries,
            mine if documents else None, theirs, diagonal, False,
          )  # fmt: skip
        column_lse, column_delta = (
          registers.spread(
            registers.load(x.at[slot], registers.PER_COLUMN), scores.shape, 1
          )
          for x in column_mem
        )
        probs = jnp.exp2(scores * factor - column_lse * _LOG2E)
        dscores = (probs * (dprobs - column_delta)).astype(s.dtype)
        sums = registers.multiply_add(
          sums,
          *([(dscores, x.at[slot])] for x in q_mem),
          [(probs.astype(s.dtype), do_mem.at[slot])],
        )
        plgpu.barrier_arrive(free.at[slot])
        return sums

      sums = [
        registers.full((_ROWS, width), 0, registers.TILE)
        for width in (*s.pieces, s.U)
      ]
      for i in range(per_tile):
        sums = step(jnp.int32(i), sums, s.documents, True)
      sums = lax.fori_loop(per_tile, whole, step, sums)
      if s.documents:
        edge = functools.partial(step, documents=True)
        sums = lax.fori_loop(whole, count, edge, sums)
      rows = pl.ds(start, _ROWS)
      keys = [total * s.scale for total in sums[:-1]]
      _store_pieces(keys, k_mem, wg, dk, (b, rows, head))
      _store_pieces(sums[-1:], [v_mem], wg, dv, (b, rows, head))
      plgpu.wait_smem_to_gmem(0)

  # wgmma sums over whole swizzled pieces, and the queries are few.
  swizzle = queries * s.dtype.itemsize
  values = functools.partial(mosaic.tile, most=swizzle)
  return mosaic.launch(
    body,
    (s.padded(s.H), s.padded(s.U)),
    grid=(s.B, s.N, s.tiles),
    grid_names=('b', 'head', 'tile'),
    warpgroups=3,
    scratch={
      'k_mem': _pieces(s, _ROWS, 2, swizzle),
      'v_mem': values(_ROWS, s.U, s.dtype, buffers=(2,)),
      'q_mem': _pieces(s, queries, stages, swizzle),
      'do_mem': values(queries, s.U, s.dtype, buffers=(stages,)),
      'column_mem': [plgpu.SMEM((stages, queries), jnp.float32)] * 2,
      'seg_mem': _segment_memory(s, _ROWS, queries, stages),
      'barriers': [
        plgpu.Barrier(
          num_arrivals=len(s.pieces) + 1 + s.documents, num_barriers=2
        ),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      ],
    },
    lane=True,
    approx_math=True,
  )(*arrays)
