"""The suite `gpu` of bench.py: a training step on one GPU, in BF16 and in FP8.

Each precision runs in a process of its own, one after the other, since a
process keeps the memory that it once had.  Without a GPU the same programs are
compiled for an H100 that is not there.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from deepseek_jax import config as config_lib
from deepseek_jax.planner import flops

PRECISIONS = {'BF16': False, 'FP8': True}  # Name -> precision.fp8.enabled.


def measure(start_worker: Callable[..., object], config, rounds: int) -> str:
  """Tokens/s, model FLOPs utilisation and peak memory, as a table.

  Args:
    start_worker: updates of the config -> a `bench.Worker`.
    config: what is trained.
    rounds: timed steps after two of warm-up; their median counts.

  Raises:
    ValueError: where there is no GPU.
  """
  backend = _backend()
  if backend != 'gpu':
    raise ValueError(
      f'--suite=gpu: JAX has a {backend} here and no GPU; --dry_run compiles '
      'the same steps for an H100 and prints their memory'
    )
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')
  tokens = config.data.batch_size * config.data.seq_len
  work = flops.train_per_token(config.model, config.data.seq_len) * tokens
  lines = [
    '| precision | step s | tokens/s | MFU | peak GB |',
    '|---|---|---|---|---|',
  ]
  for name, enabled in PRECISIONS.items():
    worker = start_worker({'precision.fp8.enabled': enabled})
    worker.run('ready')
    seconds = [worker.run('train')['seconds'] for _ in range(rounds + 2)][2:]
    memory = worker.run('memory')
    worker.close()
    step = statistics.median(seconds)
    peak = memory['peak_flops']
    mfu = f'{work / step / peak:.1%}' if peak else 'unknown'
    lines.append(
      f'| {name} | {step:.3f} | {tokens / step:.0f} | {mfu} '
      f'| {memory["peak_bytes"] / 1e9:.1f} |'
    )
  return '\n'.join([f'{memory["device"]}; MFU of its BF16 peak', *lines])


def _backend() -> str:
  """JAX's default backend, asked in a process that ends: it takes memory."""
  code = 'import jax; print(jax.default_backend())'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return done.stdout.split()[-1]


def compile_only(config: config_lib.Config) -> str:
  """Memory of the steps, compiled for one H100, as a table.

  Raises:
    ValueError: without JAX's CUDA plugin.
  """
  lines = [
    '| precision | state GB | temporary GB | Mosaic calls | compile s |',
    '|---|---|---|---|---|',
  ]
  for name, enabled in PRECISIONS.items():
    program = compiled(
      config_lib.replace(config, {'precision.fp8.enabled': enabled})
    )
    lines.append(
      f'| {name} | {program.arguments / 1e9:.2f} '
      f'| {program.temporary / 1e9:.2f} | {mosaic_calls(program.hlo)} '
      f'| {program.compiling:.0f} |'
    )
  return '\n'.join(['compiled for one H100, not run', *lines])


def compiled(config: config_lib.Config) -> Any:
  """The training step as one H100 would run it, a `training.ahead.Program`."""
  from deepseek_jax.kernels import mosaic
  from deepseek_jax.parallel import topology
  from deepseek_jax.training import ahead

  try:
    devices = topology.topology('h100', 1)
  except RuntimeError as error:
    raise ValueError(f'--dry_run: {error}') from error
  with mosaic.for_hopper():
    return ahead.train_step(config, devices)


def mosaic_calls(hlo: str) -> int:
  """Pallas kernels in a compiled program; a loop's body counts once."""
  return hlo.count('custom_call_target="mosaic_gpu')
