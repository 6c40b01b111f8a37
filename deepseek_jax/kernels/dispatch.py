"""Which implementation of an operation runs, and why.

Every module of this folder has functions with the signature of their reference
in `ops/`, and one argument more: `implementation`.

  None          the kernel where it can run and where the device is one that it
                was made for, else XLA
  'xla'         the reference
  'mosaic_gpu'  the kernel; what hinders it is an error, except for the device:
                a program may be lowered for, or interpreted without, a GPU
  'cpu'         likewise that for CPUs, of the few operations that have one,
                if the machine can compile it

Choices are made when a program is traced.  Runs print each kind of them once,
by `told`; `--verbosity=0` prints every one, beside the file of the kernel.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from deepseek_jax.kernels import cpu, mosaic

KERNELS = ('mosaic_gpu', 'cpu')
IMPLEMENTATIONS = ('xla', *KERNELS)
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


def kernel_for(implementation: str | None) -> str:
  """Of an operation that has both kernels, the one that could run."""
  if implementation in KERNELS:
    return implementation
  return 'cpu' if mosaic.target().platform == 'cpu' else 'mosaic_gpu'


def choose(
  implementation: str | None,
  obstacles: Sequence[str],
  op: str,
  *operands: Any,
  kernel: str = 'mosaic_gpu',
) -> Choice:
  """Decides for one call.

  Args:
    implementation: what the caller asks for.
    obstacles: why the kernel cannot take these arguments; none: it can.
    op: what is computed, for a person.
    *operands: arrays, whose shapes are told.
    kernel: which one could run.

  Raises:
    ValueError: for an unknown implementation, or a kernel that was asked for
      and cannot take the arguments.
  """
  choice = _choose(implementation, obstacles, kernel)
  shapes = ' '.join('x'.join(map(str, x.shape)) for x in operands)
  logging.info('%s %s: %s: %s', op, shapes, *choice, stacklevel=2)
  listener = _LISTENER.get()
  if listener is not None:
    listener(op, shapes, choice, kernel)
  return choice


@contextlib.contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
  """Within it, choices that are made are told to `say`, a line each.

  Of those with the same operation, implementation and reason only the first is
  told; a device without kernels is told once.
  """
  told_before = set()

  def listener(op, shapes, choice, kernel):
    lacks = [] if choice.is_kernel else device_obstacles(kernel)
    key, line = (op, *choice), f'{op} {shapes}: {": ".join(choice)}'
    if lacks and all(lack in choice.reason for lack in lacks):
      key = line = f'none of {kernel}: {"; ".join(lacks)}'
    if key not in told_before:
      told_before.add(key)
      say(f'kernels: {line}')

  token = _LISTENER.set(listener)
  try:
    yield
  finally:
    _LISTENER.reset(token)


def _choose(implementation, obstacles, kernel):
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'implementation={implementation!r}: choose one of '
      f'{", ".join(IMPLEMENTATIONS)}, or None for the best available'
    )
  if implementation == 'xla':
    return Choice('xla', 'asked for')
  if implementation not in (None, kernel):
    obstacles = [*obstacles, f'the kernel is {kernel}']
  elif implementation == 'cpu' and cpu.obstacle():
    obstacles = [*obstacles, cpu.obstacle()]
  if implementation is not None and obstacles:
    raise ValueError(
      f'implementation={implementation!r}: {"; ".join(obstacles)}; use None to '
      'fall back on XLA'
    )
  if implementation is not None:
    return Choice(implementation, 'asked for')
  obstacles = [*obstacles, *device_obstacles(kernel)]
  if obstacles:
    return Choice('xla', '; '.join(obstacles))
  return Choice(kernel, f'made for {mosaic.target().device_kind}')


def device_obstacles(kernel: str = 'mosaic_gpu') -> list[str]:
  """Why it cannot run on the device or the mesh that is traced for."""
  device, mesh = mosaic.target(), jax.sharding.get_abstract_mesh()
  if kernel == 'cpu':
    found = _lacks_of_cpu(device)
  else:
    found = _lacks_of_hopper(device)
  if found:
    return found
  shared = [n for n in mesh.auto_axes if mesh.shape[n] > 1]
  if shared:
    # XLA cannot cut a kernel: it would gather the operands on every device.
    return [f'the mesh axes {", ".join(map(str, shared))} are automatic']
  return []


def _lacks_of_cpu(device):
  if device.platform != 'cpu':
    return [f'the device is a {device.platform}']
  return [cpu.obstacle()] if cpu.obstacle() else []


def _lacks_of_hopper(device):
  if device.platform not in ('gpu', 'cuda'):
    return [f'the device is a {device.platform}']
  if not any(name in device.device_kind for name in _HOPPER):
    return [f'{device.device_kind} is no Hopper GPU']
  return []
