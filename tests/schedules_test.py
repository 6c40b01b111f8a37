"""Schedules against the papers' numbers, and the properties they must have."""

import bisect
import math

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.parallel import schedules as pipelines
from deepseek_jax.training import schedules


def _schedule(base=presets.deepseek_v3, **updates):
  updates = {k.replace('__', '.'): v for k, v in updates.items()}
  return schedules.Schedule(config_lib.replace(base(), updates))


def _small(**updates):
  """100 steps of 10 sequences of 32 tokens, without warm-up."""
  return _schedule(
    presets.tiny,
    **{'train__steps': 100, 'data__batch_size': 10, 'optim__warmup_steps': 0}
    | updates,
  )


class BatchRampTest(parameterized.TestCase):
  def test_v3_numbers(self):
    # 14.8T tokens take 245,103 steps with this ramp.
    schedule = _schedule(train__steps=245103)
    tokens_per_step = 15360 * 4096
    self.assertLess(abs(schedule.total_tokens - 14.8e12), tokens_per_step)
    self.assertEqual(schedule.batch_size(0), 3072)
    self.assertEqual(schedule.batch_size(245102), 15360)
    full = next(s for s in range(20000) if schedule.batch_size(s) == 15360)
    self.assertAlmostEqual(schedule.tokens_before(full) / 469e9, 1, places=3)

  def test_mean_size_within_the_ramp_is_linear_in_tokens(self):
    schedule = _schedule(train__steps=245103)
    ramp = 0.0317 * schedule.total_tokens
    for step in range(0, 15000, 500):
      linear = 3072 + 12288 * schedule.tokens_before(step) / ramp
      self.assertLess(abs(schedule.batch_size(step) - linear), 12288 / 7)

  @parameterized.product(
    steps=(1, 2, 7, 100, 1001),
    first=(0, 2, 6, 20),
    fraction=(0.0, 0.0317, 0.5, 0.99),
    micro=(1, 2),
  )
  def test_is_consistent(self, steps, first, fraction, micro):
    schedule = _small(
      train__steps=steps,
      train__micro_batch_size=micro,
      data__batch_size=20,
      data__batch_size_start=first,
      data__batch_ramp_fraction=fraction,
    )
    sizes = [schedule.batch_size(step) for step in range(steps)]
    tokens = [schedule.tokens_before(step) for step in range(steps + 1)]
    np.testing.assert_array_equal(np.diff(tokens), np.array(sizes) * 32)
    self.assertEqual(tokens[0], 0)
    self.assertEqual(tokens[-1], schedule.total_tokens)
    self.assertEqual(sizes, sorted(sizes))
    self.assertLessEqual(len(set(sizes)), schedules.RAMP_STAGES)
    self.assertTrue(all(size % micro == 0 for size in sizes))
    self.assertBetween(min(sizes), first or 20, 20)
    if fraction == 0:
      self.assertEqual(set(sizes), {20})

  @parameterized.parameters(*config_lib.PIPELINES)
  def test_every_batch_of_a_ramp_fits_the_pipeline(self, name):
    schedule = _small(
      train__steps=1000,
      train__micro_batch_size=1,
      data__batch_size=80,
      data__batch_size_start=8,
      data__batch_ramp_fraction=0.4,
      parallel__stage=4,
      parallel__schedule=name,
    )
    sizes = {schedule.batch_size(step) for step in range(1000)}
    self.assertLen(sizes, schedules.RAMP_STAGES)
    for size in sizes:
      pipelines.make(name, 4, size)

  def test_ramp_takes_its_fraction_of_the_tokens(self):
    schedule = _small(
      train__steps=10000,
      train__micro_batch_size=1,
      data__batch_size=80,
      data__batch_size_start=10,
      data__batch_ramp_fraction=0.4,
    )
    full = next(s for s in range(10000) if schedule.batch_size(s) == 80)
    reached = schedule.tokens_before(full) / schedule.total_tokens
    self.assertAlmostEqual(reached, 0.4, places=3)


