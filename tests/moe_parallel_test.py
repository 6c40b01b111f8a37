"""An MoE layer whose experts lie on several devices; what it communicates."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import (
  GQAConfig,
  ModelConfig,
  MoEConfig,
  ParallelConfig,
  PrecisionConfig,
)
from deepseek_jax.layers import stack
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.moe import MoE
from deepseek_jax.ops import routing
from deepseek_jax.parallel import hlo, rules, sharding
from deepseek_jax.parallel import mesh as mesh_lib
from tests import tolerances

_B, _T, _DIM = 8, 6, 16
_CONFIG = ModelConfig(
  dim=_DIM,
  n_heads=2,
  attention='mha',
  gqa=GQAConfig(head_dim=4),
  init_std=0.2,
  moe=MoEConfig(
    n_routed_experts=16,
    n_activated_experts=4,
    moe_inter_dim=8,
    n_expert_groups=4,
    n_limited_groups=2,
  ),
)
_LAYOUTS = (
  {'expert': 8},
  {'node': 2, 'expert': 4},
  {'data': 2, 'node': 2, 'expert': 2},
)
_EXPERTS = ('w1', 'w2', 'w3')


def _layer(parallel=ParallelConfig()):
  return MoE(_CONFIG, PrecisionConfig(compute_dtype='float32'), parallel)


@functools.cache
def _problem():
  """Variables, input, mask of padding, cotangent."""
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(2, _B, _T, _DIM)).astype(np.float32)
  mask = (rng.random((_B, _T)) < 0.8).astype(np.float32)
  variables = jax.jit(_layer().init)(jax.random.key(1), x, mask)
  variables = jax.device_get(nn.meta.unbox(variables))
  # A bias that decides something.
  bias = rng.normal(size=16).astype(np.float32) * 0.1
  variables = {**variables, 'router_state': {'bias': bias}}
  return variables, x, mask, dy


def _sums(layer, variables, x, mask, dy):
  """((loss, statistics, gradients of params), (output, gradient of x))."""

  def loss(params, x):
    y, stats = layer.apply({**variables, 'params': params}, x, mask)
    return (y * dy).sum() + stats.balance_loss, (y, stats)

  grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (value, (y, stats)), (dparams, dx) = grad(variables['params'], x)
  return (value, stats, dparams), (y, dx)


@functools.cache
def _single():
  return jax.device_get(
    jax.jit(functools.partial(_sums, _layer()))(*_problem())
  )


@functools.cache
def _sharded(sizes, buffer=2.0):
  """The compiled per-device computation, as the train step runs it."""
  parallel = ParallelConfig(**dict(sizes), expert_buffer=buffer)
  layer, batch, owned = _layer(parallel), P(rules.BATCH), P(rules.EXPERTS)

  def of_params(params):
    return {
      name: owned if name in _EXPERTS else jax.tree.map(lambda _: P(), value)
      for name, value in params.items()
    }

  params = of_params(_problem()[0]['params'])

  def run(*args):
    (value, stats, grads), rest = _sums(layer, *args)
    specs = jax.tree.map(
      lambda s: P(*s, *[None] * (3 - len(s))) if s else s,
      params,
      is_leaf=lambda s: isinstance(s, P),
    )
    grads = jax.tree.map(lambda g, s: sharding.reduce(g, s, s), grads, specs)
    return (*sharding.batch_sum((value, stats)), grads), rest

  mapped = jax.shard_map(
    run,
    mesh=mesh_lib.build(parallel, jax.devices()[: parallel.n_devices]),
    in_specs=({'params': params, 'router_state': P()}, batch, batch, batch),
    out_specs=((P(), P(), params), batch),
    check_vma=False,
  )
  return jax.jit(mapped).lower(*_problem()).compile()


def _key(sizes):
  return tuple(sizes.items())


class LayerTest(parameterized.TestCase):
  @parameterized.parameters(*_LAYOUTS)
  def test_equals_one_device(self, **sizes):
    """Output, loss, statistics, and the gradients of all parameters."""
    got = jax.device_get(_sharded(_key(sizes))(*_problem()))
    tolerances.assert_close(got, _single(), tolerances.COMPONENT_PARITY)
    np.testing.assert_array_equal(got[0][1].counts_E, _single()[0][1].counts_E)

  @parameterized.parameters(*_LAYOUTS)
  def test_only_rows_cross_and_experts_stay(self, **sizes):
    """All-to-alls over the hops' axes; gathered are only counts of rows."""
    parallel = ParallelConfig(**sizes)
    shape = {axis: getattr(parallel, axis) for axis in mesh_lib.AXES}
    program = hlo.parse(_sharded(_key(sizes)).as_text())
    found = hlo.collectives(program, shape)
    hops = {(a,) for a in rules.EXPERTS if sizes.get(a, 1) > 1}
    exchanged = {c.axes for c in found if c.kind == 'all-to-all'}
    self.assertEqual(exchanged, hops)
    for c in found:
      if c.kind == 'all-gather':
        self.assertEqual(c.dtypes, ('s32',))
      elif c.kind != 'all-to-all':
        self.assertEqual(c.kind, 'all-reduce')

  def test_on_an_ambient_mesh(self):
    """Inference: global arrays, which jit divides, and the layer's hops."""
    variables, x, mask, _ = _problem()
    parallel = ParallelConfig(node=2, expert=4)

    def run(layer, decodes):
      return jax.jit(lambda v, x, mask: layer.apply(v, x, mask, decodes))(
        variables, x, mask
      )

    for decodes in (False, True):
      with jax.set_mesh(mesh_lib.build(parallel, jax.devices()[:8])):
        got = run(_layer(parallel), decodes)
      tolerances.assert_close(
        got, run(_layer(), decodes), tolerances.COMPONENT_PARITY
      )

  def test_counts_are_of_the_whole_batch(self):
    """`check_vma` refuses a count that differs between devices."""
    ids = np.random.default_rng(3).integers(16, size=(16, 4))
    mesh = mesh_lib.build(ParallelConfig(node=2, expert=4), jax.devices()[:8])

    def counted(reduce):
      return jax.shard_map(
        lambda ids: reduce(routing.expert_counts(ids, 16)),
        mesh=mesh,
        in_specs=P(rules.EXPERTS),
        out_specs=P(),
        check_vma=True,
      )(jnp.asarray(ids))

    np.testing.assert_array_equal(
      counted(sharding.batch_sum), np.bincount(ids.reshape(-1), minlength=16)
    )
    with self.assertRaisesRegex(ValueError, 'vary|replicat|vma'):
      counted(lambda counts: counts)


