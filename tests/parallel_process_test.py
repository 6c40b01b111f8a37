"""Several processes as one run, one of them killed, and other layouts after it.

What one of them saved last is damaged, so that the other alone could read it.

The processes are real, with four CPU devices each; the steps of a test follow
one another in one workdir, because each start compiles for a minute.
"""

import json
import signal
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.training import checkpoint, metrics
from experiments import launch
from tests import processes, tolerances
from tests.records import first_gradients, without_speeds

_TRAIN = (
  '-m',
  'experiments.train',
  '--preset=tiny',
  '--model.n_layers=2',
  '--model.n_mtp_layers=0',
  '--train.steps=60',
  '--train.save_every=4',
  '--train.keep=60',
  '--train.eval_every=60',
  '--optim.ema_decay=0.9',
  '--precision.mu_dtype=float32',
)
_OFTEN = '--train.save_every=1'
_TWO = ('--parallel.data=2', '--parallel.expert=4', '--parallel.zero1')


@pytest.fixture
def start():
  with processes.starter() as function:
    yield function


def _start_pair(start, workdir):
  coordinator = f'127.0.0.1:{launch.free_port()}'
  return [
    start(
      *_TRAIN,
      *_TWO,
      _OFTEN,
      f'--workdir={workdir}',
      '--parallel.cpu_devices=4',
      '--parallel.num_processes=2',
      f'--parallel.process_id={i}',
      f'--parallel.coordinator={coordinator}',
    )
    for i in range(2)
  ]


def _wait(pair, condition):
  """Until `condition`, while both processes run."""

  def holds():
    for process in pair:
      assert process.is_running, process.text
    return condition()

  processes.wait_until(holds, 600, *pair)


def _has_begun(workdir):
  return (workdir / '.lock').exists() and (workdir / '.lock').read_text()


def _saved(workdir):
  """Steps of complete checkpoints."""
  names = [path.name for path in workdir.glob('checkpoints/*')]
  return sorted(int(name) for name in names if name.isdigit())


def _can_go_on(workdir):
  """Whether steps behind the first of two complete checkpoints are recorded."""
  saved, rows = _saved(workdir), metrics.read(workdir)
  return len(saved) > 1 and rows and rows[-1]['step'] > saved[0]