class LearningRateTest(parameterized.TestCase):
  def test_v3_phases(self):
    schedule = _schedule(train__steps=245103)
    self.assertEqual(schedule.at(0).lr, 2.2e-4 / 2000)
    self.assertEqual(schedule.at(1998).lr, 2.2e-4 * 1999 / 2000)
    self.assertEqual(schedule.at(1999).lr, 2.2e-4)
    self.assertEqual(self._at(schedule, 9.99).lr, 2.2e-4)
    half_way = self._at(schedule, 12.15).lr
    self.assertAlmostEqual(half_way, 1.21e-4, places=8)
    self.assertAlmostEqual(self._at(schedule, 14.31).lr, 2.2e-5, places=15)
    self.assertAlmostEqual(self._at(schedule, 14.63).lr, 2.2e-5, places=15)
    self.assertAlmostEqual(self._at(schedule, 14.64).lr, 7.3e-6, places=15)
    self.assertAlmostEqual(schedule.at(245102).lr, 7.3e-6, places=15)

  def test_v3_other_schedules(self):
    schedule = _schedule(train__steps=245103)
    self.assertEqual(self._at(schedule, 9.99).mtp_weight, 0.3)
    self.assertEqual(self._at(schedule, 10.01).mtp_weight, 0.1)
    self.assertEqual(self._at(schedule, 14.29).gamma, 0.001)
    self.assertEqual(self._at(schedule, 14.31).gamma, 0.0)
    self.assertEqual(
      {self._at(schedule, t).alpha for t in (0, 5, 14.7)}, {1e-4}
    )

  def _at(self, schedule, trillions):
    """The values of the first step with so many tokens before it."""
    step = bisect.bisect_left(
      range(250000), trillions * 1e12, key=schedule.tokens_before
    )
    return schedule.at(step)

  @parameterized.parameters(('v2', 60, 90), ('v2_lite', 80, 90))
  def test_v2_drops_in_the_step_that_starts_at_the_fraction(
    self, name, first, second
  ):
    schedule = _small(optim__schedule=name, optim__lr=1.0)
    rates = [schedule.at(step).lr for step in range(100)]
    expected = [0.316 ** ((s >= first) + (s >= second)) for s in range(100)]
    self.assertEqual(rates, expected)

  def test_cosine_runs_from_the_end_of_the_warm_up(self):
    schedule = _small(
      optim__schedule='cosine', optim__warmup_steps=20, optim__lr=1.0
    )
    rates = [schedule.at(step).lr for step in range(101)]
    np.testing.assert_allclose(rates[:20], np.arange(1, 21) / 20)
    expected = 0.55 + 0.45 * np.cos(np.pi * np.arange(81) / 80)
    np.testing.assert_allclose(rates[20:], expected)
    self.assertAlmostEqual(rates[60], 0.55)
    self.assertAlmostEqual(rates[100], 0.1)

  def test_constant(self):
    schedule = _small(optim__schedule='constant', optim__lr=0.5)
    self.assertEqual({schedule.at(step).lr for step in range(100)}, {0.5})

  @parameterized.parameters(*config_lib.LR_SCHEDULES)
  def test_warm_up_longer_than_the_run(self, name):
    schedule = _small(
      optim__schedule=name, optim__warmup_steps=1000, optim__lr=1.0
    )
    for step in range(100):
      self.assertBetween(schedule.at(step).lr, 1e-5, (step + 1) / 1000)

  def test_piecewise_starts_in_the_step_at_its_fraction(self):
    schedule = _small(optim__gamma='1,2@0.25,3@0.5', optim__alpha='-1')
    values = [schedule.at(step).gamma for step in range(100)]
    self.assertEqual(values, [1.0] * 25 + [2.0] * 25 + [3.0] * 50)
    self.assertEqual(schedule.at(7).alpha, -1.0)

  @parameterized.parameters(*presets.PRESETS)
  def test_presets_give_finite_values_at_every_point(self, name):
    config = presets.PRESETS[name]()
    schedule = schedules.Schedule(config)
    for step in np.linspace(0, config.train.steps - 1, 50).astype(int):
      for value in schedule.at(int(step)):
        self.assertIsInstance(value, float)
        self.assertTrue(math.isfinite(value) and value >= 0)


if __name__ == '__main__':
  absltest.main()
