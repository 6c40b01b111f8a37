"""Products of rows that are grouped by expert (V3 section 2.1.2).

The rows of each expert are padded with zeros to blocks of 128, so that a block
is of one expert, in a forward product as a tile of rows, in a weight gradient
as a step of the sum and as an FP8 tile along the tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops import experts, fp8_matmul
from deepseek_jax.ops.quantize import BLOCK, Quantized


class Groups(NamedTuple):
  """Which block of 128 rows is whose; those beyond `count` hold nothing.

  Attributes:
    expert_B: int32 [R / 128].
    count: int32 [1], blocks that hold rows.
    first_E: int32 [E], the first block of each expert.
    blocks_E: int32 [E], how many it has.
  """

  expert_B: jax.Array
  count: jax.Array
  first_E: jax.Array
  blocks_E: jax.Array


class Layout(NamedTuple):
  """Where the rows of a routing lie.

  Attributes:
    groups: of the R padded rows.
    token_R: int32, the token of each row; T where there is none.
    choice_R: int32, its flat (token, choice) index; T * K where there is none.
    row_TK: int32, the inverse; R where the choice is of no expert.
  """

  groups: Groups
  token_R: jax.Array
  choice_R: jax.Array
  row_TK: jax.Array


def lay_out(expert_ids_TK: jax.Array, n_experts: int) -> Layout:
  """The padded rows of a routing, as many as any routing may need.

  R = (T * K // 128 + min(E, T * K)) * 128.
  """
  T, K = expert_ids_TK.shape
  permutation = experts.sort_by_expert(expert_ids_TK, n_experts)
  sizes_E = permutation.group_sizes_E
  blocks_E = -(-sizes_E // BLOCK)
  last_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
  B = T * K // BLOCK + min(n_experts, T * K)
  expert_B = (jnp.arange(B)[:, None] >= last_E).sum(1, dtype=jnp.int32)
  groups = Groups(
    jnp.minimum(expert_B, n_experts - 1),
    last_E[-1:],
    last_E - blocks_E,
    blocks_E,
  )
  # How far the rows of each expert, and of none, move.
  shift_E = groups.first_E * BLOCK - (jnp.cumsum(sizes_E) - sizes_E)
  shift_E = jnp.append(shift_E, B * BLOCK)
  row_TK = permutation.flat_to_row_TK + shift_E[expert_ids_TK]
  row_TK = jnp.minimum(row_TK, B * BLOCK).astype(jnp.int32)
  choice_R = jnp.full(B * BLOCK, T * K, jnp.int32)
  choices = jnp.arange(T * K, dtype=jnp.int32)
  choice_R = choice_R.at[row_TK.reshape(-1)].set(choices, mode='drop')
  return Layout(groups, choice_R // K, choice_R, row_TK)


def permute(x_TD: jax.Array, layout: Layout) -> jax.Array:
  """Rows of tokens, grouped by expert: [R, D], zero where there is none."""
  return x_TD.at[layout.token_R].get(mode='fill', fill_value=0)


def unpermute(rows_RD: jax.Array, layout: Layout) -> jax.Array:
  """Sums the rows of each token, in float32: [T, D] in the dtype of the rows.

  Rows that hold nothing are not read.
  """
  total = 0.0
  for k in range(layout.row_TK.shape[1]):
    row = rows_RD.at[layout.row_TK[:, k]].get(mode='fill', fill_value=0)
    total += row.astype(jnp.float32)
  return total.astype(rows_RD.dtype)


def dot(
  x_RK: jax.Array, w_EKN: jax.Array, groups: Groups, dtype: Any = None
) -> jax.Array:
  """Each row times its expert's matrix: [R, N], by default as `x_RK` is."""
  return dots([(x_RK, w_EKN)], groups, dtype or x_RK.dtype)


def dots(
  pairs: Sequence[tuple[jax.Array, jax.Array]], groups: Groups, dtype: Any
) -> jax.Array:
  """The sum of the `dot` of each pair, in float32, rounded once: [R, N]."""

  def product(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)

  return _by_blocks(product, pairs, dtype, groups)


def fp8_dot(
  x_RK: Quantized, w_EKN: Quantized, groups: Groups, dtype: Any = jnp.float32
) -> jax.Array:
  """`dot` of FP8: 1 x 128 tiles by 128 x 128 blocks."""
  return fp8_dots([(x_RK, w_EKN)], groups, dtype)


def fp8_dots(
  pairs: Sequence[tuple[Quantized, Quantized]], groups: Groups, dtype: Any
) -> jax.Array:
  """`dots` of FP8."""
  return _by_blocks(fp8_matmul.dot, pairs, dtype, groups)


def outer(x_RM: jax.Array, y_RN: jax.Array, groups: Groups) -> jax.Array:
  """Each expert's `x^T @ y`, a weight gradient: float32 [E, M, N]."""

  def product(x, y):
    return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)

  return _by_expert(product, x_RM, y_RN, groups)


def fp8_outer(x_RM: Quantized, y_RN: Quantized, groups: Groups) -> jax.Array:
  """`outer` of FP8: both in 128 x 1 tiles along the rows."""

  def product(x, y):
    return fp8_matmul.dot(x.mT, y)

  return _by_expert(product, x_RM, y_RN, groups)


def _by_blocks(product, pairs, dtype, groups):
  def body(i, y):
    e = groups.expert_B[i]
    block = sum(product(_block(x, i), _at(w, e)) for x, w in pairs)
    return lax.dynamic_update_slice_in_dim(y, block.astype(dtype), i * BLOCK, 0)

  (x_RK, w_EKN), *_ = pairs
  y = jnp.zeros((x_RK.shape[0], w_EKN.shape[2]), dtype)
  return lax.fori_loop(0, groups.count[0], body, y)


def _by_expert(product, x_RM, y_RN, groups):
  def body(i, dw):
    e = groups.expert_B[i]
    block = _at(dw, e) + product(_block(x_RM, i), _block(y_RN, i))
    return lax.dynamic_update_index_in_dim(dw, block, e, 0)

  shape = groups.first_E.size, x_RM.shape[1], y_RN.shape[1]
  zeros = jnp.zeros(shape, jnp.float32)
  return lax.fori_loop(0, groups.count[0], body, zeros)


def _block(x, i):
  """128 rows, of an array or of codes with scales in either orientation."""

  def cut(v):
    size = v.shape[0] * BLOCK // R
    return lax.dynamic_slice_in_dim(v, i * size, size)

  R = x.shape[0]
  return jax.tree.map(cut, x)


def _at(w, expert):
  return jax.tree.map(
    lambda v: lax.dynamic_index_in_dim(v, expert, keepdims=False), w
  )
