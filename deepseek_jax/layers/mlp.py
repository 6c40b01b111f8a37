"""The dense SwiGLU feed-forward network, and the shared experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import PrecisionConfig
from deepseek_jax.layers import params
from deepseek_jax.layers.linear import linear, share, swiglu


class MLP(nn.Module):
  """`W2 (silu(W1 x) * W3 x)`; `w1`, `w3` [D, F] and `w2` [F, D], float32."""

  inter_dim: int
  init_std: float
  precision: PrecisionConfig = PrecisionConfig()

  @nn.compact
  def __call__(self, x_BTD: Any, decodes: bool = False) -> jax.Array:
    """[B, T, D], or what `normed` gave, to [B, T, D] in its dtype.

    `decodes`: see `linear`.
    """
    D, F = x_BTD.shape[-1], self.inter_dim
    up = params.normal(self.init_std, 'dim', 'mlp')
    down = params.normal(self.init_std, 'mlp', 'dim')
    w1 = self.param('w1', up, (D, F), jnp.float32)
    w2 = self.param('w2', down, (F, D), jnp.float32)
    w3 = self.param('w3', up, (D, F), jnp.float32)
    x = share(x_BTD, self.precision)
    how = {'precision': self.precision, 'decodes': decodes}
    gate, up = linear(x, w1, 'w1', **how), linear(x, w3, 'w3', **how)
    hidden = swiglu(gate, up, self.precision)
    return linear(hidden, w2, 'w2', **how)
