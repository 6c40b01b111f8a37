"""Products, turned codes and moved rows: the kernels beside their references.

Every case is lowered for CUDA at a real model's shapes.  Where jax interprets
all that the kernels do (from 0.11, Python 3.12), each is also run on small
arrays with several tiles, ragged and empty groups, and edges that divide
nothing; jax 0.10 interprets one of them.
"""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config, presets
from deepseek_jax.kernels import (
  expert_decode,
  experts,
  fp8,
  fp8_experts,
  fp8_gemm,
  fp8_matmul,
  grouped,
  mosaic,
  permute,
  turn,
)
from deepseek_jax.kernels import quantize as rows
from deepseek_jax.layers import block, linear
from deepseek_jax.ops import expert_decode as expert_decode_reference
from deepseek_jax.ops import experts as experts_reference
from deepseek_jax.ops import fp8_experts as fp8_experts_reference
from deepseek_jax.ops import fp8_matmul as fp8_reference
from deepseek_jax.ops import fp8_recipe, quantize
from deepseek_jax.ops import grouped as reference
from deepseek_jax.ops.formats import E4M3
from deepseek_jax.ops.quantize import (
  COLUMN_TILE,
  ROW_TILE,
  SQUARE_TILE,
  Quantized,
)
from tests import deviceless, jaxprs, tolerances

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
KERNEL = {'implementation': 'mosaic_gpu'}
MODES = ('lower', 'interpret') if mosaic.interprets_fp8() else ('lower',)


