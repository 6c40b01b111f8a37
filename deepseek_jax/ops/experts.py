"""The experts' feed-forward networks, dropless (V3 section 2.1.2).

Tokens are sorted by expert; a loop takes blocks of rows of one expert through
its SwiGLU; each token sums its K rows.  The trip count of the loop follows the
routing, so that nothing is padded to a capacity and nothing dropped.
(`lax.ragged_dot` computes every row with every matrix on CPU, and on GPU by
default.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Rows of one block; measured best on CPU for 64 to 128 (PLATFORM.md, 2).
_BLOCK = 128

_matmul = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
_NN = (((1,), (0,)), ((), ()))  # x @ w
_NT = (((1,), (1,)), ((), ()))  # x @ w^T
_TN = (((0,), (0,)), ((), ()))  # x^T @ w


class Permutation(NamedTuple):
  """Where each routed row goes; R = T * K rows, sorted by expert.

  Attributes:
    row_to_flat_R: flat (token, choice) index of each sorted row, int32.
    flat_to_row_TK: its inverse, as [T, K], int32.
    group_sizes_E: rows of each expert, int32.
  """

  row_to_flat_R: jax.Array
  flat_to_row_TK: jax.Array
  group_sizes_E: jax.Array


def sort_by_expert(expert_ids_TK: jax.Array, n_experts: int) -> Permutation:
  """The stable permutation that groups (token, choice) pairs by expert.

  Pairs of no expert, id `n_experts`, are the last, outside of all groups.
  """
  flat = expert_ids_TK.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  rows = jnp.arange(flat.size, dtype=jnp.int32)
  inverse = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
  sizes = (flat[:, None] == jnp.arange(n_experts)).sum(0, dtype=jnp.int32)
  inverse = inverse.reshape(expert_ids_TK.shape)
  return jax.tree.map(
    lambda x: checkpoint_name(x, 'routing'), Permutation(order, inverse, sizes)
  )


def unpermute(rows_RD: jax.Array, permutation: Permutation) -> jax.Array:
  """Sums the K rows of each token, gathering rather than scattering: [T, D]."""
  K = permutation.flat_to_row_TK.shape[1]
  picked = (rows_RD[permutation.flat_to_row_TK[:, k]] for k in range(K))
  return functools.reduce(jnp.add, picked)


class _Blocks(NamedTuple):
  """Blocks of `_BLOCK` rows within one group; `count` of them are real."""

  expert: jax.Array
  start: jax.Array
  end: jax.Array
  count: jax.Array


def _make_blocks(group_sizes_E: jax.Array, n_rows: int) -> _Blocks:
  E = group_sizes_E.shape[0]
  blocks_E = -(-group_sizes_E // _BLOCK)
  last_E = jnp.cumsum(blocks_E)
  index = jnp.arange(n_rows // _BLOCK + E, dtype=jnp.int32)
  expert = (index[:, None] >= last_E).sum(1, dtype=jnp.int32)
  expert = jnp.minimum(expert, E - 1)
  ends_E = jnp.cumsum(group_sizes_E)
  within = index - (last_E - blocks_E)[expert]
  start = (ends_E - group_sizes_E)[expert] + within * _BLOCK
  return _Blocks(expert, start, ends_E[expert], last_E[-1])


class _Rows(NamedTuple):
  """Per sorted row, with room for the last block to run over the end."""

  token: jax.Array  # int32 [R + block]
  gate: jax.Array  # float32 [R + block, 1]
  blocks: _Blocks


def _make_rows(weights_TK: jax.Array, permutation: Permutation) -> _Rows:
  K = weights_TK.shape[1]
  order = jnp.pad(permutation.row_to_flat_R, (0, _BLOCK))
  gate = weights_TK.reshape(-1, 1)[order].astype(jnp.float32)
  blocks = _make_blocks(permutation.group_sizes_E, order.size - _BLOCK)
  return _Rows(order // K, gate, blocks)


def _block(x: jax.Array, start: jax.Array) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, start, _BLOCK)


def _inside(blocks: _Blocks, i: jax.Array) -> jax.Array:
  """Which rows of block i are of its expert: bool [block, 1]."""
  row = blocks.start[i] + jnp.arange(_BLOCK)
  return (row < blocks.end[i])[:, None]


def _put(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
  # Rows beyond the group's end are overwritten by the next group's block; those
  # behind the last group are of no expert.
  return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, 0)


def _own(w_E: jax.Array, expert: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(w_E, expert, keepdims=False)


def _buffer(rows: _Rows, width: int, dtype) -> jax.Array:
  return jnp.zeros((rows.token.size, width), dtype)


def _hidden(gate_F, up_F):
  """SwiGLU in float32, of one block."""
  return jax.nn.silu(gate_F.astype(jnp.float32)) * up_F.astype(jnp.float32)


def _forward(x_TD, w1, w2, w3, rows):
  """Output rows [R + block, D], and the inputs of SwiGLU, [R + block, F]."""

  def body(i, carry):
    y, gates, ups = carry
    start, e = rows.blocks.start[i], rows.blocks.expert[i]
    x = x_TD[_block(rows.token, start)]
    gate = _matmul(x, _own(w1, e), _NN).astype(x.dtype)
    up = _matmul(x, _own(w3, e), _NN).astype(x.dtype)
    hidden = _hidden(gate, up) * _block(rows.gate, start)
    y_i = _matmul(hidden.astype(x.dtype), _own(w2, e), _NN)
    y_i = jnp.where(_inside(rows.blocks, i), y_i, 0)
    return _put(y, y_i, start), _put(gates, gate, start), _put(ups, up, start)

  dtype, F = x_TD.dtype, w1.shape[2]
  carry = (
    _buffer(rows, x_TD.shape[1], dtype),
    _buffer(rows, F, dtype),
    _buffer(rows, F, dtype),
  )
  return lax.fori_loop(0, rows.blocks.count, body, carry)


def _input_grad(dy_TD, w1, w2, w3, gates, ups, rows):
  """Gradients of the rows of x, of SwiGLU's inputs, and of the gate weights."""

  def body(i, carry):
    dx, dgates, dups, dweights = carry
    start, e = rows.blocks.start[i], rows.blocks.expert[i]
    dy = dy_TD[_block(rows.token, start)]
    dhidden = _matmul(dy, _own(w2, e), _NT)
    hidden, vjp = jax.vjp(_hidden, _block(gates, start), _block(ups, start))
    dweight = jnp.sum(hidden * dhidden, -1, keepdims=True)
    dgate, dup = vjp(dhidden * _block(rows.gate, start))
    dx_i = _matmul(dgate, _own(w1, e), _NT) + _matmul(dup, _own(w3, e), _NT)
    inside = _inside(rows.blocks, i)
    dx_i, dweight = (jnp.where(inside, v, 0) for v in (dx_i, dweight))
    return (
      _put(dx, dx_i, start),
      _put(dgates, dgate, start),
      _put(dups, dup, start),
      _put(dweights, dweight, start),
    )

  carry = (
    _buffer(rows, dy_TD.shape[1], dy_TD.dtype),
    jnp.zeros_like(gates),
    jnp.zeros_like(ups),
    _buffer(rows, 1, jnp.float32),
  )
  return lax.fori_loop(0, rows.blocks.count, body, carry)