def _moves_rows(program, instruction):
  """Whether it is an all-to-all of rows, not of sizes, or calls one."""
  if instruction.opcode == 'call':
    (called,) = instruction.called
    inner = program.computations[called].values()
    return any(_moves_rows(program, i) for i in inner)
  shape = instruction.shape
  is_exchange = instruction.opcode.startswith('all-to-all')
  return is_exchange and 's32' not in shape


def _waiting(program):
  """(number of exchanges, names of those that no product could run beside)."""
  found, waiting = 0, []
  called = {
    name
    for computation in program.computations.values()
    for i in computation.values()
    if i.opcode == 'call'
    for name in i.called
  }
  for name, computation in program.computations.items():
    for exchange in computation.values():
      if name in called or not _moves_rows(program, exchange):
        continue
      found += 1
      free = hlo.beside(computation, exchange.name)
      if not any(program.has(i, ('dot', '__onednn$matmul')) for i in free):
        waiting.append(exchange.name)
  assert found
  return found, waiting


@functools.cache
def _layers(n_shared, parts, with_gradient, remat='selective'):
  """Two layers in a loop on 2 x 4 devices: the compiled program, its result."""
  moe = dataclasses.replace(_CONFIG.moe, n_shared_experts=n_shared)
  config = dataclasses.replace(_CONFIG, moe=moe)
  parallel = ParallelConfig(node=2, expert=4, expert_buffer=0)
  precision = PrecisionConfig(compute_dtype='float32')
  layer = Block(config, True, precision, parallel)
  rng = np.random.default_rng(2)
  x = rng.normal(size=(16, _T, _DIM)).astype(np.float32)
  positions = np.broadcast_to(np.arange(_T, dtype=np.int32), x.shape[:2])
  args = (x, positions, None, np.ones(x.shape[:2], np.float32))

  def init(key):
    return nn.meta.unbox(stack.init_stacked(layer, key, 2, *args))

  variables = jax.device_get(jax.jit(init)(jax.random.key(0)))

  def run(variables, x, positions, mask):
    def loss(params, x):
      y, stats = stack.apply_stacked(
        layer,
        {**variables, 'params': params},
        x,
        positions,
        None,
        mask,
        remat=remat,
        parts=parts,
      )
      return (y**2).sum(), (y, stats.counts_E)

    if not with_gradient:
      return loss(variables['params'], x)[1][0]
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (dparams, dx), (y, counts) = grad(variables['params'], x)
    return (dx, y), (sharding.batch_sum(counts), dparams['ffn']['w2'])

  batch, owned = P(rules.BATCH), P(None, rules.EXPERTS)
  specs = jax.tree.map(lambda _: P(), variables)
  for name in _EXPERTS:
    specs['params']['ffn'][name] = owned
  out = ((batch, batch), (P(), owned)) if with_gradient else batch
  mapped = jax.shard_map(
    run,
    mesh=mesh_lib.build(parallel, jax.devices()[:8]),
    in_specs=(specs, batch, batch, batch),
    out_specs=out,
    check_vma=False,
  )
  args = (variables, x, positions, args[3])
  compiled = jax.jit(mapped).lower(*args).compile()
  return hlo.parse(compiled.as_text()), jax.device_get(compiled(*args))


class OverlapTest(parameterized.TestCase):
  """For each all-to-all there is a product that neither needs nor feeds it."""

  def test_a_single_batch_without_shared_experts_waits(self):
    """So that the other tests can fail."""
    found, waiting = _waiting(_layers(0, 1, False)[0])
    self.assertLen(waiting, found)

  def test_shared_experts_beside_dispatch_and_combine(self):
    self.assertEmpty(_waiting(_layers(1, 1, False)[0])[1])

  def test_two_halves_beside_each_other(self):
    """Forward and backward, and the numbers are those of the whole."""
    program, result = _layers(0, 2, True)
    self.assertEmpty(_waiting(program)[1])
    tolerances.assert_close(
      result, _layers(0, 1, True)[1], tolerances.DEEP_MODEL
    )
