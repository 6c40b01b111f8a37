"""One table and one picture of a sweep: mean and standard error over seeds."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.evaluation.sweep import Run

# Result -> (heading, format).  What is the same for every seed has no error.
COLUMNS = {
  'val_loss': ('val loss', '.4f'),
  'val_loss_difference': ('vs first', '+.4f'),
  'loss_gap': ('largest gap', '.2%'),
  'val_bpb': ('bits/byte', '.4f'),
  'val_mtp_1_acceptance': ('MTP accepted', '.3f'),
  'loss': ('train loss', '.4f'),
  'max_vio': ('MaxVio batch', '.2f'),
  'max_vio_summed': ('MaxVio summed', '.2f'),
  'tokens_per_second': ('tokens/s', ',.0f'),
  'parameters': ('parameters', ',.0f'),
  'active_parameters': ('active', ',.0f'),
  'cache_bytes_per_token': ('cache B/token', ',.0f'),
}
# Compared with the first arm, seed by seed.
_COMPARED = ('val_loss_difference', 'loss_gap')
_PAPER_GAP = 0.0025
_EMA = 0.9  # Of the losses in a gap, as in V3's appendix B.1.
_SMOOTH = (
  0.05  # Of a curve's length, averaged so that curves can be told apart.
)


def write(
  runs: Sequence[Run],
  columns: Sequence[str],
  workdir: str | os.PathLike,
  name: str = 'table',
) -> str:
  """Writes `workdir/<name>.md` and `.png`; returns the table.

  Args:
    runs: of a sweep, at least one.
    columns: names out of `COLUMNS`.
    workdir: made if need be.
    name: of the files.

  Raises:
    ValueError: if there is no run.
  """
  if not runs:
    raise ValueError('no run of the sweep came to its end: all diverged')
  workdir = pathlib.Path(workdir).expanduser()
  workdir.mkdir(parents=True, exist_ok=True)
  text = table(runs, columns)
  where = [
    f'- {arm}: ' + ', '.join(r.workdir.name for r in group)
    for arm, group in _by_arm(runs).items()
  ]
  path = workdir / f'{name}.md'
  path.write_text(text + '\nRuns:\n' + '\n'.join(where) + '\n')
  draw(runs, columns, workdir / f'{name}.png')
  return text


def table(runs: Sequence[Run], columns: Sequence[str]) -> str:
  """Markdown: one row an arm, `mean±standard error` over its seeds.

  The difference from the first arm is taken seed by seed: two runs of a seed
  read the same batches, so that much of the noise is common to both.
  """
  groups = _by_arm(runs)
  rows = [
    ['arm', 'seeds', *(COLUMNS[column][0] for column in columns)],
    ['---', *['---:'] * (1 + len(columns))],
  ]
  for arm, group in groups.items():
    cells = [_cell(_values(groups, arm, c), COLUMNS[c][1]) for c in columns]
    rows.append([arm, str(len(group)), *cells])
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def standard_error(values: Sequence[float]) -> float:
  """Of the mean; NaN for a single value, of which nothing is known."""
  n = len(values)
  return float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def _by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(run.arm, []).append(run)
  return groups


def _values(groups, arm, column) -> list[float]:
  """One value a run; empty where the arm's runs have no such result."""
  if column not in _COMPARED:
    results = [run.results for run in groups[arm]]
    return [r[column] for r in results if column in r]
  if arm == next(iter(groups)):
    return []
  pairs = _pairs(groups, arm)
  if column == 'loss_gap':
    return [loss_gap(run.records, other.records) for run, other in pairs]
  name = 'val_loss'
  return [run.results[name] - other.results[name] for run, other in pairs]


def _pairs(groups, arm) -> list[tuple[Run, Run]]:
  """The arm's runs, each with the first arm's of its seed, if there is one."""
  first = {_seed(run): run for run in groups[next(iter(groups))]}
  return [(r, first[_seed(r)]) for r in groups[arm] if _seed(r) in first]


