"""The experts' feed-forward networks, dropless (V3 section 2.1.2).

Tokens are sorted by expert, multiplied group by group, and summed back:
`permute`, `grouped_matmul`, `unpermute`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Rows of one block of the grouped matmul; measured best on CPU for 64 to 128.
_BLOCK = 128


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
  """The stable permutation that groups (token, choice) pairs by expert."""
  flat = expert_ids_TK.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  rows = jnp.arange(flat.size, dtype=jnp.int32)
  inverse = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
  sizes = (flat[:, None] == jnp.arange(n_experts)).sum(0, dtype=jnp.int32)
  inverse = inverse.reshape(expert_ids_TK.shape)
  return jax.tree.map(
    lambda x: checkpoint_name(x, 'routing'), Permutation(order, inverse, sizes)
  )


@jax.custom_vjp
def permute(x_TD: jax.Array, permutation: Permutation) -> jax.Array:
  """Copies each token to its K sorted rows: [R, D].

  The gradient is `unpermute`: a gather and a sum, where autodiff of the gather
  would scatter.
  """
  K = permutation.flat_to_row_TK.shape[1]
  return x_TD[permutation.row_to_flat_R // K]


def _permute_fwd(x_TD, permutation):
  return permute(x_TD, permutation), permutation


def _permute_bwd(permutation, drows_RD):
  return unpermute(drows_RD, permutation), None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def unpermute(rows_RD: jax.Array, permutation: Permutation) -> jax.Array:
  """Sums the K rows of each token: [T, D].  The gradient is `permute`."""
  K = permutation.flat_to_row_TK.shape[1]
  picked = (rows_RD[permutation.flat_to_row_TK[:, k]] for k in range(K))
  return functools.reduce(jnp.add, picked)


def _unpermute_fwd(rows_RD, permutation):
  return unpermute(rows_RD, permutation), permutation


def _unpermute_bwd(permutation, dx_TD):
  return permute(dx_TD, permutation), None


unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


def grouped_matmul_reference(x_RD, w_EDF, group_sizes_E):
  """Row r times the matrix of its group, the obvious way: [R, F]."""
  ends = jnp.cumsum(group_sizes_E)
  expert_R = jnp.searchsorted(ends, jnp.arange(x_RD.shape[0]), side='right')
  return jnp.einsum('RD,RDF->RF', x_RD, w_EDF[expert_R])


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


def _rows(x: jax.Array, start: jax.Array) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, start, _BLOCK)


def _pad(x: jax.Array) -> jax.Array:
  """Room for the last block to run over the end."""
  return jnp.pad(x, ((0, _BLOCK), (0, 0)))


@jax.custom_vjp
def grouped_matmul(
  x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
  """Multiplies each group of rows by its own matrix.

  A loop over blocks of rows with a traced trip count: `lax.ragged_dot` computes
  every row with every matrix on CPU, and on GPU by default.

  Args:
    x_RD: rows sorted by group.
    w_EDF: one matrix per group.
    group_sizes_E: int32, with sum R.

  Returns:
    [R, F] in the dtype of `x_RD`, accumulated in float32.
  """
  return _grouped_matmul(x_RD, w_EDF, group_sizes_E, (((1,), (0,)), ((), ())))


def _grouped_matmul(x, w, group_sizes, contraction):
  n_rows = x.shape[0]
  blocks = _make_blocks(group_sizes, n_rows)
  x = _pad(x)
  width = w.shape[2 - contraction[0][1][0]]

  def body(i, y):
    # Rows beyond the group's end are overwritten by the next group's block.
    w_i = lax.dynamic_index_in_dim(w, blocks.expert[i], keepdims=False)
    y_i = lax.dot_general(
      _rows(x, blocks.start[i]),
      w_i,
      contraction,
      preferred_element_type=jnp.float32,
    ).astype(y.dtype)
    return lax.dynamic_update_slice_in_dim(y, y_i, blocks.start[i], 0)

  y = jnp.zeros((n_rows + _BLOCK, width), x.dtype)
  return lax.fori_loop(0, blocks.count, body, y)[:n_rows]


def _grouped_weight_grad(x_RD, dy_RF, group_sizes_E):
  """`x_g^T dy_g` of each group: float32 [E, D, F]."""
  blocks = _make_blocks(group_sizes_E, x_RD.shape[0])
  x_RD, dy_RF = _pad(x_RD), _pad(dy_RF)

  def body(i, dw):
    start, expert = blocks.start[i], blocks.expert[i]
    inside = start + jnp.arange(_BLOCK) < blocks.end[i]
    x_i = jnp.where(inside[:, None], _rows(x_RD, start), 0)
    dw_i = lax.dot_general(
      x_i,
      _rows(dy_RF, start),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    dw_i += lax.dynamic_index_in_dim(dw, expert, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw, dw_i, expert, 0)

  shape = (group_sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1])
  return lax.fori_loop(0, blocks.count, body, jnp.zeros(shape, jnp.float32))


def _grouped_matmul_fwd(x_RD, w_EDF, group_sizes_E):
  return grouped_matmul(x_RD, w_EDF, group_sizes_E), (
    x_RD,
    w_EDF,
    group_sizes_E,
  )


def _grouped_matmul_bwd(residuals, dy_RF):
  x_RD, w_EDF, group_sizes_E = residuals
  dx_RD = _grouped_matmul(dy_RF, w_EDF, group_sizes_E, (((1,), (1,)), ((), ())))
  dw_EDF = _grouped_weight_grad(x_RD, dy_RF, group_sizes_E)
  return dx_RD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


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
  linearity, and its gradient then needs no [R, D] output rows.  DeepSeek's own
  kernels fuse it there too (FACTS 4.4).
  """
  permutation = sort_by_expert(expert_ids_TK, w1_EDF.shape[0])
  sizes = permutation.group_sizes_E
  rows_RD = permute(x_TD, permutation)
  gates_R = weights_TK.reshape(-1)[permutation.row_to_flat_R]
  gate_RF = checkpoint_name(grouped_matmul(rows_RD, w1_EDF, sizes), 'ffn_up')
  up_RF = checkpoint_name(grouped_matmul(rows_RD, w3_EDF, sizes), 'ffn_up')
  hidden_RF = jax.nn.silu(gate_RF) * up_RF * gates_R[:, None]
  hidden_RF = hidden_RF.astype(x_TD.dtype)
  return unpermute(grouped_matmul(hidden_RF, w2_EFD, sizes), permutation)
