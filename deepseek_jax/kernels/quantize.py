"""Kernels of `ops/quantize.py` and `ops/fused_quantize.py`: 1 x 128 tiles.

Choice: own kernels.  No release of jax, tokamax or cuDNN has one; XLA reads its
input twice, once for the magnitudes and once for the codes.

All are bound by memory.  A block of one warpgroup takes a tile of 64 rows, in
the register layout of wgmma, where a row lies in four lanes: the maximum of 128
columns is 31 local comparisons and two shuffles.  There is no pipeline within
a block: four or more blocks share an SM, and one computes while others load.

  quantize  64 x 256: 32 KiB in and 16 KiB out: 4 blocks an SM
  swiglu    64 x 128: 32 KiB in and 8 KiB out: 5 blocks an SM
  rms_norm  2 x D: whole rows, for their mean square; a warp takes a tile

Scales are written as [D / 128, T], which is what the products read; the
transposition that gives them their place in `Quantized` meets another there,
and XLA drops both.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, mosaic
from deepseek_jax.ops import fused_quantize
from deepseek_jax.ops import quantize as reference
from deepseek_jax.ops.formats import E4M3, Format
from deepseek_jax.ops.quantize import (
  BLOCK,
  MIN_AMAX,
  MIN_SCALE,
  ROW_TILE,
  Quantized,
)

_ROWS = 64
_NORM_ROWS = 2
_MANTISSA = 2**23 - 1
# [rows, 128] with a row to a warp, and 4 neighbours to a lane.
_ROW_TO_WARP = plgpu.Layout.TILED(
  plgpu.Tiling(((4, BLOCK), (4,))), (-3,), (-2,), -1
)


def obstacles(
  shape: tuple[int, ...], dtype, fmt: Format, scale: str
) -> list[str]:
  """Why no kernel quantises an array of `shape` in 1 x 128 tiles."""
  found = []
  if fmt != E4M3:
    found.append(f'the codes are {fmt}, not e4m3')
  if scale not in reference.SCALES:
    found.append(f'scale={scale!r} is unknown')
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
    found.append(f'the input is {jnp.dtype(dtype).name}')
  if len(shape) != 2:
    found.append(f'the input has {len(shape)} dimensions, not 2')
  elif shape[0] % _ROWS or shape[1] % BLOCK or not shape[0]:
    found.append(f'{shape} is not in tiles of {_ROWS} x {BLOCK}')
  return found


def quantize(
  x: jax.Array,
  tile: tuple[int, int],
  fmt: Format = E4M3,
  scale: str = 'float32',
  amax: jax.Array | None = None,
  min_amax: float = MIN_AMAX,
  implementation: str | None = None,
) -> Quantized:
  """`ops.quantize.quantize`."""
  found = obstacles(x.shape, x.dtype, fmt, scale)
  if tile != ROW_TILE:
    found.append(f'the tiles are {tile}, not {ROW_TILE}')
  if amax is not None:
    found.append('the magnitudes are given')
  choice = dispatch.choose(implementation, found, 'quantize', x)
  if not choice.is_kernel:
    return reference.quantize(x, tile, fmt, scale, amax, min_amax)
  return _rowwise(_unchanged, (x,), None, scale, min_amax)


def _unchanged(x, weight):
  del weight
  return x


def swiglu(
  gate_TF: jax.Array,
  up_TF: jax.Array,
  weights_T: jax.Array | None = None,
  fmt: Format = E4M3,
  scale: str = 'float32',
  implementation: str | None = None,
) -> Quantized:
  """`ops.fused_quantize.swiglu`."""
  found = obstacles(gate_TF.shape, gate_TF.dtype, fmt, scale)
  choice = dispatch.choose(implementation, found, 'swiglu, quantize', gate_TF)
  if not choice.is_kernel:
    return fused_quantize.swiglu(gate_TF, up_TF, weights_T, fmt, scale)
  return _rowwise(_swiglu, (gate_TF, up_TF), weights_T, scale)


def _swiglu(gate, up, weight):
  hidden = gate / (1.0 + jnp.exp(-gate)) * up
  return hidden if weight is None else hidden * weight


@mosaic.traced_once
def _rowwise(f, arrays, weights_T, scale, min_amax=MIN_AMAX):
  """Codes of `f(*tiles, weight of each row)`; `f` sees float32 [64, 128]."""
  T, D = arrays[0].shape
  dtype, n = arrays[0].dtype, len(arrays)
  width = 2 if n == 1 and D % (2 * BLOCK) == 0 else 1
  columns = width * BLOCK
  has_weights = weights_T is not None

  def body(*refs, x_smem, w_smem, c_smem, s_smem, barrier):
    *inputs, c_gmem, s_gmem = refs
    rows = pl.ds(lax.axis_index('row') * _ROWS, _ROWS)
    column = lax.axis_index('column')
    for i, x_gmem in enumerate(inputs[:n]):
      source = x_gmem.at[rows, pl.ds(column * columns, columns)]
      plgpu.copy_gmem_to_smem(source, x_smem.at[i], barrier)
    if has_weights:
      plgpu.copy_gmem_to_smem(inputs[n].at[rows], w_smem, barrier)
    plgpu.barrier_wait(barrier)
    weight = None
    if has_weights:
      weight = lax.broadcast_in_dim(w_smem[...], (_ROWS, BLOCK), (0,))
    for j in range(width):
      at = pl.ds(j * BLOCK, BLOCK)
      tiles = [x_smem[i, :, at].astype(jnp.float32) for i in range(n)]
      value = f(*tiles, weight).astype(dtype).astype(jnp.float32)
      c_smem[:, at], s_smem[j] = encode(value, scale, min_amax)
    mosaic.store(c_smem, c_gmem.at[rows, pl.ds(column * columns, columns)])
    mosaic.store(s_smem, s_gmem.at[pl.ds(column * width, width), rows])
    plgpu.wait_smem_to_gmem(0)

  codes, scales = mosaic.launch(
    body,
    (
      jax.ShapeDtypeStruct((T, D), E4M3.dtype),
      jax.ShapeDtypeStruct((D // BLOCK, T), jnp.float32),
    ),
    grid=(T // _ROWS, D // columns),
    grid_names=('row', 'column'),
    scratch={
      'x_smem': mosaic.tile(_ROWS, columns, dtype, buffers=(n,)),
      'w_smem': plgpu.SMEM((_ROWS,), jnp.float32),
      'c_smem': mosaic.tile(_ROWS, columns, E4M3.dtype),
      's_smem': plgpu.SMEM((width, _ROWS), jnp.float32),
      'barrier': plgpu.Barrier(num_arrivals=n + has_weights),
    },
  )(*arrays, *([weights_T] if has_weights else []))
  return Quantized(codes, scales.mT, ROW_TILE, E4M3)


def encode(
  value: jax.Array, scale: str, min_amax: float = MIN_AMAX
) -> tuple[jax.Array, jax.Array]:
  """Within a kernel: E4M3 codes and scales of the rows of float32 `value`."""
  scales = scale_of(jnp.max(jnp.abs(value), axis=1), scale, min_amax)
  value = value / lax.broadcast_in_dim(scales, value.shape, (0,))
  value = jnp.minimum(jnp.maximum(value, -E4M3.max), E4M3.max)
  return value.astype(E4M3.dtype), scales


def scale_of(amax: jax.Array, scale: str, min_amax: float) -> jax.Array:
  """Within a kernel: `ops.quantize.scale_of` for E4M3."""
  amax = jnp.maximum(amax, min_amax)
  if scale == 'floor':
    return jnp.maximum(_power_of_two(amax, 0) / 256.0, MIN_SCALE)
  scales = jnp.maximum(amax / E4M3.max, MIN_SCALE)
  return scales if scale == 'float32' else _power_of_two(scales, _MANTISSA)


def _power_of_two(x, added):
  """`x` without mantissa; with `added`, carried into the exponent: above."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  power = lax.bitcast_convert_type((bits + added) & ~_MANTISSA, jnp.float32)
  return jnp.where(x < jnp.inf, power, x)


