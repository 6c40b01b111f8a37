"""Kernel of `ops.quantize.requantize` to 128 x 1 tiles: operands of Wgrad.

Choice: own kernel.  A weight gradient sums over tokens, and an FP8 wgmma reads
along the sum only: codes are turned on the way.  XLA reads the input twice and
transposes in a pass of its own.

A block takes 128 tokens of 64 channels.  What arrives as bfloat16 is copied to
shared memory as it is; FP8 codes are widened to bfloat16, which holds them
exactly, because only 16-bit tiles can be read transposed.  Then a row of
registers is a channel, a tile of 128 tokens lies in four lanes, and codes are
written along the tokens.  8 KiB of codes, 16 KiB of bfloat16, 8 KiB of results:
six or seven blocks share an SM, and one computes while others load.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, mosaic
from deepseek_jax.kernels import quantize as rows
from deepseek_jax.ops import quantize as reference
from deepseek_jax.ops.formats import E4M3, Format
from deepseek_jax.ops.quantize import (
  BLOCK,
  COLUMN_TILE,
  MIN_AMAX,
  ROW_TILE,
  Quantized,
)

_CHANNELS = 64  # Of a block.


def obstacles(
  x: jax.Array | Quantized, tile: tuple[int, int], fmt: Format, scale: str
) -> list[str]:
  """Why no kernel puts `x` [T, D] into tiles along the tokens."""
  found = []
  if tile != COLUMN_TILE:
    found.append(f'the tiles are {tile}, not {COLUMN_TILE}')
  if fmt != E4M3 or scale not in reference.SCALES:
    found.append(f'the codes are {fmt}, with scale={scale!r}')
  if isinstance(x, Quantized):
    if (x.fmt, x.tile) != (E4M3, ROW_TILE):
      found.append(f'the input is {x.fmt} in tiles {x.tile}')
    if not mosaic.turns_codes():
      found.append('jax before 0.11 finds no register layout for turned codes')
  elif x.dtype != jnp.bfloat16:
    found.append(f'the input is {x.dtype.name}, not bfloat16')
  if len(x.shape) != 2 or any(n % BLOCK or not n for n in x.shape):
    found.append(f'{x.shape} is not in blocks of {BLOCK} x {BLOCK}')
  return found


def requantize(
  q: Quantized,
  tile: tuple[int, int],
  fmt: Format = E4M3,
  scale: str = 'float32',
  min_amax: float = MIN_AMAX,
  implementation: str | None = None,
) -> Quantized:
  """`ops.quantize.requantize`."""
  found = obstacles(q, tile, fmt, scale)
  choice = dispatch.choose(implementation, found, 'fp8 turned', q)
  if not choice.is_kernel:
    return reference.requantize(q, tile, fmt, scale, min_amax)
  return _turn(q.codes, q.scales.mT, scale, min_amax)


def quantize(
  x: jax.Array,
  tile: tuple[int, int],
  fmt: Format = E4M3,
  scale: str = 'float32',
  amax: jax.Array | None = None,
  min_amax: float = MIN_AMAX,
  implementation: str | None = None,
) -> Quantized:
  """`ops.quantize.quantize`, in tiles along rows or along columns."""
  if tile != COLUMN_TILE:
    return rows.quantize(x, tile, fmt, scale, amax, min_amax, implementation)
  found = obstacles(x, tile, fmt, scale)
  if amax is not None:
    found.append('the magnitudes are given')
  choice = dispatch.choose(implementation, found, 'quantize turned', x)
  if not choice.is_kernel:
    return reference.quantize(x, tile, fmt, scale, amax, min_amax)
  return _turn(x, None, scale, min_amax)


@mosaic.traced_once
def _turn(x_TD, scales_ZT, scale, min_amax):
  T, D = x_TD.shape
  has_codes = scales_ZT is not None

  def body(*refs, x_smem, wide_smem, in_smem, c_smem, s_smem, barrier):
    *inputs, c_gmem, s_gmem = refs
    i, j = lax.axis_index('token'), lax.axis_index('channel')
    tokens, channels = pl.ds(i * BLOCK, BLOCK), pl.ds(j * _CHANNELS, _CHANNELS)
    to = x_smem if has_codes else wide_smem
    plgpu.copy_gmem_to_smem(inputs[0].at[tokens, channels], to, barrier)
    if has_codes:
      block = lax.div(j, jnp.int32(BLOCK // _CHANNELS))
      plgpu.copy_gmem_to_smem(inputs[1].at[block, tokens], in_smem, barrier)
    plgpu.barrier_wait(barrier)
    if has_codes:
      codes = plgpu.layout_cast(x_smem[...], plgpu.Layout.WGMMA)
      wide_smem[...] = codes.astype(jnp.float32).astype(jnp.bfloat16)
    value = plgpu.layout_cast(wide_smem.T[...], plgpu.Layout.WGMMA)
    value = value.astype(jnp.float32)
    if has_codes:
      value *= lax.broadcast_in_dim(in_smem[...], value.shape, (1,))
    c_smem[...], s_smem[...] = rows.encode(value, scale, min_amax)
    mosaic.store(c_smem, c_gmem.at[channels, tokens])
    mosaic.store(s_smem, s_gmem.at[i, channels])
    plgpu.wait_smem_to_gmem(0)

  unused = plgpu.SMEM((8,), jnp.float32)
  codes_smem = mosaic.tile(BLOCK, _CHANNELS, E4M3.dtype)
  codes, scales = mosaic.launch(
    body,
    (
      jax.ShapeDtypeStruct((D, T), E4M3.dtype),
      jax.ShapeDtypeStruct((T // BLOCK, D), jnp.float32),
    ),
    grid=(T // BLOCK, D // _CHANNELS),
    grid_names=('token', 'channel'),
    scratch={
      'x_smem': codes_smem if has_codes else unused,
      'wide_smem': mosaic.tile(BLOCK, _CHANNELS, jnp.bfloat16),
      'in_smem': plgpu.SMEM((BLOCK,), jnp.float32) if has_codes else unused,
      'c_smem': mosaic.tile(_CHANNELS, BLOCK, E4M3.dtype),
      's_smem': plgpu.SMEM((_CHANNELS,), jnp.float32),
      'barrier': plgpu.Barrier(num_arrivals=1 + has_codes),
    },
  )(x_TD, *([scales_ZT] if has_codes else []))
  return Quantized(codes.mT, scales, COLUMN_TILE, E4M3)
