"""The table of ticks that the executor follows, for hundreds of sizes."""

import collections

from absl.testing import absltest, parameterized

from deepseek_jax.parallel import schedules, simulate, ticks
from deepseek_jax.parallel.schedules import Task


def _schedules():
  for name in schedules.SCHEDULES:
    for ranks in range(1, 7):
      for microbatches in range(1, 16):
        try:
          yield schedules.make(name, ranks, microbatches)
        except ValueError:
          continue


def _neighbour(schedule, rank, channel):
  """The rank whose message arrives over a channel."""
  shift = {'up': -1, 'down': 1}[channel.split('_')[1]]
  return (rank + shift) % schedule.ranks


class _Machine:
  """Follows a table with names in place of arrays, and notices every mix-up."""

  def __init__(self, table):
    self.table, self.schedule = table, table.schedule
    ranks = range(self.schedule.ranks)
    sizes = {
      'residuals': table.residual_slots,
      'cut': table.cut_slots,
      'x': table.x_slots,
      'g': table.g_slots,
    }
    self.buffers = [{k: [None] * n for k, n in sizes.items()} for _ in ranks]
    self.done = collections.Counter()

  def name(self, rank, task):
    """(micro-batch of all, stage)."""
    stage = self.schedule.places[rank, task.chunk][1]
    return ticks.microbatch(self.schedule, rank, task), stage

  def run(self):
    for row in self.table.cells:
      outputs = [self._compute(r, cell) for r, cell in enumerate(row)]
      for rank, cell in enumerate(row):
        self._receive(rank, cell, row, outputs)

  def _compute(self, rank, cell):
    buffers, y, dx, writes = self.buffers[rank], None, None, []
    if cell.forward:
      y = micro, stage = self.name(rank, cell.forward)
      if stage:
        assert buffers['x'][cell.x_slot] == (micro, stage - 1)
      writes.append(('residuals', cell.save_slot, y))
      self.done['F', y] += 1
    if cell.backward:
      dx = micro, stage = self.name(rank, cell.backward)
      assert buffers['g'][cell.g_slot] == (micro, stage + 1)
      assert buffers['residuals'][cell.load_slot] == dx
      if not cell.weight:
        writes.append(('cut', cell.cut_slot, dx))
      self.done['b', dx] += 1
    if cell.weight:
      own = self.name(rank, cell.weight)
      assert buffers['residuals'][cell.load_slot] == own
      if not cell.backward:
        assert buffers['cut'][cell.cut_slot] == own
      self.done['w', own] += 1
    for buffer, slot, value in writes:
      buffers[buffer][slot] = value
    return y, dx

  def _receive(self, rank, cell, row, outputs):
    for channel, slot in cell.arrivals.items():
      what = 'x' if channel[0] == 'y' else 'g'
      source = _neighbour(self.schedule, rank, channel)
      self.buffers[rank][what][slot] = outputs[source][what == 'g']
    y, dx = outputs[rank]
    if cell.y_local >= 0:
      self.buffers[rank]['x'][cell.y_local] = y
    if cell.g_local >= 0:
      has_loss = y is not None and y[1] == self.schedule.stages - 1
      loss = has_loss and (y[0], self.schedule.stages)
      self.buffers[rank]['g'][cell.g_local] = loss or dx


class TableTest(parameterized.TestCase):
  def test_everything_is_where_it_is_looked_for(self):
    count = 0
    for schedule in _schedules():
      machine = _Machine(ticks.build(schedule))
      machine.run()
      n = schedule.microbatches * schedule.stages
      self.assertEqual(set(machine.done.values()), {1})
      self.assertLen(machine.done, 3 * n)
      count += 1
    self.assertGreater(count, 300)

  def test_residuals_need_the_simulators_peak(self):
    for schedule in _schedules():
      ranks, table = range(schedule.ranks), ticks.build(schedule)
      peak = max(simulate.peak_activations(schedule, r) for r in ranks)
      self.assertEqual(table.residual_slots, peak)
      peak = max(simulate.peak_deferred(schedule, r) for r in ranks)
      self.assertEqual(table.cut_slots, peak)

  def test_a_schedule_of_equal_steps_keeps_its_makespan(self):
    """Weight gradients are already apart in zb_h1: lockstep costs nothing."""
    for ranks in (2, 4, 6):
      schedule = schedules.make('zb_h1', ranks, 12)
      table = ticks.build(schedule)
      self.assertEqual(table.makespan(), simulate.simulate(schedule).makespan)
      self.assertEqual(table.bubble(0), ranks - 1)

  @parameterized.parameters(
    (8, 20, 3, 66, 78), (8, 20, 2, 52, 60),
    (16, 120, 3, 374, 408), (16, 120, 2, 264, 291),
  )  # fmt: skip
  def test_pairs_in_lockstep_wait_for_single_steps(
    self, ranks, microbatches, pair, paper, lockstep
  ):
    """The price of one loop for all ranks, which the paper's does not pay."""
    schedule = schedules.make('dualpipe', ranks, microbatches)
    costs = simulate.Costs(pair=pair)
    self.assertEqual(simulate.simulate(schedule, costs).makespan, paper)
    self.assertEqual(ticks.build(schedule).makespan(costs), lockstep)

  def test_only_the_channels_that_are_used(self):
    channels = {
      name: ticks.build(schedules.make(name, 4, 8)).channels
      for name in ('1f1b', 'interleaved', 'dualpipe')
    }
    self.assertEqual(channels['1f1b'], ('y_up', 'g_down'))
    self.assertEqual(channels['interleaved'], ('y_up', 'g_down'))
    self.assertEqual(channels['dualpipe'], ticks.CHANNELS)

  def test_dualpipes_streams_share_the_micro_batches(self):
    schedule = schedules.make('dualpipe', 4, 8)
    task = Task('F', 1, 1)
    self.assertEqual(ticks.microbatch(schedule, 0, task), 5)


if __name__ == '__main__':
  absltest.main()
