"""Programs, compiled for devices that are not here.

What comes out is the program that each of those devices would run: its memory,
its collectives, and how long compiling took (V3 section 3.1 has 2,048 of them).
A training step and an MoE layer are here, generation is `inference/ahead.py`'s.
`parallel/topology.py` gives the devices.
"""

import collections
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax.config import Config
from deepseek_jax.layers.moe import MoE
from deepseek_jax.models import deepseek
from deepseek_jax.parallel import hlo, overlap, rules, sharding
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.planner import memory
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import optimizer, pipelined, step
from deepseek_jax.training.layout import Layout
from deepseek_jax.training.schedules import Hyper

# Without a device nothing is tuned, and XLA's own matmul kernels refuse some
# small shapes; cuBLAS takes all, and compiles sooner.
_OPTIONS = {'xla_gpu_enable_triton_gemm': False}


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    hlo: after all optimizations, of one device.
    arguments: bytes on one device that live across calls.
    temporary: bytes that it allocates in addition, at its peak.
    collectives: all of them.
    lowering: seconds.
    compiling: seconds.
  """

  hlo: str
  arguments: int
  temporary: int
  collectives: list[hlo.Collective]
  lowering: float
  compiling: float


class Weights(NamedTuple):
  """A model; arrays are shapes and places.

  Attributes:
    model: the Transformer.
    variables: float32 `params`, and `router_state`.
    layout: None: one device.
    everywhere: the place of what is whole on every device.
  """

  model: deepseek.Transformer
  variables: dict[str, Any]
  layout: Layout | None
  everywhere: jax.sharding.Sharding


def weights(config: Config, devices: Sequence[jax.Device]) -> Weights:
  """Those of a checkpoint, as `trained.load` divides them.

  Raises:
    ValueError: the layout asks for another number of devices.
  """
  model = step.build_model(config)
  declared = step.declare(model)
  layout = layout_lib.make(declared, config, devices)
  variables = dict(nn.meta.unbox(declared))
  params, state = variables['params'], variables['router_state']
  everywhere = _everywhere(layout, devices)
  if layout is None:
    params = _shapes(params, everywhere)
  else:
    params = jax.tree.map(_shapes, params, layout.params())
  variables = {'params': params, 'router_state': _shapes(state, everywhere)}
  return Weights(model, variables, layout, everywhere)


def _everywhere(layout, devices):
  """The place of what is whole on every device."""
  return layout.replicated if layout else SingleDeviceSharding(devices[0])


def _shapes(tree: Any, place: jax.sharding.Sharding) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )


def train_step(config: Config, devices: Sequence[jax.Device]) -> Program:
  """One whole optimizer step.

  Raises:
    ValueError: the layout asks for another number of devices.
  """
  started = time.perf_counter()
  model = step.build_model(config)
  tx = optimizer.adamw(config.optim, config.precision)
  layout = layout_lib.make(step.declare(model), config, devices)
  state = step.abstract_state(model, tx, layout)
  everywhere = batch_place = _everywhere(layout, devices)
  if layout is None:
    state = _shapes(state, everywhere)
  else:
    batch_place = NamedSharding(layout.mesh, layout.batch_spec)
  b = config.micro_batch_size
  shape = (config.data.batch_size // b, b, config.data.seq_len + 1)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = _shapes({'tokens': rows, 'segments': rows}, batch_place)
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  hyper = _shapes(Hyper(*[scalar] * len(Hyper._fields)), everywhere)
  run = step.make_train_step(model, config, tx, layout=layout)
  lowered = run.lower(state, batch, hyper)
  return compiled(lowered, layout, started, _OPTIONS)


def moe_layer(config: Config, devices: Sequence[jax.Device]) -> Program:
  """One MoE layer, forwards and backwards, for one micro-batch.

  Raises:
    ValueError: no experts, or another number of devices.
  """
  started = time.perf_counter()
  model, dtype = config.model, jnp.dtype(config.precision.compute_dtype)
  if not model.moe.n_routed_experts:
    raise ValueError('model.moe.n_routed_experts=0: there is no MoE layer')
  layer = MoE(model, config.precision, config.parallel)
  shape = (config.micro_batch_size, config.data.seq_len)
  x = jax.ShapeDtypeStruct((*shape, model.dim), dtype)
  mask = jax.ShapeDtypeStruct(shape, jnp.float32)
  one = jnp.zeros((1, 1, model.dim), dtype), jnp.ones((1, 1))
  declared = jax.eval_shape(layer.init, jax.random.key(0), *one)
  layout = layout_lib.make(declared, config, devices)
  variables = nn.meta.unbox(declared)

  def gradients(params, state, x, mask, dy):
    def apply(own, x):
      if layout is not None:
        own = layout.collect_top(jax.tree.map(sharding.Copy, params, own))
      y, _ = layer.apply({'params': own, 'router_state': state}, x, mask)
      return y

    own = params
    if layout is not None:
      params = layout.step_copy(params)
      own = sharding.slots(params)
    y, vjp = jax.vjp(apply, own, x)
    dparams, dx = vjp(dy)
    return y, dx, dparams if layout is None else layout.reduce(dparams)

  everywhere = batch = _everywhere(layout, devices)
  params = variables['params']
  if layout is not None:
    batch = NamedSharding(layout.mesh, PartitionSpec(rules.BATCH))
    spec = batch.spec
    gradients = layout.per_device(
      gradients,
      (layout.stored, layout_lib.WHOLE, spec, spec, spec),
      (spec, spec, layout.stored),
    )
    params = jax.tree.map(_shapes, params, layout.params())
  else:
    params = _shapes(params, everywhere)
  state = _shapes(variables['router_state'], everywhere)
  x, mask = _shapes((x, mask), batch)
  run = jax.jit(
    gradients,
    compiler_options=mesh_lib.compiler_options(layout.mesh) if layout else {},
  )
  lowered = run.lower(params, state, x, mask, x)
  return compiled(lowered, layout, started, _OPTIONS)


def compiled(
  lowered: jax.stages.Lowered,
  layout: Layout | None,
  started: float,
  options: Mapping[str, Any] = types.MappingProxyType({}),
) -> Program:
  """Compiles what was lowered.

  Args:
    lowered: for devices that are not here.
    layout: of them; None: one device.
    started: when lowering began, by `time.perf_counter`.
    options: of XLA.
  """
  traced = time.perf_counter()
  program = lowered.compile(dict(options))
  ended = time.perf_counter()
  text, sizes = program.as_text(), program.memory_analysis()
  mesh = dict(layout.mesh.shape) if layout else {}
  return Program(
    text,
    sizes.argument_size_in_bytes,
    sizes.temp_size_in_bytes,
    hlo.collectives(hlo.parse(text), mesh) if layout else [],
    traced - started,
    ended - traced,
  )


def describe(program: Program, config: Config, is_step: bool) -> str:
  """Memory, collectives and times as text."""
  p, total = program, program.arguments + program.temporary
  lines = [
    f'{config.parallel.n_devices} devices; lowered in {p.lowering:.1f} s, '
    f'compiled in {p.compiling:.1f} s',
    f'each device: {p.arguments / 1e9:.4g} GB of arguments, '
    f'{p.temporary / 1e9:.4g} GB more at the peak',
  ]
  if is_step:
    planned = _planned(config)
    lines.append(
      f'planned: {planned.state / 1e9:.4g} GB of state, '
      f'{(planned.total - planned.state) / 1e9:.4g} GB more; compiled / '
      f'planned: {total / planned.total:.2f}'
    )
  return '\n'.join(lines + _table(p.collectives))


def _planned(config: Config) -> memory.Memory:
  """Of the program, which is that of all ranks."""
  parallel, schedule = config.parallel, None
  if parallel.stage > 1:
    count = config.data.batch_size // config.micro_batch_size
    schedule = pipelined.make_schedule(parallel, count)
  return memory.of_program(config, schedule)


def _table(found: Sequence[hlo.Collective]) -> list[str]:
  """Those alike summed up."""
  rows, counts = collections.Counter(), collections.Counter()
  for c in found:
    key = '+'.join(c.axes), c.kind, '+'.join(c.dtypes), c.is_counted
    rows[key] += c.sent
    counts[key] += c.times
  lines = [
    '| over | collective | of | times | GB sent |',
    '|---|---|---|---:|---:|',
  ]
  for (axes, kind, dtypes, is_counted), sent in sorted(rows.items()):
    times = counts[axes, kind, dtypes, is_counted]
    shown = f'{times}' if is_counted else f'{times} a round'
    lines.append(f'| {axes} | {kind} | {dtypes} | {shown} | {sent / 1e9:.4g} |')
  return lines if found else []


def describe_overlap(program: Program) -> str:
  """Each collective, and the products that may run beside it."""
  lines = [
    'GFLOP of products that may run beside one execution of a collective, that '
    'are scheduled so, and that its part of the program has:',
    '| in | over | collective | of | MB sent | beside | scheduled | all |',
    '|---|---|---|---|---:|---:|---:|---:|',
  ]
  beside = overlap.beside(hlo.parse(program.hlo))
  for c in program.collectives:
    if c.is_counted:
      around = beside[c.name]
      works = around.free, around.hidden, around.whole
      cells = (
        around.computation,
        '+'.join(c.axes),
        c.kind,
        '+'.join(c.dtypes),
        f'{c.sent / c.times / 1e6:.4g}',
        *map(_work, works),
      )
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join([*lines, *_parts(program, beside)])


def _parts(program, beside):
  """What each part of the program sends, and how much of that has company."""
  rows = collections.defaultdict(lambda: [0.0] * 3)
  for c in program.collectives:
    if c.is_counted:
      around, size = beside[c.name], c.sent / c.times / 1e6
      row = rows[around.computation, '+'.join(c.axes), c.kind]
      for i, works in enumerate((True, around.free, around.hidden)):
        row[i] += size if works else 0
  lines = [
    'MB that one execution of a part sends; of these, with products that may '
    'run beside them, and with products that are scheduled so:',
    '| in | over | collective | MB sent | beside | scheduled |',
    '|---|---|---|---:|---:|---:|',
  ]
  for key, sizes in rows.items():
    cells = *key, *(f'{size:.4g}' for size in sizes)
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _work(work: overlap.Work) -> str:
  kernels = f' + {work.kernels} kernels' if work.kernels else ''
  return f'{work.flops / 1e9:.4g}{kernels}'
