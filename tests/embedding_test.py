"""The embedding's gradient: a frequent token's row is a long sum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.ops import embedding
from deepseek_jax.training import pipelined, step
from tests import tolerances
from tests.drawn import draw
from tests.invariance_test import HYPER, make_batch, make_config

_PLACES = 20_000


def _summed_in(function, table, *args):
  """Dtypes of arrays like the table into which rows are added."""
  shape = ','.join(map(str, table.shape))
  text = str(jax.make_jaxpr(function)(*args))
  return set(re.findall(rf':(\w+)\[{shape}\] = scatter-add', text))


class EmbeddingTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16')
  def test_a_frequent_token_gets_its_whole_gradient(self, dtype):
    """200 of 20,000 x 0.01; a sum in bfloat16 ends at 4."""
    table = jnp.arange(8.0).reshape(4, 2).astype(dtype)
    tokens = np.array([1] * _PLACES + [2], np.int32)
    x, vjp = jax.vjp(
      lambda table: embedding.lookup(table, tokens, 'bfloat16'), table
    )
    np.testing.assert_array_equal(x, np.asarray(table, x.dtype)[tokens])
    dx = jnp.full(x.shape, 0.01, x.dtype)
    [dtable] = vjp(dx)
    self.assertEqual(dtable.dtype, dtype)
    each = float(dx[0, 0])
    expected = np.float64([0, _PLACES * each, each, 0])[:, None]
    rung = tolerances.DEEP_MODEL  # 20,000 additions in float32.
    if dtype == 'bfloat16':
      rung = tolerances.BFLOAT16
    tolerances.assert_close(dtable, np.repeat(expected, 2, 1), rung)

  def test_the_model_and_a_pipeline_sum_so(self):
    """In BF16, of float32 weights and of a step's copy in BF16."""
    config = make_config(model__n_layers=2, precision__compute_dtype='bfloat16')
    model = step.build_model(config)
    params, state = jax.tree.map(jnp.asarray, draw(config.model, None))
    program = pipelined.make_program(model, config, step.objective)
    batch, totals = make_batch(), step.Totals(4.0, 4.0)

    def gradient(params):
      def loss(params):
        args = params, state, batch, HYPER, totals
        return step.pretrain_loss(model, config, *args)[0]

      return jax.grad(loss)(params)

    for dtype in ('float32', 'bfloat16'):
      params = {**params, 'embed': params['embed'].astype(dtype)}
      table = params['embed']
      self.assertEqual(_summed_in(gradient, table, params), {'f32'})
      x, vjp = jax.vjp(lambda t: program.embed(t, batch), table)
      self.assertEqual(_summed_in(vjp, table, x), {'f32'})


if __name__ == '__main__':
  absltest.main()
