"""A pipelined training step is one device's, whatever the schedule."""

import collections
import dataclasses
import functools
import json
import math
import re
import tempfile

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.evaluation import perplexity
from deepseek_jax.parallel import schedules
from deepseek_jax.planner import communication, memory, placement
from deepseek_jax.training import checkpoint, holdings, optimizer, pipelined
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import schedules as training_schedules
from deepseek_jax.training import step as step_lib
from tests import jaxprs, tolerances

_STEPS = 3
_SMALL = {
  'model.vocab_size': 64,
  'model.dim': 16,
  'model.inter_dim': 24,
  'model.n_layers': 4,
  'model.n_dense_layers': 1,
  'model.n_mtp_layers': 1,
  'model.moe.n_routed_experts': 4,
  'model.moe.n_expert_groups': 2,
  'model.moe.n_limited_groups': 1,
  'model.moe.moe_inter_dim': 8,
  'data.seq_len': 16,
  'data.batch_size': 16,
  'optim.alpha': '0.01',
  'optim.clip_norm': 0.1,
  'train.remat': 'selective',
  'precision.compute_dtype': 'float32',
  'precision.mu_dtype': 'float32',
  'precision.nu_dtype': 'float32',
}


# Updates of cases.
_ZERO1 = (('parallel.data', 2), ('parallel.zero1', True))
_EXPERTS = ('parallel.expert', 2)
_SHARED = (_EXPERTS, ('parallel.microbatches', 4))  # By two more axes of two.
# What a pipeline has no test of its own for.
_OTHERWISE = (
  ('model.tie_embeddings', True),
  ('model.n_mtp_layers', 2),
  ('model.moe.balance', 'none'),
  ('data.mask_documents', True),
)
_NODES = (
  ('parallel.node', 2),
  ('parallel.expert', 2),
  ('parallel.microbatches', 4),
)
_TWO_LAYERS = (('model.n_layers', 2), ('model.n_dense_layers', 0))
# Tiles along the tokens end where sequences do, and a row has two.
_FP8 = (
  *_TWO_LAYERS,
  ('model.dim', 136),
  ('data.batch_size', 8),
  ('data.seq_len', 128),
  ('precision.fp8.enabled', True),
)
_FP8_NARROW = (*_FP8, ('model.dim', 16), ('model.n_mtp_layers', 0))  # Quick.


