"""FP8 products against float64 products of the dequantised operands."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax import config
from deepseek_jax.ops import (
  formats,
  fp8_linear,
  fp8_matmul,
  fp8_recipe,
  quantize,
)
from tests import tolerances

_TILES = {
  'fprop': (quantize.ROW_TILE, quantize.SQUARE_TILE),
  'wgrad': (quantize.ROW_TILE, quantize.COLUMN_TILE),
  'tensor': (quantize.WHOLE, quantize.WHOLE),
  'mixed': (quantize.ROW_TILE, quantize.WHOLE),
}
_HOPPER = fp8_matmul.Accumulation('hopper14')


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _operands(M, K, N, tiles):
  a, b = _draw(M, K), _draw(K, N, seed=1)
  return [quantize.quantize(jnp.asarray(x), t) for x, t in zip((a, b), tiles)]


def _exact(a, b):
  return np.asarray(a.dequantize(), np.float64) @ np.asarray(
    b.dequantize(), np.float64
  )


class DotTest(parameterized.TestCase):
  @parameterized.product(
    tiles=list(_TILES), shape=((128, 256, 128), (3, 130, 5), (1, 1, 200))
  )
  def test_equals_the_dequantised_product(self, tiles, shape):
    a, b = _operands(*shape, _TILES[tiles])
    result = jax.jit(fp8_matmul.dot)(a, b)
    tolerances.assert_close(result, _exact(a, b), tolerances.FLOAT32_MATH)

  @parameterized.parameters('e8m7', 'e7m8', 'e8m3', 'e7m3fn', 'e6m3fn')
  def test_a_product_of_a_wide_format_is_finite(self, name):
    fmt, arrays = formats.parse(name), (_draw(8, 256), _draw(256, 8, seed=1))
    arrays[0][3] = 0
    a, b = (
      quantize.quantize(jnp.asarray(x), tile, fmt)
      for x, tile in zip(arrays, _TILES['fprop'])
    )
    y = fp8_matmul.dot(a, b)
    tolerances.assert_close(y, _exact(a, b), tolerances.FLOAT32_MATH)
    rung = (
      tolerances.FP8_TILES if fmt.mantissa_bits == 3 else (tolerances.BFLOAT16)
    )
    tolerances.assert_close(y, np.matmul(*arrays), rung)

  def test_why_sums_are_promoted(self):
    """V3 section 3.3.2: an error of nearly 2 % at K = 4096, without."""
    a, b = _operands(64, 4096, 64, _TILES['tensor'])
    exact = _exact(a, b)
    errors = {}
    for promote in (0, 128):
      accumulation = fp8_matmul.Accumulation('hopper14', promote)
      y = jax.jit(fp8_matmul.dot, static_argnums=2)(a, b, accumulation)
      errors[promote] = np.abs(y - exact).max() / exact.std()
    self.assertBetween(errors[0], 0.01, 0.025)
    self.assertLess(errors[128], errors[0] / 10)

  @parameterized.parameters(
    # 2^8's last place is 2^-5: both survive; of half of it, nothing or all.
    ([256, 2**-5, -(2**-5)], [], 256),
    ([256, 2**-6, -(2**-6)], [], 256 - 2**-5),
    # A second instruction aligns its products to their own largest, and then
    # the sum loses what is below 2^8's last place, towards zero.
    ([256], [2**-6, 2**-6], 256 + 2**-5),
    ([256], [2**-6], 256),
    ([-256], [-(2**-6)], -256),
  )
  def test_a_tensor_core_by_hand(self, first, second, expected):
    """13 places below the largest product, downwards."""
    a = np.zeros((1, 64), np.float32)
    a[0, : len(first)], a[0, 32 : 32 + len(second)] = first, second
    ones = jnp.ones((1, 1))
    q = [
      quantize.Quantized(
        formats.encode(jnp.asarray(x), formats.E4M3),
        ones,
        quantize.WHOLE,
        formats.E4M3,
      )
      for x in (a, np.ones((64, 1), np.float32))
    ]
    self.assertEqual(float(fp8_matmul.dot(*q, _HOPPER)[0, 0]), expected)

  def test_short_sums_are_exact_in_a_tensor_core(self):
    a, b = _operands(5, 1, 7, _TILES['tensor'])
    y = fp8_matmul.dot(a, b, _HOPPER)
    tolerances.assert_close(y, _exact(a, b), tolerances.FLOAT32_MATH)

  def test_nan_spreads(self):
    x = _draw(4, 256)
    x[1, 3] = np.nan
    a = quantize.quantize(jnp.asarray(x), quantize.ROW_TILE)
    b = quantize.quantize(jnp.asarray(_draw(256, 8)), quantize.SQUARE_TILE)
    y = np.asarray(jax.jit(fp8_matmul.dot)(a, b))
    self.assertTrue(np.isnan(y[1]).all())
    self.assertTrue(np.isfinite(y[[0, 2, 3]]).all())

  def test_refused(self):
    a, b = _operands(4, 256, 4, _TILES['fprop'])
    with self.assertRaisesRegex(ValueError, 'promote=256: .* choose'):
      fp8_matmul.dot(a, b, fp8_matmul.Accumulation('exact', 256))
    with self.assertRaisesRegex(ValueError, 'promote=0: .* choose'):
      fp8_matmul.dot(a, b, fp8_matmul.Accumulation('hopper14', 0))
    with self.assertRaisesRegex(ValueError, "accumulate='fp32': choose"):
      fp8_matmul.dot(a, b, fp8_matmul.Accumulation('fp32'))
    wide = quantize.quantize(b.dequantize(), b.tile, formats.E5M6)
    with self.assertRaisesRegex(ValueError, "hopper14': b is e5m6.*choose"):
      fp8_matmul.dot(a, wide, _HOPPER)
    turned = quantize.quantize(jnp.ones((4, 256)), quantize.COLUMN_TILE)
    with self.assertRaisesRegex(ValueError, 'a has tiles of 1 .*quantise'):
      fp8_matmul.dot(turned, b)


_POWERS = fp8_recipe.Kept(scale='ceil')
_RECIPES = {
  'v3': fp8_recipe.Recipe(),
  'wo': fp8_recipe.Recipe(saved=fp8_recipe.Kept(formats.E5M6, 'ceil')),
  'powers': fp8_recipe.Recipe(scale='ceil', saved=_POWERS),
  'e5m2': fp8_recipe.Recipe(gradient_fmt=formats.E5M2),
  'blocks': fp8_recipe.Recipe(gradient_tile=quantize.SQUARE_TILE),
  'tensor': fp8_recipe.Recipe(
    activation_tile=quantize.WHOLE,
    gradient_tile=quantize.WHOLE,
    weight_tile=quantize.WHOLE,
  ),
}


def _linear(x, w, recipe):
  inputs = fp8_linear.quantize_input(x, recipe)
  return fp8_linear.fp8_linear(inputs, w, recipe)


@functools.partial(jax.jit, static_argnums=0)
def _products(recipe, x, w, dy):
  y, vjp = jax.vjp(lambda x, w: _linear(x, w, recipe), x, w)
  return y, *vjp(dy)


class LinearTest(parameterized.TestCase):
  @parameterized.parameters(*_RECIPES)
  def test_three_products_of_their_own_operands(self, name):
    """Each product in float64, of operands quantised as the recipe says."""
    recipe, (T, D, F) = _RECIPES[name], (200, 130, 70)
    x, w, dy = (jnp.asarray(_draw(*s)) for s in ((T, D), (D, F), (T, F)))
    y, dx, dw = _products(recipe, x, w, dy)

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def rounded(x, tile, fmt, scale):
      return quantize.quantize(x, tile, fmt, scale).dequantize()

    r = recipe
    w_q = rounded(w, r.weight_tile, r.fmt, r.scale)
    x_q = rounded(x, r.activation_tile, r.fmt, r.scale)
    dy_q = rounded(dy, r.gradient_tile, r.gradient_fmt, r.scale)
    tokens = quantize.WHOLE if name == 'tensor' else quantize.COLUMN_TILE
    kept = rounded(x, quantize.ROW_TILE, r.saved.fmt, r.saved.scale)
    # Powers of two are turned to powers of two: FACTS 3.2.
    is_power = r.saved.scale == 'ceil' and name != 'tensor'
    x_w = rounded(kept, tokens, r.fmt, 'ceil' if is_power else r.scale)
    dy_w = rounded(dy, tokens, r.gradient_fmt, r.scale)
    exact = [np.asarray(v, np.float64) for v in (x_q, w_q, dy_q, x_w, dy_w)]
    x_q, w_q, dy_q, x_w, dy_w = exact
    tolerances.assert_close(
      [y, dx, dw],
      [x_q @ w_q, dy_q @ w_q.T, x_w.T @ dy_w],
      tolerances.FLOAT32_MATH,
    )

  @parameterized.parameters(*_RECIPES)
  def test_gradients_of_a_mean_over_a_large_batch(self, name):
    """V3's has 62.9M tokens: the same gradients, 2^-37 as large."""
    recipe, (T, D, F) = _RECIPES[name], (200, 130, 70)
    x, w, dy = (jnp.asarray(_draw(*s)) for s in ((T, D), (D, F), (T, F)))
    _, *expected = _products(recipe, x, w, dy)
    _, *actual = _products(recipe, x, w, dy * 2.0**-37)
    actual = jax.tree.map(lambda a: a * 2.0**37, actual)
    chex.assert_trees_all_equal(actual, expected)

  def test_is_near_the_plain_product(self):
    x, w, dy = (jnp.asarray(_draw(*s)) for s in ((256, 256),) * 3)
    plain, plain_vjp = jax.vjp(jnp.matmul, x, w)
    for a, b in zip(
      _products(_RECIPES['v3'], x, w, dy), (plain, *plain_vjp(dy))
    ):
      self.assertLess(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), 0.05)

  @parameterized.parameters(('v3', 1.0), ('wo', 1.5))
  def test_only_codes_are_kept(self, name, bytes_each):
    """Between forward and backward: codes, scales, and the weight itself."""
    x, w = jnp.asarray(_draw(256, 384)), jnp.asarray(_draw(384, 128))
    recipe = _RECIPES[name]
    _, vjp = jax.vjp(lambda x: _linear(x, w, recipe), x)
    kept = [r for r in jax.tree.leaves(vjp) if r.shape != w.shape]
    expected = 256 * 384 * bytes_each + 256 * 3 * 4
    self.assertEqual(sum(r.nbytes for r in kept if r.size > 1), expected)

  def test_an_input_quantised_once_serves_several_matrices(self):
    recipe = _RECIPES['v3']
    x, w1, w2 = (jnp.asarray(_draw(*s)) for s in ((64, 96), (96, 8), (96, 24)))

    def shared(x, w1, w2):
      inputs = fp8_linear.quantize_input(x, recipe)
      return [fp8_linear.fp8_linear(inputs, w, recipe) for w in (w1, w2)]

    def separate(x, w1, w2):
      return [_linear(x, w, recipe) for w in (w1, w2)]

    dy = [jnp.asarray(_draw(64, 8)), jnp.asarray(_draw(64, 24))]
    results = [jax.vjp(f, x, w1, w2) for f in (shared, separate)]
    chex.assert_trees_all_equal(*(y for y, _ in results))
    chex.assert_trees_all_equal(*(vjp(dy) for _, vjp in results))

  @parameterized.parameters('', 'wo')
  def test_what_was_kept_under_powers_of_two_is_turned_to_such(self, role):
    """Of what is sent, no number changes; attention's output has more bits."""
    recipe = fp8_recipe.of(config.FP8Config(enabled=True), role)
    x = 1.5 + 0.4 * jnp.tanh(jnp.asarray(_draw(128, 128)))
    kept = recipe.saved if role else recipe.dispatch
    tile, scale = recipe.turned(kept)
    self.assertEqual((tile, scale), (quantize.COLUMN_TILE, 'ceil'))
    codes = kept.quantize(x)
    again = quantize.requantize(codes, tile, recipe.fmt, scale)
    expected = formats.round_to(codes.dequantize(), recipe.fmt)
    np.testing.assert_array_equal(again.dequantize(), expected)

  def test_bfloat16_activations(self):
    x = jnp.asarray(_draw(8, 128), jnp.bfloat16)
    w = jnp.asarray(_draw(128, 16))
    dy = jnp.ones((8, 16), jnp.bfloat16)
    y, dx, dw = _products(_RECIPES['v3'], x, w, dy)
    self.assertEqual([a.dtype for a in (y, dx, dw)], [x.dtype, x.dtype, 'f4'])
