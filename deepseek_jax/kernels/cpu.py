"""Kernels for CPUs: `cpu.cc`, compiled for the machine at hand when first used.

XLA calls them as foreign functions.  A C++ compiler is all that they need;
without one XLA's operations run instead.
"""

import contextlib
import ctypes
import functools
import hashlib
import pathlib
import shutil
import subprocess
import tempfile
import threading

import jax
from absl import logging

_SOURCE = pathlib.Path(__file__).with_suffix('.cc')
_TARGETS = ('few_rows_product', 'few_rows_experts', 'few_rows_attention')
_FLAGS = (
  '-std=gnu++17', '-O3', '-march=native', '-pthread', '-fPIC', '-shared', '-w'
)  # fmt: skip
_PATIENCE = 300  # Seconds; compiling takes some ten.
_LOCK = threading.Lock()


def obstacle() -> str:
  """Why this machine has no such kernels; '': it has, and XLA knows them."""
  with _LOCK:  # A name is registered once, whatever threads trace.
    return _obstacle()


@functools.cache
def _obstacle():
  compiler = shutil.which('c++')
  if not compiler:
    return 'there is no C++ compiler (c++)'
  try:
    library = _library(compiler)
    for name in _TARGETS:
      target = jax.ffi.pycapsule(getattr(library, name))
      jax.ffi.register_ffi_target(name, target, platform='cpu')
  except subprocess.CalledProcessError as e:
    return f'{compiler} failed: {e.stderr.strip().splitlines()[:1]}'
  except subprocess.TimeoutExpired:
    return f'{compiler} took more than {_PATIENCE} s'
  except OSError as e:
    return f'kernels for this CPU cannot be loaded: {e}'
  return ''


def _library(compiler: str) -> ctypes.CDLL:
  """Kept beside JAX's compiled programs, if those are kept."""
  cache = jax.config.jax_compilation_cache_dir
  if cache and '://' not in cache:
    path = pathlib.Path(cache) / f'kernels-{_digest(compiler)}.so'
    with contextlib.suppress(OSError):  # None yet, or one that was cut off.
      return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):  # Such as one that is only read.
      return _compile(compiler, path)
  with tempfile.TemporaryDirectory() as directory:
    return _compile(compiler, pathlib.Path(directory) / 'kernels.so')


def _digest(compiler):
  # A home may be shared by machines: what `native` means is part of the name.
  means = _run(compiler, '-march=native', '-dM', '-E', '-x', 'c++', '-')
  interface = pathlib.Path(jax.ffi.include_dir()) / 'xla/ffi/api/c_api.h'
  said = (means, _SOURCE.read_text(), *_FLAGS, interface.read_text())
  return hashlib.sha256('\n'.join(said).encode()).hexdigest()[:16]


def _compile(compiler: str, path: pathlib.Path) -> ctypes.CDLL:
  logging.info('compiling %s for this CPU, into %s', _SOURCE.name, path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as directory:
    built = pathlib.Path(directory) / path.name
    include = f'-I{jax.ffi.include_dir()}'
    _run(compiler, *_FLAGS, include, str(_SOURCE), '-o', str(built))
    built.replace(path)  # Whole, whoever else compiles it.
  return ctypes.CDLL(str(path))


def _run(*command: str) -> str:
  return subprocess.run(
    command,
    input='',
    capture_output=True,
    text=True,
    errors='replace',
    check=True,
    timeout=_PATIENCE,
  ).stdout
