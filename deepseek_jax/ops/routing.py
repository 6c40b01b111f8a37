"""Which experts a token goes to, and with what weight (V3 section 2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import MoEConfig


class Routing(NamedTuple):
  """The decision for T tokens, K experts each.

  Attributes:
    weights_TK: float32, multiplied into each expert's output; 0 where dropped.
    expert_ids_TK: int32, in order of falling (biased) score.
    scores_TE: float32, sigmoid or softmax of the logits, without the bias.
  """

  weights_TK: jax.Array
  expert_ids_TK: jax.Array
  scores_TE: jax.Array


def route(
  logits_TE: jax.Array, bias_E: jax.Array, config: MoEConfig
) -> Routing:
  """Equations 12 to 16: biased, group-limited top-K; unbiased weights.

  The bias takes part in the selection of groups and of experts only.  Experts
  outside the best `n_limited_groups` are masked with -inf, not 0: a negative
  biased score in an open group must still beat every closed one.

  Args:
    logits_TE: float32 token-to-expert affinities.
    bias_E: float32 auxiliary-loss-free bias; receives no gradient.
    config: score function, groups, renormalisation and scale.
  """
  if config.score_func == 'sigmoid':
    scores_TE = jax.nn.sigmoid(logits_TE)
  else:
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
  biased_TE = jax.lax.stop_gradient(scores_TE + bias_E)
  if config.n_limited_groups < config.n_expert_groups:
    biased_TE = _close_groups(biased_TE, config)
  _, expert_ids_TK = jax.lax.top_k(biased_TE, config.n_activated_experts)
  weights_TK = jnp.take_along_axis(scores_TE, expert_ids_TK, axis=-1)
  if config.norm_topk:
    weights_TK /= weights_TK.sum(-1, keepdims=True) + 1e-20
  return Routing(weights_TK * config.route_scale, expert_ids_TK, scores_TE)


def _close_groups(biased_TE: jax.Array, config: MoEConfig) -> jax.Array:
  """-inf for the experts of all but the best `n_limited_groups` groups."""
  groups = config.n_expert_groups
  grouped_TGe = biased_TE.reshape(*biased_TE.shape[:-1], groups, -1)
  if config.group_score == 'top2_sum':
    group_scores_TG = jax.lax.top_k(grouped_TGe, 2)[0].sum(-1)
  else:
    group_scores_TG = grouped_TGe.max(-1)
  _, open_ids = jax.lax.top_k(group_scores_TG, config.n_limited_groups)
  is_open_TG = jax.nn.one_hot(open_ids, groups, dtype=jnp.bool_).any(-2)
  masked = jnp.where(is_open_TG[..., None], grouped_TGe, -jnp.inf)
  return masked.reshape(biased_TE.shape)


def drop_over_capacity(
  routing: Routing, config: MoEConfig, mask_BT: jax.Array
) -> Routing:
  """Zeroes the weights of choices beyond an expert's capacity (GShard).

  An expert takes `ceil(capacity_factor * K * T / E)` choices of one sequence of
  T tokens: first choices before second ones, and earlier tokens before later
  ones.  Capacity per sequence keeps the result independent of the batch around
  it, and padding neither raises the capacity nor takes of it.

  Args:
    routing: of B sequences, arrays [B, T, K] and [B, T, E].
    config: with `capacity_factor` above 0.
    mask_BT: float32, 0 for padding.
  """
  B, T, K = routing.expert_ids_TK.shape
  E = config.n_routed_experts
  capacity_B = jnp.ceil(config.capacity_factor * K * mask_BT.sum(-1) / E)
  ids = routing.expert_ids_TK.swapaxes(1, 2).reshape(B, K * T)
  one_hot = jax.nn.one_hot(ids, E) * jnp.tile(mask_BT, K)[..., None]
  queue = jnp.cumsum(one_hot, axis=1) - one_hot
  position = jnp.take_along_axis(queue, ids[..., None], axis=-1)[..., 0]
  kept = (position < capacity_B[:, None]).reshape(B, K, T).swapaxes(1, 2)
  return routing._replace(weights_TK=jnp.where(kept, routing.weights_TK, 0.0))


def choose_replicas(
  expert_ids_TK: jax.Array, replicas_EX: jax.Array
) -> jax.Array:
  """The copy of its expert that serves each choice: int32 [T, K].

  Copies of an expert take turns over the tokens (V3 section 3.4.1).

  Args:
    expert_ids_TK: int32.
    replicas_EX: int32, the copies of each expert, padded with -1.
  """
  copies_E = (replicas_EX >= 0).sum(-1)
  turn = jnp.arange(expert_ids_TK.shape[0])[:, None]
  return replicas_EX[expert_ids_TK, turn % copies_E[expert_ids_TK]]


def expert_counts(
  expert_ids_TK: jax.Array, n_experts: int, mask_T: jax.Array | None = None
) -> jax.Array:
  """How many of the tokens chose each expert: float32 [E].

  Args:
    expert_ids_TK: int32 [..., T, K].
    n_experts: E.
    mask_T: bool [..., T]; tokens that are padding are not counted.
  """
  ones = jnp.ones(expert_ids_TK.shape, jnp.float32)
  if mask_T is not None:
    ones *= mask_T[..., None]
  counts = jnp.zeros(n_experts, jnp.float32)
  return counts.at[expert_ids_TK.reshape(-1)].add(ones.reshape(-1))


def update_bias(
  bias_E: jax.Array, counts_E: jax.Array, gamma: jax.Array
) -> jax.Array:
  """`b_i + gamma * sign(mean(c) - c_i)`, once per optimizer step.

  `counts_E` are those of the WHOLE global batch: every micro-batch and shard
  (V3 section 2.1.2; arXiv 2408.15664, algorithm 1).  Leading dimensions, such
  as layers, are independent.
  """
  mean = counts_E.mean(-1, keepdims=True)
  return bias_E + gamma * jnp.sign(mean - counts_E)
