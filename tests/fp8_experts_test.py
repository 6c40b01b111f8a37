"""Experts in FP8 against float64 products, expert by expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax.ops import experts, formats, fp8_experts, quantize
from deepseek_jax.ops.fp8_matmul import Accumulation
from deepseek_jax.ops.fp8_recipe import Kept, Recipe
from tests import tolerances

_D, _F = 130, 70  # Ragged tiles.
# Rows of each expert, and of none, which is the last.
_SIZES = ((5, 0, 130, 9), (0, 128, 3, 0), (300, 0, 1, 20))
_RECIPES = {
  'v3': Recipe(),
  'mixed': Recipe(
    fmt=formats.Format(3, 4),
    gradient_fmt=formats.E5M2,
    scale='ceil',
    swiglu=Kept(formats.E5M6),
  ),
  'blocks': Recipe(gradient_tile=quantize.SQUARE_TILE),
  'tensor': Recipe(
    activation_tile=quantize.WHOLE,
    gradient_tile=quantize.WHOLE,
    weight_tile=quantize.WHOLE,
    accumulation=Accumulation(promote=0),
  ),
}


def _draw(sizes):
  """x, w1, w2, w3, ids, weights, dy; K = 2, its pairs in random order."""
  rng = np.random.default_rng(sum(sizes))
  ids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
  ids = ids[: len(ids) // 2 * 2].reshape(-1, 2).astype(np.int32)
  T, E = len(ids), len(sizes) - 1
  shapes = (T, _D), (E, _D, _F), (E, _F, _D), (E, _D, _F), (T, _D)
  x, w1, w2, w3, dy = (rng.standard_normal(s).astype('f4') for s in shapes)
  weights = rng.uniform(0.1, 1, ids.shape).astype('f4')
  return x, 0.1 * w1, 0.1 * w2, 0.1 * w3, ids, weights, dy


@functools.partial(jax.jit, static_argnums=0)
def _actual(recipe, x, w1, w2, w3, ids, weights, dy):
  def ffn(x, w1, w2, w3, weights):
    return fp8_experts.expert_ffn(x, w1, w2, w3, ids, weights, recipe)

  y, vjp = jax.vjp(ffn, x, w1, w2, w3, weights)
  return y, *vjp(dy)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(x, tile, fmt, scale):
  return quantize.quantize(x, tile, fmt, scale).dequantize()


def _expected(recipe, x, w1, w2, w3, ids, weights, dy):
  """The equations; blocks of 128 rows of each expert, in order of tokens."""
  r, T = recipe, len(ids)
  turned = (
    quantize.WHOLE
    if r.gradient_tile == quantize.WHOLE
    else quantize.COLUMN_TILE
  )
  double = functools.partial(np.asarray, dtype=np.float64)

  def send(v, fmt):
    return double(_rounded(v, quantize.ROW_TILE, fmt, r.dispatch.scale))

  # What was sent has powers of two, and is turned to such: FACTS 3.2.
  sent_scale = r.scale if turned == quantize.WHOLE else r.dispatch.scale

  def operand(v, tile, fmt, is_sent=False, scale=r.scale):
    if is_sent and tile == quantize.ROW_TILE and fmt == r.dispatch.fmt:
      return v
    if is_sent and tile == quantize.ROW_TILE and fmt == r.gradient_fmt:
      return v
    return double(_rounded(v.astype('f4'), tile, fmt, scale))

  def swiglu(gate, up):
    gate, up = gate.astype('f4'), up.astype('f4')
    return double(jax.nn.silu(gate) * up)

  results = [np.zeros(v.shape) for v in (x, x, w1, w2, w3, weights)]
  y, dx, *dws, dweights = results
  x_sent, dy_sent = send(x, r.dispatch.fmt), send(dy, r.gradient_fmt)
  for e in range(len(w1)):
    u1, u2, u3 = (
      double(_rounded(w[e], r.weight_tile, r.fmt, r.scale))
      for w in (w1, w2, w3)
    )
    pairs = np.argwhere(ids == e)
    for t, k in (pairs[i : i + 128].T for i in range(0, len(pairs), 128)):
      g = weights[t, k][:, None]
      rows = operand(x_sent[t], r.activation_tile, r.fmt, True)
      gate, up = rows @ u1, rows @ u3
      hidden = operand(swiglu(gate, up) * g, r.activation_tile, r.fmt)
      np.add.at(y, t, hidden @ u2)
      drows = operand(dy_sent[t], r.gradient_tile, r.gradient_fmt, True)
      dhidden = drows @ u2.T
      gate, up = (
        double(_rounded(v.astype('f4'), (1, 128), r.swiglu.fmt, r.swiglu.scale))
        for v in (gate, up)
      )
      hidden = swiglu(gate, up)
      dweights[t, k] = (hidden * dhidden).sum(1)
      sigmoid = 1 / (1 + np.exp(-gate))
      dgate = dhidden * g * up * sigmoid * (1 + gate * (1 - sigmoid))
      dup = dhidden * g * gate * sigmoid
      ops = [operand(v, r.gradient_tile, r.gradient_fmt) for v in (dgate, dup)]
      np.add.at(dx, t, ops[0] @ u1.T + ops[1] @ u3.T)
      a = operand(x_sent[t], turned, r.fmt, scale=sent_scale)
      drows = operand(dy_sent[t], turned, r.gradient_fmt, scale=sent_scale)
      h = operand(hidden * g, turned, r.fmt)
      dgate, dup = (operand(v, turned, r.gradient_fmt) for v in (dgate, dup))
      dws[0][e] += a.T @ dgate
      dws[1][e] += h.T @ drows
      dws[2][e] += a.T @ dup
  assert T
  return results


class ExpertFfnTest(parameterized.TestCase):
  @parameterized.product(name=list(_RECIPES), sizes=_SIZES)
  def test_equals_float64_products_of_its_operands(self, name, sizes):
    arguments = _draw(sizes)
    actual = _actual(_RECIPES[name], *arguments)
    expected = _expected(_RECIPES[name], *arguments)
    names = 'y', 'dx', 'dw1', 'dw2', 'dw3', 'dweights'
    for a, e, what in zip(actual, expected, names):
      tolerances.assert_close(a, e, tolerances.FP8_REORDERED, what)
      # No code but a few on the other side of a tie.
      error = np.abs(a - e).reshape(-1)
      limit = tolerances.COMPONENT_PARITY * np.abs(e).max(initial=1e-8)
      self.assertLess(np.mean(error > limit), 0.05, what)

  @parameterized.parameters(*_RECIPES)
  def test_gradients_of_a_mean_over_a_large_batch(self, name):
    """V3's has 62.9M tokens: the same gradients, 2^-37 as large."""
    *arguments, dy = _draw(_SIZES[0])
    _, *expected = _actual(_RECIPES[name], *arguments, dy)
    _, *actual = _actual(_RECIPES[name], *arguments, dy * np.float32(2.0**-37))
    for a, e in zip(actual, expected):
      np.testing.assert_array_equal(a * 2.0**37, e)

  def test_is_near_the_plain_experts(self):
    x, w1, w2, w3, ids, weights, dy = _draw((200, 3, 90, 0))
    y, *grads = _actual(_RECIPES['v3'], x, w1, w2, w3, ids, weights, dy)
    plain, vjp = jax.vjp(
      lambda x, w1, w2, w3, g: experts.expert_ffn(x, w1, w2, w3, ids, g),
      *map(jnp.asarray, (x, w1, w2, w3, weights)),
    )
    for a, b in zip((y, *grads), (plain, *vjp(jnp.asarray(dy)))):
      self.assertLess(np.linalg.norm(a - b), 0.1 * np.linalg.norm(b))

  def test_tokens_as_they_are_sent_are_not_rounded_again(self):
    """What arrives from another device, in bfloat16, gives the same codes."""
    recipe = _RECIPES['v3']
    x, *rest, _ = _draw((40, 30, 50, 0))
    sent = recipe.dispatch.quantize(jnp.asarray(x)).dequantize(jnp.bfloat16)
    again = recipe.dispatch.quantize(sent).dequantize(jnp.bfloat16)
    np.testing.assert_array_equal(sent, again)
    ffn = jax.jit(fp8_experts.expert_ffn, static_argnums=6)
    direct = ffn(jnp.asarray(x), *rest, recipe)
    arrived = ffn(sent.astype(jnp.float32), *rest, recipe)
    np.testing.assert_array_equal(direct, arrived)

  def test_only_codes_are_kept(self):
    """Codes of the tokens and of SwiGLU's inputs, with their scales."""
    x, w1, w2, w3, ids, weights, _ = _draw((40, 30, 50, 0))
    (T, K), recipe = ids.shape, _RECIPES['v3']
    _, vjp = jax.vjp(
      lambda x, g: fp8_experts.expert_ffn(x, w1, w2, w3, ids, g, recipe),
      jnp.asarray(x),
      jnp.asarray(weights),
    )
    kept = [a for a in jax.tree.leaves(vjp) if a.ndim == 2]
    rows = T * K + fp8_experts.BLOCK
    codes = T * (_D + 2 * 4) + 2 * rows * (_F + 4)
    routing = 2 * 4 * T * K  # Gate weights, and the inverse permutation.
    self.assertEqual(sum(a.nbytes for a in kept), codes + routing)
