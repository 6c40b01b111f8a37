"""Speed of a run: seconds per step, tokens/s, model FLOPs utilisation (MFU)."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import jax

from deepseek_jax.planner import devices

# Cards of the same names as SXM modules are slower, and not known here.
_CARD = re.compile('h[128]00.*(pcie|nvl)')
# Dense BF16 matmul peak in FLOP/s, by the part of `device_kind` that names the
# chip; of the A100, which nothing is planned for, from its data sheet.
_PEAKS = {name: device.bf16 for name, device in devices.DEVICES.items()}
_PEAKS['a100'] = 312e12


def peak_flops(device: jax.Device) -> float | None:
  """Dense BF16 FLOP/s of a device; None where it is not known."""
  kind = device.device_kind.lower()
  found = [peak for name, peak in _PEAKS.items() if name in kind]
  return found[0] if found and not _CARD.search(kind) else None


class Clock:
  """Speed between two marks, pauses (evaluation, saving) left out."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    """Starts without a mark; `clock` gives seconds."""
    self._clock = clock
    self._mark = None  # (time, step, tokens), moved forward by pauses.

  def lap(self, step: int, tokens: int) -> dict[str, float]:
    """Marks `step`, completed now, after `tokens` of the whole run.

    Returns step_seconds and tokens_per_second since the step of the last mark;
    nothing at the first, since compilation lies before it.
    """
    now, last = self._clock(), self._mark
    self._mark = (now, step, tokens)
    if last is None or last[1] == step:
      return {}
    seconds = now - last[0]
    return {
      'step_seconds': seconds / (step - last[1]),
      'tokens_per_second': (tokens - last[2]) / seconds,
    }

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time of the `with` block out of the current lap."""
    start = self._clock()
    yield
    if self._mark is not None:
      pause = self._clock() - start
      self._mark = (self._mark[0] + pause, *self._mark[1:])
