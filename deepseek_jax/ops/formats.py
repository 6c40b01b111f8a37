"""Number formats as data, and exact rounding to them (V3 section 3.3.2).

A `Format` is a sign, exponent bits and mantissa bits.  `round_to` gives the
nearest number of a format, as float32; `encode` and `decode` store it in as
many bits.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Format:
  """A binary floating-point format of at most 16 bits.

  Attributes:
    exponent_bits: 2 to 8.
    mantissa_bits: 1 to 12, without the leading one.
    finite: the top exponent holds numbers too, and only its last code is NaN
      ('fn'); otherwise it holds infinities and NaNs, as in IEEE 754.  Not with
      8 exponent bits, whose numbers would go beyond float32's.

  Raises:
    ValueError: if there are too few or too many bits, or numbers too large.
  """

  exponent_bits: int
  mantissa_bits: int
  finite: bool = False

  def __post_init__(self):
    E, M = self.exponent_bits, self.mantissa_bits
    if not (2 <= E <= 8 and 1 <= M <= 12 and E + M <= 15):
      raise ValueError(
        f'format e{E}m{M}: choose 2 to 8 exponent bits and 1 to 12 mantissa '
        'bits, 15 together'
      )
    if self.finite and E == 8:
      raise ValueError(
        f'format e{E}m{M}fn: its maximum is beyond float32; choose e{E}m{M}'
      )

  def __str__(self):
    return f'e{self.exponent_bits}m{self.mantissa_bits}' + 'fn' * self.finite

  @property
  def bits(self) -> int:
    """With the sign."""
    return 1 + self.exponent_bits + self.mantissa_bits

  @property
  def bias(self) -> int:
    """Of the stored exponent."""
    return 2 ** (self.exponent_bits - 1) - 1

  @property
  def min_exponent(self) -> int:
    """Of the smallest normal number; subnormals keep it."""
    return 1 - self.bias

  @property
  def max(self) -> float:
    """The largest finite number."""
    step = 2.0**-self.mantissa_bits
    top = 2**self.exponent_bits - 1 - self.bias
    if self.finite:
      return (2 - 2 * step) * 2.0**top
    return (2 - step) * 2.0 ** (top - 1)

  @property
  def dtype(self) -> jnp.dtype:
    """What stores it: JAX's own type, or unsigned integers with its bits."""
    own = _DTYPES.get(self)
    return jnp.dtype(own or (jnp.uint8 if self.bits <= 8 else jnp.uint16))


E4M3 = Format(4, 3, finite=True)
E5M2 = Format(5, 2)
E5M6 = Format(5, 6)
BF16 = Format(8, 7)

_DTYPES = {
  E4M3: jnp.float8_e4m3fn,
  E5M2: jnp.float8_e5m2,
  BF16: jnp.bfloat16,
}


def parse(name: str) -> Format:
  """The format of a name such as 'e4m3', 'e5m6' or 'e3m4fn'.

  'e4m3' is the 'fn' kind, as everywhere in this field.

  Raises:
    ValueError: if the name is none.
  """
  match = re.fullmatch(r'e(\d+)m(\d+)(fn)?', name)
  if not match:
    raise ValueError(f'format={name!r}: choose one like e4m3, e5m2, e5m6, e3m4')
  made = Format(int(match[1]), int(match[2]), bool(match[3]))
  return E4M3 if name == 'e4m3' else made


