"""Which implementation of an operation runs, and why.

Every module of this folder has functions with the signature of their reference
in `ops/`, and one argument more: `implementation`.

  None          the kernel where it can run and where the device is one that it
                was made for, else XLA
  'xla'         the reference
  'mosaic_gpu'  the kernel; what hinders it is an error, except for the device:
                a program may be lowered for, or interpreted without, a GPU

Choices are made when a program is traced.  Runs print each kind of them once,
by `told`; `--verbosity=0` prints every one, beside the file of the kernel.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from deepseek_jax.kernels import mosaic

IMPLEMENTATIONS = ('xla', 'mosaic_gpu')
_HOPPER = ('H100', 'H200', 'H800', 'H20', 'GH200')
_LISTENER = contextvars.ContextVar('listener', default=None)


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


def choose(
  implementation: str | None, obstacles: Sequence[str], op: str, *operands: Any
) -> Choice:
  """Decides for one call.

  Args:
    implementation: what the caller asks for.
    obstacles: why the kernel cannot take these arguments; none: it can.
    op: what is computed, for a person.
    *operands: arrays, whose shapes are told.

  Raises:
    ValueError: for an unknown implementation, or a kernel that was asked for
      and cannot take the arguments.
  """
  choice = _choose(implementation, obstacles)
  shapes = ' '.join('x'.join(map(str, x.shape)) for x in operands)
  logging.info('%s %s: %s: %s', op, shapes, *choice, stacklevel=2)
  listener = _LISTENER.get()
  if listener is not None:
    listener(op, shapes, choice)
  return choice


@contextlib.contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
  """Within it, choices that are made are told to `say`, a line each.

  Of those with the same operation, implementation and reason only the first is
  told; a device without kernels is told once.
  """
  told_before = set()

  def listener(op, shapes, choice):
    lacks = [] if choice.is_kernel else device_obstacles()
    key, line = (op, *choice), f'{op} {shapes}: {": ".join(choice)}'
    if lacks and all(lack in choice.reason for lack in lacks):
      key = line = f'none: {"; ".join(lacks)}'
    if key not in told_before:
      told_before.add(key)
      say(f'kernels: {line}')

  token = _LISTENER.set(listener)
  try:
    yield
  finally:
    _LISTENER.reset(token)


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
