"""A whole model in FP8: what is quantised, and what must not change it."""

import dataclasses
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.convert import fp8, names
from deepseek_jax.layers.block import Block
from deepseek_jax.models import deepseek
from deepseek_jax.ops import quantize
from deepseek_jax.parallel import expert
from deepseek_jax.training import step
from tests import jaxprs, tolerances
from tests.drawn import draw
from tests.invariance_test import HYPER, _run, make_config


def _small(**changes):
  return make_config(model__n_layers=3, model__n_mtp_layers=0, **changes)


def _fp8(**changes):
  return _small(precision__fp8__enabled=True, **changes)


def _batch():
  """Rows of 128 inputs: tiles along the tokens end where rows do."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(512, size=(2, 129)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[1, 40:] = 2
  segments[1, 120:] = 0
  return {'tokens': tokens, 'segments': segments}


@functools.cache
def _baseline():
  return _run(_fp8(), _batch())


def _assert_same(actual, expected):
  for a, e, name in zip(actual, expected, ('losses', 'gradients', 'biases')):
    tolerances.assert_close(a, e, tolerances.FP8_REORDERED, name)


def _apart(results):
  """(results but for some gradients, these).

  They are the routed experts', and what lies before all of them.
  """
  report, grads, biases = results
  ffn = dict(grads['moe_layers']['ffn'])
  apart = {name: ffn.pop(name) for name in ('w1', 'w2', 'w3')}
  rest = {**grads, 'moe_layers': {**grads['moe_layers'], 'ffn': ffn}}
  apart |= {name: rest.pop(name) for name in ('embed', 'dense_layers')}
  return (report, rest, biases), apart


@pytest.mark.slow
class InvarianceTest(parameterized.TestCase):
  def test_differs_from_the_plain_model(self):
    plain = _run(_small(), _batch())
    difference = abs(plain[0]['loss'] - _baseline()[0]['loss'])
    self.assertBetween(difference / plain[0]['loss'], 1e-5, 1e-2)
    for path, grad in jax.tree_util.tree_leaves_with_path(_baseline()[1]):
      self.assertGreater(np.abs(grad).max(), 0, path)

  @parameterized.parameters(
    ('none', False), ('full', True), ('alternate', True), ('selective', True)
  )
  def test_recomputation_and_scan(self, remat, scan):
    config = _fp8(train__remat=remat, train__scan_layers=scan)
    _assert_same(_run(config, _batch()), _baseline())

  def test_accumulation(self):
    """All but Wgrad of experts, whose rows begin a tile in each micro-batch.

    Products of fewer rows are summed in another order on some CPUs (an Intel
    Xeon), and codes of gradients fall on the other side of a tie: 2 % of the
    embedding's largest, 0.6 % of the dense layer's, and nothing behind it.
    """
    config = _fp8(train__micro_batch_size=1)
    actual, apart = _apart(_run(config, _batch()))
    expected, expected_apart = _apart(_baseline())
    _assert_same(actual, expected)
    tolerances.assert_close(apart, expected_apart, tolerances.FP8_TILES)


@pytest.mark.slow
class LargeBatchTest(parameterized.TestCase):
  def test_gradients_of_v3s_batch(self):
    """A mean over 2^18 times the tokens: gradients 2^-18 as large, no bit else.

    As all that is rounded is rounded by its leading bits.
    """
    config = make_config(
      model__n_layers=2,
      model__n_mtp_layers=0,
      precision__fp8__enabled=True,
      precision__compute_dtype='bfloat16',
    )
    model, hyper = step.build_model(config), HYPER._replace(alpha=0.0)
    params, state = jax.tree.map(jnp.asarray, draw(config.model, None))

    @jax.jit
    def gradient(tokens):
      def loss(params):
        totals = step.Totals(tokens, jnp.float32(2))
        args = params, state, _batch(), hyper, totals
        return step.pretrain_loss(model, config, *args)[0]

      return jax.grad(loss)(params)

    expected, actual = gradient(240.0), gradient(62_914_560.0)
    for path, grad in jax.tree_util.tree_leaves_with_path(expected):
      self.assertGreater(jnp.abs(grad).max(), 0, path)
    enlarged = jax.tree.map(lambda g: g * 2.0**18, actual)
    tolerances.assert_close(enlarged, expected, tolerances.FLOAT32_MATH)


_FP8 = config_lib.FP8Config(enabled=True)


def _leaf(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def _round(tensor, array):
  """One released matrix to FP8 and back, as conversion does it."""
  matrix = tensor.from_jax(array)
  scales = fp8.block_scales(matrix, power_of_two=True)
  codes = fp8.quantise(matrix, scales)
  return tensor.to_jax(fp8.dequantise(codes, scales, np.float32))


def _float32_products(jaxpr):
  """(shapes of operands and result, precision) in a jaxpr and all within."""
  found = []
  for eqn, _ in jaxprs.equations(jaxpr):
    arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name == 'dot_general' and all(
      a.dtype == jnp.float32 for a in arrays
    ):
      found.append(({a.shape for a in arrays}, eqn.params['precision']))
  return found


def _with_names(jaxpr):
  """Name -> dtypes of the arrays that carry it, in a jaxpr and all within."""
  found = {}
  for eqn, _ in jaxprs.equations(jaxpr):
    if eqn.primitive.name == 'name':
      dtypes = found.setdefault(eqn.params['name'], set())
      dtypes.add(eqn.outvars[0].aval.dtype.name)
  return found


class MapTest(parameterized.TestCase):
  """Which tensors are FP8: FACTS 3.1, and the released checkpoint."""

  def test_weights_are_those_of_the_released_checkpoint_and_their_blocks(self):
    """Rounding an FP8 weight by conversion's rule changes no bit of a logit.

    Scales are powers of two here: only then is rounding twice the same as once.
    Rounding any other parameter does change them.
    """
    config = dataclasses.replace(
      presets.tiny().model, dim=136, n_heads=5, inter_dim=130
    )
    params, state = jax.tree.map(np.array, draw(config, None))
    precision = config_lib.PrecisionConfig(
      'float32', fp8=dataclasses.replace(_FP8, scale='ceil')
    )
    model = deepseek.Transformer(config, precision)
    tokens = np.arange(24).reshape(2, 12)

    @jax.jit
    def heads(params):
      variables = {'params': params, 'router_state': state}
      output = model.apply(variables, tokens)
      hidden = output.hidden_BTD
      logits = model.apply(variables, hidden, method='unembed')
      return logits, output.mtp_hidden

    before = heads(params)
    table = [t for t in names.tensors(config) if t.leaf[:1] == ('params',)]
    linear = {t.leaf for t in table if t.is_linear}
    for tensor in table:
      leaf = _leaf(params, tensor.leaf[1:])
      if tensor.is_linear:
        array = np.array(leaf[tensor.index])
        leaf[tensor.index] = _round(tensor, array)
        self.assertGreater(np.abs(leaf[tensor.index] - array).max(), 0)
    jax.tree.map(np.testing.assert_array_equal, heads(params), before)
    others, rng = {t.leaf for t in table} - linear, np.random.default_rng(0)
    self.assertEqual(
      {leaf[-1] for leaf in others},
      {'embed', 'head', 'gate', 'eh_proj', 'enorm', 'hnorm'}
      | {'attn_norm', 'ffn_norm', 'q_norm', 'kv_norm', 'norm'},
    )
    for leaf in others:
      array = _leaf(params, leaf[1:])
      kept = array.copy()
      array *= 1 + 0.03 * rng.standard_normal(array.shape).astype('f4')
      after = jax.tree.leaves(heads(params))
      same = zip(after, jax.tree.leaves(before))
      self.assertFalse(all((a == b).all() for a, b in same), leaf)
      array[...] = kept

  @parameterized.parameters('attention', 'dense', 'experts')
  def test_a_module_alone(self, module):
    """Rounding its weights beforehand changes no bit, of others it does."""
    config = dataclasses.replace(presets.tiny().model, dim=136, inter_dim=130)
    others = set(_MODULES) - {module}
    fp8 = dataclasses.replace(
      _FP8, scale='ceil', **dict.fromkeys(others, False)
    )
    precision = config_lib.PrecisionConfig('float32', fp8=fp8)
    dense, moe = (Block(config, is_moe, precision) for is_moe in (False, True))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 136)), 'f4')
    args = jnp.zeros((1, 8), jnp.int32), None, jnp.ones((1, 8))
    # Alone, the residual stream hides what is lost of so small weights.
    variables = jax.jit(
      lambda key: [
        jax.tree.map(lambda v: 8 * v, nn.unbox(b.init(key, x, *args)))
        for b in (dense, moe)
      ]
    )(jax.random.key(0))

    @jax.jit
    def run(variables):
      return [b.apply(v, x, *args)[0] for b, v in zip((dense, moe), variables)]

    before = run(variables)
    rounded = jax.jit(_with_rounded, static_argnums=1)
    for name in _MODULES:
      after = run(rounded(variables, name))
      same = all((a == b).all() for a, b in zip(after, before))
      self.assertEqual(same, name == module, name)

  def test_what_is_kept(self):
    """Names and number formats of what may be kept for the backward pass."""
    config = dataclasses.replace(presets.tiny().model, n_dense_layers=0)
    block = Block(config, True, config_lib.PrecisionConfig(fp8=_FP8))
    x = jnp.zeros((1, 8, config.dim), jnp.bfloat16)
    ids, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8))
    variables = jax.eval_shape(
      block.init, jax.random.key(0), x, ids, None, mask
    )

    def loss(variables, x):
      return block.apply(variables, x, ids, None, mask)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(variables, x).jaxpr
    found = _with_names(jaxpr)
    bf16, e4m3, scale = 'bfloat16', 'float8_e4m3fn', 'float32'
    expected = dict.fromkeys(('wq_a', 'wq_b', 'wkv_a', 'wkv_b', 'wo'), {bf16})
    expected |= dict.fromkeys(('w1', 'w2', 'w3'), {bf16})
    expected |= {
      'linear_in': {e4m3, 'uint8', scale},  # Those of experts as integers.
      'ffn_up': {e4m3, 'uint8', scale},
      'attn_out': {'uint8', scale},  # E5M6, two in three bytes.
      'attn_lse': {'float32'},
      'routing': {'float32', 'int32'},
    }
    self.assertEqual(found, expected)

  @parameterized.parameters(True, False)
  def test_float32_products_are_of_float32(self, enabled):
    """The gate's three, and those of FP8: the default is TF32 on a Hopper."""
    fp8_config = dataclasses.replace(_FP8, enabled=enabled)
    config = dataclasses.replace(presets.tiny().model, n_dense_layers=0)
    block = Block(config, True, config_lib.PrecisionConfig(fp8=fp8_config))
    x = jnp.zeros((1, 8, config.dim), jnp.bfloat16)
    ids, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8))
    variables = nn.unbox(
      jax.eval_shape(block.init, jax.random.key(0), x, ids, None, mask)
    )

    def loss(variables, x):
      y, stats = block.apply(variables, x, ids, None, mask)
      return y.sum().astype('f4') + stats.balance_loss

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x).jaxpr
    found = _float32_products(jaxpr)
    if not enabled:
      self.assertLen(found, 3)
    for shapes, precision in found:
      highest = (jax.lax.Precision.HIGHEST,) * 2
      self.assertEqual(precision, highest, shapes)

  @parameterized.parameters(
    ('fmt', 'e5m2'),
    ('gradient_fmt', 'e5m2'),
    ('attn_out_fmt', 'e4m3'),
    ('swiglu_fmt', 'e5m6'),
    ('dispatch_fmt', 'e8m7'),
    ('scale', 'ceil'),
    ('turned_scale', 'floor'),
    ('activation_tile', '128x128'),
    ('weight_tile', 'tensor'),
    ('gradient_tile', '128x128'),
    ('accumulate', 'hopper14'),
    ('promote', 64),
    ('attention', False),
    ('dense', False),
    ('experts', False),
  )
  def test_every_flag_reaches_the_program(self, name, value):
    self.assertNotEqual(_program(**{name: value}), _program())

  @parameterized.parameters('fmt', 'gradient_fmt')
  def test_operands_that_hopper14_does_not_take(self, name):
    how = {name: 'e5m6', 'accumulate': 'hopper14'}
    with self.assertRaisesRegex(ValueError, f"{name}='e5m6': .*hopper14"):
      config_lib.FP8Config(**how)

  @parameterized.parameters(True, False)
  def test_experts_decide_what_is_sent_to_them(self, enabled):
    """In BF16 if they are, though all else is in FP8."""
    sent = mock.patch.object(expert, 'routed_ffn', wraps=expert.routed_ffn)
    with sent as routed:
      loss, args = _layer(experts=enabled)
      jax.eval_shape(loss, *args)
    exchange = routed.call_args.args[-1]
    for kept in (exchange.kept, exchange.kept_gradient):
      self.assertEqual(kept is not None, enabled)


