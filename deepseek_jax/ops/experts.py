"""The experts' feed-forward networks, dropless (V3 section 2.1.2).

Tokens are sorted by expert; a loop takes blocks of rows of one expert through
its SwiGLU; each token sums its K rows.  The trip count of the loop follows the
routing, so that nothing is padded to a capacity and nothing dropped.
(`lax.ragged_dot` computes every row with every matrix on CPU, and on GPU by
default.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Rows of a block.  A product with 256 rows runs a quarter faster on a CPU than
# one with 64, and computes more rows in vain (experiments/LOG.md): whole blocks
# of an expert's rows are large, and its remainder is taken in small ones.
_SMALL, _LARGE = 64, 256

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
  """Sums the K rows of each token, in float32: [T, D] in the rows' dtype.

  It gathers rather than scatters.
  """
  K = permutation.flat_to_row_TK.shape[1]
  picked = (rows_RD[permutation.flat_to_row_TK[:, k]] for k in range(K))
  total = sum(row.astype(jnp.float32) for row in picked)
  return total.astype(rows_RD.dtype)


class _Blocks(NamedTuple):
  """Blocks of `size` rows within one group each; `count` of them are real."""

  expert: jax.Array
  start: jax.Array
  end: jax.Array
  count: jax.Array
  size: int


class _Block(NamedTuple):
  """One of them; `inside` [size, 1]: which of its rows are its expert's."""

  expert: jax.Array
  start: jax.Array
  inside: jax.Array

  def of(self, x: jax.Array) -> jax.Array:
    """Its rows of an array of all rows."""
    return lax.dynamic_slice_in_dim(x, self.start, self.inside.size)

  def put(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x` with these rows in it."""
    rows = rows.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, rows, self.start, 0)


def _make_blocks(
  start_E: jax.Array, end_E: jax.Array, size: int, n_rows: int
) -> _Blocks:
  """Covers the rows from `start_E` to `end_E` of each expert."""
  E = start_E.shape[0]
  blocks_E = -(-(end_E - start_E) // size)
  last_E = jnp.cumsum(blocks_E)
  index = jnp.arange(n_rows // size + E, dtype=jnp.int32)
  expert = (index[:, None] >= last_E).sum(1, dtype=jnp.int32)
  expert = jnp.minimum(expert, E - 1)
  within = index - (last_E - blocks_E)[expert]
  start = start_E[expert] + within * size
  return _Blocks(expert, start, end_E[expert], last_E[-1], size)


class _Rows(NamedTuple):
  """Per sorted row, with room for the last block to run over the end."""

  token: jax.Array  # int32 [R + block]
  gate: jax.Array  # float32 [R + block, 1]
  blocks: tuple[_Blocks, ...]


def _make_rows(weights_TK: jax.Array, permutation: Permutation) -> _Rows:
  R, K = weights_TK.size, weights_TK.shape[1]
  order = jnp.pad(permutation.row_to_flat_R, (0, _SMALL))
  gate = weights_TK.reshape(-1, 1)[order].astype(jnp.float32)
  sizes_E = permutation.group_sizes_E
  end_E = jnp.cumsum(sizes_E)
  start_E = end_E - sizes_E
  if R < _LARGE:
    blocks = (_make_blocks(start_E, end_E, _SMALL, R),)
  else:
    # What a small block writes beyond its group's end is overwritten by a block
    # that comes later, small or large; behind the last group are rows of no
    # expert.  Large blocks write their own rows only.
    middle_E = start_E + sizes_E // _LARGE * _LARGE
    blocks = (
      _make_blocks(middle_E, end_E, _SMALL, R),
      _make_blocks(start_E, middle_E, _LARGE, R),
    )
  return _Rows(order // K, gate, blocks)


def _for_blocks(
  rows: _Rows, body: Callable[[_Block, Any], Any], carry: Any
) -> Any:
  """The carry that `body` makes of each block and the carry, in turn."""
  for blocks in rows.blocks:

    def step(i, carry, blocks=blocks):
      start = blocks.start[i]
      inside = start + jnp.arange(blocks.size) < blocks.end[i]
      return body(_Block(blocks.expert[i], start, inside[:, None]), carry)

    carry = lax.fori_loop(0, blocks.count, step, carry)
  return carry


def _own(w_E: jax.Array, expert: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(w_E, expert, keepdims=False)


def _buffer(rows: _Rows, width: int, dtype) -> jax.Array:
  return jnp.zeros((rows.token.size, width), dtype)


def _hidden(gate_F, up_F):
  """SwiGLU in float32, of one block."""
  return jax.nn.silu(gate_F.astype(jnp.float32)) * up_F.astype(jnp.float32)


def _forward(x_TD, w1, w2, w3, rows):
  """Output rows [R + block, D], and the inputs of SwiGLU, [R + block, F]."""

  def body(block, carry):
    y, gates, ups = carry
    x = x_TD[block.of(rows.token)]
    gate = _matmul(x, _own(w1, block.expert), _NN).astype(x.dtype)
    up = _matmul(x, _own(w3, block.expert), _NN).astype(x.dtype)
    hidden = _hidden(gate, up) * block.of(rows.gate)
    y_i = _matmul(hidden.astype(x.dtype), _own(w2, block.expert), _NN)
    y_i = jnp.where(block.inside, y_i, 0)
    return block.put(y, y_i), block.put(gates, gate), block.put(ups, up)

  dtype, F = x_TD.dtype, w1.shape[2]
  carry = (
    _buffer(rows, x_TD.shape[1], dtype),
    _buffer(rows, F, dtype),
    _buffer(rows, F, dtype),
  )
  return _for_blocks(rows, body, carry)


def _input_grad(dy_TD, w1, w2, w3, gates, ups, rows):
  """Gradients of the rows of x, of SwiGLU's inputs, and of the gate weights."""

  def body(block, carry):
    dx, dgates, dups, dweights = carry
    dy = dy_TD[block.of(rows.token)]
    dhidden = _matmul(dy, _own(w2, block.expert), _NT)
    hidden, vjp = jax.vjp(_hidden, block.of(gates), block.of(ups))
    dweight = jnp.sum(hidden * dhidden, -1, keepdims=True)
    dgate, dup = vjp(dhidden * block.of(rows.gate))
    dx_i = _matmul(dgate, _own(w1, block.expert), _NT)
    dx_i += _matmul(dup, _own(w3, block.expert), _NT)
    dx_i, dweight = (jnp.where(block.inside, v, 0) for v in (dx_i, dweight))
    return (
      block.put(dx, dx_i),
      block.put(dgates, dgate),
      block.put(dups, dup),
      block.put(dweights, dweight),
    )

  carry = (
    _buffer(rows, dy_TD.shape[1], dy_TD.dtype),
    jnp.zeros_like(gates),
    jnp.zeros_like(ups),
    _buffer(rows, 1, jnp.float32),
  )
  return _for_blocks(rows, body, carry)


def _weight_grad(x_TD, dy_TD, gates, ups, dgates, dups, rows, n_experts):
  """float32 gradients of w1, w2 and w3.

  A loop of its own, so that a pipeline can defer it (V3 section 3.2.1).
  """

  def body(block, carry):
    token, e = block.of(rows.token), block.expert
    x = jnp.where(block.inside, x_TD[token], 0)
    hidden = _hidden(block.of(gates), block.of(ups)) * block.of(rows.gate)
    hidden = jnp.where(block.inside, hidden, 0)
    products = (
      _matmul(x, block.of(dgates), _TN),
      _matmul(hidden.astype(x.dtype), dy_TD[token], _TN),
      _matmul(x, block.of(dups), _TN),
    )
    return tuple(
      lax.dynamic_update_index_in_dim(dw, _own(dw, e) + product, e, 0)
      for dw, product in zip(carry, products)
    )

  D, F = x_TD.shape[1], gates.shape[1]
  up, down = (n_experts, D, F), (n_experts, F, D)
  carry = tuple(jnp.zeros(shape, jnp.float32) for shape in (up, down, up))
  return _for_blocks(rows, body, carry)


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
