"""Multi-head latent attention, expanded and absorbed (V3 section 2.1.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, PrecisionConfig
from deepseek_jax.kernels import dispatch, few_rows, mla_attention, mla_decode
from deepseek_jax.layers import params
from deepseek_jax.layers.linear import (
  attention_kept,
  linear,
  normed,
  share,
)
from deepseek_jax.ops import cached_attention, norms, quantize, rope
from deepseek_jax.parallel import sharding


class MLA(nn.Module):
  """Attention whose keys and values are expanded from one small latent.

  Parameters (float32): `wq_a` [D, Q], `q_norm` [Q], `wq_b` [Q, N, H + P] — or
  `wq` [D, N, H + P] when `q_lora_rank` is 0 —, `wkv_a` [D, C + P],
  `kv_norm` [C], `wkv_b` [C, N, H + U], `wo` [N, U, D].
  """

  config: ModelConfig
  precision: PrecisionConfig = PrecisionConfig()

  @nn.compact
  def __call__(
    self,
    x_BTD: Any,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    cache_BSX: jax.Array | None = None,
    prefill: bool = False,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Equations 1 to 11; [B, T, D] to [B, T, D] in the dtype of `x_BTD`.

    Args:
      x_BTD: tokens, or what `normed` made of them.
      positions_BT: int32.
      segments_BT: int32; None: no mask.  Not used with a cache.
      cache_BSX: normalised latent and rotated shared key, [B, S, C + P], of
        earlier tokens; the new ones are added and the cache returned as well.
      prefill: a chunk of T tokens from one common start, a multiple of T, in
        the expanded form; otherwise the absorbed form, tokens anywhere.
    """
    c, mla = self.config, self.config.mla
    x, kept = share(x_BTD, self.precision), None
    decodes = cache_BSX is not None
    q_nope, q_pe = self._queries(x, positions_BT, decodes)
    c_kv, k_pe = self._latents(x, positions_BT, decodes)
    wkv_b = self._weight(
      'wkv_b',
      (mla.kv_lora_rank, c.n_heads, mla.qk_nope_head_dim + mla.v_head_dim),
      (None, 'heads', None),
    )
    scale = rope.softmax_scale(
      c.rope, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    )
    if not decodes:
      q, (k, v) = _join(q_nope, q_pe), self._expand(c_kv, k_pe, wkv_b)
      keep = attention_kept(self.precision)
      chosen = dispatch.requested(self.precision.kernels)
      out_BTNU = mla_attention.attend(
        q, k, v, scale, segments_BT, keep, implementation=chosen
      )
      out_BTNU, kept = out_BTNU if keep else (out_BTNU, None)
    else:
      new_BTX = _join(c_kv, k_pe)
      attend = self._attend_chunk if prefill else self._attend_rows
      out_BTNU, cache_BSX = attend(
        q_nope, q_pe, new_BTX, cache_BSX, positions_BT, wkv_b, scale
      )
    wo = self._weight(
      'wo', (c.n_heads, mla.v_head_dim, c.dim), ('heads', None, 'dim')
    )
    how = {'saved': kept, 'decodes': decodes}
    out_BTD = linear(out_BTNU, wo, 'wo', self.precision, axes=2, **how)
    return (out_BTD, cache_BSX) if decodes else out_BTD

  def _weight(self, name, shape, axes):
    init = params.normal(self.config.init_std, *axes)
    return self.param(name, init, shape, jnp.float32)

  def _queries(self, x, positions_BT, decodes):
    """`q_nope` [B, T, N, H] and rotated `q_pe` [B, T, N, P]."""
    c, mla = self.config, self.config.mla
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank:
      wq_a = self._weight('wq_a', (c.dim, mla.q_lora_rank), ('dim', None))
      latent = linear(x, wq_a, 'wq_a', self.precision, decodes=decodes)
      scale = params.norm_scale(self, 'q_norm', mla.q_lora_rank)
      latent = normed(latent, scale, c.norm_eps, self.precision)
      name, width, axis = 'wq_b', mla.q_lora_rank, None
    else:
      latent, name, width, axis = x, 'wq', c.dim, 'dim'
    w = self._weight(name, (width, c.n_heads, head_dim), (axis, 'heads', None))
    q_BTNH = linear(latent, w, name, self.precision, decodes=decodes)
    q_nope, q_pe = jnp.split(q_BTNH, [mla.qk_nope_head_dim], -1)
    return q_nope, rope.rotate(q_pe, positions_BT, c.rope)

  def _latents(self, x, positions_BT, decodes):
    """Normalised `c_kv` [B, T, C] and rotated shared `k_pe` [B, T, P]."""
    c, mla = self.config, self.config.mla
    width = mla.kv_lora_rank + mla.qk_rope_head_dim
    wkv_a = self._weight('wkv_a', (c.dim, width), ('dim', None))
    latent = linear(x, wkv_a, 'wkv_a', self.precision, decodes=decodes)
    c_kv, k_pe = jnp.split(latent, [mla.kv_lora_rank], -1)
    scale = params.norm_scale(self, 'kv_norm', mla.kv_lora_rank)
    # Not `normed`: these are columns of an array, which XLA would have to copy
    # for a kernel; that costs what one kernel for both would save.
    c_kv = norms.rms_norm(c_kv, scale, c.norm_eps)
    return c_kv, rope.rotate(k_pe, positions_BT, c.rope)

  def _expand(self, c_kv, k_pe, wkv_b):
    """Keys [B, T, N, H + P] and values [B, T, N, U] of latents."""
    kv = linear(c_kv, wkv_b, 'wkv_b', self.precision)
    k_nope, v_BTNU = jnp.split(kv, [self.config.mla.qk_nope_head_dim], -1)
    k_pe = jnp.broadcast_to(
      k_pe[:, :, None], (*k_nope.shape[:3], k_pe.shape[-1])
    )
    return _join(k_nope, k_pe), v_BTNU

  def _attend_chunk(
    self, q_nope, q_pe, new_BTX, cache_BSX, positions_BT, wkv_b, scale
  ):
    """Prefill: the latents of each block of keys are expanded."""
    mla, (start, T) = self.config.mla, (positions_BT[0, 0], q_pe.shape[1])
    cache_BSX = cached_attention.write_chunk(cache_BSX, new_BTX, start)

    def read(first):
      block = jax.lax.dynamic_slice_in_dim(cache_BSX, first, T, 1)
      return self._expand(*jnp.split(block, [mla.kv_lora_rank], -1), wkv_b)

    q = _join(q_nope, q_pe)
    out = cached_attention.attend_chunk(q, read, mla.v_head_dim, start, scale)
    return out, cache_BSX

  def _attend_rows(
    self, q_nope, q_pe, new_BTX, cache_BSX, positions_BT, wkv_b, scale
  ):
    """Decoding: W_UK goes to the queries and W_UV to the output instead.

    Every head then attends to the one row of latent and key per token, as in
    multi-query attention.
    """
    mla = self.config.mla
    w_uk, w_uv = self._absorbed(wkv_b, new_BTX.dtype)
    cache_BSX = cached_attention.write_rows(cache_BSX, new_BTX, positions_BT)
    q_latent = self._per_head(q_nope, w_uk)

    def attend(q_BTNX, cache_BSX, positions_BT):
      return mla_decode.attend_latents(
        q_BTNX,
        cache_BSX,
        mla.kv_lora_rank,
        positions_BT,
        scale,
        implementation=dispatch.requested(self.precision.kernels),
      )

    q_BTNX = _join(q_latent, q_pe)
    out_BTNC = sharding.by_sequence(attend)(q_BTNX, cache_BSX, positions_BT)
    return self._per_head(out_BTNC, w_uv), cache_BSX

  def _per_head(self, x_BTNH, w_NHC):
    """A product with each head's matrix: [B, T, N, C]."""
    chosen = dispatch.requested(self.precision.kernels)
    return few_rows.multiply(x_BTNH, w_NHC, implementation=chosen)

  def _absorbed(self, wkv_b, dtype):
    """W_UK [N, H, C] and W_UV [N, C, U]: transposing costs more than using."""
    if self.has_variable('params', 'w_uk'):  # By inference/weights.py.
      return tuple(self.get_variable('params', n) for n in ('w_uk', 'w_uv'))
    wkv_b = quantize.dense(wkv_b, dtype)
    return cached_attention.absorbed(wkv_b, self.config.mla.qk_nope_head_dim)


def _join(x, y):
  return jnp.concatenate([x, y], -1)