@dataclasses.dataclass(frozen=True)
class _Case:
  schedule: str
  stage: int
  updates: tuple = ()

  @property
  def alone(self):
    """The updates that also hold on one device."""
    return tuple(u for u in self.updates if not u[0].startswith('parallel.'))

  @property
  def config(self):
    updates = _SMALL | dict(self.updates)
    pipeline = {
      'parallel.stage': self.stage,
      'parallel.schedule': self.schedule,
      'parallel.microbatches': min(8, updates['data.batch_size'] // 2),
    }
    return config_lib.replace(presets.tiny(), pipeline | updates)


def _batch(config, step):
  """[M, b, T + 1]: two documents a row, and padding at some ends."""
  rng = np.random.default_rng(step)
  shape = config.data.batch_size, config.data.seq_len + 1
  tokens = rng.integers(1, config.model.vocab_size, shape).astype(np.int32)
  segments = (
    1 + (np.arange(shape[1]) > 9).astype(np.int32) + np.zeros_like(tokens)
  )
  segments[::6, -4:] = 0
  batch = {'tokens': tokens * (segments > 0), 'segments': segments}
  cut = config.parallel.microbatches, -1, shape[1]
  return jax.tree.map(lambda x: x.reshape(cut), batch)


def _layout(model, config):
  devices = jax.devices()[: config.parallel.n_devices]
  return layout_lib.make(step_lib.declare(model), config, devices)


@functools.cache
def _setup(case):
  """(config, model, layout, optimizer, first state, how to place a batch)."""
  config = case.config
  model = step_lib.build_model(config)
  layout = _layout(model, config)
  tx = optimizer.adamw(config.optim, config.precision)
  state = step_lib.init_state(model, tx, 0, layout)
  put = layout.put_batch if layout else lambda batch: batch
  return config, model, layout, tx, state, put


@functools.cache
def _updates(updates):
  """The optimizer's part of a step, compiled once, on one device."""
  config, _, _, tx, _, _ = _setup(_Case('1f1b', 1, updates))

  @jax.jit
  def update(params, opt_state, router_state, grads, stats, hyper):
    changes, opt_state = tx.update(grads, opt_state, params, lr=hyper.lr)
    router_state = step_lib.update_router_state(
      router_state, stats, hyper, config
    )
    return optax.apply_updates(params, changes), opt_state, router_state

  return update


def _train(case, before=None):
  """Of every step: (gradients, report) and (params, opt_state, router_state).

  Each step begins where the one before ended, or with those of `before`.
  """
  config, model, layout, _, state, put = _setup(case)
  schedule = training_schedules.Schedule(config)
  gradients = jax.jit(
    step_lib.make_gradients(model, config, step_lib.pretrain_loss, layout)
  )
  update = _updates(case.alone)
  own = state.params, state.opt_state, state.router_state
  results = []
  for step in range(_STEPS):
    if before and step:
      own = before[step - 1][1]
    params, opt_state, router_state = jax.tree.map(np.asarray, own)
    batch, hyper = put(_batch(config, step)), schedule.at(step)
    totals = step_lib.batch_totals(batch, config)
    placed = jax.device_put(params, layout.params()) if layout else params
    out = gradients(placed, router_state, batch, hyper, totals)
    grads, report = jax.tree.map(np.asarray, out)
    stats = report['stats']
    own = update(params, opt_state, router_state, grads, stats, hyper)
    results.append(((grads, report), jax.tree.map(np.asarray, own)))
  return results


@functools.cache
def _one_device(updates):
  return _train(_Case('1f1b', 1, updates))


class GradientsTest(parameterized.TestCase):
  """Three steps by hand, for what a compiled step costs to compile."""

  @parameterized.parameters(
    _Case('gpipe', 2, (('parallel.fsdp', 2), *_SHARED)),
    _Case('interleaved', 2, (*_ZERO1, *_SHARED)),
    _Case('zb_h1', 4, _OTHERWISE),
    _Case('dualpipe', 4, (('parallel.stage_layers', '0,2,1,1'),)),
    _Case('dualpipe_v', 2, (('parallel.stage_layers', '1,2,0,1'), _EXPERTS)),
    _Case('1f1b', 2, (_EXPERTS,)),
    _Case('dualpipe', 2, _NODES),
  )
  @pytest.mark.slow
  def test_equal_one_device(self, case):
    self._assert_equal(case, tolerances.DEEP_MODEL)

  @parameterized.parameters(*config_lib.PIPELINES)
  @pytest.mark.slow
  def test_bfloat16(self, name):
    updates = (*_TWO_LAYERS, ('precision.compute_dtype', 'bfloat16'))
    case = _Case(name, 2, updates)
    self._assert_equal(case, tolerances.BFLOAT16, is_rounded=True)

  @parameterized.parameters(
    _Case('gpipe', 2, _FP8),
    _Case('1f1b', 2, _FP8),
    _Case('interleaved', 2, _FP8_NARROW),
    _Case('zb_h1', 2, (*_FP8, _EXPERTS)),
    _Case('dualpipe', 2, _FP8),
    _Case('dualpipe_v', 2, _FP8_NARROW),
  )
  @pytest.mark.slow
  def test_fp8(self, case):
    """The tiles of a micro-batch are those of one device, and so the codes.

    Where experts are shared, a token's rows are summed in another order, which
    brings some codes to the other side of a tie.
    """
    is_shared = _EXPERTS in case.updates
    rung = tolerances.FP8_REORDERED if is_shared else tolerances.DEEP_MODEL
    self._assert_equal(case, rung, is_rounded=True)

  def _assert_equal(self, case, rung, is_rounded=False):
    """Rounding to few bits makes steps diverge: they begin with the same."""
    expected = _one_device(case.alone)
    results = _train(case, expected if is_rounded else None)
    self._compare(results, expected, rung)

  def _compare(self, results, expected, rung):
    for step, (actual, wanted) in enumerate(zip(results, expected)):
      tolerances.assert_close(actual[0], wanted[0], rung, f'step {step}')
      for name, stats in wanted[0][1]['stats'].items():
        counts = actual[0][1]['stats'][name].counts_E
        np.testing.assert_array_equal(counts, stats.counts_E)
      for i in (0, 2):  # Parameters and biases.
        tolerances.assert_close(actual[1][i], wanted[1][i], rung, f'{step}')


class PrecisionTest(parameterized.TestCase):
  @parameterized.parameters('1f1b', 'dualpipe')
  def test_gradients_are_float32_from_their_product_on(self, schedule):
    """Traced alone; of a width by which to tell a weight."""
    changes = ('model.dim', 48), ('precision.compute_dtype', 'bfloat16')
    case = _Case(schedule, 2, (*_FP8, *changes))
    config, model, layout, _, state, _ = _setup(case)
    batch = _batch(config, 0)
    gradients = step_lib.make_gradients(
      model, config, step_lib.pretrain_loss, layout
    )
    traced = jax.make_jaxpr(gradients)(
      state.params,
      state.router_state,
      batch,
      training_schedules.Schedule(config).at(0),
      step_lib.batch_totals(batch, config),
    )
    found = jaxprs.rounded(traced.jaxpr)
    self.assertNotEmpty(found)
    stacks = state.params['moe_layers'], state.params['mtp']['block']
    self.assertEmpty(found & jaxprs.weight_shapes(stacks))


class StepTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_a_compiled_step_equals_one_devices(self):
    states, rows = [], []
    for case in (_Case('1f1b', 2, (('parallel.data', 2),)), _Case('1f1b', 1)):
      config, model, layout, tx, state, put = _setup(case)
      state = jax.tree.map(lambda x: x.copy(), state)  # It is donated.
      train_step = step_lib.make_train_step(model, config, tx, layout=layout)
      schedule = training_schedules.Schedule(config)
      for step in range(_STEPS):
        batch = put(_batch(config, step))
        state, metrics = train_step(state, batch, schedule.at(step))
      states.append(jax.tree.map(np.asarray, state))
      rows.append(jax.tree.map(np.asarray, metrics))
    self.assertEqual(states[0].step, _STEPS)
    np.testing.assert_array_equal(rows[0]['counts'], rows[1]['counts'])
    tolerances.assert_close(*rows, tolerances.DEEP_MODEL)
    for name in ('params', 'router_state', 'opt_state'):
      pair = (getattr(state, name) for state in states)
      tolerances.assert_close(*pair, tolerances.DEEP_MODEL)


class EvaluationTest(parameterized.TestCase):
  """Stages evaluate different rows, and collect a layer at a time."""

  def test_equals_one_devices(self):
    updates = {'expert': 2, 'data': 2, 'zero1': True}
    updates = tuple((f'parallel.{k}', v) for k, v in updates.items())
    staged = _Case('1f1b', 2, (*updates, ('data.batch_size', 32)))
    results = []
    for case in (staged, _Case('1f1b', 1, staged.alone)):
      config, model, layout, _, state, _ = _setup(case)
      layout = layout and layout.for_evaluation()
      batch = jax.tree.map(lambda x: x.reshape(32, -1), _batch(config, 0))
      evaluate = perplexity.make_eval_step(model, config, layout)
      bytes_V = np.arange(config.model.vocab_size, dtype=np.float32)
      sums = evaluate(state.params, state.router_state, batch, bytes_V)
      results.append(jax.tree.map(np.asarray, sums))
    tolerances.assert_close(*results, tolerances.DEEP_MODEL)

  def test_no_device_holds_the_whole_model(self):
    updates = (('model.n_layers', 8), ('model.moe.moe_inter_dim', 64))
    config = _Case('1f1b', 4, updates).config
    model = step_lib.build_model(config)
    layout = _layout(model, config)
    like = step_lib.abstract_state(
      model, optimizer.adamw(config.optim, config.precision), layout
    )
    tokens = jax.ShapeDtypeStruct((1, 4, 17), np.int32)

    def temporary(layout):
      def hidden_sum(params, router_state, batch, _):
        variables = {'params': params, 'router_state': router_state}
        return layout.whole(model).apply(variables, batch).hidden_BTD.sum()

      run = jax.jit(layout.batch_sums(hidden_sum))
      lowered = run.lower(like.params, like.router_state, tokens, ())
      return lowered.compile().memory_analysis().temp_size_in_bytes

    experts = 3 * 4 * 16 * 64 * 4  # Bytes of one layer's.
    whole = temporary(layout)
    self.assertGreater(whole, config.model.n_moe_layers * experts)
    self.assertLess(temporary(layout.for_evaluation()), whole - 5 * experts)


class CheckpointTest(parameterized.TestCase):
  def test_a_run_goes_on_with_another_pipeline_or_none(self):
    """A checkpoint holds [L, ...], whatever the stages."""
    written = _Case('dualpipe', 4).config
    model = step_lib.build_model(written)
    tx = optimizer.adamw(written.optim, written.precision)
    state = step_lib.init_state(model, tx, 3, _layout(model, written))
    with tempfile.TemporaryDirectory() as workdir:
      with checkpoint.Checkpointer(workdir, written) as saver:
        saver.save(state.replace(step=jax.numpy.int32(1)), {})
      for case in (_Case('1f1b', 2), _Case('1f1b', 1)):
        layout = _layout(model, case.config)
        like = step_lib.abstract_state(model, tx, layout)
        with checkpoint.Checkpointer(workdir, case.config) as saver:
          restored, _, _ = saver.restore(like)
        jax.tree.map(
          np.testing.assert_array_equal, restored.params, state.params
        )
        w1 = restored.params['moe_layers']['ffn']['w1']
        parts = {s.data.shape for s in w1.addressable_shards}
        whole = list(w1.shape)
        whole[2] //= case.stage
        self.assertEqual(parts, {tuple(whole)})


def _carried(eqn):
  """Bytes."""
  first = eqn.params['num_consts']
  carry = eqn.invars[first : first + eqn.params['num_carry']]
  return sum(v.aval.size * v.aval.dtype.itemsize for v in carry)


def _sent(found, sizes):
  """Bytes that a device sends once a step, by axes; sums of a few left out."""
  total = collections.Counter()
  for eqn, around in found:
    name, params = eqn.primitive.name, eqn.params
    axes = params.get('axis_name', params.get('axes', ()))
    axes = [a for a in np.atleast_1d(axes) if sizes.get(a, 1) > 1]
    if 'scan' in around or not axes or name == 'axis_index':
      continue
    n = math.prod(sizes[a] for a in axes)
    arrays = eqn.outvars if name == 'all_gather' else eqn.invars
    times = 2 if name.startswith('psum') else 1
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in arrays)
    total['+'.join(axes)] += times * size * (n - 1) / n
  return total


