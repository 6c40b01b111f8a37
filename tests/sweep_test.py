"""Sweeps: the algebra, what is measured and told, and the ablations' arms."""

import ast
import importlib
import json
import math
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl import flags as absl_flags
from absl.testing import absltest, parameterized
from matplotlib import colors, figure

from deepseek_jax import config as config_lib
from deepseek_jax import flags, presets
from deepseek_jax.evaluation import report, sweep
from deepseek_jax.planner import cache
from deepseek_jax.training import metrics
from experiments import sweep as experiment
from tests import tolerances

_ABLATIONS = pathlib.Path(experiment.__file__).parent / 'ablations'
_NAMES = sorted(
  p.stem for p in _ABLATIONS.glob('*.py') if p.name != '__init__.py'
)


def _module(name):
  return importlib.import_module(f'experiments.ablations.{name}')


def _run(arm, seed, **results):
  config = config_lib.replace(
    presets.tiny(), {'train.seed': seed, 'data.seed': seed}
  )
  records = [{'step': i, 'loss': 5.0 - i / 10 + seed} for i in range(20)]
  return sweep.Run(arm, config, pathlib.Path(f'{arm}{seed}'), records, results)


class AlgebraTest(parameterized.TestCase):
  def test_products(self):
    a, b = sweep.axis('a', [1, 2]), sweep.axis('b', [3, 4])
    self.assertEqual(
      sweep.prod(a, b),
      [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}],
    )
    self.assertEqual(sweep.prod(a, sweep.axis('a', [5]))[0], {'a': 5})

  def test_arms_are_all_but_the_seeds(self):
    points = sweep.prod(
      sweep.axis('optim.lr', [1e-3, 2e-3]), sweep.axis('seed', [0, 1])
    )
    arms, seeds = sweep.split(points)
    self.assertEqual(
      arms, {'lr=0.001': {'optim.lr': 1e-3}, 'lr=0.002': {'optim.lr': 2e-3}}
    )
    self.assertEqual(seeds, [{'train.seed': s, 'data.seed': s} for s in (0, 1)])
    self.assertEqual(
      sweep.split(sweep.axis('x.y', [1])), ({'y=1': {'x.y': 1}}, [{}])
    )
    with self.assertRaisesRegex(ValueError, "both called 'dim=1'"):
      sweep.split(sweep.axis('a.dim', [1]) + sweep.axis('b.dim', [1]))

  def test_a_run_is_where_its_config_says_and_nowhere_else(self):
    base = presets.tiny()
    names = {sweep.fingerprint(base)}
    for name, value in (
      ('train.seed', 1), ('data.seed', 1), ('optim.lr', 1e-4),
      ('train.steps', 11), ('model.moe.balance', 'none'),
    ):  # fmt: skip
      names.add(sweep.fingerprint(config_lib.replace(base, {name: value})))
    self.assertLen(names, 6)
    moved = config_lib.replace(base, {'data.cache_dir': '/elsewhere'})
    self.assertIn(sweep.fingerprint(moved), names)


