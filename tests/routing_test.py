"""Routing, capacity, counts and the bias update against their equations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.config import MoEConfig
from deepseek_jax.ops import routing
from tests import reference, tolerances

_BASE = MoEConfig(
  n_routed_experts=12,
  n_activated_experts=4,
  n_expert_groups=4,
  n_limited_groups=2,
)
_MOE = dataclasses.replace


class RouteTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('v3', _BASE, 0.0),
    ('v3_all_negative', _BASE, -5.0),
    ('v3_all_groups_open', _MOE(_BASE, n_limited_groups=4), -1.0),
    ('v3_one_group', _MOE(_BASE, n_expert_groups=1, n_limited_groups=1), -1.0),
    ('not_normalised', _MOE(_BASE, norm_topk=False, route_scale=1.0), -0.5),
    (
      'v2',
      _MOE(
        _BASE,
        score_func='softmax',
        group_score='max',
        norm_topk=False,
        route_scale=16.0,
        n_limited_groups=3,
      ),
      0.0,
    ),
  )
  def test_equations(self, moe, mean_bias):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 50, 12)).astype(np.float32)
    bias = (mean_bias + rng.standard_normal(12)).astype(np.float32)
    actual = jax.jit(lambda x, b: routing.route(x, b, moe))(logits, bias)
    for b in range(2):
      for t in range(50):
        ids, weights, scores = reference.route(
          logits[b, t].astype(np.float64), bias.astype(np.float64), moe
        )
        np.testing.assert_array_equal(actual.expert_ids_TK[b, t], ids)
        tolerances.assert_close(
          actual.weights_TK[b, t], weights, tolerances.FLOAT32_MATH
        )
        tolerances.assert_close(
          actual.scores_TE[b, t], scores, tolerances.FLOAT32_MATH
        )

  def test_closed_groups_lose_even_to_very_negative_scores(self):
    bias = jnp.full(12, -100.0).at[:3].set(-10.0).at[3:6].set(-20.0)
    logits = jax.random.normal(jax.random.key(0), (64, 12))
    ids = routing.route(logits, bias, _BASE).expert_ids_TK
    self.assertTrue((ids < 6).all())

  def test_bias_selects_but_is_not_weighed_and_gets_no_gradient(self):
    logits = jax.random.normal(jax.random.key(1), (32, 12))
    bias = jnp.zeros(12).at[5].set(50.0)

    def weights(x, b):
      return routing.route(x, b, _BASE).weights_TK

    self.assertTrue(
      (routing.route(logits, bias, _BASE).expert_ids_TK[:, 0] == 5).all()
    )
    chosen = weights(logits, bias)
    tolerances.assert_close(
      chosen.sum(-1), np.full(32, 2.5), tolerances.FLOAT32_MATH
    )
    self.assertLess(chosen.max(), 2.5)

    def tilt(x, b):
      return (weights(x, b) * jnp.arange(4)).sum()

    by_logits, by_bias = jax.grad(tilt, (0, 1))(logits, bias)
    self.assertGreater(jnp.abs(by_logits).max(), 0)
    np.testing.assert_array_equal(by_bias, 0)


class CapacityTest(parameterized.TestCase):
  @parameterized.product(factor=(0.3, 1.0, 1.25, 100.0), length=(1, 7, 32))
  def test_drop_order(self, factor, length):
    """A queue per expert: first choices before second, early before late."""
    moe = MoEConfig(
      n_routed_experts=5,
      n_activated_experts=2,
      n_expert_groups=1,
      n_limited_groups=1,
      capacity_factor=factor,
    )
    rng = np.random.default_rng(length)
    logits = rng.standard_normal((3, length, 5)).astype(np.float32)
    logits[..., 0] += 1.5  # A favourite, which overflows.
    route = routing.route(jnp.asarray(logits), jnp.zeros(5), moe)
    mask = np.ones((3, length), np.float32)
    mask[1, length // 2 :] = 0  # Padding takes no place and makes none.
    actual = routing.drop_over_capacity(route, moe, jnp.asarray(mask))
    expected = np.zeros((3, length, 2), np.float32)
    for b in range(3):
      real = int(mask[b].sum())
      left = [math.ceil(factor * 2 * real / 5)] * 5
      for k in range(2):
        for t in range(real):
          expert = route.expert_ids_TK[b, t, k]
          if left[expert] > 0:
            left[expert] -= 1
            expected[b, t, k] = route.weights_TK[b, t, k]
    weights = actual.weights_TK * mask[..., None]
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(actual.expert_ids_TK, route.expert_ids_TK)
    if factor == 100.0:
      self.assertTrue((expected[0] > 0).all())


class BiasTest(parameterized.TestCase):
  def test_counts_leave_padding_out(self):
    ids = np.array([[[0, 2], [2, 1]], [[2, 0], [3, 2]]])
    mask = np.array([[1, 1], [0, 1]], np.float32)
    counts = routing.expert_counts(jnp.asarray(ids), 5, jnp.asarray(mask))
    np.testing.assert_array_equal(counts, [1, 1, 3, 1, 0])
    counts = routing.expert_counts(jnp.asarray(ids), 5)
    np.testing.assert_array_equal(counts, [2, 1, 4, 1, 0])

  def test_update_per_layer(self):
    """b_i + gamma sign(mean(c) - c_i): below the mean rises, at it stays."""
    bias = np.array([[0.5, -0.5, 0.0], [0.1, 0.2, 0.3]], np.float32)
    counts = np.array([[9, 1, 5], [4, 4, 4]], np.float32)
    actual = routing.update_bias(bias, counts, 0.25)
    expected = np.array([[0.25, -0.25, 0.0], [0.1, 0.2, 0.3]], np.float32)
    np.testing.assert_array_equal(actual, expected)
    self.assertEqual(actual.dtype, jnp.float32)
