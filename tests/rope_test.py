"""RoPE and YaRN against their equations and the published numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax import presets
from deepseek_jax.config import RopeConfig
from deepseek_jax.ops import rope
from tests import reference, tolerances

_V3_LONG = RopeConfig(factor=40.0)


class FrequenciesTest(parameterized.TestCase):
  @parameterized.parameters(
    (RopeConfig(), 64),
    (_V3_LONG, 64),
    (RopeConfig(factor=40.0, original_seq_len=16), 4),
    (RopeConfig(factor=4.0, original_seq_len=100, theta=500.0), 10),
    (RopeConfig(factor=8.0, original_seq_len=1), 2),
  )
  def test_equation(self, config, head_dim):
    tolerances.assert_close(
      rope.frequencies(config, head_dim),
      reference.yarn_frequencies(config, head_dim),
      tolerances.FLOAT32_MATH,
    )

  def test_v3_ramp_is_from_pair_10_to_pair_23(self):
    plain = rope.frequencies(RopeConfig(), 64)
    ratio = plain.astype(np.float64) / rope.frequencies(_V3_LONG, 64)
    np.testing.assert_array_equal(ratio[:11], 1)
    tolerances.assert_close(
      ratio[23:], np.full(9, 40.0), tolerances.FLOAT32_MATH
    )
    self.assertTrue((np.diff(ratio[10:24]) > 0).all())

  def test_published_softmax_scales(self):
    self.assertAlmostEqual(rope.softmax_scale(RopeConfig(), 192), 0.0721688, 7)
    self.assertAlmostEqual(rope.softmax_scale(_V3_LONG, 192), 0.1352338, 7)
    v2 = dataclasses.replace(presets.deepseek_v2().model.rope, factor=40.0)
    # V2 section 3.1.4 prints 0.0707 ln s + 1 = 1.26080.
    ratio = rope.softmax_scale(v2, 192) / rope.softmax_scale(RopeConfig(), 192)
    self.assertAlmostEqual(ratio, (0.0707 * np.log(40) + 1) ** 2, 5)


class RotateTest(parameterized.TestCase):
  @parameterized.parameters(((2, 9, 3, 8),), ((2, 9, 8),))
  def test_equation(self, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    positions = rng.integers(100, size=shape[:2])
    config = RopeConfig(factor=40.0, original_seq_len=16)
    actual = rope.rotate(jnp.asarray(x), jnp.asarray(positions), config)
    expected = np.stack(
      [
        np.stack(
          [
            reference.rotate(
              x[b, t].astype(np.float64), positions[b, t], config
            )
            for t in range(shape[1])
          ]
        )
        for b in range(shape[0])
      ]
    )
    # The angle itself is a float32: up to 100 radians, each good to 6e-8.
    tolerances.assert_close(actual, expected, tolerances.COMPONENT_PARITY)

  def test_scores_depend_on_distance_only(self):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(i, j):
      def at(p):
        return jnp.full((1, 1), p, jnp.int32)

      rotated = rope.rotate(q[None], at(i), _V3_LONG)
      return jnp.sum(rotated * rope.rotate(k[None], at(j), _V3_LONG))

    scores = jax.vmap(score)(
      jnp.array([7, 107, 1007]), jnp.array([2, 102, 1002])
    )
    tolerances.assert_close(
      scores, np.full(3, scores[0]), tolerances.DEEP_MODEL
    )
    self.assertGreater(abs(score(7, 3) - scores[0]), 1e-2)

  def test_keeps_dtype_and_position_zero(self):
    x = jnp.arange(1.0, 9.0, dtype=jnp.bfloat16).reshape(1, 1, 8)
    out = rope.rotate(x, jnp.zeros((1, 1), jnp.int32), RopeConfig())
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      np.asarray(out, np.float32), np.asarray(x, np.float32)
    )
