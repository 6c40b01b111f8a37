"""MLA's decoding on Hopper: `ops.cached_attention.attend_latents` (V3 2.1.1).

Every query row (a head of a token) attends to the same latents, 576 numbers a
key, whose first 512 are its value too: 1,152 bytes a key are read, once for 64
rows.  To fill 132 processors a sequence's keys are cut into splits, each of
which gives an output and a logsumexp, which XLA combines (flash-decoding).

One warpgroup feeds shared memory by TMA; two compute.  512 columns of output
for 64 rows are all of one warpgroup's registers, so each holds half of them,
and both compute the same scores: on Hopper that costs 1.5 times the products,
3,330 cycles for 64 keys where reading them takes 3,970 at 4.3 TB/s, and saves
every synchronisation between the two.  From 128 rows on (V3's heads on one
device) the products, and no longer the memory, are what takes the time.

  queries 72 K, 2 stages of 64 keys of 72 K: 216 KiB of 227
  registers: 128 of output and 32 of scores, of 240; ptxas spills ten

Nothing ready-made does this: tokamax's latent attention is for TPUs.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, few_rows, mosaic, registers
from deepseek_jax.ops import cached_attention

_ROWS = 64
_KEYS = 64
_STAGES = 2
_FEWEST = 4  # Blocks of keys that are worth a split.
_LOWEST = -1e30
_LOG2E = math.log2(math.e)


def obstacles(
  q_BTNX: jax.Array, cache_BSX: jax.Array, width: int, scale: float
) -> list[str]:
  """Why the kernel cannot take these arguments."""
  found = []
  dtypes = {x.dtype.name for x in (q_BTNX, cache_BSX)}
  if dtypes not in ({'bfloat16'}, {'float16'}):
    found.append(f'dtypes {sorted(dtypes)}, not bfloat16 or float16')
  X = cache_BSX.shape[-1]
  if width % 128 or not 0 < width <= 512 or (X - width) not in (64, 128):
    found.append(
      f'a cache row of {X} with values of {width}; the latter must be a '
      'multiple of 128 up to 512, with 64 more for the rotated key'
    )
  if q_BTNX.shape[2] % 8 or cache_BSX.shape[1] % 8:
    found.append(
      f'{q_BTNX.shape[2]} heads and {cache_BSX.shape[1]} positions are not '
      'both multiples of 8'
    )
  if scale <= 0:
    found.append(f'scale {scale} is not above 0')
  return found


def attend_latents(
  q_BTNX: jax.Array,
  cache_BSX: jax.Array,
  width: int,
  positions_BT: jax.Array,
  scale: float,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """`cached_attention.attend_latents`, by a kernel where one can run."""
  kernel, operands = dispatch.kernel_for(implementation), (q_BTNX, cache_BSX)
  if kernel == 'cpu':
    found = few_rows.obstacles(*operands)
  else:
    found = obstacles(*operands, width, scale)
  choice = dispatch.choose(
    implementation, found, 'decode', *operands, kernel=kernel
  )
  if choice.implementation != 'mosaic_gpu':
    on_cpu = choice.implementation == 'cpu'
    attend = few_rows if on_cpu else cached_attention
    return attend.attend_latents(*operands, width, positions_BT, scale)
  B, T, N, X = q_BTNX.shape
  rows = T * N
  tiles = -(-rows // _ROWS)
  blocks = -(-cache_BSX.shape[1] // _KEYS)
  processors = mosaic.processors(blocks * B * tiles)
  splits = max(1, min(blocks // _FEWEST, processors // (B * tiles)))
  out, lse = _splits(
    q_BTNX.reshape(B, rows, X), cache_BSX, width, positions_BT, scale, splits
  )
  out = _combine(out, lse)[:, :rows] if splits > 1 else out[:, 0, :rows]
  return out.reshape(B, T, N, width)


def _combine(out_BZRC, lse_BZR):
  """Averages the splits' outputs by how much of the softmax each had."""
  rows = out_BZRC.shape[2]
  lse_BZR = lse_BZR[..., :rows]
  weights = jax.nn.softmax(lse_BZR, axis=1)[..., None]
  # A split without a key wrote nothing; if none had one, all weigh alike.
  has_keys = (lse_BZR > 0.1 * _LOWEST)[..., None]
  parts = jnp.where(has_keys, out_BZRC.astype(jnp.float32), 0)
  return (weights * parts).sum(1).astype(out_BZRC.dtype)


