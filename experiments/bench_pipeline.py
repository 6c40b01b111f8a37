"""Pipeline schedules side by side, for `bench --suite=pipeline`.

Four layers and no MTP on two CPU devices of one thread each, two to a rank
whatever the schedule, and micro-batches long enough for arithmetic to take most
of the time.

Each kind of task is timed alone, on one device.  The bubbles follow from these
costs and from the tables that the program runs, so that they say nothing of the
rest of a step.  The last is measured as a whole: the share of a step's
gradients in which a rank does none of its tasks, by their costs; in it is all
that is done once a step, such as collecting the parameters, and that two
devices which share a memory are slower than one.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_jax import config as config_lib
from deepseek_jax.parallel import schedules as pipelines

_RANKS, _MICROBATCHES = 2, 8
_REPEATS = 5
_LAYERS = 2 * _RANKS
_SHAPE = {
  'model.n_layers': _LAYERS,
  'model.n_dense_layers': 0,
  'model.n_mtp_layers': 0,
  'data.seq_len': 256,
  'data.batch_size_start': 0,
  'data.batch_size': 4 * _MICROBATCHES,
  'train.micro_batch_size': 4,
  'parallel.stage': _RANKS,
  'parallel.cpu_devices': _RANKS,
}


def lines(
  config: config_lib.Config, names: Sequence[str] = config_lib.PIPELINES
) -> Iterator[str]:
  """Ticks, bubbles, memory and compile time of schedules: a table.

  Raises:
    ValueError: no such schedule.
  """
  for name in names:
    pipelines.make(name, _RANKS, _MICROBATCHES)
  # Else a rank that works takes the core of one that waits.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'
  from deepseek_jax.training import process

  config = config_lib.replace(config, _SHAPE)
  process.join(config.parallel)
  costs = _costs(config)
  yield (
    f'{_RANKS} ranks, {_MICROBATCHES} micro-batches, no MTP; a layer takes '
    f'{1e3 * costs.forward:.1f} ms for F, '
    f'{1e3 * (costs.backward - costs.weight):.1f} for an input gradient, '
    f'{1e3 * costs.weight:.1f} for W, {1e3 * costs.pair:.1f} for F&B'
  )
  yield (
    '| schedule | ticks | bubble, equal costs | measured costs '
    '| in lockstep | of a step | stages held | temporary MB | compile s |'
  )
  yield '|---|---:|---:|---:|---:|---:|---:|---:|---:|'
  for name in names:
    own = config_lib.replace(config, {'parallel.schedule': name})
    yield _row(name, costs, _measure(own))


def _row(name: str, costs: Any, measured: dict[str, Any]) -> str:
  from deepseek_jax.parallel import simulate, ticks

  schedule = pipelines.make(name, _RANKS, _MICROBATCHES)
  equal, own = (simulate.simulate(schedule, c) for c in (simulate.EQUAL, costs))
  table = ticks.build(schedule)
  layers = _LAYERS / schedule.stages  # Of a task; costs are of one.
  bubbles = (
    equal.bubble(0) / equal.makespan,
    own.bubble(0) / own.makespan,
    table.bubble(0, costs) / table.makespan(costs),
    1 - layers * own.busy(0) / measured['seconds'],
  )
  shown = ' | '.join(f'{bubble:.0%}' for bubble in bubbles)
  return (
    f'| {name} | {len(table.cells)} | {shown} | {table.residual_slots} '
    f'| {measured["bytes"] / 1e6:.1f} | {measured["compile"]:.0f} |'
  )


def _seconds(function: Callable[..., Any], *args: Any) -> float:
  """The least of some runs, and of all that a second allows, after one more."""
  import jax

  times = []
  while len(times) <= _REPEATS or sum(times[1:]) < 1:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return min(times[1:])


def _batch(config: config_lib.Config) -> dict[str, Any]:
  import numpy as np

  b = config.micro_batch_size
  shape = config.data.batch_size // b, b, config.data.seq_len + 1
  tokens = np.random.default_rng(0).integers(
    1, config.model.vocab_size, shape, np.int32
  )
  return {'tokens': tokens, 'segments': np.ones_like(tokens)}


def _costs(config: config_lib.Config) -> Any:
  """Seconds of each kind of task, of one layer and micro-batch."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.parallel import simulate, split_backward
  from deepseek_jax.training import pipelined, schedules, step

  model = step.build_model(config_lib.replace(config, {'parallel.stage': 1}))
  program = pipelined.make_program(model, config, step.objective)
  variables = step.init_variables(model, 0)
  variables = jax.tree.map(jnp.asarray, variables)
  batch = _batch(config)
  totals = step.batch_totals(batch, config)
  micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch)
  aux = micro, (schedules.Schedule(config).at(0), totals)
  x = program.embed(variables['params']['embed'], micro)
  params, state = (
    jax.tree.map(lambda a: a[0], variables[c]['moe_layers'])
    for c in ('params', 'router_state')
  )
  split = split_backward.split(
    program.layers['moe_layers'], params, state, x, aux
  )
  own = params, state, jax.jit(split.prepare)(params, state)
  run = {
    name: jax.jit(getattr(split, name))
    for name in ('forward', 'input_grad', 'weight_grad')
  }
  y, _, saved = run['forward'](*own, x, aux)
  _, cut = run['input_grad'](*own, aux, saved, y)

  @jax.jit
  def pair(x, y, saved):
    return split.forward(*own, x, aux), split.backward(*own, aux, saved, y)

  weight = _seconds(run['weight_grad'], *own, aux, saved, cut)
  return simulate.Costs(
    forward=_seconds(run['forward'], *own, x, aux),
    backward=weight + _seconds(run['input_grad'], *own, aux, saved, y),
    weight=weight,
    pair=_seconds(pair, x, y, saved),
  )


def _measure(config: config_lib.Config) -> dict[str, Any]:
  """Seconds, memory and compile time of one batch's gradients."""
  import jax

  from deepseek_jax.training import optimizer, schedules, step

  model = step.build_model(config)
  layout = step.make_layout(model, config)
  tx = optimizer.adamw(config.optim, config.precision)
  state = step.init_state(model, tx, 0, layout)
  batch = layout.put_batch(_batch(config))
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
  return {
    'seconds': _seconds(compiled, *args),
    'bytes': compiled.memory_analysis().temp_size_in_bytes,
    'compile': compile_seconds,
  }
