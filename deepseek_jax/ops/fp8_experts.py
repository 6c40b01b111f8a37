"""The experts' feed-forward networks in FP8 (V3 sections 3.3.1 to 3.3.3).

As in `ops/experts.py` a loop takes blocks of 128 rows of one expert.  The rows
of a block are also a tile along the tokens of a weight gradient, so that no
tile mixes experts: the last block of an expert is filled up with zeros.

Tokens, and the gradients of the output, are quantised once, in the form in
which they would be sent to the experts; every copy of a token is its codes.
Between forward and backward are kept the codes of the tokens and of SwiGLU's
inputs, whose output is computed again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops import experts, fp8_delayed, fp8_matmul, quantize
from deepseek_jax.ops.experts import Permutation
from deepseek_jax.ops.formats import Format
from deepseek_jax.ops.fp8_delayed import Delayed
from deepseek_jax.ops.fp8_linear import quantize_weight
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import Quantized

BLOCK = 128


class _Rows(NamedTuple):
  """Per sorted row, with room for the last block to run over the end.

  Block i has rows from `start[i]` of one expert, which end at `end[i]`; `count`
  blocks are real.
  """

  token: jax.Array  # int32 [R + block]
  gate: jax.Array  # float32 [R + block, 1]
  expert: jax.Array
  start: jax.Array
  end: jax.Array
  count: jax.Array


def _make_rows(weights_TK: jax.Array, permutation: Permutation) -> _Rows:
  R, K = weights_TK.size, weights_TK.shape[1]
  order = jnp.pad(permutation.row_to_flat_R, (0, BLOCK))
  gate = weights_TK.reshape(-1, 1)[order].astype(jnp.float32)
  sizes_E = permutation.group_sizes_E
  E, blocks_E = sizes_E.size, -(-sizes_E // BLOCK)
  ends_E, last_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)
  index = jnp.arange(R // BLOCK + E, dtype=jnp.int32)
  expert = (index[:, None] >= last_E).sum(1, dtype=jnp.int32)
  expert = jnp.minimum(expert, E - 1)
  within = index - (last_E - blocks_E)[expert]
  start = (ends_E - sizes_E)[expert] + within * BLOCK
  return _Rows(order // K, gate, expert, start, ends_E[expert], last_E[-1])


def _inside(rows: _Rows, i: jax.Array) -> jax.Array:
  """Which rows of block i are of its expert: bool [block, 1]."""
  return (rows.start[i] + jnp.arange(BLOCK) < rows.end[i])[:, None]


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array | Quantized | Delayed,
  w2_EFD: jax.Array | Quantized | Delayed,
  w3_EDF: jax.Array | Quantized | Delayed,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  recipe: Recipe,
) -> jax.Array:
  """`experts.expert_ffn` in FP8: the same arguments and result.

  Args:
    x_TD: tokens, compute dtype.  Tokens that arrive in the form of
      `recipe.dispatch` are left as they are.
    w1_EDF: float32 master weights, as the other two, or quantised ones, or with
      delayed scales: then all rows have one, and all experts.
    w2_EFD: down projections.
    w3_EDF: up projections.
    expert_ids_TK: int32; E is no expert.
    weights_TK: float32 gate weights.
    recipe: of the three layers.  Where it says one scale per tensor, rows have
      one per block, and weights one per expert.
  """
  E = jax.tree.leaves(w1_EDF)[0].shape[0]
  permutation = experts.sort_by_expert(expert_ids_TK, E)
  return _ffn(x_TD, (w1_EDF, w2_EFD, w3_EDF), weights_TK, permutation, recipe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffn(x_TD, weights, weights_TK, permutation, recipe):
  return _fwd(x_TD, weights, weights_TK, permutation, recipe)[0]


def _fwd(x_TD, weights, weights_TK, permutation, recipe):
  rows = _make_rows(weights_TK, permutation)
  sent = checkpoint_name(recipe.dispatch.quantize(x_TD).raw, 'linear_in')
  kept = _forward(sent, weights, rows, recipe, x_TD.dtype)
  y, kept = kept[0], checkpoint_name(kept[1:], 'ffn_up')
  residuals = sent, weights, weights_TK, permutation, kept
  return experts.unpermute(y, permutation), residuals


def _bwd(recipe, residuals, dy_TD):
  sent, weights, weights_TK, permutation, (kept, found) = residuals
  rows = _make_rows(weights_TK, permutation)
  dy = recipe.dispatch_gradient.quantize(dy_TD).raw
  dx, dinputs, dweights, dfound = _input_grad(
    dy, weights, kept, rows, recipe, dy_TD.dtype
  )
  dws = (None,) * 3
  if not isinstance(weights[0], Quantized):
    dws = _weight_grad(sent, dy, kept, dinputs, rows, recipe, weights)
    dws = tuple(dw.astype(w.dtype) for dw, w in zip(dws, weights))
  if found:
    dws = _with_found(dws, weights, (_seen(sent), *found), (_seen(dy), *dfound))
  return (
    experts.unpermute(dx, permutation),
    dws,
    dweights[permutation.flat_to_row_TK, 0].astype(weights_TK.dtype),
    None,
  )


_ffn.defvjp(_fwd, _bwd)


def _with_found(dws, weights, found, dfound):
  """Delayed gradients: the amaxes of x and hidden, of dy, dgate and dup."""
  (x, hidden), (dy, dgate, dup) = found, dfound
  operands = (x, dgate), (hidden, dy), (x, dup)
  return tuple(
    Delayed(dw, jnp.stack([a, fp8_delayed.seen(w.w), b]))
    for dw, w, (a, b) in zip(dws, weights, operands)
  )


def _forward(sent, weights, rows, recipe, dtype):
  """Output rows [R + block, D], codes of SwiGLU's two inputs, amaxes seen."""
  w1, w2, w3 = (_weight(w, recipe) for w in weights)
  x_amax, hidden_amax, _ = _amaxes(weights, 0)
  dot = functools.partial(fp8_matmul.dot, accumulation=recipe.accumulation)
  operand = functools.partial(
    operand_of, tile=recipe.activation_tile, fmt=recipe.fmt, scale=recipe.scale
  )

  def body(i, carry):
    *old, found = carry
    start, e = rows.start[i], rows.expert[i]
    inside = _inside(rows, i)
    x = operand(_take(sent, rows, start), inside=inside, amax=x_amax)
    inputs = [dot(x, _at(w, e)).astype(dtype) for w in (w1, w3)]
    hidden = (_hidden(*inputs) * _cut(rows.gate, start)).astype(dtype)
    y_i = dot(operand(hidden, inside=inside, amax=hidden_amax), _at(w2, e))
    y_i = jnp.where(inside, y_i, 0)
    new = [recipe.swiglu.quantize(v).raw for v in inputs]
    new = [_put(v, w, start) for v, w in zip(old, (y_i, *new))]
    return *new, _see(found, [hidden], inside)

  R, (F, D) = rows.token.size, w2.shape[1:]
  shape = jax.ShapeDtypeStruct((R, F), dtype)
  empty = jax.eval_shape(lambda x: recipe.swiglu.quantize(x).raw, shape)
  empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty)
  found = _nothing_seen(weights, 1)
  carry = jnp.zeros((R, D), dtype), empty, empty, found
  y, *kept, found = lax.fori_loop(0, rows.count, body, carry)
  return y, tuple(kept), found


