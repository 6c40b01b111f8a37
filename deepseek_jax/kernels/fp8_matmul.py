"""Kernel of `ops/fp8_matmul.py`: Fprop, Dgrad and Wgrad of a linear layer.

Choice: own kernel (`fp8_gemm`).  jax and tokamax ship no product of FP8 blocks
for Hopper.  cuBLASLt has such scales from 12.9 on, of 128 in a row and of 128 x
128; whether `lax.scaled_dot` reaches them, `gpu_check` will tell.  What XLA
makes of the reference converts the operands and multiplies in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import dispatch, fp8_gemm
from deepseek_jax.ops import fp8_matmul as reference
from deepseek_jax.ops.formats import E4M3
from deepseek_jax.ops.fp8_matmul import Accumulation
from deepseek_jax.ops.quantize import (
  BLOCK,
  COLUMN_TILE,
  ROW_TILE,
  SQUARE_TILE,
  Quantized,
)

# TMA wants rows of a multiple of 16 bytes.
_ALIGNED = 16


def obstacles(
  a: Quantized, b: Quantized, accumulation: Accumulation
) -> list[str]:
  """Why the kernel does not multiply `a` [M, K] and `b` [..., K, N]."""
  found = []
  if a.fmt != E4M3 or b.fmt != E4M3:
    found.append(f'the codes are {a.fmt} and {b.fmt}, not e4m3')
  if a.tile != ROW_TILE or b.tile not in (SQUARE_TILE, COLUMN_TILE):
    found.append(f'the tiles are {a.tile} and {b.tile}')
  if accumulation != Accumulation():
    found.append(f'sums are {accumulation.kind}, by {accumulation.promote}')
  sizes = *a.shape[-2:], b.shape[-1]
  if any(size % _ALIGNED for size in sizes) or sizes[0] < BLOCK:
    found.append(f'M, K, N = {sizes} are not multiples of {_ALIGNED}, M > 127')
  return found


def dot(
  a: Quantized,
  b: Quantized,
  accumulation: Accumulation = Accumulation(),
  dtype: Any = jnp.float32,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.fp8_matmul.dot`.

  Both operands are read along K: `b`, which is [K, N], is transposed here, and
  should be the transposition (`mT`) of something that lies as [N, K].
  """
  found = obstacles(a, b, accumulation)
  choice = dispatch.choose(implementation, found, 'fp8 matmul', a, b)
  if not choice.is_kernel:
    return reference.dot(a, b, accumulation, dtype)
  b_scales = b.scales if b.tile == COLUMN_TILE else b.scales.mT[None]
  return fp8_gemm.multiply(
    a.codes, b.codes.mT[None], a.scales.mT, b_scales, dtype=dtype
  )
