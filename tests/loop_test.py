"""Whole runs of the loop: killed, interrupted, refused, not finite."""

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.data import pipeline, tokenizer
from deepseek_jax.evaluation import perplexity, run
from deepseek_jax.training import (
  checkpoint,
  feed,
  loop,
  metrics,
  schedules,
  step_log,
  throughput,
)
from deepseek_jax.training import state as state_lib
from tests.records import without_speeds

_ROOT = pathlib.Path(__file__).parent.parent
_STEPS, _SAVE_EVERY = 60, 10


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loop')
  for i in range(30):
    lines = [f'def f{i}_{j}(x):\n  return x + {i * j}\n' for j in range(20)]
    (folder / f'{i}.txt').write_text('\n'.join(lines))
  return folder


def _config(folder, **updates):
  """Two layers, one MoE, and no MTP: what is traced at every start."""
  updates = {k.replace('__', '.'): v for k, v in updates.items()}
  return config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 2,
      'model.n_mtp_layers': 0,
      'data.source': str(folder / '*.txt'),
      'data.cache_dir': str(folder / 'cache'),
      'data.val_fraction': 0.2,
      'optim.ema_decay': 0.9,
      'train.micro_batch_size': 2,
      'train.steps': _STEPS,
      'train.save_every': _SAVE_EVERY,
      'train.eval_every': 15,
      'train.eval_batches': 1,
      **updates,
    },
  )


@pytest.fixture(scope='module')
def reference(folder):
  """A run that nothing happened to."""
  run.train(_config(folder), folder / 'reference', presets.tiny())
  return folder / 'reference'


def _records(workdir):
  return without_speeds(metrics.read(workdir))


def _last_step(workdir):
  try:
    records = metrics.read(workdir)
  except ValueError:  # Read in the middle of a write.
    return -1
  return records[-1]['step'] if records else -1


def _wait_for(condition, process):
  deadline = time.monotonic() + 1200  # A hang, not a slow machine.
  while not condition():
    assert process.is_alive(), f'ended with {process.exitcode}'
    assert time.monotonic() < deadline
    time.sleep(0.001)


@pytest.mark.slow
def test_killed_anywhere_the_losses_are_bitwise_the_same(folder, reference):
  workdir, config = folder / 'killed', _config(folder)
  # A fork server imports JAX once for all the processes.
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['deepseek_jax.evaluation.run'])

  def start():
    process = context.Process(target=run.train, args=(config, workdir))
    process.start()
    return process

  def half_written():
    return set(workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))

  process = start()  # Killed between two saves, or beside one.
  _wait_for(lambda: _last_step(workdir) >= 13, process)
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  assert _last_step(workdir) < _STEPS - 1

  before = half_written()
  process = start()  # Killed in the middle of a save.
  _wait_for(lambda: half_written() - before, process)
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  assert half_written() - before, 'the save ended before the kill'

  process = start()  # Terminated: saves first, at whatever step that is.
  _wait_for(lambda: _last_step(workdir) >= 31, process)
  os.kill(process.pid, signal.SIGTERM)
  process.join()
  assert process.exitcode == 128 + signal.SIGTERM
  _, _, saved = checkpoint.load_for_inference(workdir)
  assert saved == _last_step(workdir) + 1
  assert saved < _STEPS

  run.train(config, workdir)
  assert _records(workdir) == _records(reference)
  for use_ema in (False, True):
    _, actual, step = checkpoint.load_for_inference(workdir, use_ema)
    _, expected, _ = checkpoint.load_for_inference(reference, use_ema)
    assert step == _STEPS
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_leaves_everything_in_its_place(folder, reference):
  text = (reference / 'config.json').read_text()
  assert json.loads(text) == config_lib.to_dict(_config(folder))
  records = metrics.read(reference)
  assert [r['step'] for r in records] == list(range(_STEPS))
  assert records[-1]['loss'] < records[0]['loss'] - 0.5
  evaluated = [r['step'] for r in records if 'val_bpb' in r]
  assert evaluated == [14, 29, 44, 59]
  kinds = ('grad_norm', 'param_norm', 'update_norm', 'balance_loss', 'lr')
  kinds += ('gamma', 'dropped', 'bias_min', 'bias_max', 'max_vio', 'load')
  assert set(kinds) <= set(records[0])
  assert np.sum(records[0]['load']) == 8 * 32 * 2  # B T K, one MoE layer.
  assert all(r['tokens_per_second'] > 0 for r in records[1:])
  assert records[-1]['tokens'] == _STEPS * 8 * 32
  assert (reference / 'samples' / f'{_STEPS}.txt').read_text()
  assert {p.name for p in (reference / 'plots').iterdir()} >= {
    'losses.png',
    'expert_load.png',
    'validation.png',
  }
  steps = {p.name for p in (reference / 'checkpoints').iterdir()}
  assert steps == {'40', '50', '60'}


