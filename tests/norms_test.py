"""RMSNorm is an FP32 island (V3 section 3.3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import norms
from tests import reference, tolerances


class RMSNormTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16', 'float16')
  def test_rounds_once(self, dtype):
    """In `dtype` the squares of these would be infinite or 0, or lose bits."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 256)) * [[1e-5], [1], [30], [1000]]
    x, scale = jnp.asarray(x, dtype), jnp.asarray(rng.normal(1, 0.3, 256))
    actual = jax.jit(norms.rms_norm)(x, scale, 1e-6)
    self.assertEqual(actual.dtype, x.dtype)
    exact = reference.rms_norm(np.float64(x), np.float64(scale), 1e-6)
    if dtype == 'float32':
      tolerances.assert_close(actual, exact, tolerances.FLOAT32_MATH)
    else:
      np.testing.assert_array_equal(actual, exact.astype(x.dtype))