def _weight_grad(x_TD, dy_TD, gates, ups, dgates, dups, rows, n_experts):
  """float32 gradients of w1, w2 and w3.

  A loop of its own, so that a pipeline can defer it (V3 section 3.2.1).
  """

  def body(i, carry):
    start, e = rows.blocks.start[i], rows.blocks.expert[i]
    inside = _inside(rows.blocks, i)
    token = _block(rows.token, start)
    x = jnp.where(inside, x_TD[token], 0)
    hidden = _hidden(_block(gates, start), _block(ups, start))
    hidden = jnp.where(inside, hidden * _block(rows.gate, start), 0)
    products = (
      _matmul(x, _block(dgates, start), _TN),
      _matmul(hidden.astype(x.dtype), dy_TD[token], _TN),
      _matmul(x, _block(dups, start), _TN),
    )
    return tuple(
      lax.dynamic_update_index_in_dim(dw, _own(dw, e) + product, e, 0)
      for dw, product in zip(carry, products)
    )

  D, F = x_TD.shape[1], gates.shape[1]
  up, down = (n_experts, D, F), (n_experts, F, D)
  carry = tuple(jnp.zeros(shape, jnp.float32) for shape in (up, down, up))
  return lax.fori_loop(0, rows.blocks.count, body, carry)


@jax.custom_vjp
def _ffn(x_TD, w1, w2, w3, weights_TK, permutation):
  return _ffn_fwd(x_TD, w1, w2, w3, weights_TK, permutation)[0]


def _ffn_fwd(x_TD, w1, w2, w3, weights_TK, permutation):
  rows = _make_rows(weights_TK, permutation)
  y, gates, ups = _forward(x_TD, w1, w2, w3, rows)
  gates = checkpoint_name(gates, 'ffn_up')
  ups = checkpoint_name(ups, 'ffn_up')
  residuals = (x_TD, w1, w2, w3, weights_TK, permutation, gates, ups)
  return unpermute(y, permutation), residuals


def _ffn_bwd(residuals, dy_TD):
  x_TD, w1, w2, w3, weights_TK, permutation, gates, ups = residuals
  rows = _make_rows(weights_TK, permutation)
  dx, dgates, dups, dweights = _input_grad(dy_TD, w1, w2, w3, gates, ups, rows)
  dw1, dw2, dw3 = _weight_grad(
    x_TD, dy_TD, gates, ups, dgates, dups, rows, w1.shape[0]
  )
  return (
    unpermute(dx, permutation),
    dw1.astype(w1.dtype),
    dw2.astype(w2.dtype),
    dw3.astype(w3.dtype),
    dweights[permutation.flat_to_row_TK, 0].astype(weights_TK.dtype),
    None,
  )


_ffn.defvjp(_ffn_fwd, _ffn_bwd)


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array,
  w2_EFD: jax.Array,
  w3_EDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
) -> jax.Array:
  """`sum_k g_k W2 (silu(W1 x) * W3 x)` over each token's experts: [T, D].

  The gate weight multiplies the hidden activation, not the output: the same by
  linearity, and its gradient then needs no output rows.  DeepSeek's own kernels
  fuse it there too (FACTS 4.4).  Matmuls accumulate in float32 and store in the
  dtype of `x_TD`; kept for the backward pass are SwiGLU's two inputs.

  Args:
    x_TD: tokens, compute dtype.
    w1_EDF: as the other two matrices, in the same dtype.
    w2_EFD: down projections.
    w3_EDF: up projections.
    expert_ids_TK: int32; E is no expert: it adds nothing, and its gate weight
      gets no gradient.
    weights_TK: float32 gate weights.
  """
  permutation = sort_by_expert(expert_ids_TK, w1_EDF.shape[0])
  return _ffn(x_TD, w1_EDF, w2_EFD, w3_EDF, weights_TK, permutation)
