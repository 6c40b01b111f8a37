"""Input and weight gradients apart are the whole backward pass, at its cost."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.kernels import grouped, mosaic
from deepseek_jax.layers import stack
from deepseek_jax.ops import fp8_experts, fp8_linear, fp8_recipe
from deepseek_jax.ops.grouped import Groups
from deepseek_jax.parallel import split_backward
from deepseek_jax.training import step as step_lib
from tests import tolerances

_B, _T = 2, 16


def _compile(function, *args):
  return jax.jit(function).lower(*args).compile()


def _flops(compiled) -> float:
  return compiled.cost_analysis().get('flops', 0)


@jax.custom_vjp
def _linear(x, w):
  return x @ w


_linear.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda r, dy: (dy @ r[1].T, jnp.einsum('...i,...o->io', r[0], dy)),
)


def _two_layers(params, state, x, aux):
  """Calls of every sort that appear in a model: nested, custom, unrolled."""
  for i in range(2):
    h = jax.nn.silu(_linear(x * aux[:, None], params['w1'][i]))
    x = x + jax.jit(jnp.matmul)(h, params['w2'][i]) * params['scale'][i]
  return x + state, {'mean': x.mean()}


def _scoped(params, state, x, aux):
  """A product in a scope around a call, and one within it."""

  @jax.jit
  def inner(x):
    with jax.named_scope('inner'):
      return jnp.sin(x @ params)

  with jax.named_scope('outer'):
    return inner(x), {}


def _matrices(n):
  rng = np.random.default_rng(0)
  w1, w2 = rng.normal(size=(2, n, 64, 64)).astype(np.float32) / 8
  scale = rng.normal(size=(n, 64)).astype(np.float32)
  x, dy = rng.normal(size=(2, 32, 64)).astype(np.float32)
  params = {'w1': w1, 'w2': w2, 'scale': list(scale)}
  return params, np.float32(0.5), x, np.ones(32, np.float32), dy


def _compile_parts(split, params, state, x, aux, dy):
  """Each of the programs, compiled once, to be run and to be counted."""
  own = params, state, jax.eval_shape(split.prepare, params, state)
  saved = *own, aux, split.residuals
  return types.SimpleNamespace(
    prepare=_compile(split.prepare, params, state),
    forward=_compile(split.forward, *own, x, aux),
    input_grad=_compile(split.input_grad, *saved, dy),
    weight_grad=_compile(split.weight_grad, *saved, split.cut),
    backward=_compile(split.backward, *saved, dy),
  )


def _parts(split, params, state, x, aux, dy):
  """(y, stats, dparams, dx), of the four programs in turn."""
  prepared = split.prepare(params, state)
  y, stats, residuals = split.forward(params, state, prepared, x, aux)
  dx, cut = split.input_grad(params, state, prepared, aux, residuals, dy)
  dparams = split.weight_grad(params, state, prepared, aux, residuals, cut)
  return y, stats, dparams, dx


def _part_flops(compiled):
  return {name: _flops(part) for name, part in vars(compiled).items()}


def _whole(function, params, state, x, aux, dy):
  y, vjp, stats = jax.vjp(
    lambda p, x: function(p, state, x, aux), params, x, has_aux=True
  )
  return y, stats, *vjp(dy)


@functools.cache
def _layer(policy, dtype, fp8=False):
  """(function of an MoE layer with MLA, its arguments, dy)."""
  config = config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 2,
      'model.n_mtp_layers': 0,
      'precision.compute_dtype': dtype,
      'precision.fp8.enabled': fp8,
    },
  )
  model = step_lib.build_model(config)
  variables = step_lib.init_variables(model, 0)
  layer = model._layers()['moe_layers'][0]
  params, state = (
    jax.tree.map(lambda a: a[0], variables[name]['moe_layers'])
    for name in ('params', 'router_state')
  )

  def function(params, state, x, segments):
    positions = jnp.broadcast_to(jnp.arange(_T, dtype=jnp.int32), (_B, _T))
    apply = stack.rematerialised(layer.apply, policy)
    mask = (segments > 0).astype(jnp.float32)
    variables = {'params': params, 'router_state': state}
    x, stats = apply(variables, x, positions, None, mask)
    return (x, stats.balance_loss), stats

  rng = np.random.default_rng(1)
  x, dy = rng.normal(size=(2, _B, _T, config.model.dim))
  x, dy = jnp.asarray(x, model.dtype), jnp.asarray(dy, model.dtype)
  segments = np.ones((_B, _T), np.int32)
  return function, (params, state, x, segments), (dy, np.float32(0.1))


class PlainTest(parameterized.TestCase):
  def test_equals_vjp_and_recomputes_nothing(self):
    *args, dy = _matrices(2)
    split = split_backward.split(_two_layers, *args)
    compiled = _compile_parts(split, *args, dy)
    flops = _part_flops(compiled)
    tolerances.assert_close(
      _parts(compiled, *args, dy),
      _whole(_two_layers, *args, dy),
      tolerances.FLOAT32_MATH,
    )
    matmul = 2 * 32 * 64 * 64
    for name in ('forward', 'input_grad', 'weight_grad'):  # Four matrices each.
      self.assertBetween(flops[name], 4 * matmul, 4.4 * matmul, name)
    self.assertBetween(flops['backward'], 8 * matmul, 8.8 * matmul)

  def test_aux_is_never_a_residual_and_vectors_do_not_wait(self):
    *args, _ = _matrices(2)
    split = split_backward.split(_two_layers, *args)
    self.assertNotIn((32,), [s.shape for s in split.residuals])
    self.assertIn((64,), [s.shape for s in split.cut])

  def test_a_kernels_product_waits(self):
    """Though its result were fewer bytes to keep than what it is made of.

    A real kernel, so that a name that jax changes is noticed.
    """
    blocks = np.full(1, 8, np.int32)
    groups = Groups(np.zeros(8, np.int32), blocks, 0 * blocks, blocks)

    def outer(x, dy):
      dw = grouped.outer(x, dy, groups, implementation='mosaic_gpu')
      return dw[0].astype(x.dtype)

    @jax.custom_vjp
    def product(x, w):
      return x @ w

    product.defvjp(
      lambda x, w: (x @ w, (x, w)),
      lambda saved, dy: (dy @ saved[1].T, outer(jnp.sin(saved[0]), dy)),
    )

    def function(w, state, x, aux):
      return product(jnp.cos(x), w.astype(x.dtype)), None

    x, w = (jax.ShapeDtypeStruct((n, 128), jnp.bfloat16) for n in (1024, 128))
    with mosaic.for_hopper():
      call, *_ = jax.make_jaxpr(outer)(x, x).eqns
      split = split_backward.split(function, w, (), x, ())
    self.assertIn(call.primitive.name, split_backward._KERNELS)
    self.assertEqual([s.shape for s in split.cut], [x.shape])

  def test_a_scan_stays_whole(self):
    """Why layers are not scanned over: nothing is left for later."""

    def function(params, state, x, aux):
      def body(x, w):
        return x + jnp.tanh(x @ w), None

      return jax.lax.scan(body, x, params['w1'])[0], None

    *args, dy = _matrices(3)
    split = split_backward.split(function, *args)
    compiled = _compile_parts(split, *args, dy)
    tolerances.assert_close(
      _parts(compiled, *args, dy),
      _whole(function, *args, dy),
      tolerances.FLOAT32_MATH,
    )
    self.assertEqual(_flops(compiled.weight_grad), 0)

  def test_fp8_linear(self):
    """In FP8, two tiles a row; weights are quantised once, ahead."""

    def function(w, state, x, aux):
      inputs = fp8_linear.quantize_input(x, recipe)
      return fp8_linear.fp8_linear(inputs, w, recipe), None

    recipe = fp8_recipe.of(config_lib.FP8Config(enabled=True))

    rng = np.random.default_rng(2)
    w, x, dy = (
      rng.normal(size=size).astype(np.float32)
      for size in ((256, 384), (128, 256), (128, 384))
    )
    args = w, (), x, ()
    split = split_backward.split(function, *args)
    parts = jax.jit(functools.partial(_parts, split))(*args, dy)
    expected = jax.jit(functools.partial(_whole, function))(*args, dy)
    tolerances.assert_close(parts, expected, tolerances.FLOAT32_MATH)
    prepared = jax.eval_shape(split.prepare, w, ())
    codes = {p.dtype for p in prepared if p.size == w.size}
    self.assertEqual(codes, {jnp.dtype(jnp.float8_e4m3fn)})
    wide = [r for r in split.residuals if r.dtype.itemsize > 1]
    self.assertLess(sum(r.size for r in wide), x.size / 64)


class LayerTest(parameterized.TestCase):
  @parameterized.parameters(
    ('none', 'float32'),
    ('selective', 'float32'),
    ('full', 'bfloat16'),
    ('selective', 'bfloat16', True),
  )
  @pytest.mark.slow
  def test_mla_and_moe(self, policy, dtype, fp8=False):
    function, args, dy = _layer(policy, dtype, fp8)
    split = split_backward.split(function, *args)
    compiled = _compile_parts(split, *args, dy)
    whole = _compile(functools.partial(_whole, function), *args, dy)
    # The same operations, so that even bfloat16 agrees.
    tolerances.assert_close(
      _parts(compiled, *args, dy), whole(*args, dy), tolerances.FLOAT32_MATH
    )
    flops, most = _part_flops(compiled), 1.02 * _flops(whole)
    once = flops['forward'] + flops['prepare']
    total = once + flops['input_grad'] + flops['weight_grad']
    self.assertLess(total, most)
    self.assertLess(once + flops['backward'], most)  # As a pair has them.
    # Quantisation, at these sizes much of the work, does not wait.
    self.assertGreater(flops['weight_grad'], (0.15 if fp8 else 0.2) * total)

  @pytest.mark.slow
  def test_what_waits_for_a_weight_gradient_is_codes(self):
    """In FP8; in more bits only what the gate and the experts' loop take."""
    function, args, _ = _layer('selective', 'bfloat16', fp8=True)
    split, config = split_backward.split(function, *args), presets.tiny().model
    least = _B * _T * config.mla.kv_lora_rank
    wide = [s for s in split.cut if s.dtype.itemsize > 1 and s.size >= least]
    rows = _B * _T * config.moe.n_activated_experts + fp8_experts.BLOCK
    expert_rows = (rows, config.moe.moe_inter_dim), 'bfloat16'
    expected = [((_B, _T, config.dim), 'bfloat16'), expert_rows, expert_rows]
    self.assertCountEqual([(s.shape, s.dtype.name) for s in wide], expected)

  def test_casts_are_prepared_once(self):
    function, args, _ = _layer('full', 'bfloat16')
    split = split_backward.split(function, *args)
    prepared = jax.eval_shape(split.prepare, *args[:2])
    matrices = [p for p in prepared if p.dtype == jnp.bfloat16]
    n_matrices = len([p for p in jax.tree.leaves(args[0]) if p.ndim > 1])
    self.assertLen(matrices, n_matrices - 1)  # The gate stays in float32.
    # Full rematerialisation keeps nothing but the layer's input.
    self.assertEqual([r.shape for r in split.residuals], [args[2].shape])


class ScopeTest(absltest.TestCase):
  def test_names_of_a_profile_are_kept(self):
    x = jnp.ones((4, 4))
    split = split_backward.split(_scoped, x, (), x, ())
    own = x, (), []
    parts = (
      (split.forward, (*own, x, ())),
      (split.input_grad, (*own, (), split.residuals, x)),
      (split.weight_grad, (*own, (), split.residuals, split.cut)),
    )
    for part, arguments in parts:
      jaxpr = jax.make_jaxpr(part)(*arguments)
      [dot] = (e for e in jaxpr.eqns if e.primitive.name == 'dot_general')
      self.assertRegex(str(dot.source_info.name_stack), 'outer.*/.*inner')


if __name__ == '__main__':
  absltest.main()
