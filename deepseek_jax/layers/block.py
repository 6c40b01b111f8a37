"""A Transformer layer: attention and feed-forward, each behind an RMSNorm."""

import flax.linen as nn
import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers import params
from deepseek_jax.layers.gqa import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.mlp import MLP
from deepseek_jax.layers.moe import MoE, MoEStats
from deepseek_jax.ops import norms


class Block(nn.Module):
  """`x + attn(norm(x))`, then `x + ffn(norm(x))`.

  Parameters: `attn_norm` [D], `attn` (MLA or GQA), `ffn_norm` [D], `ffn` (MLP
  or MoE).
  """

  config: ModelConfig
  is_moe: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    mask_BT: jax.Array,
  ) -> tuple[jax.Array, MoEStats | None]:
    """One layer.

    Args:
      x_BTD: residual stream, compute dtype.
      positions_BT: int32, for RoPE.
      segments_BT: int32; attention stays within a segment.  None: no mask.
      mask_BT: float32, 0 for padding; see `MoE`.

    Returns:
      The residual stream, and the routing statistics of an MoE layer.
    """
    c = self.config
    attn = (MLA if c.attention == 'mla' else GQA)(c, name='attn')
    scale = params.norm_scale(self, 'attn_norm', c.dim)
    x_BTD += attn(
      norms.rms_norm(x_BTD, scale, c.norm_eps), positions_BT, segments_BT
    )
    scale = params.norm_scale(self, 'ffn_norm', c.dim)
    hidden_BTD = norms.rms_norm(x_BTD, scale, c.norm_eps)
    if self.is_moe:
      out_BTD, stats = MoE(c, name='ffn')(hidden_BTD, mask_BT)
    else:
      out_BTD, stats = (
        MLP(c.inter_dim, c.init_std, name='ffn')(hidden_BTD),
        None,
      )
    return x_BTD + out_BTD, stats
