"""AdamW against torch, and its edges: zeros, huge and non-finite gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax.training import optimizer
from tests import tolerances

FLOAT32 = config_lib.PrecisionConfig(
  compute_dtype='float32', mu_dtype='float32', nu_dtype='float32'
)
CONFIG = config_lib.OptimConfig()


def _params(rng):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'embed': draw(7, 4),
    'norm': draw(4),
    'layers': {'attn_norm': draw(3, 4), 'wq_b': draw(3, 4, 2, 5)},
  }


class AdamWTest(parameterized.TestCase):
  @parameterized.parameters((0.9, 0.95), (0.0, 0.999), (0.9, 0.0))
  def test_follows_torch_for_30_steps(self, b1, b2):
    rng = np.random.default_rng(0)
    params = _params(rng)
    config = config_lib.OptimConfig(b1=b1, b2=b2, weight_decay=0.3, eps=1e-6)
    tx = optimizer.adamw(config, FLOAT32)
    state = tx.init(params)
    update = jax.jit(tx.update)
    mask = [
      optimizer.decays(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    copies = [
      torch.nn.Parameter(torch.tensor(np.asarray(p)))
      for p in jax.tree.leaves(params)
    ]
    groups = [
      {'params': [c], 'weight_decay': 0.3 * decays}
      for c, decays in zip(copies, mask)
    ]
    reference = torch.optim.AdamW(groups, betas=(b1, b2), eps=1e-6)
    for step in range(30):
      lr = 0.01 * (1 + step % 5)
      scale = 10.0 ** (step % 4 - 2)  # Some gradients are clipped, some not.
      grads = jax.tree.map(
        lambda p, scale=scale: jnp.asarray(
          scale * rng.normal(size=p.shape), jnp.float32
        ),
        params,
      )
      for copy, grad in zip(copies, jax.tree.leaves(grads)):
        copy.grad = torch.tensor(np.asarray(grad))
      norm = torch.nn.utils.clip_grad_norm_(copies, config.clip_norm)
      tolerances.assert_close(
        optimizer.global_norm(grads), norm, tolerances.FLOAT32_MATH
      )
      for group in reference.param_groups:
        group['lr'] = lr
      reference.step()
      updates, state = update(grads, state, params, lr=lr)
      params = optax.apply_updates(params, updates)
    self.assertEqual(int(state.count), 30)
    expected = [copy.detach().numpy() for copy in copies]
    tolerances.assert_close(
      # Thirty steps of float32 rounding, each on top of the last.
      jax.tree.leaves(params),
      expected,
      tolerances.COMPONENT_PARITY,
    )

  def test_moments_keep_their_dtypes_and_only_they_are_rounded(self):
    precision = config_lib.PrecisionConfig(nu_dtype='float32')
    params = _params(np.random.default_rng(1))
    low, exact = (
      optimizer.adamw(CONFIG, precision),
      optimizer.adamw(CONFIG, FLOAT32),
    )
    state = low.init(params)
    updates, new = low.update(params, state, params, lr=0.1)
    expected, wide = exact.update(params, exact.init(params), params, lr=0.1)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    self.assertEqual(
      {str(x.dtype) for x in jax.tree.leaves(new.mu)}, {'bfloat16'}
    )
    self.assertEqual(
      {str(x.dtype) for x in jax.tree.leaves(new.nu)}, {'float32'}
    )
    # From zero moments, rounding what is stored does not touch this update.
    chex.assert_trees_all_equal(updates, expected)
    tolerances.assert_close(new.mu, wide.mu, tolerances.BFLOAT16)

  @parameterized.parameters('attn_norm', 'ffn_norm', 'q_norm', 'kv_norm')
  def test_stacked_norms_do_not_decay(self, name):
    params = {
      'layers': {name: jnp.ones((3, 4)), 'gate': jnp.ones((3, 4))},
      'norm': jnp.ones(4),
      'head': jnp.ones(4),
    }
    tx = optimizer.adamw(CONFIG, FLOAT32)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, lr=0.5)
    self.assertEqual(np.abs(updates['layers'][name]).max(), 0)
    self.assertEqual(np.abs(updates['norm']).max(), 0)
    decay = np.full((3, 4), -0.5 * 0.1, np.float32)
    tolerances.assert_close(
      updates['layers']['gate'], decay, tolerances.FLOAT32_MATH
    )
    tolerances.assert_close(updates['head'], decay[0], tolerances.FLOAT32_MATH)

  @parameterized.parameters(0.0, 1e-30, 1e15)
  def test_tiny_and_huge_gradients_give_finite_bounded_updates(self, scale):
    params = {'w': jnp.ones((5, 3))}
    grads = {'w': jnp.full((5, 3), scale)}
    config = config_lib.OptimConfig(weight_decay=0.0)
    tx = optimizer.adamw(config, FLOAT32)
    updates, state = tx.update(grads, tx.init(params), params, lr=1.0)
    chex.assert_tree_all_finite((updates, state))
    self.assertLessEqual(np.abs(updates['w']).max(), 1.001)
    limit = 0.1 * min(scale * np.sqrt(15), config.clip_norm)
    tolerances.assert_close(
      optimizer.global_norm(state.mu), limit, tolerances.FLOAT32_MATH
    )

  def test_infinite_clip_norm_turns_clipping_off(self):
    config = config_lib.OptimConfig(clip_norm=float('inf'))
    params = {'w': jnp.full((4,), 3.0)}
    tx = optimizer.adamw(config, FLOAT32)
    for scale in (0.0, 1e6):
      grads = {'w': jnp.full((4,), scale)}
      _, state = tx.update(grads, tx.init(params), params, lr=1.0)
      tolerances.assert_close(
        state.mu['w'], np.full(4, 0.1 * scale), tolerances.FLOAT32_MATH
      )

  @parameterized.parameters(np.nan, np.inf)
  def test_non_finite_gradient_shows_in_the_norm_and_the_updates(self, bad):
    params = {'a': jnp.ones(3), 'b': jnp.ones(2)}
    grads = {'a': jnp.array([0.0, bad, 1.0]), 'b': jnp.ones(2)}
    self.assertFalse(np.isfinite(optimizer.global_norm(grads)))
    tx = optimizer.adamw(CONFIG, FLOAT32)
    updates, _ = tx.update(grads, tx.init(params), params, lr=1.0)
    self.assertFalse(np.isfinite(updates['a']).all())

  def test_norm_of_low_precision_gradients_is_summed_in_float32(self):
    grads = {'w': jnp.ones(2**14, jnp.bfloat16), 'v': jnp.ones(3, jnp.bfloat16)}
    norm = optimizer.global_norm(grads)
    self.assertEqual(norm.dtype, jnp.float32)
    tolerances.assert_close(norm, np.sqrt(2**14 + 3), tolerances.FLOAT32_MATH)

  def test_a_new_learning_rate_does_not_compile_again(self):
    params = _params(np.random.default_rng(2))
    tx = optimizer.adamw(CONFIG, FLOAT32)

    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(n=1)
    def step(grads, state, lr):
      return tx.update(grads, state, params, lr=lr)

    state = tx.init(params)
    chex.clear_trace_counter()
    first, state = step(params, state, 1e-3)
    second, _ = step(params, state, 2e-3)
    self.assertGreater(np.abs(second['norm'] - first['norm']).max(), 0)


if __name__ == '__main__':
  absltest.main()
