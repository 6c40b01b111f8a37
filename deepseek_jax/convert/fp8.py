"""FP8 weights with one float32 scale per block of 128 x 128 (V3 section 3.3).

A weight is `codes * scale` of its block, blocks at the right and lower edge
being smaller.  The scale is amax / 448 with amax at least 1e-4, in float32, as
in DeepSeek's `inference/kernel.py`; from V3.1 on it is rounded up to a power
of two ('ue8m0').  All in numpy, on released [out, in] matrices.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from deepseek_jax.convert.names import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_MAX = np.float32(448)  # The largest E4M3 number.
_MIN_AMAX = np.float32(1e-4)  # So that a block of zeros has a scale.


def block_scales(weight: np.ndarray, power_of_two: bool = False) -> np.ndarray:
  """The scales of a matrix, float32 [ceil(out / 128), ceil(in / 128)].

  Raises:
    ValueError: if the matrix has a NaN or an infinity.
  """
  columns = range(0, weight.shape[1], BLOCK)
  amax = np.stack(
    [
      np.maximum.reduceat(np.abs(panel).max(0), columns)
      for _, panel in _panels(weight)
    ]
  )
  if not np.isfinite(amax).all():
    raise ValueError('a weight is not finite and cannot be quantised')
  scales = np.maximum(amax, _MIN_AMAX) / _MAX
  if power_of_two:
    mantissa, exponent = np.frexp(scales)  # scales = mantissa 2^exponent.
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
  return scales


def quantise(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """E4M3 codes of a matrix under its `block_scales`, rounded to even."""
  codes = np.empty(weight.shape, E4M3)
  for rows, panel in _panels(weight):
    codes[rows] = panel / _expand(scales, rows, weight.shape[1])
  return codes


def dequantise(
  codes: np.ndarray, scales: np.ndarray, dtype: np.dtype
) -> np.ndarray:
  """`codes * scales` in float32, rounded once to `dtype`."""
  weight = np.empty(codes.shape, dtype)
  for rows, panel in _panels(codes):
    weight[rows] = panel * _expand(scales, rows, codes.shape[1])
  return weight


def check_scales(name: str, scales: np.ndarray) -> None:
  """Refuses scales that no quantisation gives.

  Raises:
    ValueError: if one is NaN, infinite, zero or negative.
  """
  bad = ~(np.isfinite(scales) & (scales > 0))
  if bad.any():
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
      f'{name}{list(where)} is {scales[where]}: scales are finite and above 0; '
      'the file is damaged, fetch it again'
    )


def _panels(matrix) -> Iterator[tuple[slice, np.ndarray]]:
  """128 rows at a time in float32: what is temporary stays small."""
  for start in range(0, len(matrix), BLOCK):
    rows = slice(start, start + BLOCK)
    yield rows, matrix[rows].astype(np.float32)


def _expand(scales, rows, width):
  return np.repeat(scales[rows.start // BLOCK], BLOCK)[:width]
