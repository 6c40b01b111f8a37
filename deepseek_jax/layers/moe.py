"""DeepSeekMoE: routed and shared experts (V3 section 2.1.2)."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig, ParallelConfig, PrecisionConfig
from deepseek_jax.kernels import (
  dispatch,
  expert_decode,
  experts,
  few_rows,
  fp8_experts,
)
from deepseek_jax.layers import params
from deepseek_jax.layers.linear import recipe_of
from deepseek_jax.layers.mlp import MLP
from deepseek_jax.ops import (
  losses,
  quantize,
  routing,
)
from deepseek_jax.parallel import expert, sharding


class MoEStats(NamedTuple):
  """What training needs to know of a layer's routing, all float32.

  Attributes:
    counts_E: tokens that chose each expert, padding excluded.
    balance_loss: scalar, summed over sequences; multiply by alpha.
    dropped: scalar, choices dropped over capacity.
  """

  counts_E: jax.Array
  balance_loss: jax.Array
  dropped: jax.Array


class MoE(nn.Module):
  """Shared experts plus the gated sum of each token's K routed experts.

  Parameters (float32): `gate` [D, E], `w1` and `w3` [E, D, F], `w2` [E, F, D],
  and `shared` (an `MLP` of n_shared_experts * F).  The auxiliary-loss-free
  `bias` [E] is in the collection `router_state`: no gradient reaches it.  With
  `replicas` [E, X] beside it, for inference, the three matrices are those of
  all copies of experts; see `inference/load_balance.py`.  They may be quantised
  ones, of a converted checkpoint, also for inference.
  """

  config: ModelConfig
  precision: PrecisionConfig = PrecisionConfig()
  parallel: ParallelConfig = ParallelConfig()

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mask_BT: jax.Array, decodes: bool = False
  ) -> tuple[jax.Array, MoEStats]:
    """Returns the layer's output, without the residual, and its statistics.

    Args:
      x_BTD: normalised input, compute dtype.
      mask_BT: float32, 0 for padding, which is routed but not counted.
      decodes: inference: no gradient is taken, the tokens may be few, and none
        is dropped over capacity, for what follows a token is not known.
    """
    moe = self.config.moe
    route = self._route(x_BTD, decodes)
    dropped = jnp.zeros((), jnp.float32)
    if moe.capacity_factor and not decodes:
      kept = routing.drop_over_capacity(route, moe, mask_BT)
      lost = (kept.weights_TK == 0) & (route.weights_TK != 0)
      dropped = jnp.sum(lost * mask_BT[..., None], dtype=jnp.float32)
      route = kept
    y_BTD = self._routed(x_BTD, route, decodes)
    if moe.n_shared_experts:
      inter_dim = moe.n_shared_experts * moe.moe_inter_dim
      shared = MLP(
        inter_dim,
        self.config.init_std,
        self.precision.of('dense'),
        name='shared',
      )
      y_BTD += sharding.apart(shared(x_BTD, decodes))
    stats = MoEStats(
      routing.expert_counts(route.expert_ids_TK, moe.n_routed_experts, mask_BT),
      self._balance_loss(route, mask_BT),
      dropped,
    )
    return y_BTD, stats

  def _ffn(self, decodes, fp8):
    """The experts' function, of tokens, weights, ids and gate weights."""
    recipe = recipe_of(self.precision) if fp8 else None
    chosen = {'implementation': dispatch.requested(self.precision.kernels)}
    if decodes:
      ffn = expert_decode.expert_ffn
      return functools.partial(ffn, recipe=recipe, **chosen)
    if fp8:
      chosen['recipe'] = recipe
      return functools.partial(fp8_experts.expert_ffn, **chosen)
    return functools.partial(experts.expert_ffn, **chosen)

  def _routed(self, x_BTD, route, decodes):
    """The gated sum of each token's routed experts."""
    B, T, D = x_BTD.shape
    precision = self.precision.of('experts')
    exchange = expert.Exchange.of(self.config.moe, precision, self.parallel)
    ids_TK = route.expert_ids_TK.reshape(B * T, -1)
    if self.has_variable('router_state', 'replicas'):
      replicas_EX = self.get_variable('router_state', 'replicas')
      ids_TK = routing.choose_replicas(ids_TK, replicas_EX)
      # Copies may lie on other nodes than their expert's group.
      exchange = dataclasses.replace(exchange, max_nodes=0)
    weights = self._expert_weights()
    quantized, fp8 = quantize.is_quantized(weights), precision.fp8.enabled
    # To quantise them for every token would cost more than it saves.
    fp8 = fp8 and (quantized or not decodes)
    if not (fp8 or quantized):  # With FP8 they are rounded once, to it.
      weights = [quantize.dense(w, x_BTD.dtype) for w in weights]
    y_TD = expert.routed_ffn(
      x_BTD.reshape(B * T, D),
      *weights,
      ids_TK,
      route.weights_TK.reshape(B * T, -1),
      self._ffn(decodes or quantized and not fp8, fp8),
      exchange,
    )
    return y_TD.reshape(x_BTD.shape)

  def _route(self, x_BTD, decodes):
    """The gate, in float32: a `Routing` with leading dimensions [B, T]."""
    c = self.config
    E = c.moe.n_routed_experts
    init = params.normal(c.init_std, 'dim', None, is_float32=True)
    gate_DE = self.param('gate', init, (c.dim, E), jnp.float32)
    bias = self.variable('router_state', 'bias', jnp.zeros, (E,), jnp.float32)
    x_TD = x_BTD.reshape(-1, c.dim).astype(jnp.float32)
    # By default float32 products are TF32 on Ampere and Hopper.
    how = {'precision': jax.lax.Precision.HIGHEST}
    if decodes:
      how['implementation'] = dispatch.requested(self.precision.kernels)
    multiply = few_rows.multiply if decodes else jnp.matmul
    logits = multiply(x_TD, gate_DE, **how)
    logits = logits.reshape(*x_BTD.shape[:-1], E)
    logits = checkpoint_name(logits, 'routing')

    def choose(logits_BTE):
      return routing.route(logits_BTE, bias.value, c.moe)

    route = sharding.by_sequence(choose)(logits)  # XLA would gather them.
    ids = checkpoint_name(route.expert_ids_TK, 'routing')
    return route._replace(expert_ids_TK=ids)

  def _expert_weights(self):
    c = self.config
    D, F = c.dim, c.moe.moe_inter_dim
    E = sharding.local_experts(c.moe.n_routed_experts)
    if self.has_variable('router_state', 'replicas'):
      E = self.get_variable('params', 'w1').shape[0]  # Copies, too.
    up = params.normal(c.init_std, 'experts', 'dim', 'mlp')
    down = params.normal(c.init_std, 'experts', 'mlp', 'dim')
    w1 = self.param('w1', up, (E, D, F), jnp.float32)
    w2 = self.param('w2', down, (E, F, D), jnp.float32)
    w3 = self.param('w3', up, (E, D, F), jnp.float32)
    return w1, w2, w3

  def _balance_loss(self, route, mask_BT):
    moe = self.config.moe
    if moe.balance == 'none':
      return jnp.zeros((), jnp.float32)
    return losses.balance_loss(
      route.scores_TE,
      route.expert_ids_TK,
      moe,
      mask_BT,
      sharding.batch_sum,
    )