def abstract(shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def codes(shape, tile):
  """A `Quantized` without numbers."""
  scales = (*shape[:-2], *(-(-n // t) for n, t in zip(shape[-2:], tile)))
  return Quantized(
    abstract(shape, E4M3.dtype), abstract(scales, F32), tile, E4M3
  )


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), BF16)


@functools.cache
def routing():
  """Two choices of 96 tokens; expert 1 is empty, and 4 is none."""
  ids = np.random.default_rng(0).integers(0, 4, (96, 2))
  layout = reference.lay_out(jnp.asarray(np.where(ids == 1, 4, ids), I32), 4)
  used = int(layout.groups.count[0]) * 128
  assert layout.groups.blocks_E[1] == 0 and used < layout.token_R.size
  return layout, used


def real_routing(T=4096, K=8, E=8):
  return jax.eval_shape(
    functools.partial(reference.lay_out, n_experts=E), abstract((T, K), I32)
  )


def interpret(f, *args, **kwargs):
  with mosaic.interpreted():
    return f(*args, **kwargs, **KERNEL)


class Kernels(parameterized.TestCase):
  def lowers(self, f, *args, **kwargs):
    text = mosaic.lower(functools.partial(f, **kwargs, **KERNEL), *args)
    self.assertIn('mosaic_gpu', text)

  def close(self, actual, expected, rung=tolerances.FLOAT32_MATH):
    tolerances.assert_close(actual, expected, rung)


class FP8Test(Kernels):
  @parameterized.product(
    mode=MODES, tile=(SQUARE_TILE, COLUMN_TILE), shape=('WIDE', 'NARROW')
  )
  def test_dot(self, mode, tile, shape):
    if mode == 'lower':
      for M, K, N in (
        (4096, 7168, 2112), (4096, 16384, 7168), (8192, 2048, 10944),
        (4096, 576, 7168), (8192, 10944, 2048),  # Not whole blocks of K.
      ):  # fmt: skip
        a, b = codes((M, K), ROW_TILE), codes((N, K), tile[::-1])
        f = functools.partial(fp8_matmul.dot, dtype=BF16, **KERNEL)
        mosaic.lower(lambda a, b, f=f: f(a, b.mT), a, b)
      return
    a = quantize.quantize(draw(192, 320), ROW_TILE)
    b = quantize.quantize(draw(208, 320, seed=1), tile[::-1]).mT
    expected = fp8_reference.dot(a, b)
    if tile == SQUARE_TILE:
      shape = getattr(fp8_gemm, shape)
      with mosaic.interpreted():
        actual = fp8_gemm.multiply(
          a.codes, b.codes.mT[None], a.scales.mT, b.scales.mT[None],
          dtype=F32, shape=shape,
        )  # fmt: skip
    else:
      actual = interpret(fp8_matmul.dot, a, b)
    self.close(actual, expected)

  def test_the_tile_is_narrow_where_a_wide_one_would_leave_processors_idle(
    self,
  ):
    with mosaic.for_hopper():
      best = fp8_gemm.best_shape
      self.assertEqual(best(4096, 7168, False), fp8_gemm.WIDE)
      self.assertEqual(best(128, 7168, False), fp8_gemm.NARROW)
      self.assertEqual(best(4096, 7168, True), fp8_gemm.NARROW)

  @parameterized.product(mode=MODES, scale=('float32', 'ceil'))
  def test_turn(self, mode, scale):
    if mode == 'lower':
      x = abstract((4096, 7168))
      self.lowers(turn.quantize, x, tile=COLUMN_TILE, scale=scale)
      q = codes((8192, 1408), ROW_TILE)
      if mosaic.turns_codes():
        self.lowers(turn.requantize, q, tile=COLUMN_TILE, scale=scale)
      else:
        with self.assertRaisesRegex(ValueError, 'jax before 0.11'):
          self.lowers(turn.requantize, q, tile=COLUMN_TILE, scale=scale)
      return
    x = draw(256, 128) * jnp.exp2(jnp.arange(256) % 9 - 4)[:, None].astype(BF16)
    q = quantize.quantize(x, ROW_TILE)
    for actual, expected in (
      (interpret(turn.quantize, x, COLUMN_TILE, scale=scale),
       quantize.quantize(x, COLUMN_TILE, scale=scale)),
      (interpret(turn.requantize, q, COLUMN_TILE, scale=scale),
       quantize.requantize(q, COLUMN_TILE, scale=scale)),
    ):  # fmt: skip
      self.close(actual.scales, expected.scales)
      same = np.asarray(actual.codes == expected.codes)
      if scale == 'ceil':  # Powers of two divide exactly.
        self.assertTrue(same.all())
      self.assertGreater(same.mean(), 0.99)

  @parameterized.product(mode=MODES)
  def test_grouped(self, mode):
    if mode == 'lower':
      groups = real_routing().groups
      R = groups.expert_B.size * 128
      for K, N in ((7168, 4096), (2048, 7168)):
        x, w = codes((R, K), ROW_TILE), codes((8, N, K), SQUARE_TILE)
        mosaic.lower(
          lambda x, w, g: grouped.fp8_dot(x, w.mT, g, BF16, **KERNEL),
          x, w, groups,
        )  # fmt: skip
        turned = [codes((n, R), ROW_TILE) for n in (K, N)]
        mosaic.lower(
          lambda x, y, g: grouped.fp8_outer(x.mT, y.mT, g, **KERNEL),
          *turned, groups,
        )  # fmt: skip
      return
    layout, used = routing()
    rows = reference.permute(draw(96, 256), layout)
    x = quantize.quantize(rows, ROW_TILE)
    w = quantize.quantize(draw(4, 192, 256, seed=1), SQUARE_TILE).mT
    y = reference.fp8_dot(x, w, layout.groups)
    actual = interpret(grouped.fp8_dot, x, w, layout.groups)
    self.close(actual[:used], y[:used])
    x, y = (quantize.quantize(v, COLUMN_TILE) for v in (rows, y))
    self.close(
      interpret(grouped.fp8_outer, x, y, layout.groups),
      reference.fp8_outer(x, y, layout.groups),
    )

  @parameterized.product(mode=MODES)
  def test_two_grouped_products_are_one(self, mode):
    """Their sum is float32's, and rounded once."""
    if mode == 'lower':
      groups = real_routing().groups
      R = groups.expert_B.size * 128
      x, w = codes((R, 2048), ROW_TILE), codes((8, 7168, 2048), SQUARE_TILE)
      mosaic.lower(
        lambda *a: grouped.fp8_dots(
          [(x, w.mT) for x, w in (a[:2], a[2:4])], a[4], BF16, **KERNEL
        ),
        x, w, x, w, groups,
      )  # fmt: skip
      return
    layout, used = routing()
    pairs = []
    for seed in range(2):
      rows = reference.permute(draw(96, 320, seed=seed), layout)
      w = draw(4, 192, 320, seed=seed + 2)
      x = quantize.quantize(rows, ROW_TILE)
      pairs.append((x, quantize.quantize(w, SQUARE_TILE).mT))
    expected = sum(reference.fp8_dot(*pair, layout.groups) for pair in pairs)
    self.close(reference.fp8_dots(pairs, layout.groups, F32), expected)
    actual = [
      interpret(grouped.fp8_dots, pairs, layout.groups, dtype=dtype)
      for dtype in (F32, BF16)
    ]
    self.close(actual[0][:used], expected[:used])
    same = np.asarray(actual[1] == expected.astype(BF16))[:used]
    self.assertGreater(same.mean(), 0.99)


class BFloat16Test(Kernels):
  @parameterized.product(mode=MODES)
  def test_grouped(self, mode):
    if mode == 'lower':
      for E, K, N in ((8, 7168, 2048), (8, 2048, 7168), (64, 2048, 1408)):
        groups = real_routing(E=E).groups
        R = groups.expert_B.size * 128
        x, y, w = abstract((R, K)), abstract((R, N)), abstract((E, K, N))
        self.lowers(grouped.dot, x, w, groups)
        self.lowers(grouped.dot, y, w, groups, turned=True, dtype=F32)
        self.lowers(grouped.outer, x, y, groups)
      return
    layout, used = routing()
    x, w = reference.permute(draw(96, 256), layout), draw(4, 256, 192, seed=1)
    y, rung = reference.dot(x, w, layout.groups), tolerances.BFLOAT16
    actual = interpret(grouped.dot, x, w, layout.groups)
    self.close(actual[:used], y[:used], rung)
    actual = interpret(grouped.dot, x, w.mT, layout.groups, turned=True)
    self.close(actual[:used], y[:used], rung)
    self.close(
      interpret(grouped.outer, x, y, layout.groups),
      reference.outer(x, y, layout.groups),
    )

  @parameterized.product(mode=MODES)
  def test_two_grouped_products_are_one(self, mode):
    """Their sum is float32's, and rounded once."""
    if mode == 'lower':
      groups = real_routing().groups
      R = groups.expert_B.size * 128
      x, w = abstract((R, 2048)), abstract((8, 7168, 2048))

      def both(*args, turned=True, **how):
        pairs = args[:2], args[2:4]
        return grouped.dots(pairs, args[4], turned, BF16, **how)

      self.lowers(both, x, w, x, w, groups)
      with self.assertRaisesRegex(ValueError, 'too few across K'):
        self.lowers(
          both, *[x, abstract((8, 2048, 7168))] * 2, groups, turned=False
        )
      return
    layout, used = routing()
    pairs = [
      (reference.permute(draw(96, 168, seed=seed), layout),
       draw(4, 168, 192, seed=seed + 2))
      for seed in range(2)
    ]  # fmt: skip
    expected = sum(reference.dot(*pair, layout.groups, F32) for pair in pairs)
    self.close(reference.dots(pairs, layout.groups, F32), expected)
    pairs = [(x, w.mT) for x, w in pairs]
    with mosaic.interpreted(pads=True):  # 168 is no multiple of 32.
      actual = [
        grouped.dots(pairs, layout.groups, True, dtype, **KERNEL)
        for dtype in (F32, BF16)
      ]
    self.close(actual[0][:used], expected[:used])
    same = np.asarray(actual[1] == expected.astype(BF16))[:used]
    self.assertGreater(same.mean(), 0.99)

  def test_grouped_dot_is_interpreted_by_jax_0_10_too(self):
    groups = reference.Groups(*(
      jnp.array(v, I32) for v in ([1, 0, 1, 0], [3], [1, 0], [1, 2])
    ))  # fmt: skip
    x, w = draw(512, 128), draw(2, 128, 256, seed=1)
    actual = interpret(grouped.dot, x, w, groups)[:384]
    expected = reference.dot(x, w, groups)[:384]
    self.close(actual, expected, tolerances.BFLOAT16)

  @parameterized.product(mode=MODES, dtype=(BF16, E4M3.dtype))
  def test_rows_move(self, mode, dtype):
    if mode == 'lower':
      for T, K, E, D in ((4096, 8, 8, 7168), (8192, 6, 64, 2048)):
        layout = real_routing(T, K, E)
        R = layout.token_R.size
        self.lowers(permute.permute, abstract((T, D), dtype), layout)
        self.lowers(permute.unpermute, abstract((R, D)), layout)
      return
    layout, _ = routing()
    x = draw(96, 256).astype(dtype)
    rows = reference.permute(x, layout)
    self.close(interpret(permute.permute, x, layout), rows)
    rows = rows.astype(BF16)
    actual = interpret(permute.unpermute, rows, layout)
    self.close(actual, reference.unpermute(rows, layout))


class LayersTest(Kernels):
  """Whole layers on a Hopper are made of kernels, forward and backward."""

  def count(self, f, *args):
    return mosaic.lower(f, *args).count('custom_call @mosaic_gpu')

  def test_fp8_linear(self):
    def loss(x, w, setting):
      precision = config.PrecisionConfig(
        fp8=config.FP8Config(enabled=True), kernels=setting
      )
      return linear.linear(x, w, 'w1', precision).astype(F32).sum()

    args = abstract((4096, 7168)), abstract((7168, 2048), F32)
    for setting, expected in (
      ('auto', 7 - (not mosaic.turns_codes())),
      ('xla', 0),
    ):
      f = functools.partial(loss, setting=setting)
      grad = jax.value_and_grad(f, argnums=(0, 1))
      # Three products; quantised x and dy, and both turned.
      self.assertEqual(self.count(grad, *args), expected)

  @parameterized.product(mode=MODES)
  def test_experts(self, mode):
    def loss(f, weights, ids, x, *ws):
      return (f(x, *ws, ids, weights).astype(F32) ** 2).sum()

    def grads(f):
      return jax.grad(functools.partial(loss, f), argnums=(0, 2, 3, 4, 5))

    if mode == 'lower':
      D, F, E, T, K = 2048, 1408, 64, 4096, 6
      args = abstract((T, K), F32), abstract((T, K), I32), abstract((T, D))
      ws = [abstract(s) for s in ((E, D, F), (E, F, D), (E, D, F))]
      count = self.count(grads(experts.expert_ffn), *args, *ws)
      # Three products, five backward, of which one by w1 and w3; rows move
      # three times in, twice out.
      self.assertEqual(count, 8 + 5)
      return
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 3, (64, 2)), I32)
    weights = jnp.linspace(0.2, 1, 128).reshape(64, 2)
    x = draw(64, 128)
    ws = [draw(*s, seed=i) / 8 for i, s in enumerate(
      ((3, 128, 64), (3, 64, 128), (3, 128, 64)))]  # fmt: skip
    kernel = functools.partial(experts.expert_ffn, **KERNEL)
    with mosaic.interpreted():
      actual = grads(kernel)(weights, ids, x, *ws)
    expected = grads(experts_reference.expert_ffn)(weights, ids, x, *ws)
    self.close(actual, expected, tolerances.BFLOAT16)

  @parameterized.product(mode=MODES)
  def test_experts_of_inference(self, mode):
    """One token chooses among all experts, or many among a device's own."""
    f = functools.partial(expert_decode.expert_ffn, **KERNEL)
    if mode == 'lower':
      D, F = 7168, 2048
      for T, K, E in (1, 8, 256), (2, 8, 256), (1024, 8, 4):
        ws = [abstract(s) for s in ((E, D, F), (E, F, D), (E, D, F))]
        routed = abstract((T, K), I32), abstract((T, K), F32)
        # Three products; rows move in and out.
        self.assertEqual(self.count(f, abstract((T, D)), *ws, *routed), 5)
      return
    ids = jnp.asarray([[0, 2], [3, 1], [3, 3]], I32)  # 3 is no expert.
    ws = [draw(*s, seed=i) / 8 for i, s in enumerate(
      ((3, 128, 64), (3, 64, 128), (3, 128, 64)))]  # fmt: skip
    for T in (1, 3):
      args = draw(T, 128), *ws, ids[:T], jnp.full((T, 2), 0.3)
      with mosaic.interpreted():
        actual = f(*args)
      expected = expert_decode_reference.expert_ffn(*args)
      self.close(actual, expected, tolerances.BFLOAT16)

  def test_fp8_weights_of_inference_stay_with_the_loop(self):
    w = codes((4, 256, 256), SQUARE_TILE)
    with self.assertRaisesRegex(ValueError, 'weights are FP8'):
      expert_decode.expert_ffn(
        abstract((1, 256)), w, w, w, None, None, **KERNEL
      )

  @parameterized.product(mode=(*MODES, 'compose'))
  def test_fp8_experts(self, mode):
    small = 2.0**-40  # As gradients of a mean over V3's batch are.

    def grads(f, recipe):
      def loss(weights, ids, x, *ws):
        y = f(x, *ws, ids, weights, recipe)
        return small * (y.astype(F32) ** 2).sum()

      return jax.grad(loss, argnums=(0, 2, 3, 4, 5))

    def enlarged(tree):
      return jax.tree.map(lambda g: g / small, tree)

    kernel = functools.partial(fp8_experts.expert_ffn, **KERNEL)
    if mode == 'lower':
      D, F, E, T, K = 7168, 2048, 8, 4096, 8
      args = abstract((T, K), F32), abstract((T, K), I32), abstract((T, D))
      ws = [abstract(s, F32) for s in ((E, D, F), (E, F, D), (E, D, F))]
      recipe = fp8_recipe.Recipe(steps=fp8.steps('auto'))
      count = self.count(grads(kernel, recipe), *args, *ws)
      # Eight products, of which one by w1 and w3.  Quantised: tokens, SwiGLU's
      # inputs and output; dy, two gradients; three operands of Wgrad, and two
      # turned.  Rows move in three times, out twice.
      self.assertEqual(count, 8 + 4 + 3 + 3 + 2 * mosaic.turns_codes() + 5)
      return
    # Each block of an expert is one of 128 rows in both.
    T, E = 160, 3
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 4, (T, 2)), I32)
    weights = jnp.linspace(0.2, 1, 2 * T).reshape(T, 2)
    x = draw(T, 128).astype(F32)
    shapes = (E, 128, 256), (E, 256, 128), (E, 128, 256)
    ws = [draw(*s, seed=i).astype(F32) / 8 for i, s in enumerate(shapes)]
    recipe = fp8_recipe.Recipe()
    if mode == 'interpret':
      with mosaic.interpreted():
        actual = grads(kernel, recipe)(weights, ids, x, *ws)
    else:  # The same steps, each by its reference.
      with mock.patch.object(fp8_experts, '_KERNEL', 'xla'):
        actual = jax.jit(grads(kernel, recipe))(weights, ids, x, *ws)
    expected = jax.jit(grads(fp8_experts_reference.expert_ffn, recipe))(
      weights, ids, x, *ws
    )
    actual, expected = enlarged(actual), enlarged(expected)
    self.close(actual, expected, tolerances.FP8_REORDERED)

  @parameterized.product(
    implementation=('xla', 'mosaic_gpu'), is_fp8=(False, True)
  )
  def test_experts_add_in_float32(self, implementation, is_fp8):
    """A token's rows, and w1's and w3's parts of its gradient."""
    f, dtype = experts.expert_ffn, BF16
    if is_fp8:
      recipe = fp8_recipe.Recipe(steps=fp8.steps('xla'))
      f, dtype = functools.partial(fp8_experts.expert_ffn, recipe=recipe), F32
    args = abstract((64, 3), I32), abstract((64, 3), F32)
    ws = [abstract(s, dtype) for s in (
      (4, 128, 256), (4, 256, 128), (4, 128, 256))]  # fmt: skip

    def run(x, *args):
      y, vjp = jax.vjp(lambda x: f(x, *args, implementation=implementation), x)
      return vjp(y)

    jaxpr = jax.make_jaxpr(run)(abstract((64, 128)), *ws, *args)
    sums = [
      v.aval.dtype
      for eqn, _ in jaxprs.equations(jaxpr.jaxpr)
      if eqn.primitive.name in ('add', 'add_any')
      for v in eqn.outvars
    ]
    self.assertIn(F32, sums)
    self.assertNotIn(BF16, sums)

  def test_norms_and_swiglu_are_quantised_where_they_are_computed(self):
    """Inputs of wq_a with wkv_a, wq_b, w1 with w3, and w2, of a dense layer."""
    c = presets.deepseek_v3().model
    precision = config.PrecisionConfig(fp8=config.FP8Config(enabled=True))
    layer = block.Block(c, False, precision)
    x, ids = abstract((1, 4096, c.dim)), abstract((1, 4096), I32)
    args = x, ids, None, abstract((1, 4096), F32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), *args)

    def run(*args):
      return layer.apply(*args)[0]

    with (
      mock.patch.object(rows, '_rms_norm', wraps=rows._rms_norm) as normed,
      mock.patch.object(rows, '_rowwise', wraps=rows._rowwise) as rowwise,
    ):
      count = self.count(run, variables, *args)
    self.assertEqual(normed.call_count, 3)
    fused = [call.args[0] is rows._swiglu for call in rowwise.call_args_list]
    # Not fused: what enters wkv_b and wo; SwiGLU's inputs as they are kept.
    self.assertEqual((sum(fused), len(fused)), (1, 5))
    self.assertEqual(count, 8 + 1 + 3 + 5)

  @parameterized.parameters(False, True)
  def test_a_third_layer_brings_no_kernel(self, is_fp8):
    """JAX lowers a kernel once if its calls have it, as traced, in common."""
    c = presets.deepseek_v3().model
    precision = config.PrecisionConfig(fp8=config.FP8Config(enabled=is_fp8))
    layer = block.Block(c, True, precision)
    x, ids = abstract((1, 4096, c.dim)), abstract((1, 4096), I32)
    args = x, ids, None, abstract((1, 4096), F32)

    def calls(layers):
      def run(variables, x, *args):
        for _ in range(layers):
          x = layer.apply(variables, x, *args)[0]
        return x.astype(F32).sum()

      with mosaic.for_hopper():
        variables = jax.eval_shape(layer.init, jax.random.key(0), *args)
        jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1)))(variables, *args)
      found = jaxprs.equations(jaxpr.jaxpr)
      return [e.params for e, _ in found if e.primitive.name == 'mpmd_map']

    two, three = calls(2), calls(3)
    self.assertLess(len(two), len(three))
    kernels = [{id(call['jaxprs'][0]) for call in n} for n in (two, three)]
    self.assertEqual(*kernels)


