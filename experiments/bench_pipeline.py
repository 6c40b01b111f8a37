"""Pipeline schedules side by side, for `bench --suite=pipeline`.

On two CPU devices.  The measured bubble is what of a step's gradients does not
grow with the micro-batches: t(M) - M (t(2M) - t(M)) / M, as a share of t(M).
That includes what is done once a step, such as collecting the parameters.
"""

import time
from typing import Any

from deepseek_jax import config as config_lib

_RANKS, _MICROBATCHES = 2, 8
_REPEATS = 5


def table(config: config_lib.Config) -> str:
  """Ticks, bubbles, memory and compile time of every schedule."""
  from deepseek_jax.parallel import simulate, ticks
  from deepseek_jax.training import pipelined, process

  config = config_lib.replace(
    config,
    {
      'parallel.stage': _RANKS,
      'parallel.cpu_devices': _RANKS,
      'data.batch_size_start': 0,
      'data.batch_size': _MICROBATCHES,
      'train.micro_batch_size': 1,
      'train.remat': 'full',
    },
  )
  process.join(config.parallel)
  lines = [
    f'{_RANKS} stages, {_MICROBATCHES} micro-batches',
    '| schedule | ticks | bubble, paper | in lockstep | measured '
    '| micro-batches held | temporary MB | compile s |',
    '|---|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for name in config_lib.PIPELINES:
    own = config_lib.replace(config, {'parallel.schedule': name})
    schedule = pipelined.make_schedule(own.parallel, _MICROBATCHES)
    run, cells = simulate.simulate(schedule), ticks.build(schedule)
    few, more = (
      _measure(config_lib.replace(own, {'data.batch_size': n}))
      for n in (_MICROBATCHES, 2 * _MICROBATCHES)
    )
    bubble = 2 - more['seconds'] / few['seconds']
    lines.append(
      f'| {name} | {len(cells.cells)} | {run.bubble(0) / run.makespan:.0%} '
      f'| {cells.bubble(0) / cells.makespan():.0%} | {bubble:.0%} '
      f'| {cells.residual_slots} | {few["bytes"] / 1e6:.1f} '
      f'| {few["compile"]:.0f} |'
    )
  return '\n'.join(lines)


def _measure(config: config_lib.Config) -> dict[str, Any]:
  """Seconds, memory and compile time of one batch's gradients."""
  import jax
  import numpy as np

  from deepseek_jax.training import optimizer, schedules, step

  n = config.data.batch_size
  model = step.build_model(config)
  layout = step.make_layout(model, config)
  tx = optimizer.adamw(config.optim, config.precision)
  state = step.init_state(model, tx, 0, layout)
  tokens = np.random.default_rng(0).integers(
    1, config.model.vocab_size, (n, 1, config.data.seq_len + 1), np.int32
  )
  batch = {'tokens': tokens, 'segments': np.ones_like(tokens)}
  batch = layout.put_batch(batch)
  args = (
    state.params,
    state.router_state,
    batch,
    schedules.Schedule(config).at(0),
    step.batch_totals(batch, config),
  )
  gradients = step.make_gradients(model, config, step.pretrain_loss, layout)
  start = time.perf_counter()
  compiled = jax.jit(gradients).lower(*args).compile()
  compile_seconds = time.perf_counter() - start
  times = []
  for _ in range(_REPEATS + 1):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - start)
  return {
    'seconds': min(times[1:]),
    'bytes': compiled.memory_analysis().temp_size_in_bytes,
    'compile': compile_seconds,
  }