def _input_grad(sent_dy, weights, kept, rows, recipe, dtype):
  """Gradients of the rows of x, of SwiGLU's inputs, and of the gate weights.

  And the amaxes seen of SwiGLU's.
  """
  w1, w2, w3 = (_weight(w, recipe).mT for w in weights)
  gate_amax, dy_amax, up_amax = _amaxes(weights, 2)
  dot = functools.partial(fp8_matmul.dot, accumulation=recipe.accumulation)
  operand = functools.partial(
    operand_of,
    tile=recipe.gradient_tile,
    fmt=recipe.gradient_fmt,
    scale=recipe.scale,
    min_amax=quantize.GRADIENT_MIN_AMAX,
  )

  def body(i, carry):
    *old, found = carry
    start, e = rows.start[i], rows.expert[i]
    inside = _inside(rows, i)
    dy = operand(_take(sent_dy, rows, start), inside=inside, amax=dy_amax)
    dhidden = dot(dy, _at(w2, e))
    inputs = [_cut(q, start).dequantize() for q in kept]
    hidden, vjp = jax.vjp(_hidden, *inputs)
    dweight = jnp.sum(hidden * dhidden, -1, keepdims=True)
    dinputs = [v.astype(dtype) for v in vjp(dhidden * _cut(rows.gate, start))]
    codes = [
      operand(v, inside=inside, amax=amax)
      for v, amax in zip(dinputs, (gate_amax, up_amax))
    ]
    dx = dot(codes[0], _at(w1, e)) + dot(codes[1], _at(w3, e))
    new = jnp.where(inside, dx, 0), *dinputs, jnp.where(inside, dweight, 0)
    new = [_put(v, w, start) for v, w in zip(old, new)]
    return *new, _see(found, dinputs, inside)

  R, (D, F) = rows.token.size, w2.shape[1:]
  shapes = (R, D), (R, F), (R, F), (R, 1)
  dtypes = dtype, dtype, dtype, jnp.float32
  carry = [jnp.zeros(*each) for each in zip(shapes, dtypes)]
  carry = *carry, _nothing_seen(weights, 2)
  dx, *dinputs, dweights, found = lax.fori_loop(0, rows.count, body, carry)
  return dx, tuple(dinputs), dweights, found


