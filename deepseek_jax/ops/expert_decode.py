"""The experts' feed-forward networks for inference: few rows, no gradient.

As in `ops/experts.py` rows are sorted by expert and a loop takes blocks of one
expert's rows; here a block is as small as the rows are few, down to the single
row of a decoded token.  Each step then reads the matrices of routed experts
only, once each.

A prompt's rows choose nearly every expert.  The first rows of each are then
taken side by side, one product for all experts, which reads the matrices where
they lie; the loop, which copies an expert's first, is left what is beyond
(experiments/LOG.md).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops import fp8_experts, fp8_matmul
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import Quantized

_MAX_BLOCK = 64
# Rows of an expert, on average, from which on next to none is without.
_LEAST = 2


class _Blocks(NamedTuple):
  """Blocks of sorted rows, each of one expert; `count` of them are real."""

  expert: jax.Array
  start: jax.Array
  count: jax.Array


def block_size(n_rows: int, n_experts: int) -> int:
  """The power of two nearest to the mean number of rows of a chosen expert.

  `n_rows` drawn at random choose `n_experts * (1 - (1 - 1 / n_experts)^n_rows)`
  experts.  A larger block reads an expert's matrices less often, a smaller one
  computes fewer rows in vain.
  """
  chosen = n_experts * (1 - (1 - 1 / n_experts) ** n_rows)
  return min(1 << round(math.log2(n_rows / chosen)), _MAX_BLOCK)


def rows_abreast(n_rows: int, n_experts: int) -> int:
  """Rows of each expert that are taken side by side, a multiple of 8.

  Two standard deviations above the mean of `n_rows` drawn at random; none if
  the mean is below `_LEAST`.
  """
  mean = n_rows / n_experts
  rows = math.ceil((mean + 2 * math.sqrt(mean)) / 8) * 8
  return rows if mean >= _LEAST else 0


def _make_blocks(
  ids_R: jax.Array, starts: jax.Array, size: int, skipped: jax.Array
) -> _Blocks:
  """All rows but the first `skipped` of each expert; `ids_R` is sorted."""
  R, E = ids_R.size, starts.size - 1
  if size == 1:
    return _Blocks(ids_R, jnp.arange(R), (ids_R < E).sum(dtype=jnp.int32))
  first_E = starts[:-1] + skipped
  blocks_E = jnp.maximum(-(-(starts[1:] - first_E) // size), 0)
  last_E = jnp.cumsum(blocks_E)
  index = jnp.arange(min(R, R // size + E), dtype=jnp.int32)
  expert = (index[:, None] >= last_E).sum(1, dtype=jnp.int32)
  expert = jnp.minimum(expert, E - 1)
  within = index - (last_E - blocks_E)[expert]
  return _Blocks(expert, first_E[expert] + within * size, last_E[-1])


def _abreast(x_RD, gates_R1, ids_R, starts, w1_EDF, w2_EFD, w3_EDF, n):
  """The first `n` rows of each expert: [R, D]; beyond them any, else zero."""
  R, E = ids_R.size, starts.size - 1
  # Rows beyond an expert's last are computed in vain, and not read.
  rows_EN = jnp.minimum(starts[:-1, None] + jnp.arange(n), R - 1)
  x_END, gates_EN1, dtype = x_RD[rows_EN], gates_R1[rows_EN], x_RD.dtype
  out_END = _network(x_END, gates_EN1, w1_EDF, w2_EFD, w3_EDF, _multiply, dtype)
  expert_R = jnp.minimum(ids_R, E - 1)
  rank_R = jnp.minimum(jnp.arange(R) - starts[expert_R], n - 1)
  out_RD = out_END[expert_R, rank_R].astype(dtype)
  return jnp.where(ids_R[:, None] < E, out_RD, 0)


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array | Quantized,
  w2_EFD: jax.Array | Quantized,
  w3_EDF: jax.Array | Quantized,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  recipe: Recipe | None = None,
) -> jax.Array:
  """`experts.expert_ffn` without a gradient: the same arguments and result.

  Args:
    x_TD: tokens, compute dtype.
    w1_EDF: as the other two matrices, in the same dtype, or FP8 codes and
      scales of blocks (V3 section 3.3.2).
    w2_EFD: down projections.
    w3_EDF: up projections.
    expert_ids_TK: int32; E is no expert.
    weights_TK: float32 gate weights.
    recipe: quantised weights are multiplied with activations quantised by it,
      as `fp8_experts.expert_ffn` does; None: dequantised where they are used.
  """
  (T, K), E = expert_ids_TK.shape, w1_EDF.shape[0]
  size = block_size(T * K, E)
  matrices = w1_EDF, w2_EFD, w3_EDF
  # Quantised ones are dequantised, or multiplied as codes, one at a time.
  quantized = any(isinstance(w, Quantized) for w in matrices)
  abreast = 0 if quantized else rows_abreast(T * K, E)
  ids = expert_ids_TK.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  sizes_E = (ids[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
  starts = jnp.pad(jnp.cumsum(sizes_E), (1, 0))  # And the end of the last.
  # Of other ranks' rows most places may be empty.
  is_full = starts[-1] >= _LEAST * E
  skipped = jnp.where(is_full, abreast, 0)
  blocks = _make_blocks(ids[order], starts, size, skipped)
  # The last block may run over the end.
  padded = jnp.pad(order, (0, size))
  sent = recipe.dispatch.quantize(x_TD).raw if recipe else x_TD
  rows = jax.tree.map(lambda v: v[padded // K], sent)
  ids_R = jnp.pad(ids[order], (0, size), constant_values=E)
  gates = weights_TK.reshape(-1, 1)[padded].astype(jnp.float32)
  dtype = x_TD.dtype

  def cut(x, start):
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size), x)

  def body(i, y):
    start, e = blocks.start[i], blocks.expert[i]
    w1, w2, w3 = (
      jax.tree.map(lambda v: lax.dynamic_index_in_dim(v, e, keepdims=False), w)
      for w in matrices
    )
    inside = cut(ids_R, start)[:, None] == e
    multiply = _multiply
    if recipe:
      multiply = functools.partial(_multiply_fp8, recipe, inside, dtype=dtype)
    x = cut(rows, start)
    out = _network(x, cut(gates, start), w1, w2, w3, multiply, dtype)
    out = jnp.where(inside, out.astype(dtype), cut(y, start))
    return lax.dynamic_update_slice_in_dim(y, out, start, 0)

  y = jnp.zeros((padded.size, x_TD.shape[1]), dtype)
  if abreast:
    y = lax.cond(
      is_full,
      lambda: _abreast(rows, gates, ids_R, starts, *matrices, abreast),
      lambda: y,
    )
  y = lax.fori_loop(0, blocks.count, body, y)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(T * K))
  return y[inverse.reshape(T, K)].sum(1)


def _network(x, gates, w1, w2, w3, multiply, dtype):
  """Rows of one expert, or some of each: float32, with hidden ones in dtype."""
  hidden = jax.nn.silu(multiply(x, w1)) * multiply(x, w3) * gates
  return multiply(hidden.astype(dtype), w2)


def _multiply(x, w):
  if isinstance(w, Quantized):
    w = w.dequantize(x.dtype)
  return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _multiply_fp8(recipe, inside, x, w, dtype):
  """Rounded to the compute dtype, as `fp8_experts` does it."""
  how = recipe.activation_tile, recipe.fmt, recipe.scale
  codes = fp8_experts.operand_of(x, *how, inside)
  y = fp8_matmul.dot(codes, w, recipe.accumulation, dtype)
  return y.astype(jnp.float32)
