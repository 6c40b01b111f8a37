"""Schedules by tokens: learning rate, batch size, gamma, alpha, lambda (4.2).

Pure Python in float64, evaluated on the host once a step; the values enter the
compiled step as scalars, so no schedule is ever part of a compiled program.
"""

import bisect
import math
from typing import NamedTuple

from deepseek_jax import config as config_lib

# V3's learning-rate phases in trillions of tokens: constant, cosine to a tenth,
# constant, and a last constant (section 4.2).
_V3_TOTAL = 14.8
_V3_COSINE_START = 10.0
_V3_COSINE_END = 14.3
_V3_LAST_START = _V3_COSINE_END + 0.333
_V3_LAST = 7.3e-6 / 2.2e-4

_FLOOR = 0.1  # Where the cosines end.
_V2_DROPS = {'v2': (0.6, 0.9), 'v2_lite': (0.8, 0.9)}
_V2_FACTOR = 0.316

RAMP_STAGES = 8  # Batch sizes, the full one too; each is compiled once.


class Hyper(NamedTuple):
  """What the compiled step is told at each step."""

  lr: float
  gamma: float  # Speed of the router bias.
  alpha: float  # Weight of the balance loss.
  mtp_weight: float  # Lambda of equation 25.


class Schedule:
  """All schedules of one run; steps count from 0.

  The batch ramp: `RAMP_STAGES` sizes, evenly spaced from `batch_size_start` to
  `batch_size` inclusive and rounded to multiples of what a step can take
  (`Config.batch_step`).  The ramp's tokens are divided equally among all but
  the last, whose stage begins at its end: linear growth in tokens, in as many
  compiled programs as there are sizes.  DeepSeek never published the shape.
  """

  def __init__(self, config: config_lib.Config):
    """Solves the ramp of `config`; constant time in the number of steps."""
    self._optim = config.optim
    self._steps = config.train.steps
    self._seq_len = config.data.seq_len
    self._sizes = _ramp_sizes(config)
    self._starts = _ramp_starts(
      self._sizes, self._steps, config.data.batch_ramp_fraction
    )
    self._sequences = [0]  # Read before each stage.
    for i, size in enumerate(self._sizes[:-1]):
      length = self._starts[i + 1] - self._starts[i]
      self._sequences.append(self._sequences[-1] + length * size)
    self._pieces = {
      name: config_lib.parse_piecewise(getattr(config.optim, name))
      for name in ('gamma', 'alpha', 'mtp_weight')
    }

  def batch_size(self, step: int) -> int:
    """Sequences of the batch of `step`."""
    return self._sizes[self._stage(step)]

  def tokens_before(self, step: int) -> int:
    """Tokens read by steps `0 .. step - 1`."""
    stage = self._stage(step)
    length = step - self._starts[stage]
    return self._seq_len * (
      self._sequences[stage] + length * self._sizes[stage]
    )

  @property
  def total_tokens(self) -> int:
    """Tokens of the whole run."""
    return self.tokens_before(self._steps)

  def at(self, step: int) -> Hyper:
    """The values of `step`, by the fraction of all tokens read before it."""
    fraction = self.tokens_before(step) / self.total_tokens
    values = {k: _piecewise(v, fraction) for k, v in self._pieces.items()}
    return Hyper(lr=self._lr(step, fraction), **values)

  def _stage(self, step: int) -> int:
    assert step >= 0, step
    return bisect.bisect_right(self._starts, step) - 1

  def _lr(self, step: int, fraction: float) -> float:
    """Linear warm-up, ending at `lr` in step `warmup_steps - 1`, x a shape."""
    optim = self._optim
    peak = optim.lr * min(1.0, (step + 1) / max(1, optim.warmup_steps))
    match optim.schedule:
      case 'v3':
        return peak * _v3_shape(fraction)
      case 'cosine':
        warm = self.tokens_before(min(optim.warmup_steps, self._steps))
        warm /= self.total_tokens
        after = max(0.0, fraction - warm) / max(1e-12, 1 - warm)
        return peak * _cosine(after)
      case 'constant':
        return peak
      case name:
        drops = sum(fraction >= start for start in _V2_DROPS[name])
        return peak * _V2_FACTOR**drops


def _ramp_sizes(config: config_lib.Config) -> list[int]:
  """Batch size of each stage; the last stage lasts to the end of the run."""
  last, step = config.data.batch_size, config.batch_step
  first = config.data.batch_size_start or last
  spans = RAMP_STAGES - 1
  return [
    step * round((first + (last - first) * i / spans) / step)
    for i in range(RAMP_STAGES)
  ]


def _ramp_starts(sizes: list[int], steps: int, ramp: float) -> list[int]:
  """First step of each stage.

  Of the n sequences of the run, n x ramp / spans are read in each stage but the
  last, in n x ramp / spans / size steps, and what remains at full size.  All
  these steps sum to `steps`: that gives n, though n and the ramp need each
  other.
  """
  *growing, full = sizes
  per_sequence = [ramp / len(growing) / size for size in growing]
  n = steps / (sum(per_sequence) + (1 - ramp) / full)
  return [round(n * sum(per_sequence[:i])) for i in range(len(sizes))]


def _piecewise(pieces: tuple[tuple[float, float], ...], x: float) -> float:
  """The value of the last piece that starts at or before `x`."""
  return [value for start, value in pieces if start <= x][-1]


def _cosine(x: float) -> float:
  """From 1 at x = 0 to `_FLOOR` at x = 1."""
  return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * x)) / 2


def _v3_shape(fraction: float) -> float:
  trillions = fraction * _V3_TOTAL
  if trillions < _V3_COSINE_START:
    return 1.0
  if trillions < _V3_COSINE_END:
    span = _V3_COSINE_END - _V3_COSINE_START
    return _cosine((trillions - _V3_COSINE_START) / span)
  return _FLOOR if trillions < _V3_LAST_START else _V3_LAST
