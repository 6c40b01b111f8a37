"""The experts' feed-forward networks for inference: few rows, no gradient.

As in `ops/experts.py` rows are sorted by expert and a loop takes blocks of one
expert's rows; here a block is as small as the rows are few, down to the single
row of a decoded token.  Each step then reads the matrices of routed experts
only, once each: on a CPU as fast as if they had not been selected at all
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


def _make_blocks(ids_R: jax.Array, n_experts: int, size: int) -> _Blocks:
  """`ids_R` is sorted."""
  R = ids_R.size
  if size == 1:
    count = (ids_R < n_experts).sum(dtype=jnp.int32)
    return _Blocks(ids_R, jnp.arange(R), count)
  sizes_E = (ids_R[:, None] == jnp.arange(n_experts)).sum(0, dtype=jnp.int32)
  blocks_E = -(-sizes_E // size)
  last_E = jnp.cumsum(blocks_E)
  index = jnp.arange(min(R, R // size + n_experts), dtype=jnp.int32)
  expert = (index[:, None] >= last_E).sum(1, dtype=jnp.int32)
  expert = jnp.minimum(expert, n_experts - 1)
  within = index - (last_E - blocks_E)[expert]
  start = (jnp.cumsum(sizes_E) - sizes_E)[expert] + within * size
  return _Blocks(expert, start, last_E[-1])


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
  ids = expert_ids_TK.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  blocks = _make_blocks(ids[order], E, size)
  # The last block may run over the end.
  padded = jnp.pad(order, (0, size))
  sent = recipe.dispatch.quantize(x_TD).raw if recipe else x_TD
  rows = jax.tree.map(lambda v: v[padded // K], sent)
  gates = weights_TK.reshape(-1, 1)[padded].astype(jnp.float32)
  # The last block may also reach into the rows of no expert.
  gates = jnp.where(ids[padded, None] < E, gates, 0)

  def cut(x, start):
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size), x)

  def body(i, y):
    start, e = blocks.start[i], blocks.expert[i]
    w1, w2, w3 = (
      jax.tree.map(lambda v: lax.dynamic_index_in_dim(v, e, keepdims=False), w)
      for w in (w1_EDF, w2_EFD, w3_EDF)
    )
    multiply = _multiply
    if recipe:
      inside = cut(ids[padded], start)[:, None] == e
      multiply = functools.partial(_multiply_fp8, recipe, inside, dtype=dtype)
    x = cut(rows, start)
    hidden = jax.nn.silu(multiply(x, w1)) * multiply(x, w3)
    hidden *= cut(gates, start)
    out = multiply(hidden.astype(dtype), w2).astype(dtype)
    # Rows beyond the expert's last are overwritten by the next block.
    return lax.dynamic_update_slice_in_dim(y, out, start, 0)

  dtype = x_TD.dtype
  empty = jnp.zeros((padded.size, x_TD.shape[1]), dtype)
  y = lax.fori_loop(0, blocks.count, body, empty)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(T * K))
  return y[inverse.reshape(T, K)].sum(1)


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
