"""The experts' feed-forward networks for inference: few rows, no gradient.

As in `ops/experts.py` rows are sorted by expert and a loop takes blocks of one
expert's rows; here a block is as small as the rows are few, down to the single
row of a decoded token.  Each step then reads the matrices of routed experts
only, once each: on a CPU as fast as if they had not been selected at all
(experiments/LOG.md).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
  w1_EDF: jax.Array,
  w2_EFD: jax.Array,
  w3_EDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
) -> jax.Array:
  """`experts.expert_ffn` without a gradient: the same arguments and result."""
  (T, K), E = expert_ids_TK.shape, w1_EDF.shape[0]
  size = block_size(T * K, E)
  ids = expert_ids_TK.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  blocks = _make_blocks(ids[order], E, size)
  # The last block may run over the end.
  padded = jnp.pad(order, (0, size))
  rows = x_TD[padded // K]
  gates = weights_TK.reshape(-1, 1)[padded].astype(jnp.float32)
  # The last block may also reach into the rows of no expert.
  gates = jnp.where(ids[padded, None] < E, gates, 0)

  def product(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)

  def body(i, y):
    start, e = blocks.start[i], blocks.expert[i]
    x = lax.dynamic_slice_in_dim(rows, start, size)
    w1, w2, w3 = (
      lax.dynamic_index_in_dim(w, e, keepdims=False)
      for w in (w1_EDF, w2_EFD, w3_EDF)
    )
    hidden = jax.nn.silu(product(x, w1)) * product(x, w3)
    hidden *= lax.dynamic_slice_in_dim(gates, start, size)
    out = product(hidden.astype(x.dtype), w2).astype(x.dtype)
    # Rows beyond the expert's last are overwritten by the next block.
    return lax.dynamic_update_slice_in_dim(y, out, start, 0)

  y = lax.fori_loop(0, blocks.count, body, jnp.zeros_like(rows))
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(T * K))
  return y[inverse.reshape(T, K)].sum(1)
