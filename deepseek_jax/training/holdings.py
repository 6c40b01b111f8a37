"""Who holds what: the parts of a run's state on one device, in bytes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.layers.params import Parameter
from deepseek_jax.training import pipelined
from deepseek_jax.training.layout import Layout


class Holding(NamedTuple):
  """A group of parameters that lie alike.

  Attributes:
    name: of the group.
    elements: of all of them, on all devices together.
    stored: how most of them are divided; see `rules.Placement`.
    state: bytes per device of master weights and both moments.
    copy: bytes per device of the copy for one step; in a pipeline, of as many
      whole layers as a rank has slots.
    gradients: bytes per device of their float32 sums.
  """

  name: str
  elements: int
  stored: PartitionSpec
  state: int
  copy: int
  gradients: int


def holdings(declared: Any, config: Config, layout: Layout) -> list[Holding]:
  """One line for each stack's experts and other parameters, and for the rest.

  Args:
    declared: the model's variables; see `step.declare`.
    config: of the run.
    layout: of the run.
  """
  groups: dict[str, list[Holding]] = {}
  boxes = jax.tree_util.tree_leaves_with_path(
    declared['params'], is_leaf=lambda x: isinstance(x, Parameter)
  )
  slots = pipelined.slots(config)
  step = layout.used if slots else layout.step
  specs = (layout.stored, step, layout.dtypes)
  for (path, box), *rest in zip(boxes, *map(jax.tree.leaves, specs)):
    stack, shape = path[0].key, box.value.shape
    name = stack + (' experts' if 'experts' in box.names else '')
    held = slots.get(stack, shape[0]), *shape[1:]
    one = _holding(name, shape, held, *rest, config, layout.mesh)
    groups.setdefault(name, []).append(one)
  return [_together(parts) for parts in groups.values()]


def total(lines: list[Holding]) -> Holding:
  """Everything that a device holds."""
  return _together([line._replace(name='a device holds') for line in lines])


def _holding(name, shape, held, stored, step, dtype, config, mesh) -> Holding:
  def local(spec, shape):
    return math.prod(NamedSharding(mesh, spec).shard_shape(shape))

  moments = (config.precision.mu_dtype, config.precision.nu_dtype)
  width = 4 + sum(jnp.dtype(d).itemsize for d in moments)
  return Holding(
    name,
    math.prod(shape),
    stored,
    width * local(stored, shape),
    dtype.itemsize * local(step, held),
    4 * local(step, held),
  )


def _together(parts: list[Holding]) -> Holding:
  largest = max(parts, key=lambda part: part.elements)
  sums = (
    sum(getattr(part, field) for part in parts)
    for field in ('elements', 'state', 'copy', 'gradients')
  )
  elements, *rest = sums
  return Holding(largest.name, elements, largest.stored, *rest)


def table(declared: Any, config: Config, layout: Layout) -> str:
  """The holdings as text, for the beginning of a run."""
  axes = ', '.join(f'{a} {n}' for a, n in layout.mesh.shape.items() if n > 1)
  rows = [('', 'parameters', 'divided by', 'state', 'step copy', 'gradients')]
  lines = holdings(declared, config, layout)
  for line in lines:
    rows.append(_row(line, _axes(line.stored)))
  rows.append(_row(total(lines), ''))
  widths = [max(map(len, column)) for column in zip(*rows)]
  text = [f'mesh: {axes}']
  for row in rows:
    cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1])]
    cells += [row[2].ljust(widths[2])]
    cells += [cell.rjust(w) for cell, w in zip(row[3:], widths[3:])]
    text.append('  '.join(cells).rstrip())
  return '\n'.join(text)


def _row(line: Holding, axes: str) -> tuple[str, ...]:
  sizes = map(_size, (line.state, line.copy, line.gradients))
  return (line.name, f'{line.elements:,}', axes, *sizes)


def _axes(spec: PartitionSpec) -> str:
  entries = [entry for entry in spec if entry]
  names = [e if isinstance(e, str) else ' x '.join(e) for e in entries]
  return ' x '.join(names) or '-'


def _size(count: float) -> str:
  for unit in ('B', 'kB', 'MB'):
    if count < 1000:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:,.1f} GB'