def loss_gap(
  records: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> float:
  """The largest |loss / other loss - 1| in the second half of two runs.

  Both are averaged exponentially, with coefficient 0.9, from their first steps
  on: V3's relative loss error (appendix B.1).
  """
  gaps = _gaps(records, others)
  return float(np.abs(gaps[len(gaps) // 2 :]).max())


def _gaps(records, others):
  """loss / other loss - 1 of the averaged losses, a value for each step."""
  losses = np.array([[r['loss'] for r in rows] for rows in (records, others)])
  averages = [losses[:, 0]]
  for loss in losses.T[1:]:
    averages.append(_EMA * averages[-1] + (1 - _EMA) * loss)
  a, b = np.array(averages).T
  return a / b - 1


def _seed(run: Run) -> tuple[int, int]:
  return run.config.train.seed, run.config.data.seed


def _cell(values: list[float], spec: str) -> str:
  if not values:
    return '–'
  mean = format(float(np.mean(values)), spec)
  if len(set(values)) == 1:
    return mean
  return f'{mean}±{standard_error(values):{spec.lstrip("+")}}'


def draw(
  runs: Sequence[Run], columns: Sequence[str], path: pathlib.Path
) -> None:
  """Training losses in bands of one standard error, and each result's means.

  With 'loss_gap' also that of the averaged losses, step by step, beside V3's
  0.25 %.
  """
  from matplotlib import figure as figure_lib  # Slow to import.

  groups = _by_arm(runs)
  measured = [
    column
    for column in columns
    if column not in _COMPARED
    and any(_values(groups, arm, column) for arm in groups)
  ]
  rows = max(2, math.ceil(len(measured) / 2) + ('loss_gap' in columns))
  figure = figure_lib.Figure((13, 2.2 * rows), layout='constrained')
  grid = figure.add_gridspec(rows, 4)
  _draw_losses(figure.add_subplot(grid[:, :2]), groups)
  for i, column in enumerate(measured):
    axis = figure.add_subplot(grid[i // 2, 2 + i % 2])
    _draw_means(axis, groups, column)
  if 'loss_gap' in columns:
    _draw_gaps(figure.add_subplot(grid[-1, 2:]), groups)
  figure.savefig(path, dpi=120)


def _draw_losses(axis: Any, groups: dict[str, list[Run]]) -> None:
  for arm, group in groups.items():
    steps = [record['step'] for record in group[0].records]
    losses = np.array([[r['loss'] for r in run.records] for run in group])
    width = max(1, round(_SMOOTH * len(steps)))
    kernel = np.ones(width) / width
    smooth = np.array([np.convolve(x, kernel, 'valid') for x in losses])
    x = steps[width - 1 :]
    mean = smooth.mean(0)
    (line,) = axis.plot(x, mean, label=arm, linewidth=1.3)
    if len(group) > 1:
      error = smooth.std(0, ddof=1) / math.sqrt(len(group))
      color = line.get_color()
      axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2)
  axis.set(xlabel='step', ylabel='training loss [nats/token]')
  axis.grid(alpha=0.3)
  axis.legend()


def _draw_gaps(axis: Any, groups: dict[str, list[Run]]) -> None:
  first, *others = groups
  for i, arm in enumerate(others, 1):
    pairs = _pairs(groups, arm)
    if pairs:
      gaps = [_gaps(run.records, other.records) for run, other in pairs]
      steps = [record['step'] for record in groups[arm][0].records]
      mean = 100 * np.mean(gaps, 0)
      # Its color among the losses, whichever arms are left out here.
      axis.plot(steps, mean, color=f'C{i}', label=arm, linewidth=1.3)
  for limit in (-_PAPER_GAP, _PAPER_GAP):
    axis.axhline(100 * limit, color='gray', linestyle='--', linewidth=0.8)
  axis.set(xlabel='step', ylabel=f'loss above {first} [%]')
  axis.grid(alpha=0.3)
  axis.legend(fontsize=6, ncols=2)


def _draw_means(axis: Any, groups: dict[str, list[Run]], column: str) -> None:
  # Dots, not bars: a difference of losses is too small for an axis from 0.
  for i, arm in enumerate(groups):
    values = _values(groups, arm, column)
    if values:
      error = standard_error(values) if len(values) > 1 else 0.0
      axis.errorbar(np.mean(values), i, xerr=error, fmt='o', capsize=3)
  axis.set_yticks(range(len(groups)), list(groups), fontsize=7)
  axis.set_ylim(len(groups) - 0.5, -0.5)
  axis.set_title(COLUMNS[column][0], fontsize=9)
  axis.tick_params(axis='x', labelsize=7)
  axis.grid(axis='x', alpha=0.3)