_ASSEMBLE = """
import functools, sys
import jax
from jax.sharding import SingleDeviceSharding
from deepseek_jax.kernels import mosaic
from deepseek_jax.parallel import topology
from experiments import gpu_cases
place = SingleDeviceSharding(topology.topology('h100', 1)[0])
def abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
cases = {case.name: case for case in gpu_cases.all_cases(small=False)}
with mosaic.for_hopper():
  for name in sys.argv[1:]:
    run = functools.partial(cases[name].run, implementation='mosaic_gpu')
    operands = jax.tree.map(abstract, jax.eval_shape(cases[name].make))
    jax.jit(run).lower(*operands).compile()
"""
_FP8_GEMM = (
  'fp8_matmul 4096x7168x16384', 'fp8_matmul 4096x2112x7168',
  'fp8_matmul wgrad 4096x7168x16384', 'grouped fp8 65536x7168x2048 of 8',
  'grouped fp8 wgrad 65536x7168x2048 of 8',
  'grouped fp8 both dgrads 65536x7168x2048 of 8',
)  # fmt: skip
_OTHERS = (
  'quantize 16384x7168', 'swiglu 16384x7168', 'rms_norm 16384x7168',
  'turn bf16 16384x7168', 'grouped bf16 65536x7168x2048 of 8',
  'grouped bf16 dgrad 65536x7168x2048 of 8',
  'grouped bf16 wgrad 65536x7168x2048 of 8',
  'grouped bf16 both dgrads 65536x7168x2048 of 8',
  'permute 8192x8x7168', 'unpermute 8192x8x7168',
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('names, most', [(_FP8_GEMM, 0), (_OTHERS, 32)])
def test_kernels_are_assembled_without_spills(names, most):
  """By ptxas for sm_90a: no tile leaves the registers.

  An accumulator of 64 x 128 is 256 bytes of each thread.
  """
  reports = deviceless.assembled('-c', _ASSEMBLE, *names)
  assert len(reports) == len(names)
  for report in reports:
    assert 'sm_90a' in report
    assert 'serialized' not in report  # Of wgmma: one waits for the other.
    spilled = re.findall(r'(\d+) bytes spill stores', report)
    assert spilled and max(map(int, spilled)) <= most, report


class ReferenceTest(parameterized.TestCase):
  def test_rows_of_experts(self):
    """Each row is its token's, in a block of its expert; sums come back."""
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 6, (64, 3)), I32)
    layout = reference.lay_out(ids, 5)  # 5 is none.
    x = draw(64, 8).astype(F32)
    rows = reference.permute(x, layout)
    expert_R = np.repeat(layout.groups.expert_B, 128)
    for (t, k), row in np.ndenumerate(np.asarray(layout.row_TK)):
      if ids[t, k] == 5:
        self.assertEqual(row, rows.shape[0])
      else:
        self.assertEqual(expert_R[row], ids[t, k])
        np.testing.assert_array_equal(rows[row], x[t])
    has_token = np.asarray(layout.token_R) < 64
    self.assertEqual(has_token.sum(), (np.asarray(ids) < 5).sum())
    np.testing.assert_array_equal(rows[~has_token], 0)
    counts = (np.asarray(ids) < 5).sum(1, keepdims=True)
    tolerances.assert_close(
      reference.unpermute(rows, layout), x * counts, tolerances.FLOAT32_MATH
    )

  def test_products_are_those_of_each_expert(self):
    layout, used = routing()
    x = reference.permute(draw(96, 16), layout).astype(F32)
    w = draw(4, 16, 8, seed=1).astype(F32)
    y = np.asarray(reference.dot(x, w, layout.groups))
    expert_R = np.repeat(layout.groups.expert_B, 128)
    expected = np.einsum('RK,RKN->RN', x, np.asarray(w)[expert_R])
    tolerances.assert_close(y[:used], expected[:used], tolerances.FLOAT32_MATH)
    dw = np.zeros((4, 16, 8))
    np.add.at(dw, expert_R[:used], np.einsum('RK,RN->RKN', x, y)[:used])
    tolerances.assert_close(
      reference.outer(x, y, layout.groups), dw, tolerances.FLOAT32_MATH
    )


if __name__ == '__main__':
  absltest.main()
