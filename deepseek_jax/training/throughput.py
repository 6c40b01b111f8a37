"""Speed of a run: seconds per step, tokens/s, model FLOPs utilisation (MFU)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from deepseek_jax import config as config_lib

# Dense BF16 matmul peak in FLOP/s, from NVIDIA's data sheets; by the part of
# `device_kind` that names the chip.
_PEAKS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}


def peak_flops(device: jax.Device) -> float | None:
  """Dense BF16 FLOP/s of a device; None where it is not known."""
  found = [v for name, v in _PEAKS.items() if name in device.device_kind]
  return found[0] if found else None


def train_flops_per_token(params: Any, config: config_lib.Config) -> float:
  """FLOPs of forward and backward that the model needs, per trained token.

  6 for each matmul weight that a token meets, and 3 times the forward pass of
  causal attention, of which a token sees half the row on average.  What is
  computed again in the backward pass does not count.

  Args:
    params: the parameter tree; shapes are enough.
    config: of the run.
  """
  model, moe = config.model, config.model.moe
  weights = 0.0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    names = [entry.key for entry in path]
    if names[-1] in ('embed', 'head'):
      is_used = names[-1] == 'head' or model.tie_embeddings
      weights += is_used * (1 + model.n_mtp_layers) * x.size
    elif 'ffn' in names and x.ndim == 4:  # Routed experts: [L, E, D, F].
      weights += x.size * moe.n_activated_experts / moe.n_routed_experts
    elif not names[-1].endswith('norm'):
      weights += x.size
  mla, dims = model.mla, 2 * model.gqa.head_dim
  if model.attention == 'mla':
    dims = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
  layers = model.n_layers + model.n_mtp_layers
  attention = layers * model.n_heads * dims * config.data.seq_len  # 2 T / 2.
  return 6 * weights + 3 * attention


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
