"""Tiles, scales and special values, against loops over tiles in NumPy."""

import itertools
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax.convert import fp8
from deepseek_jax.ops import formats, quantize
from tests import conftest, tolerances

_TILES = {
  'row': quantize.ROW_TILE,
  'column': quantize.COLUMN_TILE,
  'square': quantize.SQUARE_TILE,
  'whole': quantize.WHOLE,
}


def _draw(*shape):
  rng = np.random.default_rng(0)
  spread = 2.0 ** rng.integers(-6, 6, shape)
  return (rng.standard_normal(shape) * spread).astype(np.float32)


def _by_hand(x, tile):
  """Codes and scales of an [I, J] matrix in E4M3, a tile at a time."""
  rows, columns = (t or n for t, n in zip(tile, x.shape))
  starts = range(0, x.shape[0], rows), range(0, x.shape[1], columns)
  codes = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
  scales = np.zeros([len(s) for s in starts], np.float32)
  for (a, i), (b, j) in itertools.product(*map(enumerate, starts)):
    place = slice(i, i + rows), slice(j, j + columns)
    amax = max(np.abs(x[place]).max(), np.float32(1e-4))
    scales[a, b] = np.float32(amax) / np.float32(448)
    codes[place] = (x[place] / scales[a, b]).astype(codes.dtype)
  return codes, scales


