"""Multi-head, grouped-query and multi-query attention: MLA's baselines."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, PrecisionConfig
from deepseek_jax.layers import params
from deepseek_jax.layers.linear import attention_kept, linear, share
from deepseek_jax.ops import attention, cached_attention, rope

# Keys and values of earlier tokens, each [B, S, n_kv_heads, H].
Cache = tuple[jax.Array, jax.Array]


class GQA(nn.Module):
  """Attention with `n_kv_heads` keys and values shared by groups of heads.

  `n_kv_heads` is N for `attention='mha'`, 1 for 'mqa' (V2 section 2.1).
  Parameters (float32): `wq` [D, N, H], `wk` and `wv` [D, n_kv_heads, H],
  `wo` [N, H, D].  RoPE turns the whole head.
  """

  config: ModelConfig
  precision: PrecisionConfig = PrecisionConfig()

  @nn.compact
  def __call__(
    self,
    x_BTD: Any,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    prefill: bool = False,
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """[B, T, D] to [B, T, D]; `x_BTD`, and a cache of keys, as for `MLA`."""
    c = self.config
    H = c.gqa.head_dim
    x, kept = share(x_BTD, self.precision), None

    def project(name, heads):
      init = params.normal(c.init_std, 'dim', 'heads', None)
      w = self.param(name, init, (c.dim, heads, H), jnp.float32)
      return linear(x, w, name, self.precision, decodes=cache is not None)

    q = rope.rotate(project('wq', c.n_heads), positions_BT, c.rope)
    k = rope.rotate(project('wk', c.n_kv_heads), positions_BT, c.rope)
    v = project('wv', c.n_kv_heads)
    scale = rope.softmax_scale(c.rope, H)
    if cache is None:
      keep = attention_kept(self.precision)
      out = attention.attend(q, *self._repeat(k, v), scale, segments_BT, keep)
      out, kept = out if keep else (out, None)
    elif prefill:
      out, cache = self._attend_chunk(q, (k, v), cache, positions_BT, scale)
    else:
      cache = tuple(
        cached_attention.write_rows(old, new, positions_BT)
        for old, new in zip(cache, (k, v))
      )
      out = cached_attention.attend_rows(q, *cache, positions_BT, scale)
    init = params.normal(c.init_std, 'heads', None, 'dim')
    wo = self.param('wo', init, (c.n_heads, H, c.dim), jnp.float32)
    how = {'saved': kept, 'decodes': cache is not None}
    out_BTD = linear(out, wo, 'wo', self.precision, axes=2, **how)
    return out_BTD if cache is None else (out_BTD, cache)

  def _repeat(self, *heads):
    times = self.config.n_heads // self.config.n_kv_heads
    return (jnp.repeat(x, times, axis=2) for x in heads)

  def _attend_chunk(self, q, new, cache, positions_BT, scale):
    start, T = positions_BT[0, 0], q.shape[1]
    cache = tuple(
      cached_attention.write_chunk(old, x, start) for old, x in zip(cache, new)
    )

    def read(first):
      blocks = (jax.lax.dynamic_slice_in_dim(x, first, T, 1) for x in cache)
      return tuple(self._repeat(*blocks))

    width = self.config.gqa.head_dim
    return cached_attention.attend_chunk(q, read, width, start, scale), cache
