"""Exponential moving average of the parameters in host memory (V3 3.2.3).

The average costs no device memory and no device time: the runtime copies the
parameters into pinned host memory, ordered before the next step overwrites
them, and a worker thread folds the copy in while that step runs.
"""

import collections
from concurrent import futures
from typing import Any

import jax
import numpy as np

# Elements folded in at once: a few blocks of this size stay in a core's cache,
# so that the fold reads and writes memory once.
_BLOCK = 1 << 15


class HostEMA:
  """`ema = decay * ema + (1 - decay) * params`, float32, one step behind.

  Of parameters that devices share, a process averages its own devices' parts.

  It starts at the initial parameters, so there is no bias to correct.  Updates
  are applied in the order of the calls, whatever the timing: the value is a
  function of the parameters alone.
  """

  def __init__(self, params: Any, decay: float, max_pending: int = 2):
    """Starts the average.

    Args:
      params: pytree of floating-point arrays (on a device or in numpy); copied.
      decay: in [0, 1).
      max_pending: copies of the parameters in flight; `update` waits for the
        worker beyond that, which bounds the host memory.
    """
    self._decay = decay
    self._max_pending = max_pending
    self._ema = jax.tree.map(_Average, params)
    self._pending = collections.deque()
    self._worker = futures.ThreadPoolExecutor(1, 'ema')

  def update(self, params: Any, taken: Any = True) -> None:
    """Schedules one update; `params` may be donated as soon as this returns.

    Args:
      params: after a step.
      taken: whether the step was taken, bool []; read by the worker, so that
        nothing waits for it here.  A step that was skipped changes nothing.

    Raises:
      Exception: whatever an earlier update raised in the worker thread.
    """
    while self._pending and (
      len(self._pending) >= self._max_pending or self._pending[0].done()
    ):
      self._finish_oldest()
    parts = [
      ema.parts_of(x)
      for ema, x in zip(jax.tree.leaves(self._ema), jax.tree.leaves(params))
    ]
    # Not np.asarray: on a CPU that is a view of the buffer, and while the view
    # lives the next step cannot reuse the buffer and silently copies it.
    # device_put copies, and the runtime runs it before a later donation.  Not
    # of `params` itself: for an array that other processes share, that is a
    # program.  One for each array, behind a step that has not begun on all of a
    # process's CPU devices, can take the threads that it would begin on.
    copies = jax.device_put(parts, jax.tree.map(_host_sharding, parts))
    self._pending.append(self._worker.submit(self._fold, copies, taken))

  def wait(self) -> None:
    """Returns when every scheduled update is applied; raises as `update`."""
    while self._pending:
      self._finish_oldest()

  def value(self) -> Any:
    """The average after every scheduled update: a copy, float32.

    In numpy, or, where devices share the parameters, arrays in host memory that
    are shared likewise.
    """
    self.wait()
    return jax.tree.map(_Average.copy, self._ema)

  def close(self) -> None:
    """Ends the worker thread, after the updates that it has begun."""
    self._worker.shutdown(cancel_futures=True)

  def _finish_oldest(self):
    # A failed update stays in the queue: the average is wrong from there on.
    self._pending[0].result()
    self._pending.popleft()

  def _fold(self, parts, taken):
    if not bool(taken):
      return
    for ema, new in zip(jax.tree.leaves(self._ema), parts):
      ema.fold(new, self._decay)


class _Average:
  """One array's average: whole, or this process's parts if it is shared."""

  def __init__(self, x: Any):
    self._shape = x.shape
    self._sharding = _host_sharding(x) if _is_shared(x) else None
    self._parts = {
      key: np.array(part, np.float32, order='C')
      for key, part in self._cut(x).items()
    }

  def parts_of(self, x: Any) -> list[Any]:
    """Those of `x` that are averaged, each on one device if `x` is shared."""
    cut = self._cut(x)
    return [cut[key] for key in self._parts]

  def fold(self, new: list[Any], decay: float) -> None:
    """`new`: as from `parts_of`."""
    for own, part in zip(self._parts.values(), new):
      _fold_array(own.reshape(-1), np.asarray(part).reshape(-1), decay)

  def copy(self) -> Any:
    if self._sharding is None:
      return self._parts[()].copy()
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: self._parts[_key(index)].copy(),
    )

  def _cut(self, x):
    """The different parts of `x` that this process has; () is the whole."""
    if self._sharding is None:
      return {(): x}
    return {_key(shard.index): shard.data for shard in x.addressable_shards}


def _is_shared(x: Any) -> bool:
  return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def _key(index: tuple[slice, ...]) -> tuple[Any, ...]:
  """An index that can be hashed; slices cannot in Python 3.11."""
  return tuple((part.start, part.stop) for part in index)


def _host_sharding(x: jax.Array) -> jax.sharding.Sharding:
  return x.sharding.with_memory_kind('pinned_host')


def _fold_array(ema, new, decay):
  """In-place update of the flat float32 view `ema`."""
  rest = np.float32(1 - decay)
  for start in range(0, ema.size, _BLOCK):
    block = ema[start : start + _BLOCK]
    # Equal to decay * ema + rest * new, but a decay near 1 is not rounded.
    block += rest * (new[start : start + _BLOCK] - block)
