"""Several processes as one run, one of them killed, and other layouts after it.

The processes are real, with four CPU devices each; the steps of a test follow
one another in one workdir, because each start compiles for a minute.
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.training import checkpoint, metrics
from tests import tolerances
from tests.records import without_speeds

_ROOT = pathlib.Path(__file__).parents[1]
_TRAIN = (
  '-m',
  'experiments.train',
  '--preset=tiny',
  '--model.n_layers=2',
  '--model.n_mtp_layers=0',
  '--train.steps=60',
  '--train.save_every=4',
  '--train.eval_every=60',
  '--optim.ema_decay=0.9',
)
_TWO = ('--parallel.data=2', '--parallel.expert=4', '--parallel.zero1')


def _start(*arguments, **options):
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def _start_pair(workdir, port):
  return [
    _start(
      *_TRAIN,
      *_TWO,
      f'--workdir={workdir}',
      '--parallel.cpu_devices=4',
      '--parallel.num_processes=2',
      f'--parallel.process_id={i}',
      f'--parallel.coordinator=127.0.0.1:{port}',
    )
    for i in range(2)
  ]


def _finish(process, seconds=600):
  text, _ = process.communicate(timeout=seconds)
  return process.returncode, text


def _wait_for_step(workdir, step, processes, seconds=600):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    rows = metrics.read(workdir)
    if rows and rows[-1]['step'] >= step:
      return
    for process in processes:
      assert process.poll() is None, process.communicate()[0]
    time.sleep(0.02)
  raise AssertionError(f'step {step} was not reached')


def _losses(workdir):
  return {row['step']: row['loss'] for row in metrics.read(workdir)}


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_goes_on(tmp_path):
  workdir = tmp_path / 'run'
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  pair = _start_pair(workdir, port)
  _wait_for_step(workdir, 6, pair)
  # Another run may not touch the workdir.
  status, text = _finish(_start(*_TRAIN, f'--workdir={workdir}'), 120)
  assert status == 2, text
  assert 'is training in it' in text

  pair[1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  status, text = _finish(pair[0], 60)
  assert time.monotonic() - killed < 60
  assert status not in (0, None), text
  assert 'lost another one' in text or 'another task died' in text, text
  assert _finish(pair[1])[0] == -signal.SIGKILL
  before = metrics.read(workdir)

  # The same command goes on, bitwise; this time through the launcher.
  launched = _start(
    '-m', 'experiments.launch', '--processes=2', '--',
    sys.executable, *_TRAIN, *_TWO,
    f'--workdir={workdir}', '--parallel.cpu_devices=4',
  )  # fmt: skip
  status, text = _finish(launched)
  assert status == 0, text
  resumed = int(text.split('resuming after step ')[1].split()[0])
  assert 4 <= resumed <= before[-1]['step'] + 1
  after = metrics.read(workdir)
  assert [row['step'] for row in after] == list(range(60))
  rows = after[: len(before)]
  assert without_speeds(rows) == without_speeds(before)
  assert text.count('Trained 60 steps') == 1  # The first process alone talks.
  assert (workdir / 'samples' / '60.txt').read_text()

  _check_one_device_is_the_same(workdir, tmp_path)
  _check_another_layout_goes_on(workdir)


def _check_one_device_is_the_same(workdir, tmp_path):
  one = tmp_path / 'one'
  status, text = _finish(_start(*_TRAIN, f'--workdir={one}'))
  assert status == 0, text
  for step, loss in list(_losses(one).items())[:10]:
    tolerances.assert_close(
      _losses(workdir)[step], loss, tolerances.COMPONENT_PARITY, f'step {step}'
    )


def _check_another_layout_goes_on(workdir):
  """The saved arrays are whole, whoever wrote them, and FSDP takes them."""
  config, variables, step = checkpoint.load_for_inference(workdir)
  assert step == 60 and config.parallel.n_devices == 1
  _, average, _ = checkpoint.load_for_inference(workdir, use_ema=True)
  for tree in (variables, average):
    for x in jax.tree.leaves(tree):
      assert len(x.sharding.device_set) == 1 and np.isfinite(x).all()
  more = _start(
    *_TRAIN,
    f'--workdir={workdir}',
    '--train.steps=62',
    '--parallel.fsdp=8',
    '--parallel.cpu_devices=8',
  )
  status, text = _finish(more)
  assert status == 0, text
  assert 'resuming after step 60' in text
  rows = metrics.read(workdir)
  assert [row['step'] for row in rows] == list(range(62))
  assert (
    json.loads((workdir / 'config.json').read_text())['parallel']['fsdp'] == 8
  )
  assert rows[-1]['loss'] < rows[0]['loss'] - 0.3  # It had learnt.


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
def test_the_launcher_passes_a_failure_on(arguments, expected, message):
  process = _start('-m', 'experiments.launch', *arguments)
  status, text = _finish(process)
  assert status == expected
  assert message in text and 'Traceback' not in text
