"""The one ladder of tolerances; a test names a rung, never a number.

Each rung is a pair of keyword arguments for `np.testing.assert_allclose`,
relative to the largest magnitude of the expected array: use `assert_close`.
"""

import jax
import numpy as np

FLOAT32_MATH = 1e-6  # One operation against its float64 equation.
COMPONENT_PARITY = 1e-5  # One layer against another implementation.
DEEP_MODEL = 1e-4  # Many layers, or gradients through them.
BFLOAT16 = 2e-2
# FP8 products summed in another order: now and then a code falls on the other
# side of a tie.  A tile quantised otherwise is ten times as far away.
FP8_REORDERED = 5e-3
FP8_TILES = 6e-2  # Products of operands quantised in other tiles.


def assert_close(actual, expected, rung, name=''):
  """Asserts max|actual - expected| <= rung * max(1e-8, max|expected|)."""

  def check(path, a, e):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    assert a.shape == e.shape, (name, path, a.shape, e.shape)
    assert np.isfinite(a).all(), f'{name}{path} is not finite'
    error = np.abs(a - e).max(initial=0.0)
    limit = rung * max(1e-8, np.abs(e).max(initial=0.0))
    assert error <= limit, (
      f'{name}{jax.tree_util.keystr(path)}: error {error:.3e} above {limit:.3e}'
    )

  jax.tree_util.tree_map_with_path(check, actual, expected)
