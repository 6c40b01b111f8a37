"""Sampling against `transformers` and against the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from absl.testing import absltest, parameterized

from deepseek_jax.ops import sampling
from tests import tolerances

_N = 20_000
_SIGMA = 5  # Standard deviations that a share may be off.


def _probs(*shape):
  logits = 2 * np.random.default_rng(0).standard_normal(shape)
  return np.asarray(jax.nn.softmax(logits, -1), np.float32)


def _assert_follows(tokens, probs):
  shares = np.bincount(np.asarray(tokens), minlength=len(probs)) / len(tokens)
  allowed = _SIGMA * np.sqrt(probs * (1 - probs) / len(tokens)) + 1e-9
  assert (np.abs(shares - probs) <= allowed).all(), (shares, probs)


class DistributionTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 7, 0.6), (1.0, 1, 1.0),
    (1.0, 0, 1e-6), (1.0, 99, 1.0),
  )  # fmt: skip
  def test_as_transformers(self, temperature, top_k, top_p):
    logits = np.random.default_rng(1).standard_normal((4, 30), np.float32) * 3
    chain = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k:
      chain.append(transformers.TopKLogitsWarper(top_k))
    chain.append(transformers.TopPLogitsWarper(top_p))
    expected = torch.from_numpy(logits)
    for warper in chain:
      expected = warper(None, expected)
    how = sampling.sampling(temperature, top_k, top_p)
    tolerances.assert_close(
      jax.jit(sampling.distribution)(logits, how),
      expected.softmax(-1).numpy(),
      tolerances.COMPONENT_PARITY,
    )

  def test_greedy_is_the_first_of_the_largest(self):
    how = sampling.sampling()
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, -1.0, 0.0]])
    np.testing.assert_array_equal(
      sampling.distribution(logits, how), [[0, 1, 0], [1, 0, 0]]
    )
    np.testing.assert_array_equal(sampling.choose(logits, None, how), [1, 0])

  @parameterized.parameters(1e-30, 1e-37, 2e-38, 1e-38, 1e-40, 1e-300)
  def test_a_small_temperature_is_greedy(self, temperature):
    logits = jnp.array([[-7.0, 9.0, 3.0], [2.0, -1.0, 0.0]])
    how = sampling.sampling(temperature)
    np.testing.assert_array_equal(
      jax.jit(sampling.distribution)(logits, how), [[0, 1, 0], [1, 0, 0]]
    )

  def test_any_top_k_above_the_vocabulary_is_all(self):
    logits = jnp.array([1.0, 3.0, 2.0])
    many, all_three = (sampling.sampling(1.0, k) for k in (2**40, 3))
    np.testing.assert_array_equal(
      sampling.distribution(logits, many),
      sampling.distribution(logits, all_three),
    )

  def test_draws_follow_the_probabilities(self):
    probs = np.array([0.1, 0.0, 0.2, 0.7], np.float32)
    keys = jax.random.split(jax.random.key(0), _N)
    rows = np.broadcast_to(probs, (_N, 4))
    _assert_follows(jax.jit(sampling.draw)(keys, rows), probs)


class AcceptTest(parameterized.TestCase):
  @parameterized.parameters(0, 1)
  def test_every_token_has_the_models_distribution(self, similar):
    """Given the tokens before it; whether drafts are good or bad."""
    V, D = 5, 2
    p = _probs(D + 1, V)
    q = _probs(4, V)[1 : D + 1]
    if similar:
      q = (p[:D] + 0.1) / (1 + 0.1 * V)
    keys = jax.random.split(jax.random.key(0), (_N, 2))
    drafts = jax.vmap(lambda k: sampling.draw(jax.random.split(k, D), q))(
      keys[:, 0]
    )
    how = sampling.sampling(1.0)
    count, following = jax.jit(sampling.accept)(
      drafts,
      jnp.broadcast_to(q, (_N, D, V)),
      jnp.broadcast_to(p, (_N, D + 1, V)),
      keys[:, 1],
      how,
    )
    tokens = np.concatenate([drafts, np.zeros((_N, 1), np.int32)], 1)
    tokens[np.arange(_N), count] = following
    for depth in range(D + 1):
      reached = np.asarray(count) >= depth
      self.assertGreater(reached.sum(), _N // 20)
      # p does not depend on the earlier tokens here, so neither may these.
      _assert_follows(tokens[reached, depth], p[depth])
    overlap = np.minimum(p[0], q[0]).sum()
    self.assertAlmostEqual((count > 0).mean(), overlap, delta=0.02)

  def test_greedy_accepts_what_it_would_have_said(self):
    how = sampling.sampling()
    p = np.eye(4, dtype=np.float32)[[[1, 2, 3], [0, 1, 2]]]
    drafts = np.array([[1, 2], [0, 3]], np.int32)
    q = np.eye(4, dtype=np.float32)[drafts]
    keys = jax.random.split(jax.random.key(0), 2)
    count, following = sampling.accept(drafts, q, p, keys, how)
    np.testing.assert_array_equal(count, [2, 1])
    np.testing.assert_array_equal(following, [3, 1])


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((-1.0,), 'temperature=-1.0'),
    ((float('nan'),), 'temperature=nan'),
    ((1.0, -1), 'top_k=-1'),
    ((1.0, 0, 0.0), 'top_p=0.0'),
    ((1.0, 0, 1.5), 'top_p=1.5'),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(ValueError, match=message):
    sampling.sampling(*arguments)


if __name__ == '__main__':
  absltest.main()