def test_another_model_is_refused_and_nothing_is_overwritten(folder, reference):
  before = (reference / 'config.json').read_text()
  with pytest.raises(checkpoint.ConfigMismatch, match='model.init_std'):
    run.train(_config(folder, model__init_std=0.01), reference)
  assert (reference / 'config.json').read_text() == before
  assert len(metrics.read(reference)) == _STEPS


def test_no_step_left_for_other_settings(folder, reference):
  before = {p: p.read_bytes() for p in reference.glob('*.json*')}
  with pytest.raises(checkpoint.ConfigMismatch, match='optim.lr: .* -> 0.5'):
    run.train(_config(folder, optim__lr=0.5), reference)
  # Nor is it the config of a run of fewer steps.
  loop.train(
    _config(folder, train__steps=_STEPS - 1, train__keep=2),
    reference,
    make_evaluate=lambda *_: None,
    write_samples=lambda *_: None,
  )
  assert {p: p.read_bytes() for p in reference.glob('*.json*')} == before


def test_two_runs_in_one_workdir(reference):
  with checkpoint.lock(reference):
    command = ['experiments.train', '--preset=tiny', f'--workdir={reference}']
    done = subprocess.run(
      [sys.executable, '-m', *command],
      capture_output=True,
      text=True,
      cwd=_ROOT,
    )
  assert done.returncode == 2
  expected = f'ERROR: --workdir={reference}: process {os.getpid()} on'
  assert done.stderr.startswith(expected), done.stderr


def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(folder):
  """Parameters that a finite gradient has made infinite."""
  config = _config(folder, train__save_every=1)
  workdir, at = folder / 'nonfinite', schedules.Schedule.at

  def spoilt(self, step):
    return at(self, step)._replace(lr=np.float32(np.inf if step == 2 else 0.1))

  message = r'^step 2 is not finite: .* grad_norm \d.* update_norm (inf|nan)\.'
  with (
    mock.patch.object(schedules.Schedule, 'at', spoilt),
    pytest.raises(FloatingPointError, match=message),
  ):
    run.train(config, workdir)
  _, model, step = checkpoint.load_for_inference(workdir)
  assert step == 2
  for leaf in jax.tree.leaves(model):
    assert np.isfinite(leaf).all()
  assert metrics.read(workdir)[-1]['step'] == 1


def _items(workdir, step):
  """All that a checkpoint holds, and its position in the data."""
  import orbax.checkpoint as ocp

  path = workdir / 'checkpoints' / str(step)
  with ocp.StandardCheckpointer() as reader:
    items = [reader.restore(path / n) for n in ('model', 'opt_state', 'ema')]
  meta = json.loads((path / 'meta' / 'metadata').read_text())
  return items, meta['data_state']


def test_a_skipped_step_leaves_all_but_the_step_and_the_position(folder):
  config = _config(
    folder, train__nonfinite='skip', train__steps=2, train__save_every=1
  )
  workdir, at = folder / 'skip', schedules.Schedule.at

  def spoilt(self, step):
    return at(self, step)._replace(alpha=np.float32([0, np.nan][step]))

  with mock.patch.object(schedules.Schedule, 'at', spoilt):
    loop.train(
      config,
      workdir,
      make_evaluate=lambda *_: lambda _: {},
      write_samples=lambda *_: None,
    )
  (before, first), (after, second) = (_items(workdir, n) for n in (1, 2))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert (first['drawn'], second['drawn']) == (8, 16)
  kept, skipped = metrics.read(workdir)
  assert (kept['finite'], skipped['finite']) == (1, 0)
  assert kept['bias_max'] > 0
  for name in ('bias_min', 'bias_max', 'param_norm'):
    assert skipped[name] == kept[name], name


