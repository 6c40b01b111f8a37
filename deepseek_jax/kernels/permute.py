"""Kernels of `ops.grouped.permute` and `unpermute`: rows to experts and back.

Choice: own kernels; nothing ready-made exists, and XLA's gathers are what they
have to beat.  Both only move bytes, so the copy engine does it.

  permute    a block fetches 4 rows by index and sends each on when it is there.
             A row without a token has an index beyond the end, for which TMA
             writes zeros.
  unpermute  a block fetches a piece of the K rows of one token, at most 56 KiB,
             so that four blocks share an SM, and sums them in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import dispatch, mosaic
from deepseek_jax.ops import grouped as reference
from deepseek_jax.ops.grouped import Layout

_ROWS = 4
_LANES = 128  # Columns are [D / 128, 128]: a TMA box has at most 256 a side.
_PIECE_BYTES = 56 * 1024


def obstacles(shape: tuple[int, ...], dtype) -> list[str]:
  """Why no kernel moves rows of `shape`."""
  size = jnp.dtype(dtype).itemsize
  if len(shape) != 2 or shape[1] % _LANES or shape[1] > 256 * _LANES:
    return [f'rows of {shape} are not cut into pieces of {_LANES}']
  if shape[1] * size * _ROWS > mosaic.SMEM_BYTES // 2:
    return [f'{_ROWS} rows of {shape[1] * size} bytes are too long']
  return []


def permute(
  x_TD: jax.Array, layout: Layout, implementation: str | None = None
) -> jax.Array:
  """`ops.grouped.permute`."""
  found = obstacles(x_TD.shape, x_TD.dtype)
  choice = dispatch.choose(implementation, found, 'permute', x_TD)
  if not choice.is_kernel:
    return reference.permute(x_TD, layout)
  return _permute(x_TD, layout.token_R)


@mosaic.traced_once
def _permute(x_TD, token_R):
  T, D = x_TD.shape
  R, Z = token_R.size, D // _LANES

  def body(x_gmem, token_gmem, o_gmem, smem, barrier):
    first = lax.axis_index('row') * _ROWS
    for r in range(_ROWS):
      source = x_gmem.at[token_gmem[first + r]]
      plgpu.copy_gmem_to_smem(source, smem.at[r], barrier.at[r])
    for r in range(_ROWS):
      plgpu.barrier_wait(barrier.at[r])
      plgpu.copy_smem_to_gmem(smem.at[r], o_gmem.at[first + r])
    plgpu.wait_smem_to_gmem(0)

  rows = mosaic.launch(
    body,
    jax.ShapeDtypeStruct((R, Z, _LANES), x_TD.dtype),
    grid=(R // _ROWS,),
    grid_names=('row',),
    scratch={
      'smem': plgpu.SMEM((_ROWS, Z, _LANES), x_TD.dtype),
      'barrier': plgpu.Barrier(num_barriers=_ROWS),
    },
  )(x_TD.reshape(T, Z, _LANES), token_R)
  return rows.reshape(R, D)


def unpermute(
  rows_RD: jax.Array, layout: Layout, implementation: str | None = None
) -> jax.Array:
  """`ops.grouped.unpermute`."""
  D, K = rows_RD.shape[1], layout.row_TK.shape[1]
  piece = _piece(D // _LANES, K * _LANES * rows_RD.dtype.itemsize)
  found = obstacles(rows_RD.shape, rows_RD.dtype)
  if piece == 0:
    found.append(f'{K} rows do not fit into {_PIECE_BYTES} bytes')
  choice = dispatch.choose(implementation, found, 'unpermute', rows_RD)
  if not choice.is_kernel:
    return reference.unpermute(rows_RD, layout)
  return _unpermute(rows_RD, layout.row_TK, piece)


@mosaic.traced_once
def _unpermute(rows_RD, row_TK, piece):
  (R, D), dtype = rows_RD.shape, rows_RD.dtype
  T, K = row_TK.shape
  Z = D // _LANES

  def body(x_gmem, row_gmem, o_gmem, smem, o_smem, barrier):
    t, columns = lax.axis_index('token'), lax.axis_index('piece') * piece
    for k in range(K):
      source = x_gmem.at[row_gmem[t, k], pl.ds(columns, piece)]
      plgpu.copy_gmem_to_smem(source, smem.at[k], barrier.at[k])
    total = jnp.zeros((piece, _LANES), jnp.float32)
    for k in range(K):
      plgpu.barrier_wait(barrier.at[k])
      total += smem[k].astype(jnp.float32)
    o_smem[...] = total.astype(dtype)
    mosaic.store(o_smem, o_gmem.at[t, pl.ds(columns, piece)])
    plgpu.wait_smem_to_gmem(0)

  sums = mosaic.launch(
    body,
    jax.ShapeDtypeStruct((T, Z, _LANES), dtype),
    grid=(T, Z // piece),
    grid_names=('token', 'piece'),
    scratch={
      'smem': plgpu.SMEM((K, piece, _LANES), dtype),
      'o_smem': plgpu.SMEM((piece, _LANES), dtype),
      'barrier': plgpu.Barrier(num_barriers=K),
    },
  )(rows_RD.reshape(R, Z, _LANES), row_TK)
  return sums.reshape(T, D)


def _piece(Z: int, bytes_of_one: int) -> int:
  """The largest divisor of Z that fits; 0 if none does."""
  sizes = (n for n in range(Z, 0, -1) if Z % n == 0)
  return next((n for n in sizes if n * bytes_of_one <= _PIECE_BYTES), 0)