def _keys(path):
  return [entry.key for entry in path if hasattr(entry, 'key')]


# Module -> whether a weight, by its path in a block's variables, is one of it.
_MODULES = {
  'attention': lambda path: 'attn' in _keys(path) and _keys(path)[-1][0] == 'w',
  'dense': lambda path: (
    _keys(path)[-1] in ('w1', 'w2', 'w3')
    and ('shared' in _keys(path) or path[0].idx == 0)
  ),
  'experts': lambda path: (
    _keys(path)[-2:] in [['ffn', w] for w in ('w1', 'w2', 'w3')]
    and path[0].idx == 1
  ),
}


def _rounded(w, path):
  """A weight in FP8 and back, as a layer quantises it."""
  if _keys(path)[-1] == 'wo':
    matrix = w.reshape(-1, w.shape[-1])
  elif 'attn' in _keys(path):
    matrix = w.reshape(w.shape[0], -1)
  else:
    matrix = w
  q = quantize.quantize(matrix, quantize.SQUARE_TILE, scale='ceil')
  return q.dequantize().reshape(w.shape)


def _with_rounded(variables, module):
  has = _MODULES[module]
  return jax.tree_util.tree_map_with_path(
    lambda path, w: _rounded(w, path) if has(path) else w, variables
  )


def _layer(**changes):
  """A function of a layer in FP8, and its abstract arguments."""
  config = dataclasses.replace(presets.tiny().model, dim=256, inter_dim=256)
  fp8_config = dataclasses.replace(_FP8, **changes)
  block = Block(config, True, config_lib.PrecisionConfig(fp8=fp8_config))
  x = jnp.zeros((1, 256, config.dim))
  ids, mask = jnp.zeros((1, 256), jnp.int32), jnp.ones((1, 256))
  variables = jax.eval_shape(block.init, jax.random.key(0), x, ids, None, mask)

  def loss(variables, x):
    return block.apply(variables, x, ids, None, mask)[0].sum()

  return loss, (variables, x)


@functools.cache
def _program(**changes):
  """The text of a layer and its gradient."""
  loss, args = _layer(**changes)
  return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args))