class RunTest(parameterized.TestCase):
  """With a stand-in for training, which ends a run or does not."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder)
    self.trained = []
    self.last_step = presets.tiny().train.steps - 1
    self.enter_context(mock.patch.object(sweep, '_train', self._train))

  def _train(self, config, path, base):
    self.assertEqual(base, presets.tiny())
    self.trained.append((config.optim.lr, config.train.seed))
    if config.optim.lr > 1:
      raise FloatingPointError('step 3 is not finite')
    path.mkdir(parents=True, exist_ok=True)
    record = {'step': self.last_step, 'loss': 2.0, 'val_loss': config.optim.lr}
    (path / metrics.FILE).write_text(json.dumps(record) + '\n')

  def _run(self, *rates, seeds=(0, 1)):
    arms = {f'{rate}': {'optim.lr': rate} for rate in rates}
    seeds = sweep.axis('seed', seeds)
    return sweep.run(
      presets.tiny(), arms, seeds, self.workdir, lambda _: {'parameters': 7}
    )

  def test_every_arm_once_before_any_twice(self):
    runs = self._run(0.1, 0.2)
    plan = [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]
    self.assertEqual(self.trained, plan)
    self.assertEqual([run.arm for run in runs], ['0.1', '0.2', '0.1', '0.2'])
    self.assertEqual(
      runs[1].results, {'parameters': 7, 'val_loss': 0.2, 'loss': 2.0}
    )
    self.assertEqual(runs[1].config.data.seed, 0)
    self.assertLen({run.workdir for run in runs}, 4)

  def test_finished_runs_are_shared_and_not_repeated(self):
    first = self._run(0.1, 0.2)
    self.trained.clear()
    again = self._run(0.2, 0.3)
    self.assertEqual(self.trained, [(0.3, 0), (0.3, 1)])
    self.assertEqual(again[0], first[1])

  def test_an_unfinished_run_goes_on(self):
    self.last_step -= 1
    self._run(0.1, seeds=[0])
    self.last_step += 1
    self._run(0.1, seeds=[0])
    self.assertEqual(self.trained, [(0.1, 0)] * 2)

  def test_a_diverged_run_is_left_out(self):
    runs = self._run(5.0, 0.1)
    self.assertEqual([run.arm for run in runs], ['0.1', '0.1'])

  def test_a_bad_arm_is_refused_before_anything_is_trained(self):
    with self.assertRaisesRegex(ValueError, 'optim.lr'):
      self._run(0.1, -1.0)
    self.assertEmpty(self.trained)


class GridTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.flags = absl_flags.FlagValues()
    flags.define('tiny', self.flags)

  def _parse(self, text):
    return experiment.parse_grid(text, self.flags)

  def test_values_have_the_types_of_their_leaves(self):
    points = self._parse(
      'model.moe.balance = aux_free, none; optim.gamma=0.1|0.2,0@0.5;'
      ' model.tie_embeddings=true; optim.lr=1; seed=3;'
    )
    self.assertLen(points, 4)
    self.assertEqual(
      points[1],
      {
        'model.moe.balance': 'aux_free',
        'optim.gamma': '0.2,0@0.5',
        'model.tie_embeddings': True,
        'optim.lr': 1.0,
        'train.seed': 3,
        'data.seed': 3,
      },
    )
    for point in points:
      config_lib.replace(presets.tiny(), point)

  @parameterized.parameters(
    ('', 'is empty'),
    (' ; ', 'is empty'),
    ('optim.lr', 'write leaf=value'),
    ('optim.lr=', 'write leaf=value'),
    ('model.moe.balanse=none', 'did you mean model.moe.balance'),
    ('sed=1', 'did you mean .* or seed'),
    ('model.moe.balance=aux_fre', 'did you mean aux_free'),
    ('train.steps=1,two', 'must be an integer'),
    ('seed=a', 'must be an integer'),
  )
  def test_mistakes(self, text, message):
    with self.assertRaisesRegex(ValueError, f'--sweep.*{message}'):
      self._parse(text)


class ReportTest(parameterized.TestCase):
  def test_measures_the_end_of_a_run(self):
    records = []
    for i in range(10):
      record = {'step': i, 'loss': float(i), 'tokens_per_second': 100.0 + i}
      # Each batch overloads one expert of layer 0, in turn; layer 1 always one.
      record['load'] = [[3, 1] if i % 2 else [1, 3], [4, 0]]
      records.append(record)
    records[4] |= {'val_loss': 9.0, 'val_bpb': 3.0}
    records[9] |= {'val_loss': 2.0, 'val_bpb': 1.0}
    self.assertEqual(
      sweep.measure(records),
      {
        'val_loss': 2.0,
        'val_bpb': 1.0,
        'loss': 8.5,
        'max_vio': (0.5 + 1) / 2,
        'max_vio_summed': (0 + 1) / 2,
        'tokens_per_second': 104.5,
      },
    )

  def test_mean_error_and_paired_difference(self):
    losses = {'a': (1.0, 2.0, 6.0), 'b': (1.5, 2.5, 6.5)}
    runs = [
      _run(arm, seed, val_loss=value, parameters=1000.0)
      for arm, values in losses.items()
      for seed, value in enumerate(values)
    ]
    columns = ['val_loss', 'val_loss_difference', 'parameters', 'max_vio']
    rows = report.table(runs, columns).splitlines()
    self.assertLen(rows, 4)
    # The standard deviation of 1, 2, 6 is sqrt(7).
    error = f'{math.sqrt(7 / 3):.4f}'
    self.assertEqual(rows[2], f'| a | 3 | 3.0000±{error} | – | 1,000 | – |')
    # Far apart as the seeds are, b is 0.5 above a in each: no error.
    self.assertEqual(
      rows[3], f'| b | 3 | 3.5000±{error} | +0.5000 | 1,000 | – |'
    )
    # A seed that only one arm has says nothing of the difference.
    rows = report.table(runs[1:], columns).splitlines()
    self.assertIn('| b | 3 |', rows[3])
    self.assertIn(' +0.5000 ', rows[3])
    self.assertIn('| b | 1 | 6.5000 |', report.table(runs[-1:], columns))

  def test_the_gap_of_two_runs_is_the_largest_of_their_averages(self):
    plain = [{'loss': 2.0} for _ in range(8)]
    other = [{'loss': 2.0} for _ in range(8)]
    self.assertEqual(report.loss_gap(other, plain), 0)
    other[6] = {'loss': 2.2}  # A tenth of it, and then 0.9 of that.
    tolerances.assert_close(
      report.loss_gap(other, plain), 0.01, tolerances.FLOAT32_MATH
    )
    other[0] = {'loss': 4.0}  # Forgotten at 0.9 a step; here 0.9^4 is left.
    tolerances.assert_close(
      report.loss_gap(other, plain), 0.9**4, tolerances.FLOAT32_MATH
    )

  def test_an_arm_has_one_color_in_the_picture_and_is_named(self):
    """Also after one of whose seeds the first arm has none, and so no gap."""
    runs = [_run('a', 0), _run('b', 1), _run('c', 0)]
    runs[-1].records[-1]['loss'] *= 2
    groups = {run.arm: [run] for run in runs}
    losses, gaps = figure.Figure().subplots(2)
    report._draw_losses(losses, groups)
    report._draw_gaps(gaps, groups)
    (loss,) = (x for x in losses.lines if x.get_label() == 'c')
    (gap,) = (x for x in gaps.lines if x.get_label() == 'c')
    self.assertTrue(colors.same_color(gap.get_color(), loss.get_color()))
    names = [text.get_text() for text in gaps.get_legend().get_texts()]
    self.assertEqual(names, ['c'])
    # Nothing is cut: the loss of c is the double in the end.
    self.assertGreater(gaps.get_ylim()[1], max(gap.get_ydata()))

  def test_standard_error(self):
    tolerances.assert_close(
      report.standard_error([1.0, 2.0, 6.0]),
      math.sqrt(7 / 3),
      tolerances.FLOAT32_MATH,
    )
    self.assertTrue(math.isnan(report.standard_error([1.0])))

  def test_writes_the_table_and_the_picture(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    runs = [
      _run(arm, seed, val_loss=seed + 1.0, val_bpb=1.0)
      for arm in 'ab'
      for seed in range(2)
    ]
    runs.append(_run('alone', 0, val_loss=3.0))
    text = report.write(runs, list(report.COLUMNS), folder / 'x', 'name')
    written = (folder / 'x' / 'name.md').read_text()
    self.assertStartsWith(written, text)
    self.assertIn('- a: a0, a1\n', written)
    self.assertStartsWith((folder / 'x' / 'name.png').read_bytes(), b'\x89PNG')
    with self.assertRaisesRegex(ValueError, 'all diverged'):
      report.write([], ['val_loss'], folder)


class AblationTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_arms_are_valid_and_different(self, name):
    module = _module(name)
    configs = {
      arm: config_lib.replace(presets.ablation(), updates)
      for arm, updates in module.ARMS.items()
    }
    self.assertGreaterEqual(len(configs), 2)
    self.assertLen(
      {sweep.fingerprint(c) for c in configs.values()}, len(configs)
    )

  @parameterized.parameters(*_NAMES)
  def test_says_what_was_asked_run_and_found(self, name):
    text = (_ABLATIONS / f'{name}.py').read_text()
    self.assertLessEqual(len(text.splitlines()), 60)
    doc = ast.get_docstring(ast.parse(text))
    self.assertIn('?', doc.splitlines()[0])
    self.assertIn(f'python -m experiments.ablations.{name}', doc)
    rows = [line for line in doc.splitlines() if line.startswith('| ')]
    arms = [row.split('|')[1].strip() for row in rows]
    self.assertEqual(arms[2:], list(_module(name).ARMS))

  @parameterized.parameters('attention', 'shared_expert')
  def test_arms_are_of_equal_size(self, name):
    base = presets.ablation()
    facts = [
      experiment.facts(config_lib.replace(base, updates))
      for updates in _module(name).ARMS.values()
    ]
    for key in ('parameters', 'active_parameters'):
      sizes = [fact[key] for fact in facts]
      self.assertLess(max(sizes) / min(sizes), 1.005, (key, sizes))


class CacheTest(parameterized.TestCase):
  @parameterized.parameters(
    ('deepseek_v3', {}, 35_136),
    ('deepseek_v2_lite', {}, 15_552),
    ('deepseek_v3', {'attention': 'mha'}, 1_998_848),
    ('deepseek_v3', {'attention': 'gqa', 'gqa.n_kv_heads': 8}, 124_928),
    ('deepseek_v3', {'attention': 'mqa'}, 15_616),
  )
  def test_published_elements_per_token(self, preset, changes, elements):
    model = config_lib.replace(presets.PRESETS[preset]().model, changes)
    self.assertEqual(cache.elements_per_token(model), elements)
    self.assertEqual(cache.bytes_per_token(model), 2 * elements)

  def test_facts_are_the_columns_of_the_report(self):
    facts = experiment.facts(presets.tiny())
    self.assertLessEqual(set(facts), set(report.COLUMNS))
    self.assertTrue(np.all(np.array(list(facts.values())) > 0))


if __name__ == '__main__':
  absltest.main()
