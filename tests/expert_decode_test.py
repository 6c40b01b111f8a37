"""Experts at inference: the training op's result, from routed experts only."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import config
from deepseek_jax.ops import (
  expert_decode,
  experts,
  fp8_experts,
  fp8_recipe,
  quantize,
)
from tests import tolerances

_D, _F, _K = 12, 8, 3


def _case(T, E, skew=0.0):
  rng = np.random.default_rng(T)
  chance = np.arange(1, E + 1.0) ** -skew
  ids = np.stack(
    [rng.choice(E, _K, False, chance / chance.sum()) for _ in range(T)]
  )
  shapes = ((T, _D), (E, _D, _F), (E, _F, _D), (E, _D, _F))
  arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
  gates = rng.random((T, _K), np.float32)
  return (*arrays, ids.astype(np.int32), gates)


class ExpertFfnTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 16, 0.0), (3, 16, 0.0), (8, 6, 0.0), (40, 5, 2.0), (70, 3, 0.0),
    (100, 16, 3.0),
  )  # fmt: skip
  def test_is_the_training_op(self, T, E, skew):
    case = _case(T, E, skew)
    tolerances.assert_close(
      jax.jit(expert_decode.expert_ffn)(*case),
      jax.jit(experts.expert_ffn)(*case),
      tolerances.COMPONENT_PARITY,
    )

  @parameterized.parameters((3, 16), (70, 3))
  def test_id_E_is_no_expert(self, T, E):
    *arrays, ids, gates = _case(T, E)
    absent = np.random.default_rng(0).random(ids.shape) < 0.4
    tolerances.assert_close(
      jax.jit(expert_decode.expert_ffn)(
        *arrays, np.where(absent, E, ids), gates
      ),
      jax.jit(experts.expert_ffn)(*arrays, ids, np.where(absent, 0, gates)),
      tolerances.COMPONENT_PARITY,
    )

  @parameterized.parameters(1, 2, 9)
  def test_reads_only_the_experts_that_were_chosen(self, T):
    x, *matrices, ids, gates = _case(T, 32)
    unused = np.setdiff1d(np.arange(32), ids)
    self.assertNotEmpty(unused)
    for w in matrices:
      w[unused] = np.nan
    out = jax.jit(expert_decode.expert_ffn)(x, *matrices, ids, gates)
    self.assertTrue(np.isfinite(out).all())

  def test_empty_places_are_not_rows(self):
    """Of 128 received, 9 are of experts: no other is read."""
    x, *matrices, ids, gates = _case(128, 16)
    ids = np.where(np.arange(128)[:, None] < 3, ids, 16)
    for w in matrices:
      w[np.setdiff1d(np.arange(16), ids)] = np.nan
    out = jax.jit(expert_decode.expert_ffn)(x, *matrices, ids, gates)
    self.assertTrue(np.isfinite(out).all())

  @parameterized.parameters(1, 70)
  def test_in_fp8_it_is_the_training_op_of_fp8(self, T):
    x, *matrices, ids, gates = _case(T, 16)
    matrices = [
      quantize.quantize(w, quantize.SQUARE_TILE, scale='ceil') for w in matrices
    ]
    unused = np.setdiff1d(np.arange(16), ids)
    recipe = fp8_recipe.of(config.FP8Config(scale='ceil'))
    expected = fp8_experts.expert_ffn(x, *matrices, ids, gates, recipe)
    matrices = [  # What no token chose is not read.
      dataclasses.replace(w.raw, scales=w.scales.at[unused].set(np.nan))
      for w in matrices
    ]
    decode = jax.jit(expert_decode.expert_ffn, static_argnums=6)
    actual = decode(x, *matrices, ids, gates, recipe)
    tolerances.assert_close(actual, expected, tolerances.FP8_REORDERED)
    actual = decode(x, *matrices, ids, gates, None)
    matrices = [w.dequantize() for w in matrices]
    expected = decode(x, *matrices, ids, gates, None)
    tolerances.assert_close(actual, expected, tolerances.FLOAT32_MATH)

  def test_blocks_are_as_small_as_the_rows_are_few(self):
    sizes = [expert_decode.block_size(r, 32) for r in (4, 32, 33, 256, 9999)]
    self.assertEqual(sizes, [1, 2, 2, 8, 64])

  def test_many_rows_are_taken_side_by_side(self):
    rows = [expert_decode.rows_abreast(r, 32) for r in (63, 64, 256, 2048)]
    self.assertEqual(rows, [0, 8, 16, 80])
    # A prompt of one repeated token leaves most of its rows to the loop.
    x, *matrices, ids, gates = _case(64, 8)
    repeated = np.broadcast_to(ids[:1], ids.shape)
    tolerances.assert_close(
      jax.jit(expert_decode.expert_ffn)(x, *matrices, repeated, gates),
      jax.jit(experts.expert_ffn)(x, *matrices, repeated, gates),
      tolerances.COMPONENT_PARITY,
    )


if __name__ == '__main__':
  absltest.main()
