"""The process's settings: what they change and what they leave alone."""

import resource
import subprocess
import sys

import jax

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.training import process

# Touches the same 256 MB thirty times, and prints the pages that it faulted.
_REUSE = """
import resource
import numpy as np
from deepseek_jax.training import process
if {keep}:
  process.keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
  np.empty(1 << 28, np.uint8)[::4096] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again():
  faults = {
    keep: int(
      subprocess.run(
        [sys.executable, '-c', _REUSE.format(keep=keep)],
        capture_output=True,
        check=True,
        text=True,
      ).stdout
    )
    for keep in (False, True)
  }
  pages = (1 << 28) // resource.getpagesize()
  assert faults[True] < 2 * pages
  if sys.platform == 'linux':
    assert faults[False] > 2 * faults[True]


def test_a_cache_that_jax_has_is_kept(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  assert before  # conftest's
  config = config_lib.replace(presets.tiny(), {'data.cache_dir': str(tmp_path)})
  process.use_compilation_cache(config)
  assert jax.config.jax_compilation_cache_dir == before
