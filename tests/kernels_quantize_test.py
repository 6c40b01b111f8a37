"""Quantising kernels: interpreted, and lowered at the real models' shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.kernels import mosaic, quantize
from deepseek_jax.ops import fused_quantize
from deepseek_jax.ops import quantize as reference
from tests import tolerances

ROW = reference.ROW_TILE


def draw(*shape, seed=0, dtype=jnp.bfloat16):
  """Rows of very different magnitude, as activations have."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * np.exp2(rng.integers(-9, 9, (shape[0], 1)))
  return jnp.asarray(x, dtype)


def assert_same(actual, expected, scale):
  """Same scales, and the same codes but for ties that a scale's last bit moves.

  Powers of two divide exactly: then every bit is the same.
  """
  tolerances.assert_close(
    actual.scales, expected.scales, tolerances.FLOAT32_MATH
  )
  a, b = (np.asarray(q.codes).view(np.uint8) for q in (actual, expected))
  if scale != 'float32':
    np.testing.assert_array_equal(a, b)
  step = np.abs(a.astype(int) - b)
  assert step.max() <= 1 and (step > 0).mean() < 0.01, (a != b).mean()


class InterpretedTest(parameterized.TestCase):
  @parameterized.parameters(*reference.SCALES)
  def test_rows(self, scale):
    x = draw(128, 512)
    with mosaic.interpreted():
      q = quantize.quantize(x, ROW, scale=scale, implementation='mosaic_gpu')
    assert_same(q, reference.quantize(x, ROW, scale=scale), scale)

  @parameterized.parameters(*reference.SCALES)
  def test_gradients_of_a_mean_over_a_large_batch(self, scale):
    x = (draw(64, 128) * 2.0**-60).at[3].set(0)
    how = {'scale': scale, 'min_amax': reference.GRADIENT_MIN_AMAX}
    with mosaic.interpreted():
      q = quantize.quantize(x, ROW, **how, implementation='mosaic_gpu')
    expected = reference.quantize(x, ROW, **how)
    np.testing.assert_array_equal(q.scales[3], expected.scales[3])
    large = [
      dataclasses.replace(v, scales=v.scales * 2.0**60) for v in (q, expected)
    ]
    assert_same(*large, scale)
    self.assertTrue(
      (np.asarray(q.dequantize()).any(1) == (np.arange(64) != 3)).all()
    )

  def test_zeros_and_what_is_not_finite(self):
    x = draw(64, 128, dtype=jnp.float32)
    x = x.at[0].set(0).at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    with mosaic.interpreted():
      q = quantize.quantize(x, ROW, implementation='mosaic_gpu')
    assert_same(
      jax.tree.map(lambda a: a[3:], q),
      jax.tree.map(lambda a: a[3:], reference.quantize(x, ROW)),
      'float32',
    )
    values = np.asarray(q.dequantize())
    np.testing.assert_array_equal(values[0], 0)
    # Whether the NaN reaches its whole tile is the device's maximum's affair.
    self.assertTrue(np.isnan(values[1, 5]) and np.isnan(values[2]).all())

  @parameterized.parameters(True, False)
  def test_swiglu(self, routed):
    gate, up = draw(64, 256, seed=1), draw(64, 256, seed=2)
    weights = jnp.linspace(0.1, 1, 64) if routed else None
    with mosaic.interpreted():
      q = quantize.swiglu(gate, up, weights, implementation='mosaic_gpu')
    assert_same(q, fused_quantize.swiglu(gate, up, weights), 'float32')

  def test_rms_norm(self):
    x, g = draw(64, 512), jnp.linspace(0.5, 2, 512)
    with mosaic.interpreted():
      q = quantize.rms_norm(x, g, 1e-6, implementation='mosaic_gpu')
    assert_same(q, fused_quantize.rms_norm(x, g, 1e-6), 'float32')


class LoweredTest(parameterized.TestCase):
  @parameterized.parameters(
    (4096, 7168), (4096, 2048), (32768, 512), (8192, 18432), (8192, 1408)
  )
  def test_rows_and_swiglu(self, T, D):
    x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((T,), jnp.float32)
    kernel = {'implementation': 'mosaic_gpu'}
    for scale in reference.SCALES:
      f = functools.partial(quantize.quantize, tile=ROW, scale=scale, **kernel)
      self.assertIn('mosaic_gpu', mosaic.lower(f, x))
    f = functools.partial(quantize.swiglu, **kernel)
    self.assertIn('mosaic_gpu', mosaic.lower(f, x, x, weights))
    self.assertIn('mosaic_gpu', mosaic.lower(f, x, x))

  @parameterized.parameters((4096, 7168), (8192, 1536), (8192, 2048))
  def test_rms_norm(self, T, D):
    x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((D,), jnp.float32)
    f = functools.partial(
      quantize.rms_norm, eps=1e-6, implementation='mosaic_gpu'
    )
    self.assertIn('mosaic_gpu', mosaic.lower(f, x, g))


if __name__ == '__main__':
  absltest.main()
