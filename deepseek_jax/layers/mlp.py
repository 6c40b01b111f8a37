"""The dense SwiGLU feed-forward network, and the shared experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.layers import params


class MLP(nn.Module):
  """`W2 (silu(W1 x) * W3 x)`; `w1`, `w3` [D, F] and `w2` [F, D], float32."""

  inter_dim: int
  init_std: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] to [B, T, D] in the dtype of `x_BTD`."""
    D, F = x_BTD.shape[-1], self.inter_dim
    up = params.normal(self.init_std, 'dim', 'mlp')
    down = params.normal(self.init_std, 'mlp', 'dim')
    w1 = self.param('w1', up, (D, F), jnp.float32).astype(x_BTD.dtype)
    w2 = self.param('w2', down, (F, D), jnp.float32).astype(x_BTD.dtype)
    w3 = self.param('w3', up, (D, F), jnp.float32).astype(x_BTD.dtype)
    gate = checkpoint_name(x_BTD @ w1, 'ffn_up')
    up = checkpoint_name(x_BTD @ w3, 'ffn_up')
    return (jax.nn.silu(gate) * up) @ w2
