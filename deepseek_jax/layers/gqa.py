"""Multi-head, grouped-query and multi-query attention: MLA's baselines."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers import params
from deepseek_jax.ops import attention, rope


class GQA(nn.Module):
  """Attention with `n_kv_heads` keys and values shared by groups of heads.

  `n_kv_heads` is N for `attention='mha'`, 1 for 'mqa' (V2 section 2.1).
  Parameters (float32): `wq` [D, N, H], `wk` and `wv` [D, n_kv_heads, H],
  `wo` [N, H, D].  RoPE turns the whole head.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    """[B, T, D] to [B, T, D] in the dtype of `x_BTD`."""
    c = self.config
    H = c.gqa.head_dim

    def project(name, heads):
      init = params.normal(c.init_std, 'dim', 'heads', None)
      w = self.param(name, init, (c.dim, heads, H), jnp.float32)
      return jnp.einsum('BTD,DNH->BTNH', x_BTD, w.astype(x_BTD.dtype))

    q = rope.rotate(project('wq', c.n_heads), positions_BT, c.rope)
    k = rope.rotate(project('wk', c.n_kv_heads), positions_BT, c.rope)
    v = project('wv', c.n_kv_heads)
    k, v = (jnp.repeat(y, c.n_heads // c.n_kv_heads, axis=2) for y in (k, v))
    out = attention.attend(q, k, v, rope.softmax_scale(c.rope, H), segments_BT)
    init = params.normal(c.init_std, 'heads', None, 'dim')
    wo = self.param('wo', init, (c.n_heads, H, c.dim), jnp.float32)
    return jnp.einsum('BTNH,NHD->BTD', out, wo.astype(x_BTD.dtype))
