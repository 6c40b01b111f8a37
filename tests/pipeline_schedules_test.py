"""Pipeline schedules against the paper's figure 5 and table 2."""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from deepseek_jax.parallel import schedules, simulate
from deepseek_jax.parallel.schedules import Task
from deepseek_jax.planner import timeline

# V3's figure 5, ranks 0 to 3; the others mirror them.
_FIGURE_5 = (
  'F0> F1> F2> F3> F4> F5> F6> F0< b0< w0< F1< b1< w1< F2< b2< w2< F3< '
  '[F7>B3<] [F4<B0>] [F8>B4<] [F5<B1>] [F9>B5<] [F6<B2>] B6< [F7<B3>] B7< '
  '[F8<B4>] B8< [F9<B5>] B9< b6> w6> b7> w7> b8> w8> b9> w9>',
  'F0> F1> F2> F3> F4> F0< F5> F1< b0< w0< F2< b1< w1< F3< [F6>B2<] [F4<B0>] '
  '[F7>B3<] [F5<B1>] [F8>B4<] [F6<B2>] [F9>B5<] [F7<B3>] B6< [F8<B4>] B7< '
  '[F9<B5>] B8< B6> b9< b7> w9< b8> w7> b9> w8> w9>',
  'F0> F1> F2> F0< F3> F1< F4> F2< b0< w0< F3< [F5>B1<] [F4<B0>] [F6>B2<] '
  '[F5<B1>] [F7>B3<] [F6<B2>] [F8>B4<] [F7<B3>] [F9>B5<] [F8<B4>] B6< '
  '[F9<B5>] B7< B6> B8< b7> b9< b8> w7> b9> w9< w8> w9>',
  'F0> F0< F1> F1< F2> F2< F3> F3< F4> B0< [F4<B0>] [F5>B1<] [F5<B1>] '
  '[F6>B2<] [F6<B2>] [F7>B3<] [F7<B3>] [F8>B4<] [F8<B4>] [F9>B5<] [F9<B5>] '
  'B6< B6> B7< B7> b8< b8> b9< b9> w8< w8> w9< w9>',
)
_MIRROR = str.maketrans('<>', '><')


@functools.cache
def _valid() -> list[schedules.Schedule]:
  """Every schedule of up to 10 ranks, and some micro-batches beyond 2 ranks."""
  result = []
  for name in schedules.SCHEDULES:
    for ranks in range(1, 11):
      for microbatches in (*range(1, 26), 40):
        try:
          made = schedules.make(name, ranks, microbatches)
        except ValueError:
          continue
        result.append(made)
  return result


def _bubbles(schedule, costs=simulate.EQUAL):
  run = simulate.simulate(schedule, costs)
  return [round(run.bubble(rank), 9) for rank in range(schedule.ranks)]


def _peaks(schedule):
  ranks = range(schedule.ranks)
  return [simulate.peak_activations(schedule, rank) for rank in ranks]


