"""Attention of new tokens to a cache of earlier ones (V3 section 2.1.1).

A cache has room for S positions; position j of a sequence lies in row j.  What
lies beyond a query's own position has weight zero, whatever finite number it
is.  Two forms, as in the released code:

* `attend_rows`: few queries, at a place of its own in each sequence: decoding.
  MHA, GQA and MQA hand in their keys and values, MLA, by way of
  `attend_latents`, its absorbed queries and the latents as one shared head.
* `attend_chunk`: many queries from one common start: prefill.  Keys and values
  come block by block, so that latents are expanded a block at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_NEG_INF = -1e30  # Finite: a query that sees no key must not become NaN.


def write_rows(
  cache_BSX: jax.Array, new_BTX: jax.Array, positions_BT: jax.Array
) -> jax.Array:
  """Stores each token at its own position; positions outside are dropped."""
  S = cache_BSX.shape[1]
  # A negative index would count from the end.
  inside = jnp.where(positions_BT < 0, S, positions_BT)
  if inside.size == 1:
    # Beside one that is dropped: XLA makes a single row a slice of its own,
    # updates it once per reader and copies all of the cache for each.
    inside = jnp.pad(inside, ((0, 0), (0, 1)), constant_values=S)
    new_BTX = jnp.pad(new_BTX, ((0, 0), (0, 1), *[(0, 0)] * (new_BTX.ndim - 2)))
  rows = jnp.arange(cache_BSX.shape[0])[:, None]
  return cache_BSX.at[rows, inside].set(
    new_BTX.astype(cache_BSX.dtype), mode='drop'
  )


def write_chunk(
  cache_BSX: jax.Array, new_BTX: jax.Array, start: jax.Array
) -> jax.Array:
  """Stores T tokens of every sequence from `start`; start + T is at most S."""
  return jax.lax.dynamic_update_slice_in_dim(
    cache_BSX, new_BTX.astype(cache_BSX.dtype), start, 1
  )


def attend_rows(
  q_BTNX: jax.Array,
  k_BSnX: jax.Array,
  v_BSnU: jax.Array,
  positions_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """Softmax attention of few queries to all that was cached before them.

  Args:
    q_BTNX: queries; N is a multiple of the n key-value heads.
    k_BSnX: the cache, the new tokens included.
    v_BSnU: likewise.
    positions_BT: of the queries, int32; one below 0 sees no key.
    scale: of the scores.

  Returns:
    [B, T, N, U] in the dtype of `v_BSnU`; zero for a query that sees no key.
  """
  B, T, N, X = q_BTNX.shape
  S, n = k_BSnX.shape[1:3]
  # All rows that share a head are one matrix: XLA then reads the cache where it
  # lies, and does not transpose it.
  q_BTnrX = q_BTNX.reshape(B, T, n, N // n, X)
  q_BnRX = q_BTnrX.swapaxes(1, 2).reshape(B, n, -1, X)
  scores = jnp.einsum(
    'BnRX,BSnX->BnRS', q_BnRX, k_BSnX, preferred_element_type=jnp.float32
  )
  visible_BTS = jnp.arange(S) <= positions_BT[..., None]
  visible_BRS = jnp.repeat(visible_BTS, N // n, axis=1)[:, None]
  scores = jnp.where(visible_BRS, scores * scale, _NEG_INF)
  probs = jnp.where(visible_BRS, jax.nn.softmax(scores, axis=-1), 0)
  probs = probs.astype(v_BSnU.dtype)
  out = jnp.einsum('BnRS,BSnU->BnRU', probs, v_BSnU)
  out_BnTrU = out.reshape(B, n, T, N // n, -1)
  return out_BnTrU.swapaxes(1, 2).reshape(B, T, N, -1)


def absorbed(
  wkv_b_CNX: jax.Array, nope_head_dim: int
) -> tuple[jax.Array, jax.Array]:
  """W_UK [N, H, C] and W_UV [N, C, U], before and after `attend_latents`.

  `wkv_b` makes both of a latent: X is H + U, H the `nope_head_dim`.
  """
  w_uk, w_uv = jnp.split(wkv_b_CNX, [nope_head_dim], -1)
  return w_uk.transpose(1, 2, 0), w_uv.transpose(1, 0, 2)


def attend_latents(
  q_BTNX: jax.Array,
  cache_BSX: jax.Array,
  width: int,
  positions_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """`attend_rows` to rows that are the key, and whose start is the value.

  Args:
    q_BTNX: absorbed queries.
    cache_BSX: latents and rotated keys, shared by all heads.
    width: of the latents, the values.
    positions_BT: of the queries, int32.
    scale: of the scores.

  Returns:
    [B, T, N, width] in the dtype of `cache_BSX`.
  """
  shared = cache_BSX[:, :, None]
  # The columns of the rotated key are dropped after the product, for to cut
  # them off before would copy the cache.
  out = attend_rows(q_BTNX, shared, shared, positions_BT, scale)
  return out[..., :width]


def attend_chunk(
  q_BTNX: jax.Array,
  read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  width: int,
  start: jax.Array,
  scale: float,
) -> jax.Array:
  """Causal attention of the queries at [start, start + T) to [0, start + T).

  The loop takes as many blocks of T keys as there are: nothing is computed for
  the unused part of the cache.

  Args:
    q_BTNX: queries of one chunk.
    read: first position of a block -> its keys [B, T, N, X] and values
      [B, T, N, U].
    width: U.
    start: int32 scalar, a multiple of T.
    scale: of the scores.

  Returns:
    [B, T, N, U] in the dtype of `q_BTNX`.
  """
  B, T, N, _ = q_BTNX.shape
  q_BNTX = q_BTNX.swapaxes(1, 2)
  offset = jnp.arange(T)

  def body(i, carry):
    out, top, total = carry
    k, v = read(i * T)
    scores = jnp.einsum(
      'BNTX,BSNX->BNTS', q_BNTX, k, preferred_element_type=jnp.float32
    )
    visible = start + offset[:, None] >= i * T + offset
    scores = jnp.where(visible, scores * scale, _NEG_INF)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    probs, decay = jnp.exp(scores - new_top), jnp.exp(top - new_top)
    product = jnp.einsum(
      'BNTS,BSNU->BNTU',
      probs.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    total = total * decay + probs.sum(-1, keepdims=True)
    return out * decay + product, new_top, total

  column = (B, N, T, 1)
  carry = (
    jnp.zeros((B, N, T, width), jnp.float32),
    jnp.full(column, _NEG_INF, jnp.float32),
    jnp.zeros(column, jnp.float32),
  )
  out, _, total = jax.lax.fori_loop(0, start // T + 1, body, carry)
  return (out / total).swapaxes(1, 2).astype(q_BTNX.dtype)
