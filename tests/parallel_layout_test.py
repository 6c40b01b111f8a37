"""Where a run's arrays lie: first values, checkpoints and tables of layouts."""

import functools

import chex
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.training import (
  checkpoint,
  ema,
  holdings,
  optimizer,
  process,
  step,
)

_LAYOUTS = {
  'one device': {},
  'data 2, expert 4': {'data': 2, 'expert': 4, 'zero1': True},
  'fsdp 8': {'fsdp': 8},
  'data 8': {'data': 8},
}


def _config(layout):
  changes = {f'parallel.{k}': v for k, v in _LAYOUTS[layout].items()}
  return config_lib.replace(presets.tiny(), changes)


@functools.cache
def _made(layout):
  """(config, model, tx, layout)."""
  config = _config(layout)
  model = step.build_model(config)
  tx = optimizer.adamw(config.optim, config.precision)
  return config, model, tx, step.make_layout(model, config)


def _state(layout, seed=0):
  _, model, tx, where = _made(layout)
  return step.init_state(model, tx, seed, where)


class InitTest(parameterized.TestCase):
  @parameterized.parameters(*list(_LAYOUTS)[1:])
  def test_the_first_state_is_the_same_in_parts(self, layout):
    state = _state(layout)
    chex.assert_trees_all_equal(
      jax.device_get(state), jax.device_get(_state('one device'))
    )
    where = _made(layout)[3]
    expected = where.state(state)
    jax.tree.map(lambda x, s: self.assertEqual(x.sharding, s), state, expected)
    w1 = state.params['moe_layers']['ffn']['w1'].addressable_shards[0].data
    parts = 1 if layout == 'data 8' else 8
    self.assertEqual(
      w1.size * parts, state.params['moe_layers']['ffn']['w1'].size
    )

  def test_moments_lie_with_their_parameters(self):
    state = _state('fsdp 8')
    for moment in (state.opt_state.mu, state.opt_state.nu):
      chex.assert_trees_all_equal_structs(moment, state.params)
      jax.tree.map(
        lambda m, p: self.assertEqual(m.sharding, p.sharding),
        moment,
        state.params,
      )

  def test_stages_divide_what_is_stored_and_nothing_else(self):
    config = config_lib.replace(presets.tiny(), {'parallel.stage': 8})
    layout = step.make_layout(step.build_model(config), config)
    stored = layout.stored['moe_layers']['ffn']['w1']
    self.assertEqual(stored, PartitionSpec(None, None, 'stage', None))
    for tree in (layout.step, layout.used):
      for spec in jax.tree.leaves(tree):
        self.assertNotIn('stage', str(spec))


@pytest.mark.parametrize('source', list(_LAYOUTS))
@pytest.mark.parametrize('target', list(_LAYOUTS))
def test_a_checkpoint_of_one_layout_is_read_by_another(
  source, target, tmp_path
):
  config, *_ = _made(source)
  state = _state(source, seed=3)
  average = ema.HostEMA(state.params, 0.5)
  average.update(jax.tree.map(lambda x: 0 * x, state.params))
  with checkpoint.Checkpointer(tmp_path, config) as saver:
    saver.save(state, {'next': 7}, average.value())
  average.close()

  config, model, tx, where = _made(target)
  with checkpoint.Checkpointer(tmp_path, config) as saver:
    like = step.abstract_state(model, tx, where)
    restored, data, saved_average = saver.restore(like)
  chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
  assert data == {'next': 7}
  if where:
    jax.tree.map(_assert_placed, restored, where.state(restored))
  again = ema.HostEMA(saved_average, 0.5)
  chex.assert_trees_all_equal(
    jax.device_get(again.value()),
    jax.tree.map(lambda x: np.asarray(x) / 2, state.params),
  )
  again.update(restored.params)
  again.wait()
  again.close()
  # Evaluation and generation are on one device, whoever trained.
  loaded, variables, _ = checkpoint.load_for_inference(tmp_path)
  assert loaded.parallel == config_lib.ParallelConfig()
  chex.assert_trees_all_equal(
    jax.device_get(variables['params']), jax.device_get(state.params)
  )


def _assert_placed(x, sharding):
  assert x.sharding == sharding, (x.sharding, sharding)


class HoldingsTest(parameterized.TestCase):
  def test_v3_on_its_published_data_and_expert_axes(self):
    """FACTS 2.2's 64 expert and 2 data ranks, the pipeline left out."""
    config = config_lib.replace(
      presets.deepseek_v3(),
      {
        'parallel.data': 2,
        'parallel.node': 8,
        'parallel.expert': 8,
        'parallel.zero1': True,
      },
    )
    model = step.build_model(config)
    declared, devices = step.declare(model), [jax.devices()[0]] * 128
    where = step.layout_lib.make(declared, config, devices)
    held = holdings.total(holdings.holdings(declared, config, where))
    # 683,600,000,000 parameters with MTP; master and two BF16 moments.
    total = held.elements * 8 / 128
    self.assertBetween(held.state, total, 1.001 * total)
    lines = holdings.holdings(declared, config, where)
    experts = [line for line in lines if line.name.endswith('experts')]
    for line in experts:
      self.assertEqual(line.state, line.elements * 8 // 128)
      self.assertEqual(line.copy, line.elements * 2 // 64)
      self.assertEqual(line.gradients, line.elements * 4 // 64)

  def test_the_table_adds_up(self):
    config, model, _, where = _made('data 2, expert 4')
    text = holdings.table(step.declare(model), config, where)
    state = _state('data 2, expert 4')
    tree = (state.params, state.opt_state.mu, state.opt_state.nu)
    here = sum(
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
    )
    self.assertIn('mesh: data 2, expert 4', text)
    self.assertIn(f'{here / 1000:.3g} kB', text.splitlines()[-1])


class ProcessTest(parameterized.TestCase):
  def test_alone_nobody_is_asked(self):
    process.meet()
    self.assertTrue(process.is_first())
    self.assertFalse(process.all_true(False))
    agree = process.Agreement(None)
    self.assertEqual([agree(0), agree(15)], [0, 15])
    with self.assertRaisesRegex(ValueError, 'mine'), process.together():
      raise ValueError('mine')

  def test_a_batch_is_shared_by_all_devices(self):
    where = _made('data 8')[3]
    self.assertEqual(where.share(16), (0, 1))
    rows = np.arange(2 * 16 * 3, dtype=np.int32).reshape(2, 16, 3)
    placed = where.put_batch({'tokens': rows})['tokens']
    np.testing.assert_array_equal(placed, rows)
    self.assertEqual(placed.addressable_shards[0].data.shape, (2, 2, 3))

  def test_devices_that_are_not_there_are_refused(self):
    config = config_lib.ParallelConfig(cpu_devices=3)
    with self.assertRaisesRegex(ValueError, 'cpu_devices=3: JAX has started'):
      process.join(config)
    process.join(config_lib.ParallelConfig(cpu_devices=8))


if __name__ == '__main__':
  absltest.main()
