"""A pipelined training step is one device's, whatever the schedule."""

import collections
import json
import math
import re
import tempfile

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.evaluation import perplexity
from deepseek_jax.parallel import schedules
from deepseek_jax.planner import communication, memory, placement
from deepseek_jax.training import checkpoint, holdings, optimizer, pipelined
from deepseek_jax.training import schedules as training_schedules
from deepseek_jax.training import step as step_lib
from tests import jaxprs, pipelines, tolerances
from tests.pipelines import EXPERTS, THREE_LAYERS, Case

# What a pipeline has no test of its own for.
_OTHERWISE = (
  ('model.tie_embeddings', True),
  ('model.n_mtp_layers', 2),
  ('model.moe.balance', 'none'),
  ('data.mask_documents', True),
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


def _setup(case):
  """(config, model, layout, optimizer, first state)."""
  config = case.config
  model = step_lib.build_model(config)
  layout = pipelines.make_layout(model, config)
  tx = optimizer.adamw(config.optim, config.precision)
  state = step_lib.init_state(model, tx, 0, layout)
  return config, model, layout, tx, state


def _arguments(case):
  """(the gradients' function, arguments with which to trace it, layout)."""
  config = case.config
  model = step_lib.build_model(config)
  layout = pipelines.make_layout(model, config)
  variables = nn.meta.unbox(step_lib.declare(model))
  batch = pipelines.batch(config, 0)
  gradients = step_lib.make_gradients(
    model, config, step_lib.pretrain_loss, layout
  )
  arguments = (
    variables['params'],
    variables['router_state'],
    batch,
    training_schedules.Schedule(config).at(0),
    step_lib.batch_totals(batch, config),
  )
  return gradients, arguments, layout


class GradientsTest(parameterized.TestCase):
  """All schedules in float32: tests/pipelined_process_test.py."""

  @parameterized.parameters(
    Case('zb_h1', 4, _OTHERWISE),
    Case('dualpipe', 4, (*THREE_LAYERS, ('parallel.stage_layers', '0,2,1,0'))),
  )
  @pytest.mark.slow
  def test_equal_one_device(self, case):
    first, expected = pipelines.one_device(case.alone)
    results = pipelines.train(case, first)
    pipelines.compare(results, expected, tolerances.DEEP_MODEL)

  @parameterized.parameters(*config_lib.PIPELINES)
  @pytest.mark.slow
  def test_bfloat16(self, name):
    updates = (*_TWO_LAYERS, ('precision.compute_dtype', 'bfloat16'))
    self._assert_rounded_equal(Case(name, 2, updates), tolerances.BFLOAT16)

  @parameterized.parameters(
    Case('gpipe', 2, _FP8),
    Case('1f1b', 2, _FP8),
    Case('1f1b', 2, (*_FP8, EXPERTS)),
    Case('interleaved', 2, _FP8),
    Case('zb_h1', 2, (*_FP8, EXPERTS)),
    Case('dualpipe', 2, _FP8),
    Case('dualpipe_v', 2, _FP8),
    Case('dualpipe_v', 2, (*_FP8, EXPERTS)),
  )
  @pytest.mark.slow
  def test_fp8(self, case):
    """The tiles of a micro-batch are those of one device, and so the codes.

    Where experts are shared, a token's rows are summed in another order, which
    brings some codes to the other side of a tie.
    """
    is_shared = EXPERTS in case.updates
    rung = tolerances.FP8_REORDERED if is_shared else tolerances.DEEP_MODEL
    self._assert_rounded_equal(case, rung)

  def _assert_rounded_equal(self, case, rung):
    """Rounding to few bits makes steps diverge: they begin with the same."""
    first, expected = pipelines.one_device(case.alone)
    results = pipelines.train(case, first, expected)
    pipelines.compare(results, expected, rung)


class PrecisionTest(parameterized.TestCase):
  @parameterized.parameters('1f1b', 'dualpipe')
  def test_gradients_are_float32_from_their_product_on(self, schedule):
    """Traced alone; of a width by which to tell a weight."""
    changes = ('model.dim', 48), ('precision.compute_dtype', 'bfloat16')
    case = Case(schedule, 2, (*_FP8, *changes))
    gradients, arguments, _ = _arguments(case)
    traced = jax.make_jaxpr(gradients)(*arguments)
    found = jaxprs.rounded(traced.jaxpr)
    self.assertNotEmpty(found)
    stacks = arguments[0]['moe_layers'], arguments[0]['mtp']['block']
    self.assertEmpty(found & jaxprs.weight_shapes(stacks))


class StepTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_a_compiled_step_equals_one_devices(self):
    states, rows = [], []
    shards = 'parallel.data', 2
    staged = Case('1f1b', 2, (('model.n_layers', 2), shards))
    for case in (staged, Case('1f1b', 1, staged.alone)):
      config, model, layout, tx, state = _setup(case)
      train_step = step_lib.make_train_step(model, config, tx, layout=layout)
      schedule = training_schedules.Schedule(config)
      for step in range(pipelines.STEPS):
        batch = pipelines.batch(config, step)
        batch = layout.put_batch(batch) if layout else batch
        state, metrics = train_step(state, batch, schedule.at(step))
      states.append(jax.tree.map(np.asarray, state))
      rows.append(jax.tree.map(np.asarray, metrics))
    self.assertEqual(states[0].step, pipelines.STEPS)
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
    staged = Case('1f1b', 2, (*updates, ('data.batch_size', 32)))
    results = []
    for case in (staged, Case('1f1b', 1, staged.alone)):
      config, model, layout, _, state = _setup(case)
      layout = layout and layout.for_evaluation()
      batch = jax.tree.map(
        lambda x: x.reshape(32, -1), pipelines.batch(config, 0)
      )
      evaluate = perplexity.make_eval_step(model, config, layout)
      bytes_V = np.arange(config.model.vocab_size, dtype=np.float32)
      sums = evaluate(state.params, state.router_state, batch, bytes_V)
      results.append(jax.tree.map(np.asarray, sums))
    tolerances.assert_close(*results, tolerances.DEEP_MODEL)

  def test_no_device_holds_the_whole_model(self):
    updates = (('model.n_layers', 8), ('model.moe.moe_inter_dim', 64))
    config = Case('1f1b', 4, updates).config
    model = step_lib.build_model(config)
    layout = pipelines.make_layout(model, config)
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
    written = Case('dualpipe', 4).config
    model = step_lib.build_model(written)
    tx = optimizer.adamw(written.optim, written.precision)
    state = step_lib.init_state(
      model, tx, 3, pipelines.make_layout(model, written)
    )
    with tempfile.TemporaryDirectory() as workdir:
      with checkpoint.Checkpointer(workdir, written) as saver:
        saver.save(state.replace(step=jax.numpy.int32(1)), {})
      for case in (Case('1f1b', 2), Case('1f1b', 1)):
        layout = pipelines.make_layout(model, case.config)
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
    case = Case(name, 4, wide)
    config = case.config
    declared = step_lib.declare(step_lib.build_model(config))
    gradients, arguments, layout = _arguments(case)
    traced = jax.make_jaxpr(gradients)(*arguments)
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
    case = Case('dualpipe', 2, (('model.moe.n_routed_experts', 0),))
    gradients, arguments, _ = _arguments(case)
    grads, report = jax.eval_shape(gradients, *arguments)
    jax.tree.map(
      lambda g, p: self.assertEqual(g.shape, p.shape), grads, arguments[0]
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
      _ = Case('1f1b', 2, tuple(updates.items())).config

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
    config = Case('dualpipe', 2).config
    model = step_lib.build_model(config)
    layout = pipelines.make_layout(model, config)
    with self.assertRaisesRegex(ValueError, 'pre-training only'):
      step_lib.make_gradients(model, config, lambda *_: None, layout)

  def test_stages_as_asked(self):
    config = Case('1f1b', 4, (('parallel.stage_layers', '2,1,1,0'),)).config
    stages = pipelined.stages(config.model, config.parallel)
    self.assertEqual(stages[0], [('dense_layers', 0), ('moe_layers', 0)])
    self.assertEqual(stages[3], [])


if __name__ == '__main__':
  absltest.main()
