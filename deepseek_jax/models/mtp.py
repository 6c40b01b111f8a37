"""Multi-token prediction modules (V3 section 2.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig, ParallelConfig, PrecisionConfig
from deepseek_jax.kernels import dispatch, few_rows
from deepseek_jax.layers import params
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.moe import MoEStats
from deepseek_jax.ops import norms


class MTP(nn.Module):
  """One depth: predicts token i + k + 1 from h_i and the token at i + k.

  Parameters (float32): `enorm`, `hnorm` [D], `eh_proj` [2D, D], `block` (a
  layer like the main model's last), `norm` [D] (`shared_head.norm` of the
  released weights).  Embedding and head are the main model's.

  `eh_proj` takes the normalised embedding first and the hidden state second, as
  in the released weights; equation 21 prints the other order.
  """

  config: ModelConfig
  precision: PrecisionConfig = PrecisionConfig()
  parallel: ParallelConfig = ParallelConfig()

  @nn.compact
  def __call__(
    self,
    hidden_BTD: jax.Array,
    embeddings_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    mask_BT: jax.Array,
    cache: Any = None,
    prefill: bool = False,
  ) -> tuple[jax.Array, MoEStats | None] | tuple[Any, ...]:
    """Equations 21 to 23.

    Args:
      hidden_BTD: h^{k-1} as the output head takes it: after the main model's
        final norm for depth 1, else after the previous depth's `norm`.  The
        report leaves this open; vLLM runs the released depth 1 so, Megatron
        and transformers chain any number of depths so.
      embeddings_BTD: Emb(t_{i+k}).
      positions_BT: int32.
      segments_BT: int32 or None, as for `Block`.
      mask_BT: float32, 0 where t_{i+k} does not exist.
      cache: of `block`, for inference, and
      prefill: as for `Block`.

    Returns:
      h^k after `norm`, for the output head and depth k + 1; the statistics of
      routing; the cache, if there was one.
    """
    c = self.config

    def norm(name, x):
      return norms.rms_norm(x, params.norm_scale(self, name, c.dim), c.norm_eps)

    both = jnp.concatenate(
      [norm('enorm', embeddings_BTD), norm('hnorm', hidden_BTD)], -1
    )
    init = params.normal(c.init_std, 'dim', None)
    eh_proj = self.param('eh_proj', init, (2 * c.dim, c.dim), jnp.float32)
    is_moe = c.moe.n_routed_experts > 0
    block = Block(c, is_moe, self.precision, self.parallel, name='block')
    x_BTD = self._project(both, eh_proj.astype(both.dtype), cache is not None)
    x_BTD, *rest = block(
      x_BTD, positions_BT, segments_BT, mask_BT, cache, prefill
    )
    # The gradient of `norm` needs it, and else would run the experts again.
    return norm('norm', checkpoint_name(x_BTD, 'mtp_out')), *rest

  def _project(self, both, eh_proj, decodes):
    if not decodes:
      return checkpoint_name(both @ eh_proj, 'eh_proj')
    chosen = dispatch.requested(self.precision.kernels)
    return few_rows.multiply(both, eh_proj, implementation=chosen)