@pytest.mark.slow
class PlanTest(parameterized.TestCase):
  @parameterized.parameters(
    ('zb_h1', 'parallel.fsdp', False), ('dualpipe', 'parallel.expert', True)
  )
  def test_the_planner_counts_what_the_program_holds_and_sends(
    self, name, axis, zero1
  ):
    """Gradients, residuals and cuts, of layers wide enough to matter."""
    wide = (
      ('model.dim', 128),
      ('model.inter_dim', 256),
      ('model.moe.moe_inter_dim', 64),
      ('data.seq_len', 128),
      (axis, 2),
      ('parallel.zero1', zero1),
    )
    config = _Case(name, 4, wide).config
    model = step_lib.build_model(config)
    declared, layout = step_lib.declare(model), _layout(model, config)
    gradients = step_lib.make_gradients(
      model, config, step_lib.pretrain_loss, layout
    )
    variables = nn.meta.unbox(declared)
    batch = _batch(config, 0)
    traced = jax.make_jaxpr(gradients)(
      variables['params'],
      variables['router_state'],
      batch,
      training_schedules.Schedule(config).at(0),
      step_lib.batch_totals(batch, config),
    )
    schedule = pipelined.make_schedule(config.parallel, 8)
    plan = memory.of_program(config, schedule)
    planned = plan.gradients + plan.activations + plan.deferred
    found = list(jaxprs.equations(traced.jaxpr))
    scans = (eqn for eqn, _ in found if eqn.primitive.name == 'scan')
    carried = max(map(_carried, scans))
    self.assertBetween(carried / planned, 0.9, 1.1)
    room, _ = placement.of_program(config, schedule)
    held = placement.held(config.model, [room])
    expected = collections.Counter()
    for t in communication.collected_traffic(config, held):
      expected[t.axis] += t.sent
    sent = _sent(found, layout.mesh.shape)
    self.assertLen(expected, 2)
    for axes, size in expected.items():
      self.assertBetween(sent[axes] / size, 0.98, 1)  # But for vectors.
    own = holdings.total(holdings.holdings(declared, config, layout))
    self.assertBetween(own.state / plan.state, 1, 1.03)  # Vectors are whole.
    self.assertBetween(own.copy / plan.weights, 0.999, 1)
    self.assertBetween(own.gradients / plan.gradients, 0.999, 1)


