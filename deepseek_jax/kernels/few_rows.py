"""`ops.few_rows` and few tokens' experts on a CPU, by `cpu.cc`.

None of them has a gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels import dispatch, mosaic
from deepseek_jax.ops import few_rows as reference

# With more, XLA's packing of a matrix pays (experiments/LOG.md).
MOST = 16


def obstacles(*operands: jax.Array) -> list[str]:
  """Why the kernels cannot take these arguments."""
  dtypes = {x.dtype.name for x in operands}
  if dtypes not in ({'float32'}, {'bfloat16'}):
    return [f'dtypes {sorted(dtypes)}, not float32 or bfloat16 alone']
  return []


def multiply(
  x: jax.Array,
  w: jax.Array,
  transposed: bool = False,
  dtype: Any = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.few_rows.multiply`, by a kernel for up to `MOST` rows."""
  elsewhere = implementation is None and mosaic.target().platform != 'cpu'
  rows = math.prod(x.shape[: x.ndim - w.ndim + 1])
  if elsewhere or rows > MOST:
    return reference.multiply(x, w, transposed, dtype, precision)
  found, op = obstacles(x, w), 'product of few rows'
  dtype = jnp.dtype(dtype or x.dtype)
  if dtype not in (x.dtype, jnp.float32):
    found.append(f'the result is {dtype.name}')
  choice = dispatch.choose(implementation, found, op, x, w, kernel='cpu')
  if not choice.is_kernel:
    return reference.multiply(x, w, transposed, dtype, precision)
  N = w.shape[-2] if transposed else w.shape[-1]
  w_G = w if w.ndim == 3 else w[None]
  G, K = w_G.shape[0], x.shape[-1]
  y = _call('product', (rows, G, N), dtype)(
    x.reshape(rows, G, K), w_G, transposed=transposed
  )
  return y.reshape(*x.shape[:-1], N)


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array,
  w2_EFD: jax.Array,
  w3_EDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
) -> jax.Array:
  """`ops.expert_decode.expert_ffn`, where `obstacles` finds none."""
  weights_TK = weights_TK.astype(jnp.float32)
  return _call('experts', x_TD.shape, x_TD.dtype)(
    x_TD, w1_EDF, w2_EFD, w3_EDF, expert_ids_TK, weights_TK
  )


def attend_latents(
  q_BTNX: jax.Array,
  cache_BSX: jax.Array,
  width: int,
  positions_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """`ops.cached_attention.attend_latents`, where `obstacles` finds none.

  It reads the cache up to the last position that a query sees.
  """
  shape = (*q_BTNX.shape[:3], width)
  return _call('attention', shape, cache_BSX.dtype)(
    q_BTNX, cache_BSX, positions_BT, scale=np.float32(scale)
  )


def _call(name, shape, dtype):
  result = jax.ShapeDtypeStruct(shape, dtype)
  # Under `vmap` one after another.
  return jax.ffi.ffi_call(f'few_rows_{name}', result, vmap_method='sequential')
