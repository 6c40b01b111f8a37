"""Sorting, the grouped matmul and the experts' FFN against the obvious way."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import experts
from tests import reference, tolerances


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


class SortTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 3), (7, 2, 5), (40, 3, 4))
  def test_permutation(self, T, K, E):
    rng = np.random.default_rng(T)
    ids = rng.integers(E, size=(T, K)).astype(np.int32)
    ids[ids == 1] = 0  # Expert 1 is chosen by nobody.
    p = experts.sort_by_expert(jnp.asarray(ids), E)
    flat = ids.reshape(-1)
    np.testing.assert_array_equal(
      p.row_to_flat_R, np.argsort(flat, kind='stable')
    )
    np.testing.assert_array_equal(
      np.asarray(p.row_to_flat_R)[p.flat_to_row_TK.reshape(-1)],
      np.arange(T * K),
    )
    np.testing.assert_array_equal(
      p.group_sizes_E, np.bincount(flat, minlength=E)
    )

  def test_unpermute_sums_the_rows_of_each_token(self):
    rng = np.random.default_rng(2)
    ids = rng.integers(4, size=(9, 3)).astype(np.int32)
    p = experts.sort_by_expert(jnp.asarray(ids), 4)
    rows = _normal(rng, 27, 5)
    expected = np.zeros((9, 5))
    for row, flat in zip(rows, np.asarray(p.row_to_flat_R)):
      expected[flat // 3] += row
    tolerances.assert_close(
      experts.unpermute(rows, p), expected, tolerances.FLOAT32_MATH
    )


# Rows of each expert: empty groups at every place, one that holds all, sizes
# around the blocks of 64 and 256 rows and not multiples of anything.
_SIZES = (
  (5, 0, 3, 0),
  (0, 0, 0, 7),
  (300, 0, 0),
  (128, 128, 0),
  (127, 129, 1, 0, 260),
  (256, 64, 513, 0, 3, 319),
  (1,),
)


def _exact(x, w1, w2, w3, ids, weights):
  """Token by token in float64."""
  y = np.zeros(x.shape)
  for t, k in np.ndindex(*ids.shape):
    e = ids[t, k]
    p = {'w1': w1[e], 'w2': w2[e], 'w3': w3[e]}
    y[t] += weights[t, k] * reference.swiglu(p, x[t].astype(np.float64))
  return y


class ExpertFfnTest(parameterized.TestCase):
  def _problem(self, ids, E, D=8, F=5):
    rng = np.random.default_rng(3)
    shapes = ((ids.shape[0], D), (E, D, F), (E, F, D), (E, D, F))
    x, w1, w2, w3 = (_normal(rng, *shape) for shape in shapes)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    return x, w1, w2, w3, weights

  def _check(self, ids, E):
    args = self._problem(ids, E)
    T = ids.shape[0]
    dy = _normal(np.random.default_rng(4), T, args[0].shape[1])

    def dense(x, w1, w2, w3, weights):
      gates = jnp.zeros((T, E)).at[jnp.arange(T)[:, None], ids].add(weights)

      def up(w):
        return jnp.einsum('TD,EDF->TEF', x, w, precision='highest')

      hidden = jax.nn.silu(up(w1)) * up(w3) * gates[..., None]
      return jnp.einsum('TEF,EFD->TD', hidden, w2, precision='highest')

    def fast(x, w1, w2, w3, weights):
      return experts.expert_ffn(x, w1, w2, w3, jnp.asarray(ids), weights)

    y, vjp = jax.vjp(jax.jit(fast), *args)
    x, w1, w2, w3, weights = args
    tolerances.assert_close(
      y, _exact(x, w1, w2, w3, ids, weights), tolerances.FLOAT32_MATH
    )
    _, dense_vjp = jax.vjp(dense, *args)
    grads = vjp(dy)
    tolerances.assert_close(grads, dense_vjp(dy), tolerances.COMPONENT_PARITY)
    for e in set(range(E)) - set(ids.reshape(-1).tolist()):
      for dw in grads[1:4]:
        np.testing.assert_array_equal(dw[e], 0)  # Nobody's expert.

  @parameterized.parameters(*_SIZES)
  def test_group_sizes(self, *sizes):
    ids = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.random.default_rng(0).permutation(ids)[:, None].astype(np.int32)
    self._check(ids, len(sizes))

  def test_several_experts_per_token(self):
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(5)[:3] for _ in range(30)])
    self._check(ids.astype(np.int32), 6)

  def test_id_E_is_no_expert(self):
    """Nothing comes of such a choice, nor any gradient, not even of NaN."""
    rng = np.random.default_rng(5)
    ids = rng.integers(3, size=(200, 2)).astype(np.int32)
    absent = rng.random(ids.shape) < 0.5
    args = self._problem(ids, 3)
    *others, weights = args
    dy = _normal(rng, *args[0].shape)

    def run(ids, *args):
      y, vjp = jax.vjp(lambda *a: experts.expert_ffn(*a[:4], ids, a[4]), *args)
      return y, vjp(jnp.asarray(dy))

    y, gradients = jax.jit(run)(np.where(absent, 3, ids), *args)
    expected, expected_gradients = jax.jit(run)(
      ids, *others, np.where(absent, 0, weights)
    )
    tolerances.assert_close(y, expected, tolerances.FLOAT32_MATH)
    tolerances.assert_close(
      gradients[:4], expected_gradients[:4], tolerances.COMPONENT_PARITY
    )
    np.testing.assert_array_equal(gradients[4][absent], 0)
    args[0][absent.all(1)] = np.nan  # Tokens without any expert.
    y, gradients = jax.jit(run)(np.where(absent, 3, ids), *args)
    np.testing.assert_array_equal(y[absent.all(1)], 0)
    np.testing.assert_array_equal(gradients[0][absent.all(1)], 0)

  def test_a_nan_stays_in_its_token(self):
    """Blocks reach over a group's end; what they read there must not count."""
    ids = np.repeat(np.arange(3), (7, 13, 0))[:, None].astype(np.int32)
    x, w1, w2, w3, weights = self._problem(ids, 3)
    x[7:] = np.nan
    y = jax.jit(experts.expert_ffn)(x, w1, w2, w3, ids, weights)
    self.assertTrue(bool(jnp.isfinite(y[:7]).all()))
    self.assertTrue(bool(jnp.isnan(y[7:]).all()))
