"""Quantisation of what was just computed (V3 section 3.3.3).

The input of an FP8 linear layer is often the result of something cheap: SwiGLU
or RMSNorm.  The references here are the two steps one after the other; the
kernels of the same names keep the intermediate array on the chip.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.ops import norms, quantize
from deepseek_jax.ops.formats import E4M3, Format
from deepseek_jax.ops.quantize import Quantized


def swiglu(
  gate_TF: jax.Array,
  up_TF: jax.Array,
  weights_T: jax.Array | None = None,
  fmt: Format = E4M3,
  scale: str = 'float32',
) -> Quantized:
  """`silu(gate) * up`, in 1 x 128 tiles: the input of `w2`.

  Args:
    gate_TF: compute dtype.
    up_TF: likewise.
    weights_T: float32 gate weights of the rows, if they are routed.
    fmt: of the codes.
    scale: see `quantize.scale_of`.
  """
  hidden = jax.nn.silu(gate_TF.astype(jnp.float32)) * up_TF.astype(jnp.float32)
  if weights_T is not None:
    hidden *= weights_T[:, None]
  hidden = hidden.astype(gate_TF.dtype)
  return quantize.quantize(hidden, quantize.ROW_TILE, fmt, scale)


def rms_norm(
  x_TD: jax.Array,
  scale_D: jax.Array,
  eps: float,
  fmt: Format = E4M3,
  scale: str = 'float32',
) -> Quantized:
  """`norms.rms_norm`, in 1 x 128 tiles."""
  x_TD = norms.rms_norm(x_TD, scale_D, eps)
  return quantize.quantize(x_TD, quantize.ROW_TILE, fmt, scale)