def _log(folder, workdir, **updates):
  config = _config(folder, **updates)
  state = state_lib.TrainState(np.int32(0), {}, {}, {})
  schedule = schedules.Schedule(config)
  return step_log.StepLog(workdir, config, state, schedule, 0.0)


def test_reads_a_step_only_when_the_next_is_under_way(folder, tmp_path):
  class Promise:
    read = False

    def __bool__(self):
      Promise.read = True
      return True

    def __array__(self, *_, **__):
      return np.array(True)

  with _log(folder, tmp_path) as log:
    log.add(0, {'loss': 1.0, 'finite': Promise()})
    assert not Promise.read
    log.add(1, {'loss': 2.0, 'finite': np.True_})
    assert Promise.read
    assert [r['loss'] for r in metrics.read(tmp_path)] == [1.0]
    log.extend({'val_loss': 3.0})
    log.flush()
    assert metrics.read(tmp_path)[1]['val_loss'] == 3.0
    log.flush()  # Nothing is left.
    assert len(metrics.read(tmp_path)) == 2


def test_a_skipped_step_is_recorded_and_a_stopping_one_names_the_range(
  folder, tmp_path, caplog
):
  norms = {'grad_norm': np.inf, 'update_norm': 1.0}
  bad = {'loss': np.nan, **norms, 'finite': np.False_}
  good = {'loss': 1.0, **norms, 'finite': np.True_}
  with _log(folder, tmp_path / 'skip', train__nonfinite='skip') as log:
    log.add(0, bad)
    log.add(1, good)
  record = metrics.read(tmp_path / 'skip')[0]
  assert record['finite'] == 0
  assert np.isnan(record['loss'])
  assert 'step 0 is not finite and was skipped' in caplog.text
  with _log(folder, tmp_path / 'stop', train__log_every=5) as log:
    for step in range(7):
      log.add(step, good)
    log.add(7, bad)
    with pytest.raises(FloatingPointError, match='^step 7 .* steps 5 to 7'):
      log.flush()
  assert [r['step'] for r in metrics.read(tmp_path / 'stop')] == [0, 4]


