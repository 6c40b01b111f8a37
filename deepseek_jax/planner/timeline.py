"""A schedule as a picture, like figure 5 of V3, and as text for a terminal."""

import math
import os
import pathlib
import textwrap
from typing import Any

from deepseek_jax.parallel import schedules, simulate
from deepseek_jax.parallel.schedules import Step
from deepseek_jax.parallel.simulate import Timeline

_DPI = 120
_WIDTH = 76  # Columns of the chart, of a terminal's 80; more are compressed.
# One colour for each kind, darker for the second direction or chunk.
_COLORS = {
  'F': ('#f5b971', '#e08e2b'),
  'B': ('#8fc3a8', '#4d9a76'),
  'b': ('#9fb8e0', '#6387c4'),
  'w': ('#d6d6d6', '#ababab'),
}
_KINDS = {
  'F': 'forward',
  'B': 'backward',
  'b': 'gradient of the input',
  'w': 'gradient of the weights',
}


def draw(timeline: Timeline, path: str | os.PathLike) -> None:
  """Draws a simulated run into a .png or .svg, making its folder if need be.

  Raises:
    ValueError: another suffix, or a place where nothing can be written.
  """
  path = pathlib.Path(path)
  if path.suffix not in ('.png', '.svg'):
    raise ValueError(f'out={path}: end it in .png or .svg')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(timeline).savefig(path, dpi=_DPI)
  except OSError as error:
    raise ValueError(f'out={path}: {error.strerror}') from error


def figure(timeline: Timeline) -> Any:
  """The matplotlib figure: time to the right, ranks downwards.

  Numbers are micro-batches.  A pair is its forward above its backward, in one
  black frame.
  """
  from matplotlib import figure as figure_lib  # Slow to import.
  from matplotlib import patches

  schedule = timeline.schedule
  length = 0.26 * timeline.makespan / _least(timeline)
  width = min(40.0, 2 + length)
  height = 1.6 + 0.42 * schedule.ranks
  result = figure_lib.Figure((max(6.0, width), height), layout='constrained')
  axis = result.subplots()
  size = 6 if length <= width else 0
  for rank, row in enumerate(schedule.rows):
    for i, step in enumerate(row):
      start, end = timeline.starts[rank][i], timeline.ends[rank][i]
      _draw_step(axis, rank, start, end, step, size)
  axis.set(
    xlim=(0, timeline.makespan),
    ylim=(schedule.ranks, 0),
    yticks=[rank + 0.5 for rank in range(schedule.ranks)],
    yticklabels=[f'rank {rank}' for rank in range(schedule.ranks)],
    xlabel='time',
    title=_title(timeline),
  )
  kinds = {t.kind for row in schedule.rows for step in row for t in step}
  handles = [
    patches.Patch(color=_COLORS[kind][0], label=text)
    for kind, text in _KINDS.items()
    if kind in kinds
  ]
  result.legend(handles=handles, loc='outside lower center', ncols=4)
  return result


def _draw_step(axis, rank, start, end, step: Step, size):
  height = 1 / len(step)
  for i, task in enumerate(step):
    y = rank + i * height
    color = _COLORS[task.kind][task.chunk % 2]
    _draw_box(axis, start, y, end - start, height, fc=color, ec='white')
    if size:
      axis.text(
        (start + end) / 2,
        y + height / 2,
        str(task.microbatch),
        ha='center',
        va='center',
        fontsize=size,
        in_layout=False,
      )
  if len(step) > 1:
    _draw_box(axis, start, rank, end - start, 1, fc='none', ec='black')


def _draw_box(axis, x, y, width, height, **colors):
  """A rectangle of thousands; the limits are set, so none is asked for its."""
  from matplotlib import patches

  box = patches.Rectangle((x, y), width, height, in_layout=False, **colors)
  axis.add_artist(box)


def _least(timeline: Timeline) -> float:
  """The time of the shortest step that takes any."""
  steps = {step for row in timeline.schedule.rows for step in row}
  return min(filter(None, map(timeline.costs.of, steps)))


def _title(timeline: Timeline) -> str:
  schedule, costs = timeline.schedule, timeline.costs
  return (
    f'{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} '
    f'micro-batches, F={costs.forward:g} B={costs.backward:g} '
    f'W={costs.weight:g} F&B={costs.pair:g}'
  )


def text(timeline: Timeline) -> str:
  """The same for a terminal: a chart, a table, and every rank's steps."""
  parts = [_title(timeline), _chart(timeline), _table(timeline)]
  for rank in range(timeline.schedule.ranks):
    row = schedules.describe(timeline.schedule, rank)
    parts.append(textwrap.fill(f'r{rank}: {row}', 80, subsequent_indent='  '))
  return '\n'.join(parts)


def _chart(timeline: Timeline) -> str:
  """One line a rank: what it does in the middle of each column's time."""
  unit = max(_least(timeline), timeline.makespan / _WIDTH)
  columns = round(timeline.makespan / unit)
  lines = []
  for rank, row in enumerate(timeline.schedule.rows):
    line = ['.'] * columns
    for i, step in enumerate(row):
      symbol = step[0].kind if len(step) == 1 else '#'
      for column in range(columns):
        middle = (column + 0.5) * unit
        if timeline.starts[rank][i] <= middle < timeline.ends[rank][i]:
          line[column] = symbol
    lines.append(f'{rank:3} {"".join(line)}')
  legend = f'    one column: {unit:.3g}; # a pair, . the bubble'
  return '\n'.join([*lines, legend])


def _table(timeline: Timeline) -> str:
  """Parameters and activations in those of a rank of 1F1B, as in table 2."""
  schedule = timeline.schedule
  parts = schedule.stages // schedule.ranks
  lines = ['rank   busy bubble   share  parameters  activations']
  for rank in range(schedule.ranks):
    bubble = timeline.bubble(rank)
    lines.append(
      f'{rank:4} {timeline.busy(rank):6.4g} {bubble:6.4g} '
      f'{bubble / timeline.makespan:7.1%} {schedule.chunks // parts:11} '
      f'{simulate.peak_activations(schedule, rank) / parts:12g}'
    )
  formula = simulate.bubble_formula(schedule, timeline.costs)
  bubbles = map(timeline.bubble, range(schedule.ranks))
  is_exact = any(math.isclose(formula, b, abs_tol=1e-9) for b in bubbles)
  end = f'makespan {timeline.makespan:g}, bubble by table 2: {formula:g}'
  return '\n'.join(
    [*lines, end + ('' if is_exact else ' (exact at equal costs)')]
  )