def rms_norm(
  x_TD: jax.Array,
  scale_D: jax.Array,
  eps: float,
  fmt: Format = E4M3,
  scale: str = 'float32',
  implementation: str | None = None,
) -> Quantized:
  """`ops.fused_quantize.rms_norm`."""
  found = obstacles(x_TD.shape, x_TD.dtype, fmt, scale)
  if x_TD.ndim == 2 and x_TD.shape[1] % (4 * BLOCK):
    found.append(f'{x_TD.shape[1]} is not a multiple of {4 * BLOCK}')
  choice = dispatch.choose(implementation, found, 'rms_norm, quantize', x_TD)
  if not choice.is_kernel:
    return fused_quantize.rms_norm(x_TD, scale_D, eps, fmt, scale)
  return _rms_norm(x_TD, scale_D, eps, scale)


@mosaic.traced_once
def _rms_norm(x_TD, scale_D, eps, scale):
  """A block takes `_NORM_ROWS` rows; the second is loaded under the first."""
  T, D = x_TD.shape
  Z, R, dtype = D // BLOCK, _NORM_ROWS, x_TD.dtype
  layout = functools.partial(plgpu.layout_cast, new_layout=_ROW_TO_WARP)

  def body(x_gmem, g_gmem, c_gmem, s_gmem, x_smem, g_smem, c_smem, s_smem, bar):
    first = lax.axis_index('row') * R
    plgpu.copy_gmem_to_smem(g_gmem, g_smem, bar.at[R])
    for r in range(R):
      plgpu.copy_gmem_to_smem(x_gmem.at[first + r], x_smem.at[r], bar.at[r])
    plgpu.barrier_wait(bar.at[R])
    for r in range(R):
      plgpu.barrier_wait(bar.at[r])
      x = layout(x_smem[r]).astype(jnp.float32)
      mean = jnp.sum(jnp.sum(x * x, axis=1)) / D
      # Rounded as `norms.rms_norm` rounds its result.
      x = (x * lax.rsqrt(mean + eps) * layout(g_smem[...])).astype(dtype)
      c_smem[r], s_smem[r] = encode(x.astype(jnp.float32), scale)
    mosaic.store(c_smem, c_gmem.at[pl.ds(first, R)])
    mosaic.store(s_smem, s_gmem.at[pl.ds(first, R)])
    plgpu.wait_smem_to_gmem(0)

  codes, scales = mosaic.launch(
    body,
    (
      jax.ShapeDtypeStruct((T, Z, BLOCK), E4M3.dtype),
      jax.ShapeDtypeStruct((T, Z), jnp.float32),
    ),
    grid=(T // R,),
    grid_names=('row',),
    scratch={
      'x_smem': plgpu.SMEM((R, Z, BLOCK), dtype),
      'g_smem': plgpu.SMEM((Z, BLOCK), jnp.float32),
      'c_smem': plgpu.SMEM((R, Z, BLOCK), E4M3.dtype),
      's_smem': plgpu.SMEM((R, Z), jnp.float32),
      'bar': plgpu.Barrier(num_barriers=R + 1),
    },
  )(x_TD.reshape(T, Z, BLOCK), scale_D.reshape(Z, BLOCK))
  return Quantized(codes.reshape(T, D), scales, ROW_TILE, E4M3)
