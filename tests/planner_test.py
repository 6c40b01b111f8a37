"""The plan of a run: V3's published layout, and the arithmetic behind it."""

import dataclasses
import itertools
import subprocess
import sys

from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.parallel import schedules, simulate, ticks
from deepseek_jax.planner import (
  activations,
  communication,
  cost,
  devices,
  flops,
  memory,
  parameters,
  placement,
  report,
)

_PUBLISHED = {
  'parallel.data': 2,
  'parallel.node': 8,
  'parallel.expert': 8,
  'parallel.stage': 16,
  'parallel.stage_layers': ','.join(['3', *['4'] * 14, '2']),
  'parallel.zero1': True,
  'parallel.expert_buffer': 1.2,
  'data.batch_size_start': 0,  # 3,072 sequences are too few for 16 stages.
  'train.micro_batch_size': 128,  # A sequence on each of a stage's devices.
}


def _v3(**changes):
  config = config_lib.replace(presets.deepseek_v3(), _PUBLISHED)
  return config_lib.replace(config, changes)


def _dualpipe(config):
  count = communication.microbatches(config)
  return schedules.make('dualpipe', config.parallel.stage, count)


class PublishedLayoutTest(parameterized.TestCase):
  """V3 on 2,048 H800 (FACTS 2.2 and 5.1)."""

  def setUp(self):
    super().setUp()
    self.config = _v3()
    self.schedule = _dualpipe(self.config)

  def test_devices_and_batch(self):
    parallel = self.config.parallel
    self.assertEqual(parallel.n_devices, 2048)
    self.assertEqual(parallel.n_batch_shards, 128)
    experts = self.config.model.moe.n_routed_experts
    self.assertEqual(experts // (parallel.node * parallel.expert), 4)
    self.assertEqual(communication.microbatches(self.config), 120)
    self.assertEqual(communication.tokens_per_device(self.config), 4096)
    step = cost.of_rank(self.config, devices.DEVICES['h800'], self.schedule)
    self.assertEqual(step.tokens, 62_914_560)

  def test_parameters_of_a_device(self):
    one = placement.Stage(dense=0, moe=1, mtp=0, embeds=False, heads=False)
    held = placement.held(self.config.model, [one])
    on_device = memory.on_device(held, self.config.parallel)
    self.assertEqual(on_device, 409_157_888)
    for rank in range(1, 15):
      hosted = placement.hosted(self.config, self.schedule, rank)
      held = placement.held(self.config.model, list(hosted.values()))
      on_device = memory.on_device(held, self.config.parallel)
      self.assertEqual(on_device, 8 * 409_157_888)

  def test_embedding_head_and_mtp_share_a_rank(self):
    first, last = (
      placement.hosted(self.config, self.schedule, rank) for rank in (0, 15)
    )
    self.assertCountEqual(first.values(), last.values())
    self.assertTrue(any(s.embeds for s in first.values()))
    self.assertTrue(any(s.heads and s.mtp for s in first.values()))
    held = placement.held(self.config.model, list(first.values()))
    layers = [parameters.layer(self.config.model, False)] * 3
    layers += [parameters.layer(self.config.model, True)] * 2
    tables = 2 * parameters.embedding(self.config.model)
    mtp = parameters.mtp(self.config.model)
    self.assertEqual(sum(held), sum(layers) + tables + mtp + 7168)

  def test_lower_bounds_of_the_all_to_all(self):
    """4,096 tokens to 3.5 remote nodes at 50 GB/s: 2.1 and 4.1 ms."""
    h800 = devices.DEVICES['h800']
    node = [
      t for t in communication.expert_traffic(self.config) if t.axis == 'node'
    ]
    seconds = {t.what: communication.lower_bound([t], h800) for t in node}
    self.assertAlmostEqual(seconds['dispatch'], 4096 * 3.5 * 7224 / 50e9)
    self.assertAlmostEqual(seconds['combine'], 4096 * 3.5 * 14336 / 50e9)
    self.assertEqual(
      {what: round(s * 1e3, 1) for what, s in seconds.items()},
      {'dispatch': 2.1, 'combine': 4.1},
    )

  def test_a_token_that_is_dispatched_has_a_byte_for_each_scale(self):
    for scale, size in (('ceil', 1), ('floor', 1), ('float32', 4)):
      config = _v3(**{'precision.fp8.turned_scale': scale})
      sizes = communication.token_bytes(config)
      self.assertEqual(sizes, (7168 + size * 56, 2 * 7168))

  def test_activations_follow_the_schedule(self):
    """PP + 1 micro-batches of four MoE layers (V3 table 2)."""
    stage = placement.hosted(self.config, self.schedule, 7)[0]
    rows = activations.expert_rows(self.config).allocated
    one = activations.of_stage(self.config, stage, rows)
    found = memory.of_rank(self.config, self.schedule, 7).activations
    self.assertAlmostEqual(found / one, 17)

  def test_state_is_divided_over_ranks_and_with_zero1_over_copies(self):
    model = self.config.model
    total = parameters.main_model(model) + parameters.mtp(model)
    state = memory.of_rank(self.config, self.schedule, 7).state
    self.assertAlmostEqual(state, 8 * total / 2048)
    alone = _v3(**{'parallel.zero1': False})
    held = placement.held(model, placement.stages(model, 1))
    state = memory.of_rank(alone, self.schedule, 7).state
    self.assertAlmostEqual(state, 8 * (held.other + held.routed / 64) / 16)

  def test_fits_into_an_h800(self):
    room = devices.DEVICES['h800'].memory
    needed = [
      memory.of_rank(self.config, self.schedule, rank).total
      for rank in range(16)
    ]
    self.assertBetween(max(needed), 0.8 * room, room)

  def test_one_program_has_room_for_every_rank(self):
    program = memory.of_program(self.config, self.schedule)
    for rank in range(16):
      own = memory.of_rank(self.config, self.schedule, rank)
      for name in ('weights', 'gradients'):
        self.assertGreaterEqual(getattr(program, name), getattr(own, name))
    room = devices.DEVICES['h800'].memory
    self.assertGreater(program.total, room)  # As experiments.plan says.

  @parameterized.parameters((False, 131.45e9), (True, 116.88e9))
  def test_a_program_is_planned_as_it_is_compiled(self, fp8, compiled):
    """By XLA's buffer assignment (LOG.md, 2026-11-24 and 2026-12-01)."""
    changes = {
      'parallel.stage': 16,
      'parallel.expert': 8,
      'parallel.microbatches': 32,
      'precision.fp8.enabled': fp8,
      'data.batch_size': 256,
      'data.batch_size_start': 0,
      'train.micro_batch_size': 0,
      'model.n_layers': 16,
    }
    config = config_lib.replace(presets.deepseek_v3(), changes)
    found = memory.of_program(config, _dualpipe(config)).total
    self.assertBetween(found / compiled, 0.9, 1.1)

  def test_the_measured_step_is_above_the_bound(self):
    """19.926 s a step (FACTS 2.6), of which 10.3 % are bubble."""
    h800 = devices.DEVICES['h800']
    found = cost.of_rank(self.config, h800, self.schedule, 7)
    self.assertBetween(found.step, 0.2 * 19.926, 19.926)
    # FACTS 2.6 counts 385 TFLOP/s without MTP, of 62.9M tokens in 19.926 s.
    model = dataclasses.replace(self.config.model, n_mtp_layers=0)
    total = flops.train_per_token(model, 4096) * found.tokens
    self.assertAlmostEqual(total / 19.926 / 2048 / 1e12, 385, delta=1.5)


class DestinationsTest(parameterized.TestCase):
  def _model(self, experts, groups, limit, chosen):
    return config_lib.replace(
      presets.deepseek_v3().model,
      {
        'moe.n_routed_experts': experts,
        'moe.n_expert_groups': groups,
        'moe.n_limited_groups': limit,
        'moe.n_activated_experts': chosen,
        'moe.group_score': 'max',
      },
    )

  @parameterized.parameters(
    (8, 1, 1, 3, 2), (8, 1, 1, 3, 8), (12, 4, 2, 4, 2), (12, 4, 2, 4, 4),
    (12, 3, 2, 4, 6), (6, 1, 1, 6, 3), (8, 8, 3, 3, 4),
  )  # fmt: skip
  def test_is_the_mean_over_all_choices(self, experts, groups, limit, chosen,
                                        parts):  # fmt: skip
    """Counted: equally many experts of every open group."""
    each, per_group = chosen // limit, experts // groups
    total = number = 0
    for opened in itertools.combinations(range(groups), limit):
      choices = [
        itertools.combinations(range(g * per_group, (g + 1) * per_group), each)
        for g in opened
      ]
      for choice in itertools.product(*map(list, choices)):
        ids = itertools.chain(*choice)
        total += len({i * parts // experts for i in ids})
        number += 1
    model = self._model(experts, groups, limit, chosen)
    found = communication.destinations(model, parts)
    self.assertAlmostEqual(found, total / number)

  def test_v3(self):
    model = presets.deepseek_v3().model
    self.assertAlmostEqual(communication.destinations(model, 8), 4)
    self.assertAlmostEqual(communication.destinations(model, 1), 1)
    self.assertAlmostEqual(communication.destinations(model, 256), 8)


class PlacementTest(parameterized.TestCase):
  def test_v3_on_16_stages(self):
    """As `parallel.placement` cuts, or as asked: chunks of four MoE layers."""
    model = presets.deepseek_v3().model
    cut = placement.stages(model, 16)
    self.assertEqual([s.dense + s.moe for s in cut], [4] * 13 + [3] * 3)
    cut = placement.stages(model, 16, _v3().parallel.stage_sizes)
    self.assertEqual([s.dense for s in cut], [3] + [0] * 15)
    self.assertEqual([s.moe for s in cut], [0] + [4] * 14 + [2])
    self.assertEqual([s.mtp for s in cut], [0] * 15 + [1])

  @parameterized.product(name=list(presets.PRESETS), n=(1, 2, 3))
  def test_nothing_is_lost(self, name, n):
    model = presets.PRESETS[name]().model
    cut = placement.stages(model, n)
    self.assertEqual(sum(s.dense for s in cut), model.n_first_dense)
    self.assertEqual(sum(s.moe for s in cut), model.n_moe_layers)
    self.assertEqual([s.embeds for s in cut], [i == 0 for i in range(n)])
    held = [placement.held(model, [s]) for s in cut]
    again = parameters.embedding(model)  # A stage of its own needs it for MTP.
    copies = n > 1 and model.n_mtp_layers > 0 and not model.tie_embeddings
    expected = parameters.main_model(model) + parameters.mtp(model)
    self.assertEqual(sum(map(sum, held)), expected + copies * again)

  def test_sizes_that_do_not_fit(self):
    model = presets.tiny().model
    for sizes in ((2, 2), (1, 1, 1)):
      with self.assertRaisesRegex(ValueError, 'add up to model.n_layers=3'):
        placement.stages(model, 2, sizes)


class TrafficTest(parameterized.TestCase):
  def test_stages_send_at_every_tick(self):
    config = _v3()
    schedule = _dualpipe(config)
    sent = [
      communication.stage_traffic(config, schedule, rank).sent
      for rank in range(16)
    ]
    vector = 4096 * 7168 * 2
    # Activations and gradients to each neighbour; it needs 240 of 696.
    count = 174
    self.assertLen(ticks.build(schedule).cells, count)
    ends = [2 * count * vector]
    self.assertEqual(sent, [*ends, *[4 * count * vector] * 14, *ends])

  def test_ranks_bring_their_stages_together(self):
    """Without ZeRO-1 their parts are summed; pipelined_test.py: with it."""
    held, config = (
      placement.Held(64 * 1000, 600),
      _v3(**{'parallel.zero1': False}),
    )
    found = communication.collected_traffic(config, held)
    stage = [t for t in found if t.axis == 'stage']
    self.assertEqual(sum(t.sent for t in stage), (2 + 4) * 1600 * 15 / 16)
    self.assertTrue(all(t.sent == t.crossing for t in stage))
    total = placement.held(config.model, placement.stages(config.model, 1))
    sums = [t.sent for t in found if t.axis != 'stage']
    self.assertEqual(
      sums, [8 * total.other / 16 * 127 / 128, 8 * total.routed / 64 / 16 / 2]
    )

  def test_zero1_sends_less_than_an_all_reduce(self):
    config = _v3()
    held = placement.Held(routed=64 * 1000, other=1000)
    sharded = communication.parameter_traffic(config, held, 1)
    self.assertEqual(
      [(t.axis, round(t.sent)) for t in sharded],
      [
        ('data+node+expert', round(4000 * 127 / 128)),
        ('data+node+expert', round(2000 * 127 / 128)),
        ('data', 2000),
        ('data', 1000),
      ],
    )
    config = _v3(**{'parallel.zero1': False})
    plain = communication.parameter_traffic(config, held, 1)
    ratio = sum(t.sent for t in plain) / sum(t.sent for t in sharded)
    self.assertAlmostEqual(ratio, 8 / 6)

  @parameterized.parameters(('float32', 4), ('bfloat16', 2))
  def test_fsdp_gathers_for_each_pass_and_scatters_float32(self, dtype, width):
    changes = {'parallel.fsdp': 4, 'train.micro_batch_size': 4}
    changes['precision.compute_dtype'] = dtype
    config = config_lib.replace(presets.tiny(), changes)
    held = placement.Held(routed=600, other=400)
    found = communication.parameter_traffic(config, held, 3)
    self.assertEqual({t.axis for t in found}, {'fsdp'})
    total = sum(t.sent for t in found)
    self.assertAlmostEqual(total, 3 * (2 * width + 4) * 1000 * 3 / 4)

  def test_one_device_sends_nothing(self):
    self.assertEqual(cost.traffic(presets.tiny()), [])

  def test_one_hop_crosses_more_than_two(self):
    two = communication.expert_traffic(_v3())
    one = communication.expert_traffic(
      _v3(**{'parallel.node': 1, 'parallel.expert': 64})
    )
    crossing = [sum(t.crossing for t in hops) for hops in (two, one)]
    # Eight experts, of which 7/8 are on other nodes; 3.5 other nodes.
    self.assertAlmostEqual(crossing[1] / crossing[0], 7 / 3.5)

  def test_two_hops_send_what_the_compiled_program_does(self):
    """LOG.md, 2026-11-24: 822 and 1,644 MB in BF16, forwards and backwards."""
    config = _v3(**{'precision.fp8.enabled': False})
    sent = {'node': 0, 'expert': 0}
    for t in communication.expert_traffic(config):
      sent[t.axis] += 2 * t.sent / 1e6
    self.assertEqual({k: round(v) for k, v in sent.items()},
                     {'node': 822, 'expert': 1644})  # fmt: skip


class MemoryTest(parameterized.TestCase):
  def test_policies_keep_less_and_less(self):
    config = config_lib.replace(presets.deepseek_v3(), {})
    kept = [
      activations.kept(config, True, policy, 8 * 4096)
      for policy in ('none', 'selective', 'full')
    ]
    self.assertEqual(kept, sorted(kept, reverse=True))
    mean = activations.kept(config, True, 'alternate', 8 * 4096)
    self.assertEqual(mean, (kept[0] + kept[2]) / 2)

  def test_full_keeps_the_input_alone(self):
    config = presets.deepseek_v3()
    tokens = config.train.micro_batch_size * 4096
    self.assertEqual(
      activations.kept(config, True, 'full', 10), tokens * 7168 * 2
    )

  def test_fsdp_has_two_layers_at_once(self):
    """Compiled for eight H100s: experiments/LOG.md, 2026-11-24."""
    config = config_lib.replace(presets.deepseek_v3(), {'parallel.fsdp': 2})
    rows = activations.expert_rows(config).allocated
    whole = parameters.layer(config.model, True)
    for fsdp, sizes in ((1, 4), (2, 2 * (4 + 2))):
      varied = config_lib.replace(config, {'parallel.fsdp': fsdp})
      total = activations.of_layer(varied, True, rows)
      none = activations.kept(varied, True, 'none', rows)
      kept = activations.kept(varied, True, config.train.remat, rows)
      D, F = config.model.dim, config.model.moe.moe_inter_dim
      rest = 2 * none - kept + rows * (D + 2 * F) * 2
      self.assertEqual(total, rest + whole * sizes)

  def test_rows(self):
    rows = activations.expert_rows(_v3())
    self.assertEqual(rows.expected, 4096 * 8)
    # All 64 x 4,096 tokens choose the four experts of one device.
    self.assertEqual(rows.worst, 64 * 4096 * 4)
    self.assertEqual(rows.allocated, 1.2 * 4096 * 8)
    rows = activations.expert_rows(_v3(**{'parallel.expert_buffer': 0.0}))
    self.assertEqual(rows.allocated, rows.worst)


class BoundsTest(parameterized.TestCase):
  def test_compute_alone(self):
    config, h100 = presets.deepseek_v2_lite(), devices.DEVICES['h100']
    found = cost.of_rank(config, h100)
    tokens = 4608 * 4096
    total = flops.train_per_token(config.model, 4096) * tokens
    self.assertEqual(found.step, total / 989.5e12)
    self.assertEqual((found.bubble, found.sending), (0, 0))

  def test_bubble_is_the_schedules(self):
    config, h800 = _v3(), devices.DEVICES['h800']
    schedule = _dualpipe(config)
    found = cost.of_rank(config, h800, schedule, 7)
    run = simulate.simulate(schedule)
    share = found.bubble / (found.compute + found.bubble)
    self.assertAlmostEqual(share, run.bubble(7) / run.makespan)
    table = ticks.build(schedule)
    share = found.lockstep / (found.compute + found.lockstep)
    self.assertAlmostEqual(share, table.bubble(7) / table.makespan())
    self.assertGreater(found.lockstep, found.bubble)

  def test_fp8_doubles_the_linears_only(self):
    h800 = devices.DEVICES['h800']
    plain = _v3(**{'precision.fp8.enabled': False})
    ratio = (
      cost.of_rank(plain, h800).compute / cost.of_rank(_v3(), h800).compute
    )
    linears = sum(flops.linears_per_token(plain.model).values())
    share = linears / flops.train_per_token(plain.model, 4096)
    self.assertAlmostEqual(ratio, 1 / (1 - share + share / 2))
    # All weights but heads, gates and eh_proj; norms are next to nothing.
    attended = flops.attention_per_token(plain.model, 4096)
    others = 6 * (2 * 129_280 * 7168 + 59 * 256 * 7168 + 2 * 7168**2)
    total = flops.train_per_token(plain.model, 4096) - attended - others
    self.assertBetween(linears / total, 0.9999, 1)

  @parameterized.parameters(
    ('attention', 62 * 187_107_328),  # FACTS 1.8, and so below.
    ('dense', 9 * 7168 * 18_432 + 59 * 3 * 7168 * 2048),
    ('experts', 59 * 8 * 3 * 7168 * 2048),
  )
  def test_a_module_without_fp8_is_timed_in_bfloat16(self, module, weights):
    h800 = devices.DEVICES['h800']
    changed = _v3(**{f'precision.fp8.{module}': False})
    fast, slow = (cost.of_rank(c, h800) for c in (_v3(), changed))
    per_device = fast.tokens / 2048 * 6 * weights
    lost = per_device / h800.bf16 - per_device / h800.fp8
    self.assertAlmostEqual(slow.compute - fast.compute, lost)
    self.assertEqual(slow.flops, fast.flops)


class CommandTest(parameterized.TestCase):
  def _run(self, *arguments):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.plan', *arguments],
      capture_output=True,
      text=True,
    )

  def test_prints_the_published_layout(self):
    flags = [
      f'--{name}={str(value).lower()}' for name, value in _PUBLISHED.items()
    ]
    done = self._run('--preset=deepseek_v3', '--device=h800', *flags)
    self.assertEqual(done.returncode, 0, done.stderr)
    for text in (
      '2048 x h800',
      '62,914,560 tokens',
      '3,273,263,104',
      'micro-batches: 120',
    ):
      self.assertIn(text, done.stdout)

  @parameterized.parameters(
    (('--preset=tiny', '--device=a100'), 'use one of h800'),
    (('--preset=tiny', '--parallel.stage=4'), 'the nearest is 8'),
    (('--preset=tiny', '--parallel.expert=3'), 'must divide'),
    (
      (
        '--preset=deepseek_v3',
        '--parallel.stage=10',
        '--train.micro_batch_size=128',
      ),
      'use one of 1, 2, 4, 8\n',  # 16 ranks would need more micro-batches.
    ),
    (('--preset=tiny', '--ranks=4'), '--ranks is of the plan of a schedule'),
    (
      ('--schedule=dualpipe', '--device=h100'),
      '--device is of the plan of a run',
    ),
  )
  def test_mistakes_are_one_line(self, arguments, message):
    done = self._run(*arguments)
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertStartsWith(done.stderr, 'ERROR: ')
    self.assertIn(message, done.stderr)


class ReportTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_every_preset(self, name):
    text = report.text(presets.PRESETS[name](), 'h200')
    self.assertNotIn('nan', text)
    self.assertIn('fit into h200', text.replace('fits', 'fit'))


if __name__ == '__main__':
  absltest.main()
