"""Metrics files, plots and progress: resumed, damaged, incomplete."""

import errno
import io
import json
import pathlib
import struct
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from deepseek_jax.training import metrics, plots, progress


class MaxVioTest(parameterized.TestCase):
  @parameterized.parameters(np.asarray, jnp.asarray)
  def test_definition(self, array):
    load_LE = array([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 1, 2, 2]])
    np.testing.assert_allclose(metrics.max_vio(load_LE), [0.0, 3.0, 0.5])

  def test_layer_without_tokens_is_nan(self):
    vio = metrics.max_vio(jnp.array([[0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_array_equal(vio, [np.nan, 0.0])


class WriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'run'
    self.file = self.workdir / 'metrics.jsonl'

  def _write(self, steps, first_step=0, **values):
    with metrics.Writer(self.workdir, first_step) as writer:
      for step in steps:
        writer.write(step, {'loss': float(step)} | values)

  def _steps(self):
    return [record['step'] for record in metrics.read(self.workdir)]

  def test_round_trip_of_every_kind_of_value(self):
    values = {
      'python': 1 / 3,
      'integer': 14_800_000_000_000,
      'float32': np.float32(0.1),
      'bfloat16': jnp.bfloat16(0.1),
      'counts': jnp.arange(3),
      'load': np.array([[0.25, 0.75], [np.nan, 1.0]]),
      'bad': [np.nan, np.inf, -np.inf],
      'none': np.zeros((0,)),
    }
    self._write([3], **values)
    (record,) = metrics.read(self.workdir)
    self.assertEqual(record.pop('step'), 3)
    self.assertEqual(record.pop('loss'), 3.0)
    self.assertEqual(list(record), list(values))
    for name, value in values.items():
      np.testing.assert_array_equal(record[name], np.asarray(value))
    self.assertIs(type(record['integer']), int)

  def test_lines_are_strict_json(self):
    self._write([0], a=np.nan, b=[np.inf, -np.inf])

    def refuse(constant):
      raise AssertionError(constant)

    record = json.loads(self.file.read_text(), parse_constant=refuse)
    self.assertEqual((record['a'], record['b']), ('nan', ['inf', '-inf']))

  def test_lines_are_there_before_closing(self):
    writer = metrics.Writer(self.workdir)
    writer.write(0, {'loss': 1.0})
    self.assertEqual(self._steps(), [0])
    writer.close()

  @parameterized.parameters(
    (0, []), (4, [0, 2]), (5, [0, 2, 4]), (6, [0, 2, 4]), (99, [0, 2, 4, 6, 8])
  )
  def test_resume_drops_what_will_be_done_again(self, first_step, kept):
    self._write([0, 2, 4, 6, 8])
    self._write([], first_step)
    self.assertEqual(self._steps(), kept)
    self._write([100], first_step)
    self.assertEqual(self._steps(), [*kept, 100])

  def test_each_step_once_and_in_order(self):
    with metrics.Writer(self.workdir, 5) as writer:
      writer.write(5, {})
      for step in (4, 5):
        with self.assertRaises(AssertionError):
          writer.write(step, {})

  def test_every_truncation_heals(self):
    self._write([0, 1])
    whole = self.file.read_bytes()
    first = whole.index(b'\n') + 1
    for length in range(len(whole)):
      self.file.write_bytes(whole[:length])
      complete = [0] if length >= first else []
      self.assertEqual(self._steps(), complete)
      # The events are of no interest, and slow.
      end = metrics._end_before(self.file, 99)
      self.assertEqual(end, first if complete else 0)
    self._write([1], first_step=1)
    self.assertEqual(self._steps(), [0, 1])

  @parameterized.parameters(b'\0' * 50 + b'\n', b'{"loss": 1}\n', b'[]\n')
  def test_rubbish_heals_at_the_end_and_is_named_elsewhere(self, rubbish):
    self._write([0, 1])
    with self.file.open('ab') as file:
      file.write(rubbish)
    self.assertEqual(self._steps(), [0, 1])
    self.file.write_bytes(rubbish + self.file.read_bytes())
    with self.assertRaisesRegex(ValueError, r'metrics\.jsonl:1 is damaged'):
      metrics.read(self.workdir)

  def test_no_file(self):
    self.assertEqual(metrics.read(self.workdir), [])

  def test_events(self):
    self._write([0, 7], max_vio=np.array([0.5, 1.5]), load=np.ones((2, 3)))
    (path,) = (self.workdir / 'tensorboard').iterdir()
    data, found = path.read_bytes(), {}
    while data:  # Records are length, checksum, event, checksum.
      (size,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
    expected = {}
    for step in (0, 7):
      expected['loss', step] = step
      expected['max_vio/0', step] = 0.5
      expected['max_vio/1', step] = 1.5
    self.assertEqual(found, expected)

  def test_a_full_disk_ends_the_run(self):
    full = OSError(errno.ENOSPC, 'No space left on device')
    with metrics.Writer(self.workdir) as writer:
      writer.write(0, {'loss': 1.0})
      where = 'tensorboardX.record_writer.RecordWriter.write'
      refused = self.assertRaisesRegex(OSError, 'No space left')
      with mock.patch(where, side_effect=full), refused:
        writer.write(1, {'loss': 1.0})


class PlotsTest(parameterized.TestCase):
  def _draw(self, records):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    workdir = pathlib.Path(folder)
    with metrics.Writer(workdir) as writer:
      for step, record in enumerate(records):
        writer.write(step * 10, record)
    paths = plots.draw(workdir)
    for path in paths:
      self.assertEqual(path.parent, workdir / 'plots')
      self.assertTrue(path.read_bytes().startswith(b'\x89PNG'))
    return [path.stem for path in paths]

  def _record(self, layers, experts, seed):
    load_LE = np.random.default_rng(seed).dirichlet(np.ones(experts), layers)
    return {
      'loss': 3.0,
      'mtp_1_loss': 3.5,
      'mtp_10_loss': 4.5,
      'balance_loss': 0.1,
      'grad_norm': 1.0,
      'load': load_LE,
      'max_vio': metrics.max_vio(load_LE),
      'lr': 1e-3,
      'gamma': 1e-3,
      'alpha': 1e-4,
      'mtp_weight': 0.3,
    }

  def test_all(self):
    records = [self._record(11, 4, seed) for seed in range(5)]
    records[2] |= {'val_bpb': 2.0, 'val_mtp_1_acceptance': 0.5}
    names = ['losses', 'validation', 'expert_load', 'max_vio', 'schedules']
    self.assertEqual(self._draw(records), names)

  def test_dense_model_without_validation(self):
    records = [{'loss': 1.0, 'load': np.zeros((0, 0)), 'max_vio': []}] * 3
    self.assertEqual(self._draw(records), ['losses'])

  def test_one_step_not_finite_with_an_idle_layer(self):
    record = self._record(2, 4, 0)
    record |= {'loss': np.nan, 'grad_norm': np.inf}
    record['load'][1] = 0
    record['max_vio'] = [0.5, np.nan]
    expected = ['losses', 'expert_load', 'max_vio', 'schedules']
    self.assertEqual(self._draw([record]), expected)

  def test_nothing(self):
    self.assertEqual(self._draw([]), [])

  def test_long_run_is_thinned(self):
    record = {'load': np.full((1, 2), 0.5), 'max_vio': [0.0]}
    records = [{'step': step} | record for step in range(5000)]
    axis = plots._expert_load(records).axes[0]
    (mesh,) = axis.collections
    self.assertEqual(mesh.get_array().shape, (2, 400))
    self.assertEqual(axis.get_xlim(), (-0.5, 4999.5))
    (line,) = plots._max_vio(records).axes[0].lines  # One layer has no mean.
    self.assertLen(line.get_xdata(), 5000)


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class ProgressTest(parameterized.TestCase):
  METRICS = {
    'loss': jnp.float32(2.5),
    'tokens_per_second': 12345.6,
    'max_vio': [0.5, 1.0],
    'step_seconds': 2.0,
  }

  def _run(self, stream, values):
    with progress.Progress(10, 100, stream) as bar:
      bar.advance()
      bar.show(values)
      bar.advance()
    return stream.getvalue()

  def test_log_has_one_line(self):
    self.assertEqual(
      self._run(io.StringIO(), self.METRICS),
      'step 11/100  loss 2.5000  tokens/s 12,346  MaxVio 0.75  02:58 left\n',
    )

  def test_dense_log(self):
    text = self._run(io.StringIO(), {'loss': np.nan, 'max_vio': []})
    self.assertEqual(text, 'step 11/100  loss nan\n')

  def test_terminal_has_a_bar(self):
    text = self._run(_Terminal(), self.METRICS)
    self.assertIn('12/100', text)
    self.assertIn('loss 2.5000  tokens/s 12,346  MaxVio 0.75', text)


if __name__ == '__main__':
  absltest.main()