def _damage(workdir):
  """Cuts in half all that process 1 wrote of the newest checkpoint: its step.

  One file may hold only what a later one replaces: any of them can be spared.
  """
  newest = _saved(workdir)[-1]
  item = workdir / 'checkpoints' / str(newest) / 'opt_state'
  for path in (item / 'ocdbt.process_1' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  return newest


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_goes_on(start, tmp_path):
  workdir = tmp_path / 'run'
  pair = _start_pair(start, workdir)
  # Another run may not touch the workdir; these two compile for longer.
  _wait(pair, lambda: _has_begun(workdir))
  status, text = start(*_TRAIN, f'--workdir={workdir}').finish()
  assert status == 2, text
  assert 'is training in it' in text

  _wait(pair, lambda: _can_go_on(workdir))
  pair[1].send(signal.SIGKILL)
  status, text = pair[0].finish(60)
  assert status, text
  assert 'lost another one' in text or 'another task died' in text, text
  assert pair[1].finish()[0] == -signal.SIGKILL
  before, damaged = metrics.read(workdir), _damage(workdir)

  # The same command goes on, bitwise; this time through the launcher.
  status, text = start(
    '-m', 'experiments.launch', '--processes=2', '--',
    sys.executable, *_TRAIN, *_TWO,
    f'--workdir={workdir}', '--parallel.cpu_devices=4',
  ).finish()  # fmt: skip
  assert status == 0, text
  resumed = int(text.split('resuming after step ')[1].split()[0])
  assert 1 <= resumed < damaged <= before[-1]['step'] + 1
  assert len(list((workdir / 'damaged').iterdir())) == 1
  after = metrics.read(workdir)
  assert [row['step'] for row in after] == list(range(60))
  rows = after[: len(before)]
  assert without_speeds(rows) == without_speeds(before)
  assert text.count('Trained 60 steps') == 1  # The first process alone talks.
  assert (workdir / 'samples' / '60.txt').read_text()

  _check_one_device_is_the_same(start, workdir, tmp_path / 'one')
  _check_another_layout_goes_on(start, workdir)


def _check_one_device_is_the_same(start, workdir, one):
  """Ten steps, of which the schedules of a run of 20 are the same."""
  short = '--train.steps=20', f'--workdir={one}'
  status, text = start(*_TRAIN, _OFTEN, *short).finish()
  assert status == 0, text
  gradients = map(first_gradients, (workdir, one))
  tolerances.assert_close(*gradients, tolerances.COMPONENT_PARITY)
  pairs = zip(metrics.read(workdir)[:10], metrics.read(one))
  for row, full in (without_speeds(pair) for pair in pairs):
    # A choice may fall on a tie.
    assert np.abs(np.subtract(row.pop('load'), full.pop('load'))).max() <= 1
    del row['max_vio'], full['max_vio']
    assert {'loss', 'grad_norm', 'param_norm', 'bias_max'} < set(row)
    tolerances.assert_close(row, full, tolerances.COMPONENT_PARITY)


def _check_another_layout_goes_on(start, workdir):
  """The saved arrays are whole, whoever wrote them, and FSDP takes them."""
  config, variables, step = checkpoint.load_for_inference(workdir)
  assert step == 60 and config.parallel.n_devices == 1
  _, average, _ = checkpoint.load_for_inference(workdir, use_ema=True)
  for tree in (variables, average):
    for x in jax.tree.leaves(tree):
      assert len(x.sharding.device_set) == 1 and np.isfinite(x).all()
  status, text = start(
    *_TRAIN,
    f'--workdir={workdir}',
    '--train.steps=62',
    '--parallel.fsdp=8',
    '--parallel.cpu_devices=8',
  ).finish()
  assert status == 0, text
  assert 'resuming after step 60' in text
  rows = metrics.read(workdir)
  assert [row['step'] for row in rows] == list(range(62))
  assert (
    json.loads((workdir / 'config.json').read_text())['parallel']['fsdp'] == 8
  )
  assert rows[-1]['loss'] < rows[0]['loss'] - 0.3  # It had learnt.


# One of two processes has another seed, then a disk of its own in the workdir's
# place, and then another corpus.
_DIFFERS = """
import contextlib, dataclasses, sys
from deepseek_jax import config, presets
from deepseek_jax.data import pipeline
from deepseek_jax.evaluation import run
from deepseek_jax.training import checkpoint, process
workdir, where, i = sys.argv[1:]
changes = dict(
  data=2, cpu_devices=1, num_processes=2, process_id=int(i), coordinator=where
)
changes = {f'parallel.{name}': value for name, value in changes.items()}
here = config.replace(presets.tiny(), changes)
process.join(here.parallel)
try:
  seed = {'train.seed': int(i)}
  process.check_flags(workdir, config.leaves(config.replace(here, seed)))
except ValueError as error:
  print(error, flush=True)
disk = workdir + '/disk' + i
first = checkpoint.lock(disk) if i == '0' else contextlib.nullcontext()
with first:
  process.meet()
  try:
    checkpoint.check_shared(disk)
  except ValueError as error:
    print(error, flush=True)
  checkpoint.check_shared(workdir + '/disk0')
load = pipeline.load
pipeline.load = lambda *of: dataclasses.replace(load(*of), fingerprint=i)
run.train(here, workdir)
"""


def test_processes_that_differ_are_refused(start, tmp_path):
  where = f'127.0.0.1:{launch.free_port()}'
  pair = [start('-c', _DIFFERS, str(tmp_path), where, str(i)) for i in range(2)]
  for i, process in enumerate(pair):
    status, text = process.finish()
    assert status == 1, text
    other = f'process 1 has another value than process 0 (here {i})'
    assert f'train.seed: {other}; start all with the same' in text
    disk = f'what is in --workdir={tmp_path}/disk{i}: process 1 has another'
    assert disk in text
    other = other.replace(f'{i})', f"'{i}')")
    assert (
      f'ERROR: process {i} of 2: data.source and its tokens: {other}' in text
    )


@pytest.mark.parametrize(
  'arguments, expected, message',
  [
    (('--processes=2', '--', 'false'), 1, 'ended with status 1'),
    (('--', 'no-such-program'), 2, 'ERROR: no-such-program: no such program'),
    (('--processes=2',), 2, 'ERROR: no command to start'),
    (('--processes=0', '--', 'true'), 2, 'ERROR: flag --processes=0: '),
    (('--process=2', '--', 'true'), 2, 'did you mean --processes'),
  ],
)
def test_the_launcher_passes_a_failure_on(start, arguments, expected, message):
  status, text = start('-m', 'experiments.launch', *arguments).finish()
  assert status == expected
  assert message in text and 'Traceback' not in text
