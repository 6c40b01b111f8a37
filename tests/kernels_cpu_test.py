"""Kernels of few rows on a CPU: their sums, and when they run."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.inference import generate
from deepseek_jax.kernels import (
  cpu,
  dispatch,
  expert_decode,
  few_rows,
  mla_decode,
)
from deepseek_jax.ops import cached_attention
from deepseek_jax.ops import expert_decode as expert_reference
from deepseek_jax.training import step
from tests import tolerances

CPU = {'implementation': 'cpu'}


def setUpModule():
  if cpu.obstacle():
    raise unittest.SkipTest(cpu.obstacle())


def _normal(shape, dtype=np.float32, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(x, dtype)


def _wide(x):
  return np.asarray(x, np.float64)


class MultiplyTest(parameterized.TestCase):
  @parameterized.product(
    rows=(1, 2, 5, 9, 16),
    shape=((512, 300), (33, 130), (5, 7), (16, 16)),
    transposed=(False, True),
  )
  def test_float32(self, rows, shape, transposed):
    K, N = shape
    x, w = _normal((rows, K)), _normal((N, K) if transposed else (K, N))
    y = few_rows.multiply(x, w, transposed, **CPU)
    expected = _wide(x) @ (_wide(w).T if transposed else _wide(w))
    tolerances.assert_close(y, expected, tolerances.COMPONENT_PARITY)

  @parameterized.product(rows=(1, 4, 11), transposed=(False, True))
  def test_a_matrix_of_each_group(self, rows, transposed):
    x, w = _normal((rows, 3, 40)), _normal((3, 50, 40), seed=1)
    if not transposed:
      w = w.swapaxes(1, 2)
    y = few_rows.multiply(x, w, transposed, **CPU)
    matrix = _wide(w).swapaxes(1, 2) if transposed else _wide(w)
    expected = np.einsum('RGK,GKN->RGN', _wide(x), matrix)
    tolerances.assert_close(y, expected, tolerances.COMPONENT_PARITY)

  @parameterized.parameters(None, 'float32')
  def test_bfloat16_is_summed_in_float32(self, dtype):
    x, w = _normal((3, 512), 'bfloat16'), _normal((512, 72), 'bfloat16', 1)
    y = few_rows.multiply(x, w, dtype=dtype and jnp.dtype(dtype), **CPU)
    exact = _wide(x) @ _wide(w)
    if dtype:
      tolerances.assert_close(y, exact, tolerances.COMPONENT_PARITY)
    else:
      nearest = jnp.asarray(exact, jnp.bfloat16)
      off = np.abs(_wide(y) - _wide(nearest)) > 0
      self.assertLess(off.mean(), 0.01)  # Of sums beside a tie.

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_what_is_no_number_stays_so(self, value):
    x = _normal((2, 64)).at[1, 3].set(value)
    for dtype in ('float32', 'bfloat16'):
      w = jnp.ones((64, 40), dtype)
      y = np.asarray(few_rows.multiply(x.astype(dtype), w, **CPU), np.float32)
      self.assertTrue(np.isfinite(y[0]).all())
      np.testing.assert_array_equal(y[1], np.float32(value))

  def test_more_rows_are_xlas(self):
    x, w = _normal((few_rows.MOST + 1, 8)), _normal((8, 8))
    text = jax.jit(few_rows.multiply).lower(x, w).as_text()
    self.assertNotIn('few_rows_product', text)
    text = jax.jit(few_rows.multiply).lower(x[1:], w).as_text()
    self.assertIn('few_rows_product', text)

  def test_the_same_bits_on_one_core(self):
    program = (
      'import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])});'
      'from tests import kernels_cpu_test as t; sys.stdout.write(t.digest())'
    )
    core = str(min(os.sched_getaffinity(0)))
    alone = subprocess.run(
      [sys.executable, '-c', program, core],
      capture_output=True, text=True, check=True,
    )  # fmt: skip
    self.assertEqual(alone.stdout, digest())


def digest():
  """The bits of one product of each kind, in hexadecimal."""
  x, cache = _normal((9, 96)), _normal((3, 40, 24))
  *case, ids, gates = _experts(T=20, E=6, D=96, F=40)
  positions = jnp.array([[4], [39], [-1]], jnp.int32)
  results = (
    few_rows.multiply(x, _normal((96, 1000)), **CPU),
    few_rows.multiply(x, _normal((1000, 96)), transposed=True, **CPU),
    expert_decode.expert_ffn(*case, ids, gates, **CPU),
    mla_decode.attend_latents(
      _normal((3, 1, 5, 24)), cache, 16, positions, 0.3, **CPU
    ),
  )
  return ''.join(np.asarray(y).tobytes().hex() for y in results)


def _experts(T, E, D=40, F=24, K=3, dtype='float32'):
  rng = np.random.default_rng(T)
  ids = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
  shapes = ((T, D), (E, D, F), (E, F, D), (E, D, F))
  arrays = [_normal(s, dtype, i) for i, s in enumerate(shapes)]
  return (*arrays, ids, rng.random((T, K), np.float32))


class ExpertsTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 16, 40, 24), (3, 16, 24, 40), (8, 6, 130, 33), (70, 3, 512, 256),
    (300, 5, 20, 7),
  )  # fmt: skip
  def test_is_the_reference(self, T, E, D, F):
    case = _experts(T, E, D, F)
    tolerances.assert_close(
      expert_decode.expert_ffn(*case, **CPU),
      jax.jit(expert_reference.expert_ffn)(*case),
      tolerances.COMPONENT_PARITY,
    )

  def test_bfloat16(self):
    case = _experts(T=9, E=6, dtype='bfloat16')
    wide = [x.astype(jnp.float32) for x in case[:4]]
    y = expert_decode.expert_ffn(*case, **CPU)
    self.assertEqual(y.dtype, jnp.bfloat16)
    exact = jax.jit(expert_reference.expert_ffn)(*wide, *case[4:])
    error = np.abs(_wide(y) - _wide(exact)).max() / np.abs(_wide(exact)).max()
    self.assertLess(error, 2**-8)

  @parameterized.parameters(2, 90)
  def test_id_E_is_no_expert_and_no_other_is_read(self, T):
    x, *matrices, ids, gates = _experts(T, 16)
    ids = np.where((ids == 0) | (ids > 12), 16, ids)
    unused = np.setdiff1d(np.arange(16), ids)
    matrices = [w.at[unused].set(np.nan) for w in matrices]
    y = expert_decode.expert_ffn(x, *matrices, ids, gates, **CPU)
    expected = jax.jit(expert_reference.expert_ffn)(x, *matrices, ids, gates)
    tolerances.assert_close(y, expected, tolerances.COMPONENT_PARITY)

  def test_silu_of_large_numbers(self):
    x = jnp.array([[1.0], [-1.0]])
    values = jnp.array([1e-3, 1.0, 20.0, 87.0, 89.0, 600.0])
    w1, w3 = values[None, None], jnp.ones((1, 1, 6))
    w2, ids = jnp.eye(6)[None, :, :1], jnp.zeros((2, 1), jnp.int32)
    for i in range(6):
      out = expert_decode.expert_ffn(
        x, w1[..., i:], w2[:, : 6 - i], w3[..., i:], ids, jnp.ones((2, 1)),
        **CPU,
      )  # fmt: skip
      z = _wide(x[:, 0]) * float(values[i])
      expected = z / (1 + np.exp(-z)) * _wide(x[:, 0])
      np.testing.assert_allclose(out[:, 0], expected, rtol=1e-6, atol=1e-35)


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, 8, 160, 128, 128), (3, 2, 5, 24, 70, 16), (2, 3, 16, 40, 33, 32)
  )
  def test_is_the_reference(self, B, T, N, X, S, width):
    q, cache = _normal((B, T, N, X)), _normal((B, S, X), seed=1)
    positions = np.random.default_rng(0).integers(-1, S, (B, T)).astype('i4')
    how = width, positions, 0.3
    tolerances.assert_close(
      mla_decode.attend_latents(q, cache, *how, **CPU),
      cached_attention.attend_latents(q, cache, *how),
      tolerances.COMPONENT_PARITY,
    )

  def test_nothing_beyond_the_position_is_read(self):
    q, cache = (
      _normal((1, 1, 3, 24)),
      _normal((1, 50, 24)).at[:, 11:].set(jnp.nan),
    )
    how = 16, jnp.array([[10]], jnp.int32), 0.3
    tolerances.assert_close(
      mla_decode.attend_latents(q, cache, *how, **CPU),
      cached_attention.attend_latents(q, cache[:, :11], *how),
      tolerances.COMPONENT_PARITY,
    )


def _jax_that_keeps_in(directory):
  config = mock.Mock(jax_compilation_cache_dir=directory)
  return mock.Mock(wraps=jax, config=config, __version__=jax.__version__)


class WhenTest(absltest.TestCase):
  def test_the_kernels_write_what_xla_writes(self):
    texts = []
    for kernels in ('auto', 'xla'):
      config = presets.tiny()
      config = config_lib.replace(config, {'precision.kernels': kernels})
      model = step.build_model(config)
      variables = step.init_variables(model, 0)
      prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
      lines = []
      with dispatch.told(lines.append):
        done = generate.generate(model, variables, prompts, 6)
      texts.append(done.tokens)
      made = [line for line in lines if 'cpu: made for cpu' in line]
      self.assertEqual(bool(made), kernels == 'auto', lines)
    self.assertEqual(*texts)

  def test_without_a_compiler_xla_runs(self):
    with mock.patch.object(cpu.shutil, 'which', return_value=None):
      reason = cpu._obstacle.__wrapped__()
    self.assertEqual(reason, 'there is no C++ compiler (c++)')
    with mock.patch.object(cpu, 'obstacle', lambda: reason):
      y = few_rows.multiply(jnp.ones((1, 4)), jnp.ones((4, 4)))
      with self.assertRaisesRegex(ValueError, 'no C.. compiler.*fall back'):
        few_rows.multiply(jnp.ones((1, 4)), jnp.ones((4, 4)), **CPU)
    np.testing.assert_array_equal(y, 4.0)

  def test_a_compiler_that_fails_is_named(self):
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'kernels.so'
      with (
        mock.patch.object(cpu, '_FLAGS', ('-no-such-flag',)),
        mock.patch.object(cpu, '_library', lambda c: cpu._compile(c, path)),
      ):
        reason = cpu._obstacle.__wrapped__()
      self.assertRegex(reason, r'c\+\+ failed: .*no-such-flag')
      self.assertEmpty(list(path.parent.iterdir()))

  def test_a_library_is_compiled_once(self):
    cpu.obstacle()
    with mock.patch.object(cpu, '_compile') as compiled:
      cpu._library(cpu.shutil.which('c++'))
    compiled.assert_not_called()

  def test_a_library_that_was_cut_off_is_made_anew(self):
    with (
      tempfile.TemporaryDirectory() as directory,
      mock.patch.object(cpu, 'jax', _jax_that_keeps_in(directory)),
      mock.patch.object(cpu, '_digest', lambda c: 'x'),
      mock.patch.object(cpu, '_compile') as compiled,
    ):
      path = pathlib.Path(directory) / 'kernels-x.so'
      path.write_bytes(b'\x7fELF')
      cpu._library('c++')
    compiled.assert_called_once_with('c++', path)

  def test_a_cache_that_cannot_be_written_is_done_without(self):
    with (
      tempfile.NamedTemporaryFile() as file,  # No directory.
      mock.patch.object(cpu, 'jax', _jax_that_keeps_in(file.name)),
      mock.patch.object(cpu, '_digest', lambda c: 'x'),
    ):
      library = cpu._library(cpu.shutil.which('c++'))
    self.assertTrue(library.few_rows_product)

  def test_a_compiler_that_hangs_is_given_up(self):
    late = subprocess.TimeoutExpired('c++', 1)
    with mock.patch.object(cpu.subprocess, 'run', side_effect=late):
      self.assertIn('took more than', cpu._obstacle.__wrapped__())

  def test_other_results_are_xlas(self):
    x, w = jnp.ones((2, 8)), jnp.ones((8, 5))
    y = few_rows.multiply(x, w, dtype=jnp.bfloat16)
    self.assertEqual(y.dtype, jnp.bfloat16)
    with self.assertRaisesRegex(ValueError, 'the result is bfloat16'):
      few_rows.multiply(x, w, dtype=jnp.bfloat16, **CPU)

  def test_under_vmap(self):
    x, w = _normal((3, 2, 8)), _normal((8, 5))
    y = jax.vmap(lambda x: few_rows.multiply(x, w, **CPU))(x)
    np.testing.assert_allclose(y, _wide(x) @ _wide(w), rtol=1e-5, atol=1e-5)

  def test_other_dtypes_are_xlas(self):
    x = jnp.ones((1, 4), jnp.float16)
    self.assertEqual(few_rows.multiply(x, x.T).dtype, jnp.float16)
    with self.assertRaisesRegex(ValueError, 'float16'):
      few_rows.multiply(x, x.T, **CPU)


if __name__ == '__main__':
  absltest.main()
