"""The train step in FP8 on 8 devices against one device, tile by tile.

Numbers that share a scale must be the same on both sides: a sequence has 128
tokens, so that tiles along the tokens end where sequences do; and one device
takes the sequences in the portions, and in the order, in which their rows come
together at an expert.  Then every code is the same; where experts are shared, a
token's rows are summed in another order, which brings a code or two of
attention's gradients, and so of the embedding's, to the other side of a tie.
"""

import collections
import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax.parallel import hlo
from tests import invariance_test as invariance
from tests import jaxprs, tolerances

_BASE = {
  'model.n_layers': 1,
  'model.n_dense_layers': 0,
  'model.n_mtp_layers': 0,
  'precision.fp8.enabled': True,
  'data.batch_size': 8,
  'parallel.expert_buffer': 0.0,  # One round.
}
_LAYOUTS = {
  'one by one': {'train.micro_batch_size': 1},
  'at once': {},
  'ZeRO-1': {'parallel.data': 8, 'parallel.zero1': True},
  'FSDP': {
    'parallel.data': 2,
    'parallel.fsdp': 4,
    'train.remat': 'full',
  },
  'EP': {'parallel.expert': 8, 'parallel.zero1': True},
  'EP, nodes': {
    'parallel.node': 2,
    'parallel.expert': 4,
    'train.remat': 'selective',
  },
}
# V3's dtype, and three tiles a row, the last ragged.
_BFLOAT16 = (('precision.compute_dtype', 'bfloat16'), ('model.dim', 264))
# Of two hops an expert sees first what came through rank 0 of its node: the
# sequences of rank 0 of either node.
_BY_RANK = (0, 4, 1, 5, 2, 6, 3, 7)


def _config(layout, more=()):
  config = invariance.make_config()
  return config_lib.replace(config, {**_BASE, **_LAYOUTS[layout], **dict(more)})


def _batch():
  """Documents of very different lengths, and padding."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(512, size=(8, 129)).astype(np.int32)
  segments = np.ones_like(tokens)
  for row, end in zip(segments, rng.integers(20, 129, size=8)):
    row[end // 2 :] = 2
    row[end:] = 0
  return {'tokens': tokens, 'segments': segments}


def _arguments(config, batch):
  """Master weights are numbers that the compute dtype holds."""
  state, batch = invariance.arguments(config, batch)
  dtype = config.precision.compute_dtype
  params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), state.params)
  return state.replace(params=params), batch, invariance.HYPER


@functools.cache
def _program(layout, more=()):
  config = _config(layout, more)
  train_step, _ = invariance.step_of(config)
  traced = train_step.trace(*_arguments(config, _batch()))
  return traced.lower().compile(), traced.jaxpr


@functools.cache
def _results(layout, order=tuple(range(8)), more=()):
  """(report, gradients, biases) of one step."""
  batch = jax.tree.map(lambda x: x[list(order)], _batch())
  program, _ = _program(layout, more)
  new, metrics = program(*_arguments(_config(layout, more), batch))
  names = [n for n in metrics if n.endswith('loss')]
  report = {n: metrics[n] for n in [*names, 'counts', 'grad_norm']}
  return jax.device_get((report, new.opt_state, new.router_state))


def _without_attention(results):
  """(results but for the gradients of attention and before it, these)."""
  report, grads, biases = results
  layers = dict(grads['moe_layers'])
  before = {name: layers.pop(name) for name in ('attn', 'attn_norm')}
  rest = {**grads, 'moe_layers': layers}
  before['embed'] = rest.pop('embed')
  return (report, rest, biases), before


@pytest.mark.slow
class Fp8LayoutTest(parameterized.TestCase):
  @parameterized.parameters('ZeRO-1', 'FSDP')
  def test_devices_that_share_sequences(self, layout):
    """Each is one device that has its sequences, one by one."""
    self._assert_same(_results(layout), _results('one by one'))

  @parameterized.parameters('ZeRO-1', 'FSDP')
  def test_bfloat16(self, layout):
    """A gradient of a weight stays float32 until it is summed."""
    actual, expected = (
      _results(name, more=_BFLOAT16) for name in (layout, 'one by one')
    )
    self._assert_same(actual, expected)
    _, jaxpr = _program(layout, _BFLOAT16)
    found = jaxprs.rounded(jaxpr)
    self.assertNotEmpty(found)
    weights = jaxprs.weight_shapes(actual[1]['moe_layers'])
    self.assertEmpty(found & weights)

  def test_devices_that_share_experts(self):
    """An expert's rows come from all sequences, in their order."""
    rung = tolerances.FP8_TILES
    self._assert_same(_results('EP'), _results('at once'), rung)

  def test_two_hops(self):
    expected = _results('at once', _BY_RANK)
    actual, rung = _results('EP, nodes'), tolerances.FP8_TILES
    self._assert_same(actual, expected, rung)
    # The order matters: other rows share a scale.
    with self.assertRaisesRegex(AssertionError, 'grad_norm.*error'):
      self._assert_same(actual, _results('at once'), rung)

  @parameterized.parameters('EP', 'EP, nodes')
  def test_rows_are_dispatched_as_bytes_and_combined_as_they_are(self, layout):
    """Tokens and gradients one way, and the same back in float32."""
    _, where = invariance.step_of(_config(layout))
    found = hlo.collectives(
      hlo.parse(_program(layout)[0].as_text()), where.mesh.shape
    )
    # What is smaller are scales, a byte for each row, gate weights and counts.
    moved = collections.Counter()
    for c in found:
      if c.kind == 'all-to-all':
        (dtype,) = c.dtypes
        moved[dtype, c.payload >= 2**13] += c.payload * c.times
    self.assertGreater(moved['u8', True], 0)
    self.assertEqual(4 * moved['u8', True], moved['f32', True])
    dim = _config(layout).model.dim
    self.assertEqual(dim * moved['u8', False], moved['u8', True])

  def _assert_same(self, actual, expected, rung=tolerances.COMPONENT_PARITY):
    """`rung`: of the gradients of attention and before it."""
    (a_rest, a_attention), (e_rest, e_attention) = map(
      _without_attention, (actual, expected)
    )
    tolerances.assert_close(a_rest, e_rest, tolerances.COMPONENT_PARITY)
    tolerances.assert_close(a_attention, e_attention, rung, 'attention')
    jax.tree.map(np.testing.assert_array_equal, actual[2], expected[2])


if __name__ == '__main__':
  absltest.main()