class RowsTest(parameterized.TestCase):
  def test_dualpipe_is_the_figure_of_the_paper(self):
    schedule = schedules.make('dualpipe', 8, 20)
    for rank, row in enumerate(_FIGURE_5):
      self.assertEqual(schedules.describe(schedule, rank), row)
      mirrored = row.translate(_MIRROR)
      self.assertEqual(schedules.describe(schedule, 7 - rank), mirrored)

  @parameterized.parameters(
    (0, 23, 15, 15, 97, 8), (6, 17, 9, 9, 103, 8), (7, 17, 8, 8, 103, 9)
  )
  def test_dualpipe_of_the_report(self, rank, F, b, w, pairs, B):
    """16 stages; as many micro-batches as make the published counts."""
    row = schedules.make('dualpipe', 16, 120).rows[rank]
    kinds = [''.join(task.kind for task in step) for step in row]
    counts = {kind: kinds.count(kind) for kind in kinds}
    self.assertEqual(counts, {'F': F, 'b': b, 'w': w, 'FB': pairs, 'B': B})

  def test_dualpipe_v_is_the_upper_half_of_dualpipe(self):
    whole = schedules.make('dualpipe', 8, 20)
    folded = schedules.make('dualpipe_v', 4, 10)
    self.assertEqual(folded.rows, whole.rows[:4])
    self.assertEqual(folded.stages, whole.stages)

  def test_zb_h1_defers_one_weight_gradient_more_on_each_rank(self):
    schedule = schedules.make('zb_h1', 3, 4)
    rows = [schedules.describe(schedule, rank) for rank in range(3)]
    self.assertEqual(rows[0], 'F0 F1 F2 b0 w0 F3 b1 w1 b2 w2 b3 w3')
    self.assertEqual(rows[1], 'F0 F1 b0 F2 b1 w0 F3 b2 w1 b3 w2 w3')
    self.assertEqual(rows[2], 'F0 b0 F1 b1 F2 b2 w0 F3 b3 w1 w2 w3')

  def test_interleaved_takes_groups_of_ranks_through_the_chunks(self):
    row = schedules.describe(schedules.make('interleaved', 2, 2), 1)
    self.assertEqual(row, 'F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0')


class ValidityTest(parameterized.TestCase):
  def test_hundreds_of_sizes_are_valid(self):
    self.assertGreater(len(_valid()), 1000)
    for schedule in _valid():
      schedules.validate(schedule)

  @parameterized.parameters(
    ('dualpipe', 7, 20, 'ranks=7.*nearest are 6 and 8'),
    ('dualpipe', 1, 20, 'ranks=1.*nearest is 2$'),
    ('dualpipe', 8, 19, 'microbatches=19.*nearest is 20'),
    ('dualpipe', 8, 12, 'microbatches=12.*nearest is 16'),
    ('dualpipe_v', 8, 12, 'microbatches=12.*nearest is 16'),
    ('interleaved', 4, 11, 'microbatches=11.*nearest is 12'),
    ('interleaved', 4, 1, 'microbatches=1.*nearest is 4'),
    ('1f1b', 0, 4, 'ranks=0.*at least 1'),
    ('gpipe', 4, 0, 'microbatches=0.*at least 1'),
    ('zbv', 4, 8, 'use one of gpipe, 1f1b'),
  )
  def test_refuses_and_names_the_nearest(self, name, ranks, n, message):
    with self.assertRaisesRegex(ValueError, message):
      schedules.make(name, ranks, n)

  def _broken(self, edit, name='zb_h1', rank=1):
    schedule = schedules.make(name, 4, 8)
    rows = list(schedule.rows)
    rows[rank] = tuple(edit(list(rows[rank])))
    return dataclasses.replace(schedule, rows=tuple(rows))

  @parameterized.parameters(
    (lambda row: row[1:], 'missing'),
    (lambda row: row + row[:1], 'twice'),
    (lambda row: row[:-1], 'input and weights differ'),
    (lambda row: [*row[:-2], row[-1], row[-2]], 'is the oldest'),
    (lambda row: [row[1], row[0], *row[2:]], 'order differs'),
    (lambda row: [row[0] + row[1], *row[2:]], 'is no pair'),
  )
  def test_the_validator_finds(self, edit, message):
    with self.assertRaisesRegex(ValueError, message):
      schedules.validate(self._broken(edit))

  def test_the_validator_finds_ranks_that_wait_for_each_other(self):
    def edit(row):  # Every forward on this rank waits for the first backward.
      backwards = [step for step in row if step[0].kind == 'B']
      return [backwards[0], *(step for step in row if step != backwards[0])]

    with self.assertRaisesRegex(ValueError, 'waits for ever'):
      schedules.validate(self._broken(edit, '1f1b', rank=2))

  def test_needs_a_forward_of_the_same_stream(self):
    schedule = schedules.make('dualpipe', 4, 8)
    self.assertEqual(
      schedule.needs(1, Task('B', 3, 1)),
      [(1, Task('F', 3, 1)), (0, Task('B', 3, 1))],
    )


