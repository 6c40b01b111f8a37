"""The metrics of a run, read one step late, so that no step waits for them."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from deepseek_jax import config as config_lib
from deepseek_jax.planner import flops
from deepseek_jax.training import (
  metrics,
  process,
  progress,
  schedules,
  throughput,
)
from deepseek_jax.training import state as state_lib


class StepLog(contextlib.AbstractContextManager):
  """Checks that every step is finite, and records those that are due.

  A record has the metrics of that very step (not of the steps since the last),
  so it does not depend on where a run was interrupted; only the speeds do.
  """

  def __init__(
    self,
    workdir: Any,
    config: config_lib.Config,
    state: state_lib.TrainState,
    schedule: schedules.Schedule,
    started: float,
  ):
    """Opens metrics.jsonl for what follows `state.step`.

    Args:
      workdir: of the run.
      config: of the run.
      state: before the first step that will be logged.
      schedule: of the run.
      started: `time.perf_counter()` at the start, for the time to first step.
    """
    self._first = int(state.step)
    self._config, self._schedule = config.train, schedule
    self._started = started
    self._unread = None  # (step, row) of the newest step.
    self._written = self._first - 1
    self._clock = throughput.Clock()
    self._peak = throughput.peak_flops(jax.local_devices()[0])
    self._flops = flops.train_per_token(config.model, config.data.seq_len)
    self._n_devices = config.parallel.n_devices
    self._writer = self._bar = None  # But in the first process.
    with contextlib.ExitStack() as stack:
      if process.is_first():
        writer = metrics.Writer(workdir, self._first)
        self._writer = stack.enter_context(writer)
        total = max(self._first, config.train.steps)
        bar = progress.Progress(self._first, total)
        self._bar = stack.enter_context(bar)
      self._files = stack.pop_all()

  def __exit__(self, *_):
    self._files.close()

  def add(self, step: int, row: dict[str, Any]) -> None:
    """Takes the metrics that `step` will have, and reads the step before.

    Raises:
      FloatingPointError: the step before was not finite, and
        `train.nonfinite` is 'stop'.
    """
    self.flush()
    self._unread = (step, dict(row))

  def extend(self, values: dict[str, float]) -> None:
    """Adds values, such as those of an evaluation, to the newest step."""
    self._unread[1].update(values)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves what happens inside, beside training, out of the speeds."""
    if self._unread:
      jax.block_until_ready(self._unread[1])
    with self._clock.paused():
      yield

  def flush(self) -> None:
    """Reads the newest step, waiting for it; raises as `add`."""
    if self._unread is None:
      return
    (step, row), self._unread = self._unread, None
    finite = bool(row['finite'])
    if step == self._first:
      seconds = time.perf_counter() - self._started
      say(f'first step done after {seconds:.1f} s')
      self._clock.lap(step, self._schedule.tokens_before(step + 1))
    if not finite:
      self._report_nonfinite(step, row)
    if self._bar:
      self._bar.advance()
    done, every = step + 1, self._config.log_every
    due = done % every == 0 or step == 0 or done == self._config.steps
    if self._writer and (due or 'val_loss' in row):
      self._write(step, jax.device_get(row))

  def _write(self, step, row):
    tokens = self._schedule.tokens_before(step + 1)
    record = {**row, **self._schedule.at(step)._asdict(), 'tokens': tokens}
    if 'counts' in row:
      counts_LE = record.pop('counts')
      record['load'] = counts_LE.astype(np.int64)
      record['max_vio'] = metrics.max_vio(counts_LE)
    record |= self._clock.lap(step, tokens)
    if self._peak and 'tokens_per_second' in record:
      peak = self._peak * self._n_devices
      record['mfu'] = self._flops * record['tokens_per_second'] / peak
    self._writer.write(step, record)
    self._written = step
    self._bar.show(record)

  def _report_nonfinite(self, step, row):
    names = 'loss', 'grad_norm', 'update_norm'
    what = ', '.join(f'{name} {float(row[name])}' for name in names)
    if self._config.nonfinite == 'skip':
      logging.warning('step %d is not finite and was skipped: %s', step, what)
      return
    raise FloatingPointError(
      f'step {step} is not finite: {what}.  The steps before it were; see the '
      f'last rows of metrics.jsonl, up to step {self._written}, and look at '
      f'steps {self._written + 1} to {step}.  Nothing was saved since.  Go on '
      'from the last checkpoint with --train.nonfinite=skip, or with another '
      '--optim.lr, --optim.clip_norm or --data.seed'
    )


def say(text: str) -> None:
  """Tells the person at the terminal; stdout is left to results."""
  if process.is_first():
    print(text, file=sys.stderr, flush=True)
