"""Rotary position embedding and YaRN (V3 section 4.3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
  """Angle per position of each rotated pair: float32 [head_dim // 2].

  With `factor` above 1 the low frequencies are divided by it and the high ones
  kept, with a linear ramp between the pairs that turn `beta_slow` and
  `beta_fast` times within the original context (YaRN).
  """
  pairs = np.arange(head_dim // 2, dtype=np.float64)
  freqs = config.theta ** (-2 * pairs / head_dim)
  if config.factor > 1:

    def pair_turning(turns: float) -> float:
      wavelength = config.original_seq_len / (2 * math.pi * turns)
      return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low = max(math.floor(pair_turning(config.beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.beta_slow)), head_dim - 1)
    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    freqs = freqs / config.factor * ramp + freqs * (1 - ramp)
  return freqs.astype(np.float32)


def softmax_scale(config: RopeConfig, head_dim: int) -> float:
  """`(0.1 mscale ln(factor) + 1)^2 / sqrt(head_dim)`.

  The square is YaRN's entropy factor sqrt(t) on queries and on keys; `cos` and
  `sin` stay unscaled, as in the released models (mscale = mscale_all_dim).
  """
  mscale = 0.1 * config.mscale * math.log(config.factor) + 1
  return mscale**2 / math.sqrt(head_dim)


def rotate(x: jax.Array, positions: jax.Array, config: RopeConfig) -> jax.Array:
  """Rotates neighbouring pairs (x[2i], x[2i+1]) by position * frequency_i.

  Args:
    x: [..., T, N, P] or [..., T, P] with `positions` of shape [..., T]; the
      pairs are interleaved, as in DeepSeek's code.
    positions: int [..., T], broadcastable against x's leading dimensions.
    config: base and YaRN.

  Returns:
    The shape and dtype of `x`; the arithmetic is float32.
  """
  freqs = jnp.asarray(frequencies(config, x.shape[-1]))
  angles = positions[..., None].astype(jnp.float32) * freqs
  if x.ndim == positions.ndim + 2:
    angles = angles[..., None, :]  # The same for every head.
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  real, imag = pairs[..., 0], pairs[..., 1]
  rotated = jnp.stack((real * cos - imag * sin, real * sin + imag * cos), -1)
  return rotated.reshape(x.shape).astype(x.dtype)
