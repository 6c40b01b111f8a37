"""Layouts of 8 CPU devices beside one another: `bench.py --suite=parallel`.

The devices share the machine's cores, so a step's time says what a layout adds
to the same work, not how fast it would be on as many accelerators; the bytes
that a device sends are the compiled program's and hold anywhere.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax.parallel import hlo
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import optimizer, process, schedules, step

_DEVICES = 8
_LAYOUTS = {
  'one device': {},
  'data 8': {'data': 8},
  'data 8, ZeRO-1': {'data': 8, 'zero1': True},
  'fsdp 8': {'fsdp': 8},
  'data 2, fsdp 4': {'data': 2, 'fsdp': 4},
  'data 2, expert 4': {'data': 2, 'expert': 4},
  'node 2, expert 4': {'node': 2, 'expert': 4},
  'data 2, fsdp 2, expert 2, ZeRO-1': {
    'data': 2,
    'fsdp': 2,
    'expert': 2,
    'zero1': True,
  },
}


class Run(NamedTuple):
  """One layout, measured.

  Attributes:
    compile: seconds.
    step: median seconds.
    state: bytes of parameters and moments that a device holds.
    temporary: bytes that a device's program needs beside them.
    sent: bytes that a device sends along each set of axes, per step.
  """

  compile: float
  step: float
  state: int
  temporary: int
  sent: dict[tuple[str, ...], float]


def measure(config: config_lib.Config, rounds: int) -> Run:
  """Compiles the layout's train step on the first devices and times it."""
  model = step.build_model(config)
  tx = optimizer.adamw(config.optim, config.precision)
  devices = jax.devices()[: config.parallel.n_devices]
  layout = layout_lib.make(step.declare(model), config, devices)
  state = step.init_state(model, tx, 0, layout)
  batch = _batch(config, layout)
  hyper = schedules.Schedule(config).at(0)
  train_step = step.make_train_step(model, config, tx, layout=layout)
  started = time.perf_counter()
  program = train_step.lower(state, batch, hyper).compile()
  compiled, seconds = time.perf_counter() - started, []
  held = sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
  )
  for _ in range(rounds + 1):
    started = time.perf_counter()
    state, metrics = program(state, batch, hyper)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - started)
  sent = {}
  if layout:
    found = hlo.collectives(hlo.parse(program.as_text()), layout.mesh.shape)
    sent = hlo.sent_by_axis(found)
  temporary = program.memory_analysis().temp_size_in_bytes
  return Run(compiled, statistics.median(seconds[1:]), held, temporary, sent)


def _batch(config: config_lib.Config, layout: Any) -> dict[str, Any]:
  micro, T = config.micro_batch_size, config.data.seq_len
  shape = (config.data.batch_size // micro, micro, T + 1)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
  batch = {'tokens': tokens, 'segments': np.ones_like(tokens)}
  return layout.put_batch(batch) if layout else batch


def lines(config: config_lib.Config, rounds: int) -> Iterator[str]:
  """Every layout on the config's batch; then weak scaling.  As measured."""
  process.join(config_lib.ParallelConfig(cpu_devices=_DEVICES))
  jax.config.update('jax_enable_compilation_cache', False)  # Compilers' times.
  yield '| layout | compile s | step s | state MB | temporary MB | sent MB |'
  yield '|---|---|---|---|---|---|'
  runs = {}
  for name, axes in _LAYOUTS.items():
    runs[name] = measure(_laid_out(config, axes), rounds)
    yield f'| {name} {_row(runs[name])}'
  each = config.data.batch_size // _DEVICES
  yield f'\nWeak scaling, {each} sequences a device:\n'
  yield (
    '| devices | compile s | step s | per device, times one | state MB '
    '| temporary MB | sent MB |'
  )
  yield '|---|---|---|---|---|---|---|'
  one = None
  for n in (1, 2, 4, _DEVICES):
    run = runs['data 8']
    if n < _DEVICES:
      part = config_lib.replace(config, {'data.batch_size': each * n})
      run = measure(_laid_out(part, {'data': n}), rounds)
    one = one or run.step
    ratio = run.step / n / one
    yield (
      f'| {n} | {run.compile:.0f} | {run.step:.2f} | {ratio:.2f} '
      f'| {run.state / 1e6:.1f} | {run.temporary / 1e6:.1f} | {_sent(run)} |'
    )


def _laid_out(config, axes):
  parallel = config_lib.ParallelConfig(**axes)
  return dataclasses.replace(config, parallel=parallel)


def _row(run: Run) -> str:
  return (
    f'| {run.compile:.0f} | {run.step:.2f} | {run.state / 1e6:.1f} '
    f'| {run.temporary / 1e6:.0f} | {_sent(run)} |'
  )


def _sent(run: Run) -> str:
  parts = [f'{"+".join(a)} {n / 1e6:.2f}' for a, n in run.sent.items()]
  return ', '.join(parts) or '-'
