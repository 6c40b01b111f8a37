"""What a person sees while a run trains: a bar, or lines in a log."""

import contextlib
import sys
from typing import Any, TextIO

import numpy as np
import tqdm


class Progress(contextlib.AbstractContextManager):
  """A bar with loss, tokens/s, MaxVio and time left.

  On a terminal the bar moves with every step.  Elsewhere `show` prints a line.
  """

  def __init__(
    self, first_step: int, total_steps: int, stream: TextIO | None = None
  ):
    """Starts after `first_step` steps are done; `stream` is stderr if None."""
    self._stream = stream or sys.stderr
    self._bar = tqdm.tqdm(
      initial=first_step,
      total=total_steps,
      file=self._stream,
      disable=not self._stream.isatty(),
      dynamic_ncols=True,
      bar_format='step {n}/{total} {bar} {remaining} left{postfix}',
    )
    self._done, self._total = first_step, total_steps

  def advance(self) -> None:
    """Counts one step."""
    self._done += 1
    self._bar.update()

  def show(self, metrics: dict[str, Any]) -> None:
    """Shows those of the main metrics that are there, of the last step."""
    texts = [f'{name} {text}' for name, text in _readable(metrics)]
    if not self._bar.disable:
      self._bar.set_postfix_str('  '.join(texts))
      return
    if 'step_seconds' in metrics:
      seconds = (self._total - self._done) * float(metrics['step_seconds'])
      texts.append(f'{tqdm.tqdm.format_interval(seconds)} left')
    line = '  '.join([f'step {self._done}/{self._total}', *texts])
    print(line, file=self._stream, flush=True)

  def __exit__(self, *_) -> None:
    self._bar.close()


def _readable(metrics: dict[str, Any]):
  if 'loss' in metrics:
    yield 'loss', f'{float(metrics["loss"]):.4f}'
  if 'tokens_per_second' in metrics:
    yield 'tokens/s', f'{float(metrics["tokens_per_second"]):,.0f}'
  if np.size(metrics.get('max_vio', ())):
    yield 'MaxVio', f'{np.mean(metrics["max_vio"]):.2f}'
  if 'val_bpb' in metrics:
    yield 'validation bits/byte', f'{float(metrics["val_bpb"]):.4f}'
