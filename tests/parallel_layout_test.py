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
from deepseek_jax.inference import weights
from deepseek_jax.parallel import rules
from deepseek_jax.training import (
  checkpoint,
  ema,
  holdings,
  optimizer,
  process,
  schedules,
  step,
  trained,
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
    stages = {'parallel.stage': 8, 'parallel.schedule': '1f1b'}
    config = config_lib.replace(presets.tiny(), stages)
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


def test_no_device_reads_more_than_its_part(tmp_path):
  """Nor holds more where the model is unstacked for generation."""
  config, model, *_ = _made('one device')
  state = _state('one device', seed=3)
  average = jax.tree.map(lambda x: 2 * np.asarray(x), state.params)
  with checkpoint.Checkpointer(tmp_path, config) as saver:
    saver.save(state, {}, average)
  parallel = trained.start({'fsdp': 2, 'expert': 2})
  assert parallel == config_lib.ParallelConfig(data=2, fsdp=2, expert=2)
  for use_ema, expected in ((False, state.params), (True, average)):
    read = trained.load(tmp_path, use_ema, parallel)
    assert read.config.parallel == parallel
    params = read.variables['params']
    jax.tree.map(_assert_placed, params, read.layout.params())
    chex.assert_trees_all_equal(*jax.device_get((params, expected)))
  too_many = config_lib.ParallelConfig(expert=16)
  with pytest.raises(checkpoint.ConfigMismatch, match='must divide n_routed'):
    trained.load(tmp_path, parallel=too_many)
  for variables in (
    read.variables,
    {**read.variables, 'params': read.layout.for_inference(params)},
  ):
    divided = weights.unstack(model, variables)['params']
    for path, x in jax.tree_util.tree_leaves_with_path(divided):
      parts = 1 if x.ndim == 1 else 2 if x.ndim == 2 else None
      if path[-1].key in ('w1', 'w2', 'w3') and x.ndim == 3:
        parts = 4
      if parts:
        assert x.addressable_shards[0].data.size * parts == x.size, path


def test_devices_that_are_left_over_copy_the_model():
  assert trained.start({}) == config_lib.ParallelConfig()
  assert trained.start({'num_processes': 1}) == config_lib.ParallelConfig()
  assert trained.start({'expert': 4}).data == 2
  for axes in ({'expert': 4, 'data': 1}, {'expert': 3}, {'fsdp': 16}):
    with pytest.raises(ValueError, match='devices, but there are 8'):
      trained.start(axes)


def _assert_placed(x, sharding):
  assert x.sharding == sharding, (x.sharding, sharding)


@pytest.mark.slow
class FullSizeTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_a_step_of_every_preset_divides(self, preset):
    """Traced at full size on all axes but stages: parameters, activations."""
    config = config_lib.replace(
      presets.PRESETS[preset](),
      {
        **{f'parallel.{k}': 2 for k in rules.BATCH},
        'parallel.zero1': True,
        'data.batch_size': 16,
        'data.batch_size_start': 0,
        'train.micro_batch_size': 0,
      },
    )
    model = step.build_model(config)
    tx = optimizer.adamw(config.optim, config.precision)
    devices = jax.devices() * 2  # They are named, not used.
    where = step.layout_lib.make(step.declare(model), config, devices)
    state = step.abstract_state(model, tx, where)
    shape = (1, 16, config.data.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    batch = {'tokens': tokens, 'segments': tokens}
    hyper = schedules.Schedule(config).at(0)
    train_step = step.make_train_step(model, config, tx, layout=where)
    new, metrics = jax.eval_shape(train_step, state, batch, hyper)
    jax.tree.map(self._assert_alike, new, state)
    m = config.model
    counts = m.n_moe_layers + m.n_mtp_layers, m.moe.n_routed_experts
    self.assertEqual(metrics['counts'].shape, counts)

  def _assert_alike(self, new, old):
    self.assertEqual((new.shape, new.dtype), (old.shape, old.dtype))


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
