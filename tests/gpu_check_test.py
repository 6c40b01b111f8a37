"""The GPU's check, without a GPU: it runs to its end, and says so."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.kernels import mosaic
from deepseek_jax.ops import fp8_matmul, fused_quantize, grouped
from deepseek_jax.ops import quantize as reference
from experiments import gpu_cases, gpu_check
from tests import deviceless, tolerances

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


def _case(name, cases):
  return next(c for c in cases if c.name.startswith(name))


def _without_small(x, tile, **how):
  amax = reference.expand(reference.tile_amax(x, tile), tile, x.shape)
  small = jnp.abs(x).astype(jnp.float32) < amax / 16
  return reference.quantize(jnp.where(small, 0, x), tile, **how)


_ROW = reference.ROW_TILE
_MUTANTS = {
  'quantize 128': lambda x: _without_small(x, _ROW),
  'quantize ceil': lambda x: reference.quantize(x, _ROW, scale='floor'),
  'quantize floor': lambda x: reference.quantize(x, _ROW, scale='ceil'),
  'quantize gradients': lambda x: reference.quantize(x, _ROW),
  'swiglu': lambda g, u, w: fused_quantize.swiglu(g, u),
  'rms_norm': lambda x, g: fused_quantize.rms_norm(x, g[::-1], 1e-6),
  'turn bf16 ceil': lambda x: reference.quantize(x, reference.COLUMN_TILE),
  # The last row of a token is dropped.
  'unpermute': lambda x, layout: grouped.unpermute(
    x, layout._replace(row_TK=layout.row_TK[:, :1])
  ),
}


@pytest.mark.parametrize('name', _MUTANTS)
def test_what_a_broken_kernel_gives_is_judged_wrong(name):
  case = _case(name, gpu_cases.all_cases(small=True))
  operands = case.make()
  run = functools.partial(case.run, implementation='xla')
  for f, right in ((run, True), (_MUTANTS[name], False)):
    assert (
      gpu_check._judge(case, name, jax.jit(f)(*operands), operands) == right
    )


@pytest.mark.parametrize('name', ['fp8_matmul 64', 'fp8_matmul wgrad'])
def test_a_product_that_is_not_promoted_is_judged_wrong(name):
  """One of 14 bits that is promoted, every 128 of K, is not."""
  case = _case(name, gpu_cases._products(64, 64, 4096))
  operands = a, b = case.make()
  b = b.mT
  hopper = fp8_matmul.Accumulation('hopper14')
  kept = jax.jit(fp8_matmul._tensor_core)(a.dequantize().T, b.dequantize())
  dtype = case.run(*operands, implementation='xla').dtype
  for y, right in ((fp8_matmul.dot(a, b, hopper), True), (kept, False)):
    assert gpu_check._judge(case, name, y.astype(dtype), operands) == right


def test_what_kernels_are_timed_beside_computes_the_same():
  found = []
  for case in gpu_cases.all_cases(small=True):
    for name, f in case.others.items():
      if name.startswith('lax.'):
        operands = case.make()
        error = gpu_check._error(case, jax.jit(f)(*operands), operands)
        assert error <= tolerances.BFLOAT16, (case.name, name, error)
        found.append(name)
  assert sorted(found) == sorted(
    2 * ['lax.ragged_dot', 'lax.scaled_dot'] + ['lax.ragged_dot_general']
  )


_COMPILE = """
import functools, re
import jax
from jax.sharding import SingleDeviceSharding
from deepseek_jax.kernels import mosaic
from deepseek_jax.parallel import topology
from experiments import gpu_cases
place = SingleDeviceSharding(topology.topology('h100', 1)[0])
def abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
with mosaic.for_hopper():
  for case in gpu_cases.all_cases(small=False):
    if case.name.startswith(('fp8_matmul', 'grouped fp8')):
      run = functools.partial(case.run, implementation='mosaic_gpu')
      operands = jax.tree.map(abstract, jax.eval_shape(case.make))
      text = jax.jit(run).lower(*operands).compile().as_text()
      print(case.name, 'mosaic_gpu' in text)
      print(*re.findall(r'f8e4m3fn\\S* transpose', text), sep='\\n')
"""


@pytest.mark.slow
def test_what_is_timed_turns_no_codes():
  """They lie as the kernels read them: the products alone are timed."""
  lines = deviceless.run('-c', _COMPILE).split('\n')
  names = [line for line in lines if line.endswith('True')]
  assert len(names) == 18
  assert [line for line in lines if line not in names and line] == []


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
