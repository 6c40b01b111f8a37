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
  """`x` [..., K] times `w` [K, N]: [..., N].

  Args:
    x: or [..., G, K], of which each of G groups has a `w` of its own.
    w: in the dtype of `x`; or [G, K, N], which gives [..., G, N].
    transposed: `w` is [N, K], [G, N, K].
    dtype: of the result; None: that of `x`.  Sums are float32.
    precision: of float32 products, as for `jnp.matmul`.
  """
  groups = 'G' if w.ndim == 3 else ''
  matrix = 'NK' if transposed else 'KN'
  spec = f'...{groups}K,{groups}{matrix}->...{groups}N'
  how = {'precision': precision, 'preferred_element_type': dtype}
  return jnp.einsum(spec, x, w, **how)
