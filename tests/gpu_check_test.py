"""The GPU's check, without a GPU: it runs to its end, and says so."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from deepseek_jax.kernels import mosaic
from experiments import gpu_cases

_ROOT = pathlib.Path(__file__).parent.parent
# What memory bounds at every shape, and what it or products do; else products.
_MOVES = 'quantize', 'swiglu', 'rms_norm', 'turn', 'permute', 'unpermute'
_EITHER = 'fp8_matmul', 'decode'


def _check(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.gpu_check', *arguments],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


@pytest.mark.slow
def test_dry_run():
  done = _check('--shapes=small', '--rounds=1')
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'No Hopper GPU: the device is a cpu' in done.stdout
  assert 'all passed' in done.stdout
  assert 'no kernel' not in done.stdout or jax.__version_info__ < (0, 11)
  assert 'us' not in done.stdout.split()  # Nothing is timed.
  for case in gpu_cases.all_cases(small=True):
    assert f'{case.name}: reference ok' in done.stdout
    assert f'{case.name}: kernel' in done.stdout or 'turn e4m3' in case.name


def test_real_cases_are_lowered():
  """Each kernel at each shape that will be timed, as far as it goes here."""
  names = []
  for case in gpu_cases.all_cases(small=False):
    names.append(case.name)
    if 'turn e4m3' in case.name and not mosaic.turns_codes():
      continue
    run = functools.partial(case.run, implementation='mosaic_gpu')
    text = mosaic.lower(run, *jax.eval_shape(case.make))
    assert 'mosaic_gpu' in text, case.name
    kind = case.name.split()[0]
    assert bool(case.flops) == (kind not in _MOVES), case.name
    assert bool(case.bytes) == (kind in _MOVES + _EITHER), case.name
  assert len(set(names)) == len(names) > 30
  assert 'fp8_matmul 4096x7168x16384' in names
