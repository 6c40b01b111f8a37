"""Cross-entropy in chunks and the balance losses against float64 equations."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.config import MoEConfig
from deepseek_jax.ops import losses, routing
from tests import jaxprs, reference, tolerances


def _cross_entropy(hidden, head, targets, weights, z):
  """float64: (loss, nll) and the gradients by hidden and head."""
  hidden, head = hidden.astype(np.float64), head.astype(np.float64)
  logits = hidden @ head.T
  top = logits.max(-1, keepdims=True)
  lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  hit = np.eye(head.shape[0])[targets]
  nll = (weights * (lse - (logits * hit).sum(-1))).sum()
  probs = np.exp(logits - lse[..., None])
  dlogits = probs * (1 + 2 * z * lse)[..., None] - hit
  dlogits *= weights[..., None]
  sums = (nll + z * (weights * lse**2).sum(), nll)
  dhead = np.einsum('btv,btd->vd', dlogits, hidden)
  return sums, (dlogits @ head, dhead)


def _inputs(batch, length, vocab=11, dim=6):
  rng = np.random.default_rng(length)
  hidden = rng.standard_normal((batch, length, dim)).astype(np.float32)
  head = rng.standard_normal((vocab, dim)).astype(np.float32)
  targets = rng.integers(vocab, size=(batch, length)).astype(np.int32)
  weights = rng.uniform(size=(batch, length)).astype(np.float32)
  weights[rng.uniform(size=weights.shape) < 0.3] = 0.0
  return hidden, head, targets, weights


class CrossEntropyTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, 1, 0.0),
    (2, 12, 10**6, 0.0),
    (2, 12, 3, 0.1),
    (3, 7, 1, 0.0),
    (3, 7, 3, 0.1),
  )
  def test_values_and_gradients(self, batch, length, tokens_a_chunk, z):
    hidden, head, targets, weights = _inputs(batch, length)
    limit = tokens_a_chunk * batch
    with mock.patch.object(losses, '_CHUNK_TOKENS', limit):

      def loss(h, w):
        sums = losses.cross_entropy(h, w, targets, weights, z)
        return 3 * sums.loss, sums

      plain = losses.cross_entropy(hidden, head, targets, weights, z)
      grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
      (_, sums), grads = jax.jit(grad)(hidden, head)
    expected, expected_grads = _cross_entropy(hidden, head, targets, weights, z)
    for actual in (plain, sums):
      tolerances.assert_close(
        list(actual), list(expected), tolerances.FLOAT32_MATH
      )
    tolerances.assert_close(
      list(grads), [3 * g for g in expected_grads], tolerances.FLOAT32_MATH
    )

  def test_chunks_of_any_length_are_few(self):
    for length, n in (4096, 8), (4093, 8), (512, 1), (1, 1), (513, 2):
      chunk = losses._chunk_length(1, length)
      self.assertLessEqual(chunk, losses._CHUNK_TOKENS)
      self.assertEqual(-(-length // chunk), n)
    hidden, head, *_ = _inputs(2, 7)
    with mock.patch.object(losses, '_CHUNK_TOKENS', 2 * 3):
      actual = losses.greedy(jnp.asarray(hidden), head)
    np.testing.assert_array_equal(actual, (hidden @ head.T).argmax(-1))

  def test_huge_logits_stay_finite(self):
    hidden, head, targets, weights = _inputs(2, 5)
    args = (1e4 * hidden, head, targets, weights)
    expected, expected_grads = _cross_entropy(*args, 0.0)
    loss, grads = jax.value_and_grad(
      lambda h, w: losses.cross_entropy(h, w, *args[2:]).loss, (0, 1)
    )(*args[:2])
    tolerances.assert_close(loss, expected[0], tolerances.FLOAT32_MATH)
    tolerances.assert_close(
      list(grads), list(expected_grads), tolerances.COMPONENT_PARITY
    )

  def test_no_array_of_all_logits_is_made(self):
    hidden, head, targets, weights = _inputs(2, 64, vocab=32)
    grad = jax.grad(
      lambda h, w: losses.cross_entropy(h, w, targets, weights).loss, (0, 1)
    )
    with mock.patch.object(losses, '_CHUNK_TOKENS', 2 * 8):
      sizes = _array_sizes(jax.make_jaxpr(grad)(hidden, head).jaxpr)
    self.assertLess(max(sizes), 2 * 64 * 32)
    self.assertIn(2 * 8 * 32, sizes)

  def test_bfloat16(self):
    hidden, head, targets, weights = _inputs(2, 12)
    low = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    loss, grads = jax.value_and_grad(
      lambda h, w: losses.cross_entropy(h, w, targets, weights).loss, (0, 1)
    )(*low)
    self.assertEqual({g.dtype for g in grads}, {jnp.dtype(jnp.bfloat16)})
    exact = (np.asarray(x, np.float64) for x in low)
    expected, expected_grads = _cross_entropy(*exact, targets, weights, 0.0)
    tolerances.assert_close(loss, expected[0], tolerances.FLOAT32_MATH)
    tolerances.assert_close(
      list(grads), list(expected_grads), tolerances.BFLOAT16
    )


def _array_sizes(jaxpr):
  """Element counts of every intermediate, inner programs included."""
  found = jaxprs.equations(jaxpr)
  return [v.aval.size for equation, _ in found for v in equation.outvars]


def _moe(aux_loss, **changes):
  fields = {
    'n_routed_experts': 8,
    'n_activated_experts': 3,
    'n_expert_groups': 4,
    'n_limited_groups': 2,
    'aux_loss': aux_loss,
  }
  return MoEConfig(**{**fields, **changes})


class BalanceLossTest(parameterized.TestCase):
  @parameterized.product(
    aux_loss=('sequence', 'batch', 'expert', 'gshard'),
    score_func=('sigmoid', 'softmax'),
  )
  def test_equations(self, aux_loss, score_func):
    """With a bias that changes the selection, groups, and padding."""
    moe = _moe(aux_loss, score_func=score_func)
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 10, 8)).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32)
    mask = np.ones((2, 10), np.float32)
    mask[0, 7:] = 0
    route = routing.route(jnp.asarray(logits), bias, moe)
    actual = losses.balance_loss(
      route.scores_TE, route.expert_ids_TK, moe, mask
    )
    rows = [
      [reference.route(x.astype(np.float64), bias, moe) for x in row]
      for row in logits
    ]
    chosen = [[token[0] for token in row] for row in rows]
    scores = [[token[2] for token in row] for row in rows]
    if aux_loss == 'batch':
      expected = 2 * reference.balance_loss(
        sum(chosen, []), sum(scores, []), mask.ravel(), moe
      )
    else:
      expected = sum(
        reference.balance_loss(chosen[b], scores[b], mask[b], moe)
        for b in range(2)
      )
    tolerances.assert_close(actual, expected, tolerances.FLOAT32_MATH)

  def test_sequence_counts_ignore_bias_and_groups(self):
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (1, 6, 8)))
    mask = jnp.ones((1, 6))
    loss = functools.partial(losses.balance_loss, scores, mask_BT=mask)
    zeros = jnp.zeros((1, 6, 3), jnp.int32)
    self.assertEqual(
      loss(expert_ids_BTK=zeros, config=_moe('sequence')),
      loss(expert_ids_BTK=zeros + 5, config=_moe('sequence')),
    )
    self.assertNotEqual(
      loss(expert_ids_BTK=zeros, config=_moe('expert')),
      loss(expert_ids_BTK=zeros + 5, config=_moe('expert')),
    )

  @parameterized.parameters('sequence', 'batch', 'expert', 'gshard')
  def test_is_one_when_balanced(self, aux_loss):
    """E f_i/E P_i with f = P = 1/E: the reason for the factor E / (K T)."""
    moe = _moe(aux_loss, n_activated_experts=1, score_func='softmax')
    scores = jnp.full((2, 8, 8), 1 / 8) + 1e-6 * jnp.eye(8)
    ids = jnp.broadcast_to(jnp.arange(8)[:, None], (2, 8, 1))
    loss = losses.balance_loss(scores, ids, moe, jnp.ones((2, 8)))
    tolerances.assert_close(loss, 2.0, tolerances.COMPONENT_PARITY)

  def test_a_row_of_padding_adds_nothing(self):
    """Not even by the batch-wise loss, which weighs by the rows in use."""
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(2), (3, 6, 8)))
    ids = jax.lax.top_k(scores, 3)[1]
    mask = jnp.ones((3, 6)).at[2].set(0)
    for kind in ('sequence', 'batch', 'expert', 'gshard'):
      moe = _moe(kind)
      tolerances.assert_close(
        losses.balance_loss(scores, ids, moe, mask),
        losses.balance_loss(scores[:2], ids[:2], moe, mask[:2]),
        tolerances.FLOAT32_MATH,
        kind,
      )

  def test_gradient_is_of_the_mean_score_alone(self):
    """d/ds of sum_i f_i mean(s_i / sum s), with f constant."""
    moe = _moe('sequence')
    scores = np.random.default_rng(5).uniform(0.1, 1, size=(1, 6, 8))
    scores = scores.astype(np.float32)
    ids = jax.lax.top_k(jnp.asarray(scores), 3)[1]
    mask = jnp.ones((1, 6))
    actual = jax.grad(losses.balance_loss)(scores, ids, moe, mask)
    s = scores[0].astype(np.float64)
    f = np.zeros(8)
    for row in s:
      f[np.argsort(row)[::-1][:3]] += 8 / (3 * 6)
    total = s.sum(-1, keepdims=True)
    expected = (f - (f * s).sum(-1, keepdims=True) / total) / total / 6
    tolerances.assert_close(actual[0], expected, tolerances.FLOAT32_MATH)
