"""Pictures of a run, drawn from its metrics.jsonl.

Figures are made without pyplot: no display, and no state beside the caller's.
"""

import math
import os
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.training import metrics as metrics_lib

_MAX_COLUMNS = 400  # Steps in a heat map; more would not be seen.
_MAX_LEGEND = 9  # More layers than this get a colour bar.
_DPI = 120


def draw(workdir: str | os.PathLike) -> list[pathlib.Path]:
  """Draws every figure whose metrics exist into `workdir/plots`.

  Returns the files written: losses, validation, expert_load, max_vio, schedules
  (.png), those without data left out.
  """
  records = metrics_lib.read(workdir)
  folder = pathlib.Path(workdir) / 'plots'
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for name, make in _FIGURES.items():
    figure = make(records)
    if figure is not None:
      paths.append(folder / f'{name}.png')
      figure.savefig(paths[-1], dpi=_DPI)
  return paths


def _series(
  records: list[dict[str, Any]], name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Steps [T] and values [T, ...] of the records where `name` is not empty."""
  rows = [(r['step'], r[name]) for r in records if np.size(r.get(name, ()))]
  return np.array([s for s, _ in rows]), np.array([v for _, v in rows])


def _panels(rows: int, columns: int, width: float, height: float, title: str):
  from matplotlib import figure as figure_lib  # Slow to import.

  figure = figure_lib.Figure((width, height), layout='constrained')
  figure.suptitle(title)
  axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
  for axis in axes[-1]:
    axis.set_xlabel('step')
  return figure, axes


def _curves(records, panels: list[tuple[str, list[str]]], title: str, **style):
  """One panel for each (y label, metrics), below one another; None if empty."""
  data = [
    (label, {name: _series(records, name) for name in names})
    for label, names in panels
  ]
  data = [
    (label, {name: xy for name, xy in lines.items() if len(xy[0])})
    for label, lines in data
  ]
  data = [(label, lines) for label, lines in data if lines]
  if not data:
    return None
  figure, axes = _panels(len(data), 1, 8, 1.2 + 3 * len(data), title)
  for axis, (label, lines) in zip(axes[:, 0], data):
    for name, (steps, values) in lines.items():
      axis.plot(steps, values, label=name, linewidth=1.3, **style)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend()
  return figure


def _depths(records, pattern):
  """The metrics of every MTP depth that was recorded, depth 1 first."""
  names = {name for record in records for name in record}
  depths = range(1, len(names) + 1)
  return [pattern.format(k) for k in depths if pattern.format(k) in names]


def _losses(records):
  """Cross-entropy of every head, and what is added to the objective."""
  mtp = _depths(records, 'mtp_{}_loss')
  panels = [
    ('cross-entropy [nats/token]', ['loss', *mtp, 'val_loss']),
    ('balance loss', ['balance_loss']),
    ('l2 norm', ['grad_norm']),
  ]
  return _curves(records, panels, 'Training losses')


def _validation(records):
  drafts = _depths(records, 'val_mtp_{}_acceptance')
  panels = [
    ('bits per byte', ['val_bpb']),
    ('accepted share of MTP drafts', drafts),
  ]
  return _curves(records, panels, 'Validation', marker='o')


def _schedules(records):
  panels = [
    ('learning rate', ['lr']),
    ('router-bias speed', ['gamma']),
    ('loss weight', ['mtp_weight', 'alpha']),
  ]
  return _curves(records, panels, 'Schedules')


def _max_vio(records):
  """One line a layer, from dark to bright with depth, and their mean."""
  import matplotlib
  from matplotlib import cm, colors

  steps, vio_TL = _series(records, 'max_vio')
  if not len(steps):
    return None
  figure, axes = _panels(1, 1, 8, 4.5, 'Load imbalance of the experts')
  axis, layers = axes[0, 0], vio_TL.shape[1]
  scale = cm.ScalarMappable(
    colors.Normalize(0, max(1, layers - 1)), matplotlib.colormaps['viridis']
  )
  for i in range(layers):
    color = scale.to_rgba(i)
    axis.plot(steps, vio_TL[:, i], color=color, lw=1, label=f'MoE layer {i}')
  if layers > 1:
    mean = vio_TL.mean(1)
    axis.plot(steps, mean, color='black', lw=2, label='mean of layers')
  if layers <= _MAX_LEGEND:
    axis.legend()
  else:
    bar = figure.colorbar(scale, ax=axis, label='MoE layer (black: mean)')
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
  label = 'MaxVio = max load / mean load - 1'
  axis.set(ylabel=label, ylim=(0, None))
  axis.grid(alpha=0.3)
  return figure


def _expert_load(records):
  """Experts x steps for each layer: blue starves, red is overloaded."""
  from matplotlib import colors

  steps, load_TLE = _series(records, 'load')
  if not len(steps):
    return None
  keep = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_COLUMNS))
  keep = np.unique(keep.astype(int))
  steps, load_TLE = steps[keep], load_TLE[keep]
  _, layers, experts = load_TLE.shape
  columns = math.ceil(math.sqrt(layers / 4))
  rows = math.ceil(layers / columns)
  title = 'Load of every expert, relative to the mean of its layer'
  width = 1.5 + max(7, 3.2 * columns)
  figure, axes = _panels(rows, columns, width, 1 + 2 * rows, title)
  norm = colors.LogNorm(1 / 4, 4)  # 1, perfect balance, is the white middle.
  for i, axis in enumerate(axes.flat):
    if i >= layers:
      axis.set_axis_off()
      continue
    with np.errstate(invalid='ignore'):  # A layer that routed nothing: blank.
      relative_TE = load_TLE[:, i] / load_TLE[:, i].mean(-1, keepdims=True)
    image = axis.pcolormesh(
      _edges(steps),
      np.arange(experts + 1) - 0.5,
      np.clip(relative_TE.T, 1 / 4, 4),
      norm=norm,
      cmap='RdBu_r',
      rasterized=True,
    )
    axis.set_title(f'MoE layer {i}', fontsize=9)
    axis.yaxis.get_major_locator().set_params(integer=True)
    if i % columns == 0:
      axis.set_ylabel('expert')
    if i + columns >= layers:  # The panel below may be an empty one.
      axis.tick_params(labelbottom=True)
      axis.set_xlabel('step')
  bar = figure.colorbar(image, ax=axes, ticks=[1 / 4, 1 / 2, 1, 2, 4])
  bar.ax.set_yticklabels(['≤ 1/4', '1/2', '1', '2', '≥ 4'])
  bar.ax.minorticks_off()
  bar.set_label('load / mean load')
  return figure


def _edges(steps: np.ndarray) -> np.ndarray:
  """Cell borders half-way between steps."""
  middle = (steps[1:] + steps[:-1]) / 2
  return np.concatenate([steps[:1] - 0.5, middle, steps[-1:] + 0.5])


_FIGURES = {
  'losses': _losses,
  'validation': _validation,
  'expert_load': _expert_load,
  'max_vio': _max_vio,
  'schedules': _schedules,
}
