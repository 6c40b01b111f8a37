"""A Transformer layer: attention and feed-forward, each behind an RMSNorm."""

from typing import Any

import flax.linen as nn
import jax

from deepseek_jax.config import ModelConfig, ParallelConfig, PrecisionConfig
from deepseek_jax.layers import params
from deepseek_jax.layers.gqa import GQA
from deepseek_jax.layers.linear import normed
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
  precision: PrecisionConfig = PrecisionConfig()
  parallel: ParallelConfig = ParallelConfig()

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    mask_BT: jax.Array,
    cache: Any = None,
    prefill: bool = False,
  ) -> tuple[jax.Array, MoEStats | None] | tuple[Any, ...]:
    """One layer.

    Args:
      x_BTD: residual stream, compute dtype.
      positions_BT: int32, for RoPE.
      segments_BT: int32; attention stays within a segment.  None: no mask.
      mask_BT: float32, 0 for padding; see `MoE`.
      cache: of the attention, for inference; see `MLA` and `GQA`.
      prefill: likewise.

    Returns:
      The residual stream, the routing statistics of an MoE layer, and, if there
      was one, the cache with the new tokens in it.
    """
    c, precision = self.config, self.precision.of('attention')
    attn = (MLA if c.attention == 'mla' else GQA)(c, precision, name='attn')
    scale = params.norm_scale(self, 'attn_norm', c.dim)
    hidden = normed(x_BTD, scale, c.norm_eps, precision)
    decodes = cache is not None
    if decodes:
      out_BTD, cache = attn(hidden, positions_BT, None, cache, prefill)
    else:
      out_BTD = attn(hidden, positions_BT, segments_BT)
    x_BTD += out_BTD
    scale = params.norm_scale(self, 'ffn_norm', c.dim)
    if self.is_moe:
      # Not `normed`: the gate reads the values themselves, so that they are
      # written in any case, and to quantise those reads no more than to
      # quantise with the norm.
      hidden_BTD = norms.rms_norm(x_BTD, scale, c.norm_eps)
      ffn = MoE(c, self.precision, self.parallel, name='ffn')
      out_BTD, stats = ffn(hidden_BTD, mask_BT, decodes)
    else:
      precision = self.precision.of('dense')
      ffn = MLP(c.inter_dim, c.init_std, precision, name='ffn')
      hidden = normed(x_BTD, scale, c.norm_eps, precision)
      out_BTD, stats = ffn(hidden, decodes), None
    x_BTD += out_BTD
    return (x_BTD, stats, cache) if decodes else (x_BTD, stats)