class SimulationTest(parameterized.TestCase):
  def test_the_bubble_is_table_2_on_every_rank_at_equal_costs(self):
    for schedule in _valid():
      if schedule.name == 'zb_h1' and schedule.microbatches < schedule.ranks:
        continue
      formula = simulate.bubble_formula(schedule, simulate.EQUAL)
      self.assertEqual(_bubbles(schedule), [formula] * schedule.ranks)

  @parameterized.parameters(
    (8, 21, 7, 6),
    (16, 45, 15, 14),  # FACTS 4.1
  )
  def test_table_2_in_numbers(self, ranks, one_f_one_b, zb1p, dualpipe):
    made = [schedules.make(n, ranks, 40) for n in ('1f1b', 'zb_h1', 'dualpipe')]
    bubbles = [_bubbles(schedule)[0] for schedule in made]
    self.assertEqual(bubbles, [one_f_one_b, zb1p, dualpipe])

  @parameterized.parameters(
    simulate.Costs(1.3, 2.9, 1.1, 3), simulate.Costs(0.7, 2, 0.6, 2)
  )
  def test_formulas_that_hold_for_all_costs(self, costs):
    for name in ('gpipe', '1f1b', 'interleaved', 'zb_h1'):
      schedule = schedules.make(name, 4, 12)
      formula = simulate.bubble_formula(schedule, costs)
      for bubble in _bubbles(schedule, costs):
        self.assertAlmostEqual(bubble, formula)

  @parameterized.parameters(('dualpipe', 8, 24), ('dualpipe_v', 4, 12))
  def test_the_formula_is_for_equal_costs(self, name, ranks, n):
    schedule = schedules.make(name, ranks, n)
    # A gain of the overlap is missing only from the ranks that wait longest.
    short = _bubbles(schedule, simulate.Costs(pair=2))
    self.assertEqual(short[:4], [1, 2, 3, 3])
    # Unequal parts: below the formula (7.5), or above it (3).
    below = _bubbles(schedule, simulate.Costs(1, 2.5, 1, 3))
    self.assertEqual(below[:4], [5.5, 6, 6.5, 6.5])
    above = _bubbles(schedule, simulate.Costs(1, 2, 1.2, 2.6))
    self.assertEqual(above[:4], [4, 4.4, 4.8, 4.8])

  def test_the_bubble_does_not_grow_with_the_micro_batches(self):
    for name in ('1f1b', 'zb_h1', 'dualpipe'):
      few, many = (schedules.make(name, 4, n) for n in (8, 200))
      self.assertEqual(_bubbles(few), _bubbles(many))
      self.assertEqual(_peaks(few), _peaks(many))

  def test_activations_are_those_of_table_2(self):
    for schedule in _valid():
      peaks, ranks = _peaks(schedule), schedule.ranks
      if schedule.microbatches < 2 * ranks:
        continue
      expected = {
        'gpipe': [schedule.microbatches] * ranks,
        '1f1b': [ranks - rank for rank in range(ranks)],
        'interleaved': [3 * ranks - 2 * rank - 1 for rank in range(ranks)],
        'zb_h1': [ranks] * ranks,
        'dualpipe': [ranks + 1] * ranks,
        'dualpipe_v': [2 * ranks + 1] * ranks,
      }[schedule.name]
      self.assertEqual(peaks, expected)

  def test_latency_delays_each_hop(self):
    schedule = schedules.make('1f1b', 3, 1)
    run = simulate.simulate(schedule, simulate.Costs(latency=0.5))
    self.assertEqual(run.starts[2], (3.0, 4.0))
    self.assertEqual(run.makespan, 3 * 3 + 4 * 0.5)

  def test_refuses_costs_that_are_none(self):
    for value in (-1, float('nan'), float('inf'), 1e101):
      message = re.escape(f'costs.forward={value}')
      with self.assertRaisesRegex(ValueError, message):
        simulate.Costs(forward=value)
    with self.assertRaisesRegex(ValueError, 'use more'):
      simulate.Costs(0, 0, 0, 0)
    with self.assertRaisesRegex(ValueError, 'costs.weight=3'):
      simulate.Costs(weight=3)


