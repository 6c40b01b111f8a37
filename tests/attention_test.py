"""Blockwise attention against softmax(q k^T) v in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import attention
from tests import jaxprs, reference, tolerances

_B, _N, _H, _U = 2, 2, 6, 4
_SCALE = 0.7


def _inputs(length, documents):
  rng = np.random.default_rng(length)
  shapes = ((_B, length, _N, w) for w in (_H, _H, _U, _U))
  q, k, v, dout = (rng.standard_normal(s).astype(np.float32) for s in shapes)
  segments = None
  if documents:
    cuts = rng.uniform(size=(_B, length)) < 0.1
    segments = (1 + cuts.cumsum(1)).astype(np.int32)
    segments[:, length - length // 8 :] = 0  # Padding at the end.
  return q, k, v, dout, segments


def _exact(q, k, v, dout, segments):
  """Output and gradients by q, k, v, float64, with all scores at once."""
  q, k, v, dout = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, dout))
  length = q.shape[2]
  seen = np.tril(np.ones((length, length), bool))
  if segments is not None:
    seen = (segments[:, None, :, None] == segments[:, None, None]) & seen
  scores = np.where(seen, _SCALE * q @ k.swapaxes(2, 3), -np.inf)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  out = probs @ v
  dprobs = dout @ v.swapaxes(2, 3)
  dscores = probs * (dprobs - (dprobs * probs).sum(-1, keepdims=True)) * _SCALE
  dq, dk = dscores @ k, dscores.swapaxes(2, 3) @ q
  dv = probs.swapaxes(2, 3) @ dout
  return [x.swapaxes(1, 2) for x in (out, dq, dk, dv)]


class AttendTest(parameterized.TestCase):
  @parameterized.product(
    length=(1, 255, 257, 600),
    documents=(False, True),
  )
  def test_value_and_gradients(self, length, documents):
    q, k, v, dout, segments = _inputs(length, documents)
    expected = _exact(q, k, v, dout, segments)
    for attend in (attention.attend, attention.attend_reference):

      def run(q, k, v, dout, attend=attend):
        def apply(*a):
          return attend(*a, _SCALE, segments)

        out, vjp = jax.vjp(apply, q, k, v)
        return [out, *vjp(dout)]

      tolerances.assert_close(
        jax.jit(run)(q, k, v, dout),
        expected,
        tolerances.COMPONENT_PARITY,
        attend.__name__,
      )

  def test_one_query_at_a_time(self):
    """The exact function above against the equation's plain loop."""
    q, k, v, dout, segments = _inputs(12, True)
    exact = _exact(q, k, v, dout, segments)[0]
    for b in range(_B):
      tolerances.assert_close(
        exact[b],
        reference.attend(q[b], k[b], v[b], _SCALE, segments[b]),
        tolerances.FLOAT32_MATH,
      )

  def test_large_scores_do_not_overflow(self):
    q, k, v, dout, _ = _inputs(130, False)
    run = jax.jit(
      jax.value_and_grad(
        lambda q: (attention.attend(q, k, v, _SCALE) * dout).sum()
      )
    )
    value, grad = run(1e4 * q)
    expected = (_exact(1e4 * q, k, v, dout, None)[0] * dout).sum()
    tolerances.assert_close(value, expected, tolerances.DEEP_MODEL)
    self.assertTrue(jnp.isfinite(grad).all())

  def test_bfloat16(self):
    *arrays, segments = _inputs(150, True)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]

    def apply(q, k, v):
      return attention.attend(q, k, v, _SCALE, segments)

    out, vjp = jax.vjp(apply, *low[:3])
    actual = [out, *vjp(low[3])]
    self.assertEqual({x.dtype for x in actual}, {jnp.dtype(jnp.bfloat16)})
    expected = _exact(*(np.asarray(x, np.float32) for x in low), segments)
    tolerances.assert_close(actual, expected, tolerances.BFLOAT16)

  def test_scores_and_softmax_of_bfloat16_are_float32(self):
    length = 150
    *arrays, segments = _inputs(length, True)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]

    def both(q, k, v, dout):
      def apply(q, k, v):
        return attention.attend(q, k, v, _SCALE, segments)

      out, vjp = jax.vjp(apply, q, k, v)
      return out, vjp(dout)

    found = {}
    for eqn, _ in jaxprs.equations(jax.make_jaxpr(both)(*low).jaxpr):
      out, name = eqn.outvars[0].aval, eqn.primitive.name
      # Only products of queries and keys, or the like, have a score's shape.
      if name != 'dot_general' or out.shape[-2:] == (length, length):
        found.setdefault(name, set()).add(out.dtype.name)
    for name in ('dot_general', 'exp', 'log', 'reduce_max', 'reduce_sum'):
      self.assertEqual(found[name], {'float32'}, name)

  def test_the_blocks_cover_every_query_once(self):
    for length in (1, 127, 128, 129, 300, 2048, 2049, 4095, 5000):
      blocks = attention._blocks(length)
      self.assertEqual([0, *(end for _, end in blocks[:-1])],
                       [start for start, _ in blocks])  # fmt: skip
      self.assertEqual(blocks[-1][1], length)
      self.assertLessEqual(len(blocks), 16)