def _visible(positions_BT, n_heads, S, tiles):
  """Last key that each row sees, [B, rows], and block counts, [B, tiles, 2].

  Of a tile: the blocks that all its rows see whole, and those that any sees.
  """
  last = jnp.repeat(jnp.minimum(positions_BT, S - 1), n_heads, axis=1)
  missing = tiles * _ROWS - last.shape[1]
  last = jnp.pad(last, ((0, 0), (0, missing)), mode='edge').astype(jnp.int32)
  per_tile = last.reshape(last.shape[0], tiles, _ROWS)
  whole = jnp.maximum(per_tile.min(-1) + 1, 0) // _KEYS
  some = jnp.maximum(per_tile.max(-1) // _KEYS + 1, 0)
  return last, jnp.stack([whole, some], -1).astype(jnp.int32)


@mosaic.traced_once
def _splits(q_BRX, cache_BSX, width, positions_BT, scale, splits):
  """Each split's output [B, splits, rows, width] and logsumexp.

  The outputs are rounded to the cache's dtype: half the bytes to combine.
  """
  B, R, X = q_BRX.shape
  S, tiles, half = cache_BSX.shape[1], -(-R // _ROWS), width // 2
  last, bounds = _visible(positions_BT, R // positions_BT.shape[1], S, tiles)
  factor = scale * _LOG2E
  dtype = cache_BSX.dtype

  def body(
    q, cache, last, bounds, out, lse, *, q_mem, q_pe_mem, kv_mem, pe_mem,
    last_mem, lse_mem, q_full, full, free, finished,
  ):  # fmt: skip
    wg, b, tile, split = (
      lax.axis_index(name) for name in ('wg', 'b', 'tile', 'split')
    )
    rows = pl.ds(tile * _ROWS, _ROWS)
    whole, some = bounds[b, tile, 0], bounds[b, tile, 1]
    share = lax.div(some + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(split * share, some)
    count = jnp.minimum(first + share, some) - first
    unmasked = jnp.clip(whole - first, 0, count)

    def fetch(source, index, slot, parts, rest, barrier):
      for part in range(2):
        columns = pl.ds(part * half, half)
        plgpu.copy_gmem_to_smem(
          source.at[(*index, columns)], parts.at[slot, part], barrier
        )
      columns = pl.ds(width, X - width)
      plgpu.copy_gmem_to_smem(
        source.at[(*index, columns)], rest.at[slot], barrier
      )

    @pl.when(wg == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')
      fetch(q, (b, rows), 0, q_mem, q_pe_mem, q_full)
      plgpu.copy_gmem_to_smem(last.at[b, rows], last_mem, q_full)

      def step(i, _):
        slot = lax.rem(i, jnp.int32(_STAGES))

        @pl.when(i >= _STAGES)
        def _():
          plgpu.barrier_wait(free.at[slot])

        keys = pl.ds((first + i) * _KEYS, _KEYS)
        fetch(cache, (b, keys), slot, kv_mem, pe_mem, full.at[slot])

      lax.fori_loop(0, count, step, None)
      for slot in range(_STAGES):

        @pl.when(slot < count)
        def _(slot=slot):
          plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      plgpu.barrier_wait(q_full)
      row_last = registers.load(last_mem, registers.PER_ROW)

      def step(i, carry, masked=False):
        top, total, acc = carry
        slot = lax.rem(i, jnp.int32(_STAGES))
        plgpu.barrier_wait(full.at[slot])
        pairs = [
          (q_mem.at[0, p], registers.transposed(kv_mem.at[slot, p]))
          for p in range(2)
        ]
        rest = (q_pe_mem.at[0], registers.transposed(pe_mem.at[slot]))
        [scores] = registers.multiply([*pairs, rest])
        if masked:
          shape = scores.shape
          key = registers.iota(shape, 1) + (first + i) * _KEYS
          seen = key <= registers.spread(row_last, shape, 0)
          lost = registers.full(shape, -jnp.inf, registers.TILE)
          scores = lax.select(seen, scores, lost)
        new_top = jnp.maximum(top, scores.max(1) * factor)
        decay = jnp.exp2(top - new_top)
        probs = jnp.exp2(
          scores * factor - registers.spread(new_top, scores.shape, 0)
        )
        total = total * decay + probs.sum(1)
        acc = acc * registers.spread(decay, acc.shape, 0)
        [acc] = registers.multiply_add(
          [acc], [(probs.astype(dtype), kv_mem.at[slot, wg])]
        )
        plgpu.barrier_arrive(free.at[slot])
        return new_top, total, acc

      carry = (
        registers.full((_ROWS,), _LOWEST, registers.PER_ROW),
        registers.full((_ROWS,), 0, registers.PER_ROW),
        registers.full((_ROWS, half), 0, registers.TILE),
      )
      carry = lax.fori_loop(0, unmasked, step, carry)

      def masked(i, carry):
        return step(i, carry, True)

      top, total, acc = lax.fori_loop(unmasked, count, masked, carry)
      # The other warpgroup may still read queries where this one writes.
      plgpu.barrier_arrive(finished)
      plgpu.barrier_wait(finished)
      floor = registers.full((_ROWS,), 1e-30, registers.PER_ROW)
      total = jnp.maximum(total, floor)  # Rows that saw no key give zero.
      acc = acc * registers.spread(1.0 / total, acc.shape, 0)
      q_mem.at[0, wg][...] = acc.astype(dtype)
      lse_mem.at[wg][...] = (top + jnp.log(total) * _LOG2E) / _LOG2E
      plgpu.commit_smem()

      @pl.when((count > 0) | (splits == 1))
      def _():
        columns = pl.ds(wg * half, half)
        plgpu.copy_smem_to_gmem(
          q_mem.at[0, wg], out.at[b, split, rows, columns]
        )

      @pl.when(wg == 0)
      def _():
        plgpu.copy_smem_to_gmem(lse_mem.at[0], lse.at[b, split, rows])

      plgpu.wait_smem_to_gmem(0)

  # TMA drops rows beyond the last; the interpreter wants room for them.
  kept = tiles * _ROWS if mosaic.is_interpreted() else R
  parts = (_STAGES, 2)
  return mosaic.launch(
    body,
    (
      jax.ShapeDtypeStruct((B, splits, kept, width), dtype),
      jax.ShapeDtypeStruct((B, splits, tiles * _ROWS), jnp.float32),
    ),
    grid=(B, splits, tiles),
    grid_names=('b', 'split', 'tile'),
    warpgroups=3,
    scratch={
      'q_mem': mosaic.tile(_ROWS, half, dtype, buffers=(1, 2)),
      'q_pe_mem': mosaic.tile(_ROWS, X - width, dtype, buffers=(1,)),
      'kv_mem': mosaic.tile(_KEYS, half, dtype, buffers=parts),
      'pe_mem': mosaic.tile(_KEYS, X - width, dtype, buffers=parts[:1]),
      'last_mem': plgpu.SMEM((_ROWS,), jnp.int32),
      'lse_mem': plgpu.SMEM((2, _ROWS), jnp.float32),
      'q_full': plgpu.Barrier(num_arrivals=4),
      'full': plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
      'finished': plgpu.Barrier(num_arrivals=2),
    },
    lane=True,
    approx_math=True,
  )(q_BRX, cache_BSX, last, bounds)