def test_feed_goes_on_at_the_row_where_it_was(folder, caplog):
  config = _config(folder)
  corpus = pipeline.load(config.data, config.model.vocab_size)
  first = feed.Feed(corpus, config)
  batches = [first.draw(4) for _ in range(3)]
  assert batches[0]['tokens'].shape == (2, 2, config.data.seq_len + 1)
  position = json.loads(json.dumps(first.position))  # As a checkpoint has it.
  expected = [first.draw(size) for size in (4, 8)]
  rows = [batch['tokens'].reshape(-1, 33) for batch in expected]
  for micro in (2, 4):
    other = _config(folder, train__micro_batch_size=micro)
    second = feed.Feed(corpus, other, position)
    for size, row in zip((4, 8), rows):
      batch = second.draw(size)['tokens']
      assert batch.shape[:2] == (size // micro, micro)
      np.testing.assert_array_equal(batch.reshape(-1, 33), row)
  assert not caplog.text
  other = _config(folder, data__seed=1)
  corpus = pipeline.load(other.data, config.model.vocab_size)
  feed.Feed(corpus, other, position)
  assert 'seed changed since the checkpoint' in caplog.text


class _Share:
  """What a feed asks of a layout, in one of several processes."""

  def __init__(self, index, count):
    self._share = index, count

  def share(self, _):
    return self._share

  def put_batch(self, batch):
    return batch


def test_feed_goes_on_among_others_and_in_parts_that_do_not_fit(folder):
  config = _config(folder)
  corpus = pipeline.load(config.data, config.model.vocab_size)
  whole = feed.Feed(corpus, config).draw(40)['tokens'].reshape(-1, 33)

  def draw(position, micro, count, batch_size):
    other = _config(
      folder, train__micro_batch_size=micro, data__batch_size=batch_size
    )
    feeds = [
      feed.Feed(corpus, other, position, _Share(i, count)) for i in range(count)
    ]
    parts = [f.draw(batch_size)['tokens'] for f in feeds]
    rows = np.concatenate(parts, axis=1).reshape(-1, 33)
    return rows, json.loads(json.dumps(feeds[0].position))

  position, begin = None, 0
  # 4 rows are no whole number of 3, 6 or 8; and resumed twice alike.
  for micro, count, size in (
    (4, 2, 4), (3, 1, 3), (8, 2, 8), (8, 2, 8), (6, 3, 6), (2, 1, 2),
  ):  # fmt: skip
    rows, position = draw(position, micro, count, size)
    np.testing.assert_array_equal(rows, whole[begin : begin + size])
    begin += size
    assert position['drawn'] == begin


def test_validation_rows_do_not_depend_on_accumulation(folder):
  rows = []

  def collect(_, params, router_state, batches, bytes_V):
    del params, router_state, bytes_V
    rows.append(np.concatenate([batch['tokens'] for batch in batches]))

  state = state_lib.TrainState(np.int32(0), {}, {}, {})
  with (
    mock.patch.object(perplexity, 'make_eval_step'),
    mock.patch.object(perplexity, 'evaluate', collect),
  ):
    for micro in (0, 2, 4):
      config = _config(folder, train__micro_batch_size=micro)
      corpus = pipeline.load(config.data, config.model.vocab_size)
      run.make_evaluate(None, config, corpus)(state)
  assert rows[0].shape == (config.data.batch_size, 33)
  for other in rows[1:]:
    np.testing.assert_array_equal(other, rows[0])


def test_the_prompt_of_a_short_document_does_not_end_it(folder, tmp_path):
  documents = [np.array([1, 7, 8, 2]), np.arange(3, 40)]
  corpus = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(eos_id=2, decode=str),
    validation=types.SimpleNamespace(
      documents=documents, document=documents.__getitem__
    ),
  )
  with mock.patch.object(run.generate, 'generate') as generate:
    generate.return_value.tokens = [[4], [5]]
    run.write_samples(tmp_path, None, {}, corpus, _config(folder), 3)
  prompts = generate.call_args.args[2]
  assert prompts == [[1, 7, 8], list(range(3, 19))]
  assert '[1, 7, 8]' in (tmp_path / 'samples/3.txt').read_text()


def test_speed_leaves_out_compilation_and_pauses():
  now = [0.0]
  clock = throughput.Clock(lambda: now[0])
  now[0] = 100.0  # Compilation.
  assert clock.lap(0, 10) == {}
  assert clock.lap(0, 10) == {}
  now[0] += 8
  with clock.paused():
    now[0] += 1000
  now[0] += 2
  assert clock.lap(5, 110) == {'step_seconds': 2, 'tokens_per_second': 10}


def test_the_peak_is_that_of_the_planners_devices():
  for kind, peak in (
    ('NVIDIA H800', 989.5e12),
    ('NVIDIA H100 80GB HBM3', 989.5e12),
    ('NVIDIA H100 PCIe', None),
    ('NVIDIA H200 NVL', None),
    ('NVIDIA A100-PCIE-40GB', 312e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('cpu', None),
  ):
    device = types.SimpleNamespace(device_kind=kind)
    assert throughput.peak_flops(device) == peak, kind


def test_a_run_keeps_its_tokenizer(tmp_path):
  def train(text):
    return tokenizer.Tokenizer.train([text], 300)

  first = train('import numpy as np ' * 9)
  loop._keep_tokenizer(tmp_path, first)
  assert tokenizer.Tokenizer.load(tmp_path / 'tokenizer.json').equals(first)
  loop._keep_tokenizer(tmp_path, train('import numpy as np ' * 9))
  with pytest.raises(ValueError, match='began on other text'):
    loop._keep_tokenizer(tmp_path, train('another language ' * 9))