class ViewTest(parameterized.TestCase):
  def test_draws_every_task(self):
    schedule = schedules.make('dualpipe', 4, 8)
    run = simulate.simulate(schedule)
    steps = [step for row in schedule.rows for step in row]
    tasks = [task for step in steps for task in step]
    axis = timeline.figure(run).axes[0]
    self.assertLen(axis.texts, len(tasks))
    frames = len([step for step in steps if len(step) > 1])
    self.assertLen(axis.patches, len(tasks) + frames)
    with tempfile.TemporaryDirectory() as folder:
      for name, start in (('a.png', b'\x89PNG'), ('a.svg', b'<?xml')):
        path = pathlib.Path(folder) / 'new' / name
        timeline.draw(run, path)
        self.assertStartsWith(path.read_bytes()[:5], start)
      with self.assertRaisesRegex(ValueError, 'a.gif: end it in .png'):
        timeline.draw(run, pathlib.Path(folder) / 'a.gif')

  def test_command(self):
    arguments = ['--schedule=dualpipe', '--ranks=8', '--microbatches=20']
    done = subprocess.run(
      [sys.executable, '-m', 'experiments.plan', *arguments],
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    words = done.stdout.replace('\n  ', ' ')
    self.assertIn(f'r3: {_FIGURE_5[3]}\n', words)
    self.assertIn('makespan 66, bubble by table 2: 6', done.stdout)

  @parameterized.parameters('1f1b', 'zb_h1', 'dualpipe_v')
  def test_the_unit_of_costs_changes_nothing(self, name):
    schedule = schedules.make(name, 4, 8)

    def view(unit):
      costs = simulate.Costs(*(unit * n for n in (1, 2, 1, 3)))
      run = simulate.simulate(schedule, costs)
      size = timeline.figure(run).get_size_inches().tolist()
      return timeline.text(run).splitlines()[1:5], size

    rows, size = view(1)
    self.assertEqual(view(1 / 128), (rows, size))
    self.assertTrue(all(len(row) > 4 + 24 for row in rows))

  def test_the_table_is_in_stages_of_1f1b(self):
    """V3 table 2, and where its bubble is not what runs."""
    for name, held in ('1f1b', '1 4'), ('dualpipe', '2 5'), (
      'dualpipe_v', '1 4.5'
    ):  # fmt: skip
      run = simulate.simulate(schedules.make(name, 4, 8))
      row, *_ = (s for s in timeline.text(run).splitlines() if s[:5] == '   0 ')
      self.assertEqual(row.split()[-2:], held.split())
      self.assertNotIn('equal costs', timeline.text(run))
    schedule = schedules.make('zb_h1', 4, 8)
    run = simulate.simulate(schedule, simulate.Costs(1, 3, 2, 4))
    self.assertIn('table 2: 0 (exact at equal costs)', timeline.text(run))

  def test_a_long_run_fits_into_80_columns(self):
    run = simulate.simulate(schedules.make('dualpipe', 8, 60))
    lines = timeline.text(run).splitlines()
    self.assertEqual(max(map(len, lines)), 80)
    self.assertLen(lines[1], 80)  # The chart.

  @parameterized.parameters(
    ('--schedule=', "schedule='': use one of gpipe"),
    ('--costs=x', '--costs=x: give 1 to 5 numbers'),
    ('--microbatches=99999', 'microbatches=99999: use at most 100,000'),
    ('--out=', 'end it in .png or .svg'),
    ('--out=/proc/no/x.png', 'out=/proc/no/x.png: No such file'),
  )
  def test_command_refuses(self, flag, message):
    command = [sys.executable, '-m', 'experiments.plan', '--schedule=1f1b']
    done = subprocess.run([*command, flag], capture_output=True, text=True)
    self.assertEqual(done.returncode, 2)
    self.assertIn(message, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