class DenseTest(parameterized.TestCase):
  def test_a_model_without_experts(self):
    """Its one kind of layer has no statistics; traced alone."""
    case = _Case('dualpipe', 2, (('model.moe.n_routed_experts', 0),))
    config, model, layout, _, state, _ = _setup(case)
    batch = _batch(config, 0)
    grads, report = jax.eval_shape(
      step_lib.make_gradients(model, config, step_lib.pretrain_loss, layout),
      state.params,
      state.router_state,
      batch,
      training_schedules.Schedule(config).at(0),
      step_lib.batch_totals(batch, config),
    )
    jax.tree.map(
      lambda g, p: self.assertEqual(g.shape, p.shape), grads, state.params
    )
    self.assertNotIn('moe_layers', report['stats'])


class ConfigTest(parameterized.TestCase):
  def test_names_of_schedules_are_the_flags_values(self):
    self.assertEqual(config_lib.PIPELINES, tuple(schedules.SCHEDULES))

  def test_stages_are_those_of_the_schedule(self):
    for name in config_lib.PIPELINES:
      parallel = config_lib.ParallelConfig(stage=4, schedule=name)
      made = schedules.make(name, 4, 8)
      self.assertEqual(parallel.n_stages, made.stages, name)

  @parameterized.parameters(
    ({'parallel.schedule': 'pipedream'}, 'use one of gpipe, 1f1b'),
    ({'parallel.stage_layers': '4,x'}, 'one number per stage'),
    ({'parallel.stage_layers': '2,1,1'}, '1f1b has 2 stages on 2 ranks'),
    ({'parallel.stage_layers': '2,1'}, 'add up to model.n_layers=4'),
    ({'parallel.microbatches': 3}, 'must divide data.batch_size=16'),
    ({'train.micro_batch_size': 2}, 'set one of them to 0'),
    ({'train.remat': 'alternate'}, 'use full, selective or none'),
  )
  def test_refuses(self, updates, message):
    with self.assertRaisesRegex(ValueError, message):
      _ = _Case('1f1b', 2, tuple(updates.items())).config

  @parameterized.parameters(
    ('dualpipe', 2, 1, r'least 4, a mult.* of 2; .* 4, .*16 on 1 .*\[4, 8, 16'),
    ('dualpipe', 4, 4, r'the nearest is 8, .*allows \[8, 16\]'),
    ('dualpipe', 16, 16, r'the nearest is 32, .*data.batch_size=16.* none'),
    ('dualpipe_v', 4, 4, r'at least 8; the nearest is 8, .*\[8, 16\]'),
    ('interleaved', 4, 2, r'multiple of 4; the nearest is 4, .*\[4, 8, 16\]'),
  )
  def test_refuses_micro_batches_that_do_not_fit(self, name, ranks, n, message):
    base = {'data.batch_size': 16, 'parallel.schedule': name}
    base['parallel.stage'] = ranks
    given = {'parallel.microbatches': n}
    with self.assertRaisesRegex(
      ValueError, f'^parallel.microbatches={n}: .*{message}'
    ):
      config_lib.replace(presets.tiny(), base | given)
    given = {'train.micro_batch_size': 16 // n}
    message = re.sub(r',? ?\\\[.*', '', message)  # Sizes, not their numbers.
    with self.assertRaisesRegex(
      ValueError, f'^train.micro_batch_size={16 // n}: .*{message}'
    ):
      config_lib.replace(presets.tiny(), base | given)

  @parameterized.parameters(
    ('train.micro_batch_size', 128, '[16, 32, 48, 64, 96]'),
    ('parallel.microbatches', 120, '[160, 240, 320, 480, 960]'),
  )
  def test_suggests_what_fits_the_whole_ramp(self, name, value, allowed):
    base = {'parallel.stage': 16, 'parallel.data': 16}
    base['train.micro_batch_size'] = 0

    def make(more):
      return config_lib.replace(presets.deepseek_v3(), base | more)

    with self.assertRaises(ValueError) as raised:
      make({name: value})
    message = str(raised.exception)
    self.assertStartsWith(message, f'{name}={value}: gives data.batch_size_st')
    self.assertEndsWith(message, f'on 16 shards allows {allowed}')
    self.assertIn('32, as 4096 sequences', message)
    make({name: value, 'data.batch_size_start': 4096})
    for other in json.loads(allowed):
      make({name: other})
    with self.assertRaisesRegex(ValueError, '^parallel.microbatches=32: .*480'):
      make({'parallel.microbatches': 32})

  @parameterized.parameters(
    ({'parallel.stage': 3}, r'parallel.stage=3: .* nearest are 2 and 4'),
    (
      {'data.batch_size_start': 2},
      r'batches=4: .*data.batch_size_start=2 .*no',
    ),
    ({'parallel.expert': 2}, r'batches=1: .*size=8 on 2 shards allows \[4\]'),
  )
  def test_refuses_stages_and_first_batches_that_do_not_fit(
    self, more, message
  ):
    base = {'parallel.stage': 2, 'data.batch_size': 8}
    if 'parallel.expert' not in more:
      base['parallel.microbatches'] = 4
    with self.assertRaisesRegex(ValueError, message):
      config_lib.replace(presets.tiny(), base | more)

  def test_refuses_sizes_of_no_stages(self):
    with self.assertRaisesRegex(ValueError, "stage_layers='9,9': .* pipel"):
      config_lib.replace(presets.tiny(), {'parallel.stage_layers': '9,9'})

  def test_refuses_other_objectives(self):
    config = _Case('dualpipe', 2).config
    model = step_lib.build_model(config)
    layout = _layout(model, config)
    with self.assertRaisesRegex(ValueError, 'pre-training only'):
      step_lib.make_gradients(model, config, lambda *_: None, layout)

  def test_stages_as_asked(self):
    config = _Case('1f1b', 4, (('parallel.stage_layers', '2,1,1,0'),)).config
    stages = pipelined.stages(config.model, config.parallel)
    self.assertEqual(stages[0], [('dense_layers', 0), ('moe_layers', 0)])
    self.assertEqual(stages[3], [])


if __name__ == '__main__':
  absltest.main()
