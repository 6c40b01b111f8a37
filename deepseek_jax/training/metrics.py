"""Metrics of a run: metrics.jsonl, TensorBoard events, and MaxVio.

Each line of metrics.jsonl is one strict JSON object, `{"step": 7, "loss": 5.1,
"load": [[...]], ...}`, `step` counting from 0.  JSON has no NaN or infinity:
they are written as the strings "nan", "inf" and "-inf", and `read` turns them
back into numbers.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

FILE = 'metrics.jsonl'
_FLUSH_SECONDS = 10  # Of events: each is a wait for the disk.


def max_vio(load_LE: Any) -> Any:
  """MaxVio of each layer, [L]: (max load - mean load) / mean load.

  0 is perfect balance, E - 1 all tokens on one expert, NaN a layer that routed
  nothing (loss-free balancing paper, section 4.1).  Loads may be counts or
  fractions, of numpy or of jax.
  """
  return load_LE.max(-1) / load_LE.mean(-1) - 1


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Every complete line of `workdir`'s metrics.jsonl, in the order of steps.

  Also while the run is writing.  Without the file there are no lines.

  Raises:
    ValueError: on a damaged line that is not the last one.
  """
  path = pathlib.Path(workdir) / FILE
  return [record for record, _ in _records(path)] if path.exists() else []


class Writer(contextlib.AbstractContextManager):
  """Appends to a run's metrics; one flushed line a step.

  What a killed run has logged at or after `first_step`, and a line that it left
  half-written, is removed on opening: so the file has each step once.
  """

  def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
    """Opens `workdir`, made if need be, for steps from `first_step` on."""
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    if path.exists():
      os.truncate(path, _end_before(path, first_step))
    self._next_step = first_step
    self._lines = path.open('a', encoding='utf-8')
    self._events = _Events(directory / 'tensorboard', first_step)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Records numbers or arrays, of numpy or of jax; steps must increase.

    Events have the scalars, and vectors as one scalar for each layer; matrices,
    such as the load of each expert, are in metrics.jsonl alone.
    """
    assert step >= self._next_step, (step, self._next_step)
    self._next_step = step + 1
    arrays = {name: np.asarray(value) for name, value in metrics.items()}
    record = {'step': step}
    record.update({name: _encode(_plain(a)) for name, a in arrays.items()})
    self._lines.write(json.dumps(record, allow_nan=False) + '\n')
    self._lines.flush()
    scalars = {}
    for name, array in arrays.items():
      if array.ndim == 0:
        scalars[name] = float(array)
      elif array.ndim == 1:
        parts = {f'{name}/{i}': float(x) for i, x in enumerate(array)}
        scalars.update(parts)
    self._events.write(step, scalars)

  def close(self) -> None:
    """Closes both files."""
    self._lines.close()
    self._events.close()

  def __exit__(self, *_) -> None:
    self.close()


class _Events:
  """TensorBoard's file of scalars, flushed by a step every ten seconds.

  `SummaryWriter` writes in a thread, which a full disk ends; the run would then
  wait for it without end.  Here the step that cannot be written raises.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    # Slow to import, and only training writes.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    directory.mkdir(exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(directory / 'events'))
    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    # TensorBoard hides what earlier files have from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(first_step, session_log=start)
    self._flush()

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Records numbers by their names."""
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(step, summary=self._summary(value=values))
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self._flush()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()

  def _add(self, step, **content):
    event = self._event(wall_time=time.time(), step=step, **content)
    self._file.write_event(event)

  def _flush(self):
    self._file.flush()
    self._flushed = time.monotonic()


def _records(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], int]]:
  """Yields each complete record and the byte offset where its line ends.

  A kill can leave the last line without its end; a crash of the machine can
  also leave rubbish in it.
  """
  end = 0
  with path.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line) if line.endswith(b'\n') else None
      except ValueError:
        record = None
      if not isinstance(record, dict) or 'step' not in record:
        if lines.read(1):
          raise ValueError(f'{path}:{number} is damaged; remove that line')
        return
      end += len(line)
      yield {name: _decode(value) for name, value in record.items()}, end


def _end_before(path: pathlib.Path, first_step: int) -> int:
  """Bytes of the lines whose step is below `first_step`."""
  end = 0
  for record, line_end in _records(path):
    if record['step'] >= first_step:
      break
    end = line_end
  return end


def _plain(array: np.ndarray) -> Any:
  """Numbers and nested lists; small floats, such as bfloat16, made wide."""
  exact = array.dtype.kind in 'iuf'
  return (array if exact else array.astype(np.float64)).tolist()


def _encode(value: Any) -> Any:
  if isinstance(value, list):
    return [_encode(item) for item in value]
  return str(value) if not math.isfinite(value) else value


def _decode(value: Any) -> Any:
  if isinstance(value, list):
    return [_decode(item) for item in value]
  return float(value) if isinstance(value, str) else value
