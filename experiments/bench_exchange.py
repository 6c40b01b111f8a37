"""Bytes that the experts' all-to-all moves, per token, axis and kind of hop.

    python -m experiments.bench_exchange
    PYTHONPATH=cuda JAX_PLATFORMS=cpu \\
        python -m experiments.bench_exchange --topology=h100

The first runs on eight CPU devices and counts the rows that real routing sends
to other ranks.  The second compiles V3's routed experts, forward and backward,
for 64 GPUs that need not be there (see `parallel/topology.py`) and adds up the
buffers of the compiled program, with room for the mean load.  A gate and shared
experts communicate nothing.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import flags, presets
from deepseek_jax.config import (
  FP8Config,
  MoEConfig,
  ParallelConfig,
  PrecisionConfig,
)
from deepseek_jax.ops import routing
from deepseek_jax.parallel import expert, hlo, rules, topology
from deepseek_jax.parallel import mesh as mesh_lib

_TOPOLOGY = absl_flags.DEFINE_enum(
  'topology', 'cpu', ['cpu', 'h100', 'h200'], 'cpu: run; otherwise: compile.'
)
_TOKENS = absl_flags.DEFINE_integer('tokens', 4096, 'Of a rank.')
_KINDS = {
  f'{hops}, {dtype}': (hops == 'two hops', dtype == 'FP8')
  for hops in ('one hop', 'two hops')
  for dtype in ('BF16', 'FP8')
}


def _exchange(moe, parallel, two_hop, fp8):
  precision = PrecisionConfig(fp8=FP8Config(enabled=fp8))
  made = expert.Exchange.of(moe, precision, parallel)
  return dataclasses.replace(made, two_hop=two_hop)


def _across_and_within(sent, parallel):
  """Bytes to other nodes and inside the own one, of bytes by mesh axes."""
  other = parallel.node * parallel.expert - 1
  across, both = sent.get(('node',), 0.0), sent.get(rules.EXPERTS, 0.0)
  across += both * (parallel.node - 1) * parallel.expert / other
  return across, sent.get(('expert',), 0.0) + both * (
    parallel.expert - 1
  ) / other


def _compiled(mesh, model, parallel, two_hop, fp8):
  """(compiled forward and backward pass of V3's experts, seconds)."""
  moe, D, T = model.moe, model.dim, _TOKENS.value * parallel.n_devices
  E, F, K = moe.n_routed_experts, moe.moe_inter_dim, moe.n_activated_experts

  def shape(sizes, dtype, *spec):
    place = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  up = shape((E, D, F), jnp.bfloat16, rules.EXPERTS)
  down = shape((E, F, D), jnp.bfloat16, rules.EXPERTS)
  tokens = shape((T, D), jnp.bfloat16, rules.BATCH)
  weights = shape((T, K), jnp.float32, rules.BATCH)
  ids = shape((T, K), jnp.int32, rules.BATCH)

  def run(x, w1, w2, w3, weights, ids, dy):
    def ffn(x, w1, w2, w3, weights):
      how = _exchange(moe, parallel, two_hop, fp8)
      return expert.routed_ffn(x, w1, w2, w3, ids, weights, exchange=how)

    y, vjp = jax.vjp(ffn, x, w1, w2, w3, weights)
    return y, vjp(dy)

  started = time.perf_counter()
  with jax.set_mesh(mesh):
    args = (tokens, up, down, up, weights, ids, tokens)
    compiled = jax.jit(run).lower(*args).compile()
  return compiled, time.perf_counter() - started


def _compile_v3():
  model = presets.deepseek_v3().model
  parallel = ParallelConfig(node=8, expert=8, expert_buffer=1.0)
  devices = topology.topology(_TOPOLOGY.value, parallel.n_devices)
  mesh = mesh_lib.build(parallel, devices)
  print(
    'MB per rank   | to other nodes | within the node | temporary | compiled'
  )
  for name, kind in _KINDS.items():
    compiled, seconds = _compiled(mesh, model, parallel, *kind)
    found = hlo.collectives(hlo.parse(compiled.as_text()), mesh.shape)
    sent = _across_and_within(hlo.sent_by_axis(found), parallel)
    across, within = (b / 1e6 for b in sent)
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(
      f'{name:13} | {across:14.0f} | {within:15.0f} | {memory:9.0f} | '
      f'{seconds:.0f} s'
    )
  _print_least(model, parallel)


def _print_least(model, parallel):
  """What two hops must move: each token once to each node, K rows inside."""
  moe, T = model.moe, _TOKENS.value
  across = T * moe.n_limited_groups * (1 - 1 / parallel.node)
  within = T * moe.n_activated_experts * (1 - 1 / parallel.expert)
  for name, width in (('BF16', 2), ('FP8', 1)):
    # Dispatched are tokens, and gradients; combined, likewise, in BF16.
    row = 2 * model.dim * (width + 2) / 1e6
    print(
      f'least, {name:6} | {across * row:14.0f} | {within * row:15.0f} |'
      '           |'
    )


def _measured(parallel, two_hop):
  """Rows per token that ranks send to other nodes, and within their own."""
  moe = MoEConfig(n_routed_experts=64, n_expert_groups=4, n_limited_groups=2)
  mesh = mesh_lib.build(parallel, jax.devices())
  T, E = _TOKENS.value, moe.n_routed_experts
  logits = np.random.default_rng(0).normal(size=(8 * T, E))

  def count(logits):
    ids = routing.route(logits, jnp.zeros(E), moe).expert_ids_TK
    how = _exchange(moe, parallel, two_hop, fp8=False)
    sent = {h.axes: h.crossing_rows for h in expert.route(ids, E, how)}
    return {axes: jax.lax.psum(n, rules.EXPERTS) for axes, n in sent.items()}

  run = jax.shard_map(
    count, mesh=mesh, in_specs=P(rules.EXPERTS), out_specs=P(), check_vma=False
  )
  with jax.set_mesh(mesh):
    rows = jax.device_get(jax.jit(run)(logits.astype(np.float32)))
  per_token = {axes: n / (8 * T) for axes, n in rows.items()}
  return _across_and_within(per_token, parallel)


def _run_on_cpu():
  jax.config.update('jax_num_cpu_devices', 8)
  print('rows per token              | to other nodes | within the node')
  for nodes in (2, 4):
    parallel = ParallelConfig(node=nodes, expert=8 // nodes)
    for two_hop in (False, True):
      across, within = _measured(parallel, two_hop)
      name = (
        f'{nodes} nodes x {8 // nodes}, {"two hops" if two_hop else "one hop"}'
      )
      print(f'{name:27} | {across:14.2f} | {within:15.2f}')


def main() -> None:
  """Prints a table."""
  if _TOPOLOGY.value == 'cpu':
    _run_on_cpu()
  else:
    _compile_v3()


if __name__ == '__main__':
  flags.run(main)
