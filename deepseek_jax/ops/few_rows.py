"""Products of few rows with large matrices, as in decoding."""

from typing import Any

import jax
import jax.numpy as jnp


def multiply(
  x: jax.Array,
  w: jax.Array,
  transposed: bool = False,
  dtype: Any = None,
  precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
  """`x` [R, K] times `w` [K, N]: [R, N].

  Args:
    x: or [R, G, K], of which each of G groups has a `w` of its own.
    w: in the dtype of `x`; or [G, K, N], which gives [R, G, N].
    transposed: `w` is [N, K], [G, N, K].
    dtype: of the result; None: that of `x`.  Sums are float32.
    precision: of float32 products, as for `jnp.matmul`.
  """
  groups = 'G' if x.ndim == 3 else ''
  matrix = 'NK' if transposed else 'KN'
  spec = f'R{groups}K,{groups}{matrix}->R{groups}N'
  how = {'precision': precision, 'preferred_element_type': dtype}
  return jnp.einsum(spec, x, w, **how)
