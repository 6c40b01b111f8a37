"""Rounding and storage of every format, exhaustively and bit for bit."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import formats

_LIBRARY = {
  'e4m3': ml_dtypes.float8_e4m3fn,
  'e5m2': ml_dtypes.float8_e5m2,
  'e8m7': ml_dtypes.bfloat16,
  'e4m3_ieee': ml_dtypes.float8_e4m3,
  'e3m4': ml_dtypes.float8_e3m4,
}


def _format(name):
  return formats.Format(4, 3) if name == 'e4m3_ieee' else formats.parse(name)


def _numbers(fmt) -> np.ndarray:
  """All finite numbers of a format, from its definition, float64, sorted."""
  E, M = fmt.exponent_bits, fmt.mantissa_bits
  fields = np.arange(2**E)[:, None]
  mantissas = np.arange(2**M) / 2**M
  values = np.where(
    fields == 0,
    mantissas * 2.0**fmt.min_exponent,
    (1 + mantissas) * 2.0 ** (fields - fmt.bias),
  ).ravel()
  values = values[:-1] if fmt.finite else values[: -(2**M)]
  return np.concatenate([-values[:0:-1], values])


def _nearest(x: np.ndarray, fmt) -> np.ndarray:
  """The nearest number, ties to the even code, in float64."""
  numbers = _numbers(fmt)
  above = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
  low, high = numbers[above - 1], numbers[above]
  middle = (low + high) / 2
  zero = len(numbers) // 2
  high_is_even = (above - zero) % 2 == 0
  up = (x > middle) | ((x == middle) & high_is_even)
  return np.where(up, high, low)


def _samples(fmt) -> np.ndarray:
  """Numbers of the format, the middles between them, and their neighbours."""
  numbers = _numbers(fmt)
  middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
  exact = np.concatenate([numbers.astype(np.float32), middles])
  around = [np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf)]
  rng = np.random.default_rng(0)
  wide = rng.standard_normal(20_000) * 2.0 ** rng.integers(-40, 40, 20_000)
  return np.concatenate([exact, *around, wide.astype(np.float32)])


class FormatsTest(parameterized.TestCase):
  def test_powers_of_two_as_a_byte(self):
    """All of float32's normal ones; ml_dtypes has the format, too."""
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    bad = np.float32([np.inf, np.nan, -np.nan])
    codes = jax.jit(formats.encode_e8m0)(np.concatenate([powers, bad]))
    library = powers.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(codes, [*library, 255, 255, 255])
    again = jax.jit(formats.decode_e8m0)(codes)
    np.testing.assert_array_equal(again, [*powers, *[np.nan] * 3])
    self.assertEqual(formats.decode_e8m0(jnp.uint8(0)), 0)

  @parameterized.parameters('e4m3', 'e5m2', 'e5m6', 'e3m4', 'e2m1', 'e4m7fn')
  def test_rounds_to_the_nearest(self, name):
    fmt = formats.parse(name)
    x = _samples(fmt)
    expected = _nearest(x.astype(np.float64), fmt)
    np.testing.assert_array_equal(
      jax.jit(formats.round_to, static_argnums=1)(x, fmt),
      expected.astype(np.float32),
    )

  @parameterized.parameters(*_LIBRARY)
  def test_ml_dtypes_agrees_bit_for_bit(self, name):
    fmt, dtype = _format(name), _LIBRARY[name]
    if fmt.bits == 16:  # The normal numbers; CPUs take the others for zeros.
      rng = np.random.default_rng(0)
      x = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
      x = x[np.isfinite(x) & (np.abs(x) > 2.0**-120)]
    else:
      x = _samples(fmt)
    x = x[np.abs(x) <= fmt.max]
    expected = x.astype(dtype)
    bits = np.uint16 if fmt.bits == 16 else np.uint8
    codes = np.asarray(formats.encode(jnp.asarray(x), fmt))
    np.testing.assert_array_equal(codes.view(bits), expected.view(bits))

  @parameterized.parameters(
    'e4m3', 'e5m2', 'e5m6', 'e3m4', 'e4m3_ieee', 'e7m8', 'e8m3', 'e8m7'
  )
  def test_every_code_survives(self, name):
    fmt = _format(name)
    codes = np.arange(2**fmt.bits).astype(
      np.uint8 if fmt.bits <= 8 else np.uint16
    )
    stored = jnp.asarray(codes.view(fmt.dtype))
    values = formats.decode(stored, fmt)
    again = np.asarray(formats.encode(values, fmt)).view(codes.dtype)
    number = ~np.isnan(np.asarray(values))
    if fmt.exponent_bits == 8:  # CPUs take float32's subnormals for zeros.
      number &= (codes % 2 ** (fmt.bits - 1) >= 2**fmt.mantissa_bits) | (
        np.asarray(values) == 0
      )
    np.testing.assert_array_equal(again[number], codes[number])
    finite = np.unique(np.asarray(values)[np.isfinite(values)])
    np.testing.assert_array_equal(finite, np.unique(_numbers(fmt)))
    if name in _LIBRARY:
      expected = codes.view(_LIBRARY[name]).astype(np.float32)
      np.testing.assert_array_equal(values, expected)

  @parameterized.parameters('e4m3', 'e5m2', 'e5m6', 'e3m4fn', 'e8m3', 'e8m7')
  def test_beyond_the_format(self, name):
    fmt = formats.parse(name)
    largest = np.finfo(np.float32).max
    x = jnp.array([largest, -largest, jnp.inf, -jnp.inf, jnp.nan])
    result = np.asarray(formats.decode(formats.encode(x, fmt), fmt))
    np.testing.assert_array_equal(result[:2], [fmt.max, -fmt.max])
    infinite = [np.nan, np.nan] if fmt.finite else [np.inf, -np.inf]
    np.testing.assert_array_equal(result[2:], [*infinite, np.nan])

  def test_known_ranges(self):
    largest = {'e4m3': 448, 'e5m2': 57344, 'e5m6': 65024}
    for name, value in largest.items():
      self.assertEqual(formats.parse(name).max, value)
    self.assertEqual(formats.BF16.max, float(ml_dtypes.finfo('bfloat16').max))

  def test_powers_of_two(self):
    x = jnp.array([1.0, 1.5, 2.0, 0.75, 3e38, 1e-30, jnp.nan, jnp.inf])
    logs = np.log2(np.asarray(x, np.float64)[:4])
    np.testing.assert_array_equal(
      formats.ceil_power_of_two(x)[:4], 2 ** np.ceil(logs)
    )
    np.testing.assert_array_equal(
      formats.floor_power_of_two(x)[:4], 2 ** np.floor(logs)
    )
    ceil, floor = formats.ceil_power_of_two(x), formats.floor_power_of_two(x)
    self.assertEqual(float(ceil[4]), np.inf)
    self.assertEqual(float(floor[4]), 2.0**127)
    chex.assert_trees_all_equal(ceil[6:], floor[6:], x[6:])

  @parameterized.parameters('fp8', 'e9m3', 'e4m0', 'e8m8', 'e8m3fn', 'E4M3', '')
  def test_refused(self, name):
    with self.assertRaisesRegex(ValueError, 'choose'):
      formats.parse(name)
