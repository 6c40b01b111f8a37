"""RMSNorm, an FP32 island (V3 section 3.3.1)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension.

  Args:
    x: [..., D], any float dtype; the arithmetic is float32.
    scale_D: [D].
    eps: added to the mean square.

  Returns:
    [..., D] in the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
  return (x32 * inv_rms * scale_D.astype(jnp.float32)).astype(x.dtype)
