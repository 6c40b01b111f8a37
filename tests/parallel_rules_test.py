"""Meshes, and what divides what: every parameter of every preset."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.layers import params
from deepseek_jax.ops import losses
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.parallel import rules, sharding
from deepseek_jax.training import step
from tests import tolerances

_SINGLE = dict.fromkeys(mesh_lib.AXES, 1)
_LAYOUTS = {
  'SINGLE': {},
  'DP': {'data': 8},
  'FSDP': {'data': 2, 'fsdp': 4},
  'EP': {'node': 2, 'expert': 4},
  'EP+FSDP': {'data': 2, 'fsdp': 2, 'expert': 2},
}

_HALVES = {
  'parallel.data': 2,
  'parallel.expert': 2,
  'parallel.interleave': True,
}


def _sizes(layout):
  return {**_SINGLE, **_LAYOUTS[layout]}


@functools.cache
def _boxes(preset):
  """(path, `Parameter` of a shape) of a preset at full size."""
  model = step.build_model(presets.PRESETS[preset]())
  return jax.tree_util.tree_leaves_with_path(
    step.declare(model)['params'],
    is_leaf=lambda x: isinstance(x, params.Parameter),
  )


def _parts(spec, sizes):
  axes = [axis for entry in spec for axis in rules.axes_of(entry)]
  assert len(axes) == len(set(axes)), spec
  return math.prod(sizes[axis] for axis in axes)


class RulesTest(parameterized.TestCase):
  @parameterized.product(preset=tuple(presets.PRESETS), layout=tuple(_LAYOUTS))
  def test_every_parameter_has_its_place(self, preset, layout):
    sizes = _sizes(layout)
    for path, box in _boxes(preset):
      shape, names = box.value.shape, box.names
      with self.subTest(jax.tree_util.keystr(path)):
        place = rules.place(names, shape, sizes, zero1=True)
        for spec in place:
          for n, entry in zip(shape, spec, strict=True):
            self.assertEqual(n % _parts([entry], sizes), 0)
        stored, used_step, used = (_parts(spec, sizes) for spec in place)
        experts = sizes['node'] * sizes['expert'] if 'experts' in names else 1
        self.assertEqual(used, experts)
        if math.prod(shape) >= 2**24:  # What matters is divided by all.
          self.assertEqual(used_step, experts * sizes['fsdp'])
          everyone = math.prod(sizes[axis] for axis in rules.BATCH)
          self.assertEqual(stored, everyone)
        plain = rules.place(names, shape, sizes)
        self.assertEqual(plain, (place.step, place.step, place.used))

  def test_v3_experts(self):
    sizes = {**_SINGLE, 'data': 2, 'node': 8, 'expert': 8, 'fsdp': 4}
    names, shape = ('layers', 'experts', 'dim', 'mlp'), (58, 256, 7168, 2048)
    stored, used_step, used = rules.place(names, shape, sizes, zero1=True)
    experts = ('node', 'expert')
    self.assertEqual(used, PartitionSpec(None, experts, None, None))
    self.assertEqual(used_step, PartitionSpec(None, experts, 'fsdp', None))
    self.assertEqual(
      stored, PartitionSpec(None, experts, ('fsdp', 'data'), None)
    )

  def test_a_dimension_that_fsdp_does_not_divide_is_passed_over(self):
    place = rules.place(('dim', 'heads'), (6, 8), {**_SINGLE, 'fsdp': 4})
    self.assertEqual(place.step, PartitionSpec(None, 'fsdp'))
    place = rules.place(('dim', 'heads'), (6, 7), {**_SINGLE, 'fsdp': 4})
    self.assertEqual(place.step, PartitionSpec(None, None))
    # ZeRO-1 takes as many axes as divide.
    sizes = {**_SINGLE, 'data': 2, 'expert': 4}
    place = rules.place(('dim', 'heads'), (6, 7), sizes, zero1=True)
    self.assertEqual(place.stored, PartitionSpec('data', None))

  @parameterized.parameters(
    (('batch', 'experts'), (8, 8), 'divide two dimensions'),
    (('batch', 'sequence'), (8, 8), "unknown dimension 'sequence'"),
    (('experts', 'dim'), (6, 8), 'experts=6'),
    (('dim',), (8, 8), '1 names'),
  )
  def test_bad_divisions_are_refused(self, names, shape, message):
    with self.assertRaisesRegex(ValueError, message):
      rules.spec(names, shape, {**_SINGLE, 'expert': 4})


class MeshTest(parameterized.TestCase):
  def test_axes_are_auto_and_experts_are_neighbours(self):
    config = config_lib.ParallelConfig(data=2, expert=4)
    mesh = mesh_lib.build(config)
    self.assertEqual(dict(mesh.shape), {**_SINGLE, 'data': 2, 'expert': 4})
    self.assertEqual(set(mesh.axis_types), {AxisType.Auto})
    ids = [d.id for d in mesh.devices[0, 0, 0, 0]]
    self.assertEqual(ids, [0, 1, 2, 3])

  @parameterized.parameters(
    ('cpu', 2, ()),
    ('gpu', 1, ('latency_hiding_scheduler',)),
    (
      'gpu',
      2,
      (
        'latency_hiding_scheduler',
        'pipelined_all_gather',
        'pipelined_reduce_scatter',
      ),
    ),
  )
  def test_gpus_compute_while_they_send(self, platform, fsdp, names):
    devices = np.array([mock.Mock(platform=platform)])
    mesh = mock.Mock(devices=devices, shape={**_SINGLE, 'fsdp': fsdp})
    expected = {f'xla_gpu_enable_{name}': True for name in names}
    self.assertEqual(mesh_lib.compiler_options(mesh), expected)

  @parameterized.parameters(
    ({'data': 3}, r'3 devices, but there are 8: use --parallel.data=8'),
    ({'data': 2, 'expert': 2}, r'--parallel.data=4 or --parallel.fsdp=2'),
    ({'expert': 16}, r'axes whose product is 8'),
    ({'data': 2, 'stage': 32}, r'--parallel.cpu_devices=64'),
  )
  def test_another_number_of_devices_is_refused(self, axes, message):
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.build(config_lib.ParallelConfig(**axes))

  @parameterized.parameters(
    ({'parallel.data': 0}, 'parallel.data=0: use at least 1'),
    ({'parallel.expert': 3}, r'n_routed_experts=8; use .* \[1, 2\]'),
    ({'parallel.node': 16}, r'must divide n_routed_experts=8'),
    ({'parallel.data': 3}, r'data.batch_size=\d+: .*a multiple of 3'),
    ({'parallel.fsdp': 16}, 'a multiple of 16'),
    ({'model.moe.n_routed_experts': 0, 'parallel.expert': 2}, r'among \[1\]'),
    ({'parallel.process_id': 1}, r'process_id=1: use 0 to 0'),
    ({'parallel.coordinator': 'here'}, 'write host:port'),
    ({'parallel.coordinator': 'here:65536'}, 'a port up to 65535'),
    ({'parallel.interleave': True}, 'use a node or expert above 1'),
    ({**_HALVES, 'data.batch_size': 12}, r'12 // 4; use .* that 8 divides'),
    ({**_HALVES, 'model.moe.aux_loss': 'batch'}, 'use another aux_loss'),
    ({**_HALVES, 'parallel.stage': 2}, 'a pipeline overlaps whole'),
  )
  def test_bad_layouts_are_refused(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      config_lib.replace(presets.tiny(), changes)


class ShardingTest(parameterized.TestCase):
  def test_without_a_mesh_nothing_happens(self):
    x = {'a': np.ones(3)}
    self.assertIs(sharding.batch_sum(x), x)
    self.assertEqual(sharding.local_experts(8), 8)
    self.assertEmpty(sharding.shards(rules.BATCH))

  @parameterized.product(
    layout=('DP', 'FSDP', 'EP', 'EP+FSDP'), zero1=(0, 1), processes=(0, 1)
  )
  def test_collected_parts_and_their_gradients(self, layout, zero1, processes):
    """They are the whole; the gradient is that of one device."""
    self.enter_context(
      mock.patch.object(jax.distributed, 'is_initialized', lambda: processes)
    )
    mesh = mesh_lib.build(config_lib.ParallelConfig(**_LAYOUTS[layout]))
    names, shape = ('dim', None), (16, 3)
    place = rules.place(names, shape, mesh.shape, bool(zero1))
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=shape), rng.normal(size=(16, 16))
    w, x = w.astype(np.float32), x.astype(np.float32)

    def loss(w, x):
      return (jnp.sin(x @ w) ** 2).sum()

    def per_device(w, x):
      w = sharding.gather(w, place.stored, place.step)

      def local(slot):
        copy = sharding.Copy(w, slot)
        return loss(sharding.collect(copy, place.step, place.used), x)

      value, gradient = jax.value_and_grad(local)(sharding.slots(w))
      gradient = sharding.reduce(gradient, place.step, place.stored)
      return sharding.batch_sum(value), gradient

    batch = rules.spec(('batch', None), x.shape, mesh.shape)
    run = jax.jit(
      jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(place.stored, batch),
        out_specs=(PartitionSpec(), place.stored),
        check_vma=False,
      )
    )
    w_parts = jax.device_put(w, NamedSharding(mesh, place.stored))
    if processes:
      self.assertNotRegex(str(run.trace(w_parts, x).jaxpr), 'reduce_scatter')
    value, gradient = run(w_parts, x)
    expected = jax.value_and_grad(loss)(w, x)
    tolerances.assert_close(
      (value, gradient), expected, tolerances.COMPONENT_PARITY
    )
    local = gradient.addressable_shards[0].data.size
    parts = _parts(place.stored, mesh.shape)
    self.assertEqual(local * parts, w.size)
    self.assertEqual(parts, 8 if zero1 else mesh.shape['fsdp'])

  def test_the_balance_loss_of_the_whole_batch(self):
    """Its shares add up, and so do their gradients."""
    moe = config_lib.MoEConfig(
      n_routed_experts=6,
      n_activated_experts=2,
      n_expert_groups=1,
      n_limited_groups=1,
      aux_loss='batch',
    )
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(8, 5, 6)).astype(np.float32)
    ids = jnp.argsort(-scores)[..., :2]
    mask = (np.arange(5) < np.arange(8)[:, None]).astype(np.float32)

    def loss(scores, ids, mask):
      return losses.balance_loss(scores, ids, moe, mask, sharding.batch_sum)

    grad = jax.value_and_grad(loss)

    def per_device(*args):
      value, gradient = grad(*args)
      return sharding.batch_sum(value), gradient

    mesh = mesh_lib.build(config_lib.ParallelConfig(data=4, expert=2))
    rows = rules.spec(('batch', None, None), scores.shape, mesh.shape)
    run = jax.jit(
      jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(rows, rows, PartitionSpec(*rows[:2])),
        out_specs=(PartitionSpec(), rows),
        check_vma=False,
      )
    )
    tolerances.assert_close(
      run(scores, ids, mask),
      grad(scores, ids, mask),
      tolerances.COMPONENT_PARITY,
    )


if __name__ == '__main__':
  absltest.main()
