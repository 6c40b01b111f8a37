"""One session of eight CPU devices, with a persistent compilation cache."""

import os
import pathlib
import tempfile

_CACHE = pathlib.Path(tempfile.gettempdir()) / 'deepseek_jax_test_cache'

# Before the first import of jax; subprocesses of tests inherit them.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of a test's time: level 0 halves it, and the arithmetic is
# the same float32.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0',
)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
