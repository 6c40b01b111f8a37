"""Sorting, the grouped matmul and the experts' FFN against the obvious way."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import experts
from tests import reference, tolerances

# Group sizes: empty ones at every place, one that holds all, sizes around the
# block of 128 rows and not multiples of anything.
_SIZES = (
  (5, 0, 3, 0),
  (0, 0, 0, 7),
  (300, 0, 0),
  (128, 128, 0),
  (127, 129, 1, 0, 260),
  (1,),
)


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


class GroupedMatmulTest(parameterized.TestCase):
  @parameterized.parameters(*_SIZES)
  def test_value_and_gradients(self, *sizes):
    rng = np.random.default_rng(sum(sizes))
    rows, E = sum(sizes), len(sizes)
    x, w, dy = (
      _normal(rng, rows, 9),
      _normal(rng, E, 9, 4),
      _normal(rng, rows, 4),
    )
    y, vjp = jax.vjp(
      lambda x, w: experts.grouped_matmul(x, w, jnp.array(sizes, jnp.int32)),
      x,
      w,
    )
    x64, w64, dy64 = (a.astype(np.float64) for a in (x, w, dy))
    expected = [np.zeros_like(a) for a in (dy64, x64, w64)]
    end = 0
    for e, size in enumerate(sizes):
      own = slice(end, end := end + size)
      expected[0][own] = x64[own] @ w64[e]
      expected[1][own] = dy64[own] @ w64[e].T
      expected[2][e] = x64[own].T @ dy64[own]
    tolerances.assert_close([y, *vjp(dy)], expected, tolerances.FLOAT32_MATH)

  def test_reference_is_the_same_function(self):
    rng = np.random.default_rng(0)
    args = _normal(rng, 8, 9), _normal(rng, 4, 9, 5), jnp.array([5, 0, 3, 0])
    tolerances.assert_close(
      experts.grouped_matmul(*args),
      experts.grouped_matmul_reference(*args),
      tolerances.FLOAT32_MATH,
    )

  def test_a_nan_stays_in_its_group(self):
    """Blocks reach over a group's end; what they read there must not count."""
    rng = np.random.default_rng(1)
    x, w = _normal(rng, 20, 3), _normal(rng, 3, 3, 2)
    x[7:] = np.nan
    sizes = jnp.array([7, 13, 0])
    y, vjp = jax.vjp(lambda x, w: experts.grouped_matmul(x, w, sizes), x, w)
    dx, dw = vjp(jnp.ones_like(y))
    finite = [bool(jnp.isfinite(a).all()) for a in (y[:7], dx, dw[0], dw[2])]
    self.assertEqual(finite, [True] * 4)
    np.testing.assert_array_equal(dw[2], 0)
    self.assertTrue(jnp.isnan(y[7:]).all())


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

  def test_permute_and_unpermute_are_each_others_transpose(self):
    rng = np.random.default_rng(2)
    ids = rng.integers(4, size=(9, 3)).astype(np.int32)
    p = experts.sort_by_expert(jnp.asarray(ids), 4)
    gather = np.zeros((27, 9))  # The matrix that copies tokens to rows.
    gather[np.arange(27), np.asarray(p.row_to_flat_R) // 3] = 1
    x, rows = _normal(rng, 9, 5), _normal(rng, 27, 5)
    for function, argument, cotangent, matrix in (
      (experts.permute, x, rows, gather),
      (experts.unpermute, rows, x, gather.T),
    ):
      y, vjp = jax.vjp(lambda a, f=function: f(a, p), argument)
      tolerances.assert_close(
        [y, *vjp(cotangent)],
        [matrix @ argument, matrix.T @ cotangent],
        tolerances.FLOAT32_MATH,
      )


class ExpertFfnTest(parameterized.TestCase):
  def test_value_and_gradients(self):
    """Against every expert on every token, the unchosen with weight 0."""
    rng = np.random.default_rng(3)
    T, K, E, D, F = 30, 3, 6, 8, 5
    x, w1, w2, w3 = (
      _normal(rng, *shape)
      for shape in ((T, D), (E, D, F), (E, F, D), (E, D, F))
    )
    ids = np.stack([rng.permutation(E - 1)[:K] for _ in range(T)])
    weights = rng.uniform(size=(T, K)).astype(np.float32)
    dy = _normal(rng, T, D)

    def dense(x, w1, w2, w3, weights):
      gates = jnp.zeros((T, E)).at[jnp.arange(T)[:, None], ids].add(weights)

      def up(w):
        return jnp.einsum('TD,EDF->TEF', x, w, precision='highest')

      hidden = jax.nn.silu(up(w1)) * up(w3) * gates[..., None]
      return jnp.einsum('TEF,EFD->TD', hidden, w2, precision='highest')

    def fast(x, w1, w2, w3, weights):
      return experts.expert_ffn(x, w1, w2, w3, jnp.asarray(ids), weights)

    y, vjp = jax.vjp(jax.jit(fast), x, w1, w2, w3, weights)
    exact = np.zeros((T, D))
    for t in range(T):
      for k in range(K):
        p = {w: a[ids[t, k]] for w, a in (('w1', w1), ('w2', w2), ('w3', w3))}
        exact[t] += weights[t, k] * reference.swiglu(p, x[t].astype(np.float64))
    tolerances.assert_close(y, exact, tolerances.FLOAT32_MATH)
    _, dense_vjp = jax.vjp(dense, x, w1, w2, w3, weights)
    tolerances.assert_close(vjp(dy), dense_vjp(dy), tolerances.COMPONENT_PARITY)
    np.testing.assert_array_equal(vjp(dy)[1][E - 1], 0)  # Nobody's expert.
