"""Causal softmax attention with different query-key and value widths.

`attend_reference` is the equation; `attend` is the same function, blockwise in
the queries, which never holds [T, S] scores of all queries, skips keys in the
future, and saves only the output and one logsumexp per query for the backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops import quantize
from deepseek_jax.ops.fp8_recipe import Kept
from deepseek_jax.ops.quantize import Packed, Quantized

_NEG_INF = -1e30  # Finite: a row of a padding query must not become NaN.
_MAX_BLOCKS = 16  # Blocks are unrolled, so that each has a static key extent.
_MIN_BLOCK = 256


def attend_reference(q_BTNH, k_BTNH, v_BTNU, scale, segments_BT=None):
  """`softmax(scale q k^T + causal and document mask) v` in float32.

  Args:
    q_BTNH: queries.
    k_BTNH: keys, the same number of heads.
    v_BTNU: values; their width U may differ from H.
    scale: of the scores.
    segments_BT: int32; a query sees keys of its own segment only.

  Returns:
    [B, T, N, U] in the dtype of `v_BTNU`.
  """
  scores = jnp.einsum(
    'BTNH,BSNH->BNTS', q_BTNH, k_BTNH, preferred_element_type=jnp.float32
  )
  scores = _mask(scores * scale, 0, segments_BT, segments_BT)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_BTNU.dtype)
  return jnp.einsum('BNTS,BSNU->BTNU', probs, v_BTNU)


def _mask(scores_BNTS, start, q_segments_BT, k_segments_BS):
  """-inf above the diagonal, where query row 0 is position `start`."""
  T, S = scores_BNTS.shape[-2:]
  visible = (start + jnp.arange(T))[:, None] >= jnp.arange(S)
  if q_segments_BT is not None:
    same = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    visible = (visible & same)[:, None]
  return jnp.where(visible, scores_BNTS, _NEG_INF)


def _blocks(length: int) -> list[tuple[int, int]]:
  """(start, end) of each query block."""
  size = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _block_scores(q_rows, k, scale, segments, start, end):
  """Masked float32 scores of queries [start, end) against keys [0, end).

  Heads come before positions here: [B, N, T, H].
  """
  scores = jnp.einsum(
    'BNTH,BNSH->BNTS',
    q_rows,
    k[:, :, :end],
    preferred_element_type=jnp.float32,
  )
  if segments is None:
    return _mask(scores * scale, start, None, None)
  return _mask(scores * scale, start, segments[:, start:end], segments[:, :end])


def _in_turn(blocks, *arrays):
  """The arrays, none of which is read before all are there.

  A GPU's scheduler would else make the scores of all blocks first, and hold
  them.  Where there are two, the slices so copied take more than is saved.
  """
  return jax.lax.optimization_barrier(arrays) if len(blocks) > 2 else arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def _attend(q, k, v, scale, segments, keep):
  """The output, and what is kept of it: itself, or its codes."""
  return _attend_fwd(q, k, v, scale, segments, keep)[0]


def _attend_fwd(q, k, v, scale, segments, keep):
  outs, lses = [], []
  blocks = _blocks(q.shape[2])
  for start, end in blocks:
    q_rows, *outs[-1:] = _in_turn(blocks, q[:, :, start:end], *outs[-1:])
    scores = _block_scores(q_rows, k, scale, segments, start, end)
    top = scores.max(-1, keepdims=True)
    unnormalised = jnp.exp(scores - top)
    total = unnormalised.sum(-1, keepdims=True)
    out = jnp.einsum(
      'BNTS,BNSU->BNTU',
      unnormalised.astype(v.dtype),
      v[:, :, :end],
      preferred_element_type=jnp.float32,
    )
    outs.append((out / total).astype(v.dtype))
    lses.append(top + jnp.log(total))
  out = jnp.concatenate(outs, 2)
  kept = out if keep is None else encode(out.swapaxes(1, 2), keep)
  kept = checkpoint_name(kept, 'attn_out')
  lse = checkpoint_name(jnp.concatenate(lses, 2), 'attn_lse')
  out = kept if keep is None else out
  return (out, kept), (q, k, v, segments, kept, lse)


def encode(out_BTNU: jax.Array, keep: Kept) -> Quantized | Packed:
  """Codes of [B T, N U], as the linear layer behind attention takes it."""
  B, T, N, U = out_BTNU.shape
  return quantize.pack(keep.quantize(out_BTNU.reshape(B * T, N * U)))


def decode(
  kept: jax.Array | Quantized | Packed, shape: tuple[int, ...]
) -> jax.Array:
  """What `encode` kept, rounded, in `shape` [B, T, N, U]; or an array as is."""
  if not isinstance(kept, (Quantized, Packed)):
    return kept
  return quantize.unpack(kept).dequantize().reshape(shape)


def _attend_bwd(scale, keep, residuals, cotangents):
  q, k, v, segments, kept, lse = residuals
  dout = cotangents[0]
  out = kept
  if keep is not None:
    out = decode(kept, dout.swapaxes(1, 2).shape).swapaxes(1, 2)
  delta = jnp.sum(
    dout.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
  )
  dqs = []
  # Keys last: of two operands that are contracted over their rows, a CPU
  # transposes the first, and queries are smaller than scores.
  dk = jnp.zeros(k.mT.shape, jnp.float32)
  dv = jnp.zeros(v.mT.shape, jnp.float32)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  blocks = _blocks(q.shape[2])
  for start, end in blocks:
    rows = slice(start, end)
    q_rows, dout_rows, dk, dv, *dqs[-1:] = _in_turn(
      blocks, q[:, :, rows], dout[:, :, rows], dk, dv, *dqs[-1:]
    )
    scores = _block_scores(q_rows, k, scale, segments, start, end)
    probs = jnp.exp(scores - lse[:, :, rows])
    dprobs = product('BNTU,BNSU->BNTS', dout_rows, v[:, :, :end])
    dscores = (probs * (dprobs - delta[:, :, rows]) * scale).astype(q.dtype)
    dqs.append(product('BNTS,BNSH->BNTH', dscores, k[:, :, :end]))
    dk = dk.at[..., :end].add(product('BNTH,BNTS->BNHS', q_rows, dscores))
    dv = dv.at[..., :end].add(
      product('BNTU,BNTS->BNUS', dout_rows, probs.astype(v.dtype))
    )
  dq = jnp.concatenate(dqs, 2).astype(q.dtype)
  return dq, dk.mT.astype(k.dtype), dv.mT.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNU: jax.Array,
  scale: float,
  segments_BT: jax.Array | None = None,
  keep: Kept | None = None,
) -> jax.Array | tuple[jax.Array, Quantized | Packed]:
  """`attend_reference`, blockwise: the same arguments and result.

  With `keep` the backward pass reads the output rounded so, and only its codes
  are saved (V3 section 3.3.3): they are returned as well, [B T, N U].
  """
  q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTNH, v_BTNU))
  out, kept = _attend(q, k, v, scale, segments_BT, keep)
  out = out.swapaxes(1, 2)
  return out if keep is None else (out, kept)
