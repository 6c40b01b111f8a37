"""The table of schedules: its arithmetic by hand, and what is measured."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.parallel import simulate, split_backward
from deepseek_jax.training import pipelined, schedules, step
from experiments import bench_pipeline

_TOKENS = 32
_ALONE = {f'parallel.{axis}': 1 for axis in ('stage', 'data')}


def _config(**parallel):
  """Of fewer tokens, on all devices of the session."""
  small = {
    'data.seq_len': _TOKENS,
    'parallel.data': 4,
    'parallel.cpu_devices': 8,
  }
  small |= {f'parallel.{name}': value for name, value in parallel.items()}
  return config_lib.replace(presets.tiny(), bench_pipeline._SHAPE | small)


def _flops(function, *args):
  """In place of its seconds: other work on the machine changes nothing."""
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.cost_analysis()['flops']


class RowTest(parameterized.TestCase):
  @parameterized.parameters(
    # A rank works for 8 x 7; 7 of 63.  9 ticks take F, 16 b, and one W.
    ('gpipe', 26, '11% | 11% | 33% | 50%', 8),
    # (1 + 2 - 2) / 25; (2 + 5 - 2) / 61.
    ('zb_h1', 25, '4% | 8% | 31% | 50%', 2),
    # Of half as many layers; 3 / 51; 7 / 119.
    ('interleaved', 50, '6% | 6% | 31% | 50%', 5),
    # 5 pairs, and 3 F and 3 B apart: both ranks always do the same.
    ('dualpipe', 14, '0% | 0% | 0% | 54%', 3),
  )
  def test_by_hand(self, name, ticks, bubbles, held):
    costs = simulate.Costs(forward=2, backward=5, weight=1, pair=6)
    measured = {'seconds': 224.0, 'bytes': 12_340_000, 'compile': 7.4}
    row = bench_pipeline._row(name, costs, measured)
    expected = f'| {name} | {ticks} | {bubbles} | {held} | 12.3 | 7 |'
    self.assertEqual(row, expected)


class MeasureTest(parameterized.TestCase):
  def test_what_is_timed_of_a_layer(self):
    """Each gradient is as many products as the forward, and a pair is all."""
    with mock.patch.object(bench_pipeline, '_seconds', _flops):
      c = bench_pipeline._costs(_config())
    self.assertBetween(c.pair / (c.forward + c.backward), 0.97, 1)
    self.assertBetween(c.weight / c.forward, 0.7, 1)
    self.assertBetween((c.backward - c.weight) / c.forward, 1, 1.4)

  @pytest.mark.slow
  def test_memory_grows_by_what_a_stage_holds(self):
    """Of GPipe 8 micro-batches, of 1F1B 2; and an inbox for gradients."""
    with mock.patch.object(bench_pipeline, '_seconds', return_value=1.0):
      gpipe, one = (
        bench_pipeline._measure(_config(schedule=name))
        for name in ('gpipe', '1f1b')
      )
    held = 2 * _residuals(_config()) + 4 * _TOKENS * _config().model.dim
    grown = (gpipe['bytes'] - one['bytes']) / (8 - 2)
    self.assertBetween(grown, held, 1.1 * held)
    self.assertGreater(one['compile'], 0)


def _residuals(config):
  """Bytes that a layer keeps of one device's part of a micro-batch."""
  model = step.build_model(config_lib.replace(config, _ALONE))
  program = pipelined.make_program(model, config, step.objective)
  variables = nn.meta.unbox(step.declare(model))
  own = (
    jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype),
      variables[name]['moe_layers'],
    )
    for name in ('params', 'router_state')
  )
  rows = jax.ShapeDtypeStruct((1, _TOKENS + 1), jnp.int32)
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  hyper = schedules.Hyper(*[scalar] * len(schedules.Hyper._fields))
  split = split_backward.split(
    program.layers['moe_layers'],
    *own,
    jax.ShapeDtypeStruct((1, _TOKENS, config.model.dim), model.dtype),
    ({'segments': rows}, (hyper, step.Totals(scalar, scalar))),
  )
  return sum(s.size * s.dtype.itemsize for s in split.residuals)


if __name__ == '__main__':
  absltest.main()
