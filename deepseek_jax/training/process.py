"""What a process that compiles and trains sets once, before its first step."""

import ctypes
import pathlib

import jax

from deepseek_jax import config as config_lib

# Parameters of mallopt(3): its number, and the value that keeps memory.
_KEEP = {
  'M_MMAP_MAX': (-4, 0),  # Large arrays come from the heap, too,
  'M_TRIM_THRESHOLD': (-1, -1),  # which never shrinks,
  'M_ARENA_MAX': (-8, 1),  # and which all threads share.
}


def prepare(config: config_lib.Config) -> None:
  """Sets up the compilation cache and, on CPU, the allocator."""
  use_compilation_cache(config)
  if jax.default_backend() == 'cpu':
    keep_freed_memory()


def use_compilation_cache(config: config_lib.Config) -> None:
  """Keeps compiled programs under `data.cache_dir`, unless JAX has a cache."""
  if jax.config.jax_compilation_cache_dir is None:
    path = pathlib.Path(config.data.cache_dir).expanduser() / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def keep_freed_memory() -> None:
  """Lets the C library hand freed memory out again, not give it back.

  XLA frees a program's temporary buffers after each run, and the kernel then
  clears the same gigabytes page by page at the next: a second per step of
  `bench_cpu`.  Without glibc nothing is changed.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt:
    for parameter, value in _KEEP.values():
      mallopt(parameter, value)