class QuantizeTest(parameterized.TestCase):
  @parameterized.product(
    tile=list(_TILES), shape=((256, 384), (1, 128), (130, 257), (3, 5))
  )
  def test_codes_and_scales(self, tile, shape):
    x = _draw(*shape)
    q = jax.jit(quantize.quantize, static_argnums=1)(x, _TILES[tile])
    codes, scales = _by_hand(x, _TILES[tile])
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(
      np.asarray(q.codes).view(np.uint8), codes.view(np.uint8)
    )
    rows, columns = (t or n for t, n in zip(_TILES[tile], shape))
    spread = np.repeat(np.repeat(scales, rows, 0), columns, 1)
    expected = codes.astype(np.float32) * spread[: shape[0], : shape[1]]
    np.testing.assert_array_equal(q.dequantize(), expected)
    np.testing.assert_array_equal(q.mT.dequantize(), expected.T)

  def test_leading_axes_are_separate(self):
    x = _draw(2, 3, 130, 200)
    q = quantize.quantize(jnp.asarray(x), quantize.SQUARE_TILE)
    for i, j in itertools.product(range(2), range(3)):
      one = quantize.quantize(jnp.asarray(x[i, j]), quantize.SQUARE_TILE)
      np.testing.assert_array_equal(q.scales[i, j], one.scales)
      np.testing.assert_array_equal(q.dequantize()[i, j], one.dequantize())

  @parameterized.parameters(False, True)
  def test_weights_as_the_converter_writes_them(self, power_of_two):
    w = _draw(200, 300)
    scales = fp8.block_scales(w, power_of_two)
    q = quantize.quantize(
      jnp.asarray(w),
      quantize.SQUARE_TILE,
      scale='ceil' if power_of_two else 'float32',
    )
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(
      np.asarray(q.codes).view(np.uint8),
      fp8.quantise(w, scales).view(np.uint8),
    )

  @parameterized.parameters('ceil', 'floor')
  def test_power_of_two_scales(self, scale):
    x = jnp.asarray(_draw(64, 256))
    q = quantize.quantize(x, quantize.ROW_TILE, scale=scale)
    exponents = np.log2(np.asarray(q.scales, np.float64))
    np.testing.assert_array_equal(exponents, np.round(exponents))
    exact = np.log2(np.asarray(quantize.tile_amax(x, q.tile)) / 448.0)
    if scale == 'ceil':
      np.testing.assert_array_equal(exponents, np.ceil(exact))
    else:
      amax = np.asarray(quantize.tile_amax(x, q.tile), np.float64)
      np.testing.assert_array_equal(exponents, np.floor(np.log2(amax)) - 8)

  def test_two_orientations_of_powers_of_two_differ_in_no_normal_number(self):
    """Why the saved attention output has such scales (V3 section 3.3.3)."""
    x = jnp.asarray(
      np.random.default_rng(0).uniform(1, 2, (128, 128)).astype(np.float32)
    )
    kept = quantize.quantize(x, quantize.ROW_TILE, formats.E5M6, 'ceil')
    turned = quantize.requantize(
      kept, quantize.COLUMN_TILE, formats.E5M6, 'ceil'
    )
    np.testing.assert_array_equal(turned.dequantize(), kept.dequantize())
    kept = quantize.quantize(x, quantize.ROW_TILE, formats.E5M6)
    turned = quantize.requantize(kept, quantize.COLUMN_TILE, formats.E5M6)
    self.assertTrue((turned.dequantize() != kept.dequantize()).any())

  @parameterized.product(fmt=('e4m3', 'e5m2', 'e5m6'), scale=quantize.SCALES)
  def test_special_tiles(self, fmt, scale):
    x = np.ones((6, 256), np.float32)
    x[0] = 0
    x[1] = 1e-38
    x[2] = 3e38
    x[3, 7] = np.nan
    x[4, 7] = np.inf
    q = quantize.quantize(
      jnp.asarray(x), quantize.ROW_TILE, formats.parse(fmt), scale
    )
    y = np.asarray(q.dequantize())
    np.testing.assert_array_equal(y[:2], 0)
    np.testing.assert_allclose(y[2], 3e38, rtol=0.13)
    self.assertTrue(np.isnan(y[3:5, :128]).all())
    np.testing.assert_allclose(y[3:5, 128:], 1, rtol=0.13)
    np.testing.assert_allclose(y[5], 1, rtol=0.13)

  @parameterized.product(
    fmt=('e4m3', 'e5m2', 'e5m6'),
    scale=quantize.SCALES,
    exponent=(-37, -90),
  )
  def test_gradients_have_no_least_amax(self, fmt, scale, exponent):
    """2^-37 is what they are at V3's batch; the same codes, smaller scales."""
    fmt, x = formats.parse(fmt), jnp.asarray(_draw(4, 256)).at[1].set(0)
    how = quantize.ROW_TILE, fmt, scale
    least = quantize.GRADIENT_MIN_AMAX
    tiny = quantize.quantize(x * 2.0**exponent, *how, min_amax=least)
    np.testing.assert_array_equal(
      tiny.dequantize() * 2.0**-exponent,
      quantize.quantize(x, *how, min_amax=least).dequantize(),
    )
    np.testing.assert_array_equal(tiny.scales[1], np.float32(2.0**-126))
    # As in DeepSeek's `act_quant`, otherwise.
    tiny = quantize.quantize(x * 2.0**-37, *how)
    least = quantize.scale_of(jnp.full((4, 2), 1e-4), fmt, scale)
    np.testing.assert_array_equal(tiny.scales, least)

  @parameterized.parameters(*quantize.SCALES)
  def test_a_format_as_wide_as_float32(self, scale):
    """Its amax over its maximum would be no normal number."""
    x = jnp.asarray(_draw(4, 256))
    q = quantize.quantize(x, quantize.ROW_TILE, formats.BF16, scale)
    tolerances.assert_close(q.dequantize(), x, tolerances.BFLOAT16)

  def test_an_optimised_loop_keeps_a_nan(self):
    x = jnp.ones((512, 256)).at[3, 5].set(jnp.nan)
    amax = jax.jit(lambda x: quantize.tile_amax(x, quantize.ROW_TILE))
    # Tests compile without optimisation: the maximum would not be vectorised.
    out = np.asarray(amax.lower(x).compile(conftest.OPTIMISED)(x))
    np.testing.assert_array_equal(np.argwhere(np.isnan(out)), [[3, 0]])

  def test_an_optimised_program_spoils_the_whole_tile_of_a_nan(self):
    x = jnp.ones((64, 256)).at[3, 5].set(jnp.nan).at[4, 200].set(jnp.inf)
    run = jax.jit(lambda x: quantize.quantize(x, quantize.ROW_TILE).raw)
    y = np.asarray(run.lower(x).compile(conftest.OPTIMISED)(x).dequantize())
    spoilt = np.zeros((64, 256), bool)
    spoilt[3, :128] = spoilt[4, 128:] = True
    np.testing.assert_array_equal(np.isnan(y), spoilt)
    np.testing.assert_allclose(y[~spoilt], 1, rtol=1e-6)

  def test_a_given_amax_clips(self):
    x = jnp.array([[1.0, 2.0, 8.0]])
    q = quantize.quantize(x, quantize.ROW_TILE, amax=jnp.full((1, 1), 4.0))
    np.testing.assert_allclose(q.dequantize(), [[1, 2, 4]], rtol=1e-6)

  def test_is_a_pytree(self):
    q = quantize.quantize(jnp.asarray(_draw(4, 200)), quantize.ROW_TILE)
    leaves, tree = jax.tree.flatten(q)
    self.assertLen(leaves, 2)
    again = jax.jit(lambda q: q)(jax.tree.unflatten(tree, leaves))
    self.assertEqual((again.tile, again.fmt), (q.tile, q.fmt))
    self.assertEqual(q.nbytes, 4 * 200 + 4 * 2 * 4)

  def test_scales_of_powers_of_two_need_a_byte(self):
    x = jnp.asarray(_draw(4, 200)).at[0, 3].set(jnp.nan).at[1, 3].set(jnp.inf)
    x = x.at[2].set(0)
    for least in (quantize.MIN_AMAX, quantize.GRADIENT_MIN_AMAX):
      how = {'scale': 'ceil', 'min_amax': least}
      q = quantize.quantize(x, quantize.ROW_TILE, **how)
      self.assertEqual(q.narrow.nbytes, 4 * 200 + 4 * 2)
      np.testing.assert_array_equal(q.narrow.dequantize(), q.dequantize())

  def test_is_divided_saved_and_read_again(self):
    q = quantize.quantize(jnp.asarray(_draw(16, 256)), quantize.ROW_TILE)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec('data'))
    divided = jax.device_put(q, place)
    self.assertTrue(all(x.sharding == place for x in jax.tree.leaves(divided)))
    folder = self.enter_context(tempfile.TemporaryDirectory())
    with ocp.StandardCheckpointer() as saver:
      saver.save(f'{folder}/q', divided)
      saver.wait_until_finished()
      again = saver.restore(f'{folder}/q', divided)
    doubled = jax.jit(lambda q: 2 * q.dequantize())(again)
    self.assertEqual((again.tile, again.fmt), (q.tile, q.fmt))
    self.assertEqual(again.codes.sharding, place)
    np.testing.assert_array_equal(doubled, 2 * q.dequantize())

  @parameterized.parameters(('e5m6', 5 * 96 * 1.5), ('e4m3', 5 * 96))
  def test_twelve_bits_take_a_byte_and_a_half(self, fmt, nbytes):
    x = jnp.asarray(_draw(5, 96)).at[0, :3].set(jnp.array([-1e9, jnp.nan, 0]))
    q = quantize.quantize(x, quantize.ROW_TILE, formats.parse(fmt))
    packed = quantize.pack(q)
    self.assertEqual(jax.tree.leaves(packed)[0].nbytes, nbytes)
    again = jax.jit(quantize.unpack)(packed)
    self.assertEqual((again.tile, again.fmt), (q.tile, q.fmt))
    self.assertEqual(again.codes.tobytes(), q.codes.tobytes())
    np.testing.assert_array_equal(again.scales, q.scales)
    odd = quantize.quantize(x[:, 1:], quantize.ROW_TILE, formats.parse(fmt))
    self.assertIs(quantize.pack(odd), odd)

  def test_refused(self):
    with self.assertRaisesRegex(ValueError, "scale='round': choose"):
      quantize.scale_of(jnp.ones(1), formats.E4M3, 'round')
