"""The process's settings: what they change and what they leave alone."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.training import checkpoint, process
from experiments import launch

# Runs a program with 256 MB of temporary memory over and over; prints the page
# faults of one run, the most memory in MB, and the command line.
_REUSE = """
import resource
import sys
from experiments import large_pages
if 'large' in sys.argv:
  large_pages.use()
import jax, jax.numpy as jnp
x = jnp.ones((1 << 13, 64))
f = jax.jit(lambda x: jnp.exp(x @ x.T) @ x)
for i in range(8):
  if i == 2:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  f(x).block_until_ready()
usage = resource.getrusage(resource.RUSAGE_SELF)
print((usage.ru_minflt - before) // 6, usage.ru_maxrss // 1024, sys.argv[1:])
"""


def _reuse(*words):
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  done = subprocess.run(
    [sys.executable, '-c', _REUSE, *words],
    capture_output=True,
    check=True,
    text=True,
    env=env | {'JAX_PLATFORMS': 'cpu'},
  )
  faults, peak, rest = done.stdout.split(maxsplit=2)
  return int(faults), int(peak), rest


def test_large_pages_save_faults_and_take_no_more_memory():
  faults, peak, words = _reuse('large', "and 'quoted words'")
  assert 'large' in words and 'quoted words' in words
  setting = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
  if setting.exists() and '[madvise]' in setting.read_text():
    plain_faults, plain_peak, _ = _reuse()
    assert faults < plain_faults / 10
    assert peak < 1.25 * plain_peak


def test_a_cache_that_jax_has_is_kept(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  assert before  # conftest's
  config = config_lib.replace(presets.tiny(), {'data.cache_dir': str(tmp_path)})
  process.use_compilation_cache(config)
  assert jax.config.jax_compilation_cache_dir == before


def _out_of_memory():
  return jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')


def _failed_barrier():
  error = TimeoutError('waiting for a barrier')  # As orbax raises it.
  error.__cause__ = jax.errors.JaxRuntimeError('INTERNAL: Barrier failed')
  return error


@pytest.mark.parametrize(
  'error, is_lost',
  [
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-to-all failed'), True),
    (_failed_barrier(), True),
    (_out_of_memory(), False),
    (ValueError('a flag'), False),
  ],
)
def test_who_has_lost_another_waits_for_no_save(
  error, is_lost, tmp_path, monkeypatch
):
  saver = checkpoint.Checkpointer(tmp_path, presets.tiny())
  closed = []
  monkeypatch.setattr(saver, 'close', lambda: closed.append(True))
  for count in (1, 2):
    monkeypatch.setattr(jax, 'process_count', lambda count=count: count)
    with pytest.raises(type(error)), saver:
      raise error
  assert len(closed) == (1 if is_lost else 2)
  assert not process.lost_another(None)


def _two(port):
  where = f'127.0.0.1:{port}'
  return config_lib.ParallelConfig(
    num_processes=2, process_id=0, coordinator=where
  )


def test_a_port_that_is_taken_is_refused():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f'127.0.0.1:{port}: .* another port'):
      process.join(_two(port))
  assert not jax.distributed.is_initialized()


def test_a_process_that_meets_nobody_gives_up():
  code = (
    'from deepseek_jax import config\n'
    'from deepseek_jax.training import process\n'
    'process._MEETING_SECONDS = 1\n'
    f'process.join(config.{_two(launch.free_port())})\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith('ERROR: waited 1 s for 2 processes to come to')
  assert len(done.stderr.splitlines()) == 1
