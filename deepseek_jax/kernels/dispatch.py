"""Which implementation of an operation runs, and why.

Every module of this folder has functions with the signature of their reference
in `ops/`, and one argument more: `implementation`.

  None          the kernel where it can run and where the device is one that it
                was made for, else XLA
  'xla'         the reference
  'mosaic_gpu'  the kernel; what hinders it is an error, except for the device:
                a program may be lowered for, or interpreted without, a GPU

`--verbosity=0` prints every choice when a program is traced, beside the file of
the kernel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import logging

from deepseek_jax.kernels import mosaic

IMPLEMENTATIONS = ('xla', 'mosaic_gpu')
_HOPPER = ('H100', 'H200', 'H800', 'H20', 'GH200')


class Choice(NamedTuple):
  """What runs, and why.

  Attributes:
    implementation: one of `IMPLEMENTATIONS`.
    reason: one line for a person.
  """

  implementation: str
  reason: str

  @property
  def is_kernel(self) -> bool:
    """Whether it is not the reference."""
    return self.implementation != 'xla'


def requested(setting: str) -> str | None:
  """`implementation` under `precision.kernels`: 'auto' or 'xla'."""
  return None if setting == 'auto' else setting


def choose(implementation: str | None, obstacles: Sequence[str]) -> Choice:
  """Decides for one call.

  Args:
    implementation: what the caller asks for.
    obstacles: why the kernel cannot take these arguments; none: it can.

  Raises:
    ValueError: for an unknown implementation, or a kernel that was asked for
      and cannot take the arguments.
  """
  choice = _choose(implementation, obstacles)
  logging.info('%s: %s', *choice, stacklevel=2)
  return choice


def _choose(implementation, obstacles):
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'implementation={implementation!r}: choose one of '
      f'{", ".join(IMPLEMENTATIONS)}, or None for the best available'
    )
  if implementation == 'xla':
    return Choice('xla', 'asked for')
  if implementation is not None and obstacles:
    raise ValueError(
      f"implementation='mosaic_gpu': {'; '.join(obstacles)}; use None to fall "
      'back on XLA'
    )
  if implementation is not None:
    return Choice(implementation, 'asked for')
  obstacles = [*obstacles, *device_obstacles()]
  if obstacles:
    return Choice('xla', '; '.join(obstacles))
  return Choice('mosaic_gpu', f'made for {mosaic.target().device_kind}')


def device_obstacles() -> list[str]:
  """Why no kernel runs on the device, or under the mesh, that is traced for."""
  device, mesh = mosaic.target(), jax.sharding.get_abstract_mesh()
  if device.platform not in ('gpu', 'cuda'):
    return [f'the device is a {device.platform}']
  if not any(name in device.device_kind for name in _HOPPER):
    return [f'{device.device_kind} is no Hopper GPU']
  shared = [n for n in mesh.auto_axes if mesh.shape[n] > 1]
  if shared:
    # XLA cannot cut a kernel: it would gather the operands on every device.
    return [f'the mesh axes {", ".join(map(str, shared))} are automatic']
  return []