def _weight_grad(sent, sent_dy, kept, dinputs, rows, recipe, weights):
  """float32 gradients of w1, w2 and w3, from operands in tiles along tokens.

  A loop of its own, so that a pipeline can defer it (V3 section 3.2.1).
  """
  computed, sent_x, sent_dys = (
    dict(zip(('tile', 'scale'), recipe.turned(kept)))
    for kept in (None, recipe.dispatch, recipe.dispatch_gradient)
  )
  x_amax, hidden_amax, _ = _amaxes(weights, 0)
  gate_amax, dy_amax, up_amax = _amaxes(weights, 2)
  dot = functools.partial(fp8_matmul.dot, accumulation=recipe.accumulation)

  def body(i, carry):
    start, e = rows.start[i], rows.expert[i]
    inside = _inside(rows, i)
    activation = functools.partial(operand_of, fmt=recipe.fmt, inside=inside)
    gradient = functools.partial(
      operand_of,
      fmt=recipe.gradient_fmt,
      inside=inside,
      min_amax=quantize.GRADIENT_MIN_AMAX,
    )
    x = activation(_take(sent, rows, start), amax=x_amax, **sent_x).mT
    hidden = _hidden(*(_cut(q, start).dequantize() for q in kept))
    hidden = hidden * _cut(rows.gate, start)
    hidden = hidden.astype(dinputs[0].dtype)
    hidden = activation(hidden, amax=hidden_amax, **computed).mT
    dgate, dup = (
      gradient(_cut(v, start), amax=amax, **computed)
      for v, amax in zip(dinputs, (gate_amax, up_amax))
    )
    dy = gradient(_take(sent_dy, rows, start), amax=dy_amax, **sent_dys)
    products = dot(x, dgate), dot(hidden, dy), dot(x, dup)
    return tuple(
      lax.dynamic_update_index_in_dim(dw, _at(dw, e) + product, e, 0)
      for dw, product in zip(carry, products)
    )

  carry = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
  return lax.fori_loop(0, rows.count, body, carry)


def operand_of(
  x: jax.Array | Quantized,
  tile: tuple[int, int],
  fmt: Format,
  scale: str,
  inside: jax.Array,
  amax: jax.Array | None = None,
  min_amax: float = quantize.MIN_AMAX,
) -> Quantized:
  """A block of rows in the form that a product takes; 0 where not `inside`."""
  if isinstance(x, Quantized):
    if (x.tile, x.fmt) == (tile, fmt):
      return x
    x = x.dequantize()
  x = jnp.where(inside, x, 0)
  if amax is not None:
    return fp8_delayed.quantize(x, amax, fmt, scale, min_amax)
  return quantize.quantize(x, tile, fmt, scale, min_amax=min_amax)


def _weight(w, recipe) -> Quantized:
  """All experts' operand of Fprop."""
  if isinstance(w, Delayed):
    return fp8_delayed.quantize_weight(w, recipe)
  return quantize_weight(w, recipe).raw


def _amaxes(weights, i) -> list[jax.Array | None]:
  """What delayed scaling has for an operand of each weight; None: online."""
  return [w.amax[i] if isinstance(w, Delayed) else None for w in weights]


def _nothing_seen(weights, count) -> tuple[jax.Array, ...]:
  """Amaxes before the first block; none with online scales."""
  is_delayed = isinstance(weights[0], Delayed)
  return (jnp.zeros((), jnp.float32),) * (count * is_delayed)


def _see(found, arrays, inside) -> tuple[jax.Array, ...]:
  """`found`, and a block's."""
  return tuple(
    jnp.maximum(amax, fp8_delayed.seen(jnp.where(inside, x, 0)))
    for amax, x in zip(found, arrays)
  )


def _seen(sent) -> jax.Array:
  """The amax of what was sent."""
  return fp8_delayed.seen(sent.dequantize())


def _hidden(gate_F, up_F):
  """SwiGLU in float32, of one block."""
  return jax.nn.silu(gate_F.astype(jnp.float32)) * up_F.astype(jnp.float32)


def _take(q: Quantized, rows: _Rows, start: jax.Array) -> Quantized:
  """The codes of one block's tokens."""
  token = _cut(rows.token, start)
  return jax.tree.map(lambda v: v[token], q)


def _cut(x: Any, start: jax.Array) -> Any:
  """One block of rows."""
  return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, BLOCK), x)


def _put(x: Any, block: Any, start: jax.Array) -> Any:
  """Writes a block; what lies beyond its expert's rows comes later."""
  return jax.tree.map(
    lambda v, b: lax.dynamic_update_slice_in_dim(
      v, b.astype(v.dtype), start, 0
    ),
    x,
    block,
  )


def _at(w_E: Any, expert: jax.Array) -> Any:
  """The weight of one expert."""
  return jax.tree.map(
    lambda v: lax.dynamic_index_in_dim(v, expert, keepdims=False), w_E
  )