def _power_of_two(exponent: jax.Array) -> jax.Array:
  """2^exponent in float32, exactly, for exponents of normal numbers."""
  return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent(x: jax.Array) -> jax.Array:
  """floor(log2 |x|) of normal float32 numbers; -127 for what is smaller."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return ((bits >> 23) & 0xFF) - 127


# A step takes these hundreds of times, of few shapes.
_traced_once = functools.partial(jax.jit, static_argnames='fmt', inline=True)


@_traced_once
def round_to(x: jax.Array, fmt: Format) -> jax.Array:
  """The nearest number of `fmt`, ties to even: float32, of the shape of `x`.

  Finite values beyond `fmt.max` become plus or minus `fmt.max`.  NaN stays NaN;
  an infinity stays one where the format has them, else it becomes NaN.

  Args:
    x: float32 or narrower.
    fmt: the format; its subnormals are kept, but for those of 8 exponent bits
      where a device, as a CPU, takes float32's for zeros.
  """
  x = x.astype(jnp.float32)
  if fmt.exponent_bits == 8:  # Those of float32: only the mantissa is shorter.
    rounded = lax.reduce_precision(x, 8, fmt.mantissa_bits)
  else:
    exponent = jnp.maximum(_exponent(x), fmt.min_exponent) - fmt.mantissa_bits
    # Beyond the format, any value that is clipped will do.
    exponent = jnp.minimum(exponent, fmt.bias + 1)
    steps = jnp.round(x * _power_of_two(-exponent))
    rounded = steps * _power_of_two(exponent)
  clipped = jnp.clip(rounded, -fmt.max, fmt.max)
  overflow = jnp.nan if fmt.finite else x
  return jnp.where(jnp.isfinite(x), clipped, overflow)


@_traced_once
def encode(x: jax.Array, fmt: Format) -> jax.Array:
  """`round_to`, stored in `fmt.dtype`."""
  rounded = round_to(x, fmt)
  if fmt == BF16:
    return rounded.astype(fmt.dtype)
  # Not by XLA's own casts from and to float8: in large CPU programs (jaxlib
  # 0.10.2) some kernels take E4M3 numbers above 240 for NaN.
  M, is_negative = fmt.mantissa_bits, jnp.signbit(rounded)
  bits = lax.bitcast_convert_type(jnp.abs(rounded), jnp.int32)
  # Exponent and mantissa lie side by side: a new bias and a shift move both.
  code = (bits >> (23 - M)) - ((127 - fmt.bias) << M)
  if fmt.exponent_bits < 8:  # Else subnormals are float32's own.
    subnormal = jnp.abs(rounded) * 2.0 ** (M - fmt.min_exponent)
    is_normal = _exponent(rounded) >= fmt.min_exponent
    code = jnp.where(is_normal, code, subnormal.astype(jnp.int32))
  top = (2**fmt.exponent_bits - 1) << M
  nan = top | (2**M - 1 if fmt.finite else 2 ** (M - 1))
  code = jnp.where(jnp.isinf(rounded), top, code)
  code = jnp.where(jnp.isnan(rounded), nan, code)
  sign = is_negative.astype(jnp.int32) << (fmt.bits - 1)
  code |= sign
  if fmt in _DTYPES:
    return lax.bitcast_convert_type(code.astype(jnp.uint8), fmt.dtype)
  return code.astype(fmt.dtype)


@_traced_once
def decode(codes: jax.Array, fmt: Format) -> jax.Array:
  """The float32 numbers that `encode` stored."""
  if fmt == BF16:
    return codes.astype(jnp.float32)
  if fmt in _DTYPES:
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
  M, codes = fmt.mantissa_bits, codes.astype(jnp.int32)
  magnitude = codes & (2 ** (fmt.bits - 1) - 1)
  field, mantissa = magnitude >> M, magnitude & (2**M - 1)
  value = lax.bitcast_convert_type(
    (magnitude + ((127 - fmt.bias) << M)) << (23 - M), jnp.float32
  )
  if fmt.exponent_bits < 8:
    subnormal = mantissa * jnp.float32(2.0 ** (fmt.min_exponent - M))
    value = jnp.where(field == 0, subnormal, value)
  top = 2**fmt.exponent_bits - 1
  if fmt.finite:
    is_nan = magnitude == (top << M | (2**M - 1))
    value = jnp.where(is_nan, jnp.nan, value)
  else:
    special = jnp.where(mantissa == 0, jnp.inf, jnp.nan)
    value = jnp.where(field == top, special, value)
  return jnp.where(codes >> (fmt.bits - 1) == 1, -value, value)


def encode_e8m0(x: jax.Array) -> jax.Array:
  """Powers of two as uint8, the exponents of float32: the OCP format E8M0.

  Args:
    x: float32, positive normal powers of two; infinity becomes NaN.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return ((bits >> 23) & 0xFF).astype(jnp.uint8)


def decode_e8m0(codes: jax.Array) -> jax.Array:
  """The float32 numbers that `encode_e8m0` stored; a 0, which is none, as 0."""
  value = _power_of_two(codes.astype(jnp.int32) - 127)
  return jnp.where(codes == 0xFF, jnp.nan, value)


def ceil_power_of_two(x: jax.Array) -> jax.Array:
  """2^ceil(log2 x) of positive normal float32; NaN and infinity stay."""
  exponent = _exponent(x)
  is_power = x == _power_of_two(exponent)
  # Beyond 2^127 there is no such float32: infinity.
  above = _power_of_two(exponent) * jnp.where(is_power, 1.0, 2.0)
  return jnp.where(jnp.isfinite(x), above, x)


def floor_power_of_two(x: jax.Array) -> jax.Array:
  """2^floor(log2 x) of positive normal float32; NaN and infinity stay."""
  return jnp.where(jnp.isfinite(x), _power_of_two(_exponent(x)), x)
