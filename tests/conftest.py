"""One session of eight CPU devices, with a persistent compilation cache."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tempfile

import pytest

_CACHE = pathlib.Path(tempfile.gettempdir()) / 'deepseek_jax_test_cache'

# Before the first import of jax; subprocesses of tests inherit them.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of a test's time: level 0 halves it, and the arithmetic is
# the same float32.
_FLAGS = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
)
# For what a test has compiled as outside of tests.
OPTIMISED = {'xla_backend_optimization_level': 3}
# Python 3.11's newest JAX can also write loops without MLIR, which saves a
# quarter of the rest; JAX 0.12 refuses the flag.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS += ' --xla_cpu_use_fusion_emitters=false'
  OPTIMISED['xla_cpu_use_fusion_emitters'] = True
os.environ.setdefault('XLA_FLAGS', _FLAGS)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# A full collection looks at all that is imported, and JAX, tracing, makes so
# many objects that they took a fifth of its time.
gc.set_threshold(*gc.get_threshold()[:2], 100)

NEED_TORCH = [
  'bench_test.py',
  'convert_parity_test.py',
  'gpu_check_torch_test.py',
  'optimizer_test.py',
  'parity_test.py',
  'sampling_test.py',
]
# `[test]` brings torch for Python 3.11 only: see setup.py.
_HAS_TORCH = sys.version_info < (3, 12) or importlib.util.find_spec('torch')
collect_ignore = [] if _HAS_TORCH else NEED_TORCH


def pytest_terminal_summary(terminalreporter):
  if collect_ignore:
    names = ', '.join(collect_ignore)
    terminalreporter.write_line(f'not run, for there is no torch: {names}')


@pytest.fixture(scope='module', autouse=True)
def _programs_end_with_their_module():
  """Frees the module's compiled programs.

  XLA:CPU maps about 100 pieces of memory for each, and Linux allows a process
  65,530 (vm.max_map_count): past that the next compilation is a segfault.
  """
  yield
  import jax  # Not before the settings above.

  jax.clear_caches()
  gc.collect()
