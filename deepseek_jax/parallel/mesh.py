"""The mesh of a run: the only place where one is built."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import ParallelConfig

# Outermost first.  JAX lists devices process by process, so that an axis
# further to the right stays within a node for longer: experts exchange most,
# stages least.
AXES = ('stage', 'data', 'fsdp', 'node', 'expert')


def build(
  config: ParallelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """All of `devices` (default: every process's) with the axes `AXES`.

  Args:
    config: the size of each axis.
    devices: also those of a topology, for compilation without any.

  Raises:
    ValueError: the axes ask for another number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  if config.n_devices != len(devices):
    raise ValueError(_misfit(sizes, len(devices)))
  grid = np.asarray(devices).reshape(tuple(sizes.values()))
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """What XLA is asked for, to run collectives beside computation.

  Its scheduler for GPUs otherwise keeps the order of memory use, in which most
  collectives end before anything else begins.  And with FSDP the loop over
  layers gathers a layer's weights while it computes the one before, which takes
  the weights and gradients of one layer more (`planner/activations.py`).
  """
  if mesh.devices.flat[0].platform not in ('gpu', 'cuda'):
    return {}
  options = ['latency_hiding_scheduler']
  if mesh.shape['fsdp'] > 1:
    options += ['pipelined_all_gather', 'pipelined_reduce_scatter']
  return {f'xla_gpu_enable_{name}': True for name in options}


def _misfit(sizes: dict[str, int], count: int) -> str:
  """What is wrong, and which change of one axis would fit."""
  product = math.prod(sizes.values())
  asked = ' x '.join(f'{a}={n}' for a, n in sizes.items() if n > 1) or 'data=1'
  fits = [
    f'--parallel.{axis}={count * n // product}'
    for axis, n in sizes.items()
    if count * n % product == 0 and axis in ('data', 'fsdp')
  ]
  fix = ' or '.join(fits) or f'axes whose product is {count}'
  return (
    f'parallel: {asked} is {product} devices, but there are {count}: use '
    f'{fix}, or try the layout with --parallel.cpu_devices={product}'
  )
