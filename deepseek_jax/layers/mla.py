"""Multi-head latent attention, in its expanded form (V3 section 2.1.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers import params
from deepseek_jax.ops import attention, norms, rope


class MLA(nn.Module):
  """Attention whose keys and values are expanded from one small latent.

  Parameters (float32): `wq_a` [D, Q], `q_norm` [Q], `wq_b` [Q, N, H + P] — or
  `wq` [D, N, H + P] when `q_lora_rank` is 0 —, `wkv_a` [D, C + P],
  `kv_norm` [C], `wkv_b` [C, N, H + U], `wo` [N, U, D].
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Equations 1 to 11; [B, T, D] to [B, T, D] in the dtype of `x_BTD`."""
    c, mla = self.config, self.config.mla
    q_nope, q_pe = self._queries(x_BTD, positions_BT)
    k_nope, k_pe, v_BTNU = self._keys_values(x_BTD, positions_BT)
    k_pe = jnp.broadcast_to(
      k_pe[:, :, None], (*k_nope.shape[:3], k_pe.shape[-1])
    )
    out_BTNU = attention.attend(
      jnp.concatenate([q_nope, q_pe], -1),
      jnp.concatenate([k_nope, k_pe], -1),
      v_BTNU,
      rope.softmax_scale(c.rope, mla.qk_nope_head_dim + mla.qk_rope_head_dim),
      segments_BT,
    )
    wo = self._weight(
      'wo', (c.n_heads, mla.v_head_dim, c.dim), ('heads', None, 'dim')
    )
    return jnp.einsum('BTNU,NUD->BTD', out_BTNU, wo.astype(x_BTD.dtype))

  def _weight(self, name, shape, axes):
    init = params.normal(self.config.init_std, *axes)
    return self.param(name, init, shape, jnp.float32)

  def _queries(self, x_BTD, positions_BT):
    """`q_nope` [B, T, N, H] and rotated `q_pe` [B, T, N, P]."""
    c, mla = self.config, self.config.mla
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank:
      wq_a = self._weight('wq_a', (c.dim, mla.q_lora_rank), ('dim', None))
      latent = checkpoint_name(x_BTD @ wq_a.astype(x_BTD.dtype), 'q_latent')
      scale = params.norm_scale(self, 'q_norm', mla.q_lora_rank)
      latent = norms.rms_norm(latent, scale, c.norm_eps)
      name, width, axis = 'wq_b', mla.q_lora_rank, None
    else:
      latent, name, width, axis = x_BTD, 'wq', c.dim, 'dim'
    w = self._weight(name, (width, c.n_heads, head_dim), (axis, 'heads', None))
    q_BTNH = jnp.einsum('BTQ,QNH->BTNH', latent, w.astype(latent.dtype))
    q_nope, q_pe = jnp.split(q_BTNH, [mla.qk_nope_head_dim], -1)
    return q_nope, rope.rotate(q_pe, positions_BT, c.rope)

  def _keys_values(self, x_BTD, positions_BT):
    """`k_nope` [B, T, N, H], rotated shared `k_pe` [B, T, P], `v`."""
    c, mla = self.config, self.config.mla
    width = mla.kv_lora_rank + mla.qk_rope_head_dim
    wkv_a = self._weight('wkv_a', (c.dim, width), ('dim', None))
    latent = checkpoint_name(x_BTD @ wkv_a.astype(x_BTD.dtype), 'kv_latent')
    c_kv, k_pe = jnp.split(latent, [mla.kv_lora_rank], -1)
    scale = params.norm_scale(self, 'kv_norm', mla.kv_lora_rank)
    c_kv = norms.rms_norm(c_kv, scale, c.norm_eps)
    wkv_b = self._weight(
      'wkv_b',
      (mla.kv_lora_rank, c.n_heads, mla.qk_nope_head_dim + mla.v_head_dim),
      (None, 'heads', None),
    )
    kv = jnp.einsum('BTC,CNH->BTNH', c_kv, wkv_b.astype(c_kv.dtype))
    k_nope, v_BTNU = jnp.split(kv, [mla.qk_nope_head_dim], -1)
    return k_nope, rope.rotate(k_pe, positions_BT, c.rope), v_BTNU
