"""How many parameters a model has, and how many a token uses: arithmetic only.

The router's biases are counted where balancing uses them, as DeepSeek counts
them in the released weights.
"""

from deepseek_jax.config import ModelConfig


def attention(config: ModelConfig) -> int:
  """MLA with its two latent norms (V3 equations 1 to 11), or a baseline."""
  D, N = config.dim, config.n_heads
  if config.attention != 'mla':
    return 2 * D * config.gqa.head_dim * (N + config.n_kv_heads)
  c = config.mla
  qk = N * (c.qk_nope_head_dim + c.qk_rope_head_dim)
  q = D * qk
  if c.q_lora_rank:
    q = c.q_lora_rank * (D + 1 + qk)
  kv = D * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
  kv += c.kv_lora_rank * N * (c.qk_nope_head_dim + c.v_head_dim)
  return q + kv + N * c.v_head_dim * D


def layer(config: ModelConfig, is_moe: bool, active: bool = False) -> int:
  """One Transformer layer with its two norms.

  Args:
    config: the architecture.
    is_moe: whether its FFN is a mixture of experts.
    active: count only the routed experts that one token goes to.
  """
  D, moe = config.dim, config.moe
  total = attention(config) + 2 * D
  if not is_moe:
    return total + 3 * D * config.inter_dim
  routed = moe.n_activated_experts if active else moe.n_routed_experts
  total += 3 * D * moe.moe_inter_dim * (routed + moe.n_shared_experts)
  bias = 1 if moe.balance == 'aux_free' else 0
  return total + moe.n_routed_experts * (D + bias)


def routed_experts(config: ModelConfig) -> int:
  """All routed experts of one layer, without the gate."""
  moe = config.moe
  return 3 * config.dim * moe.moe_inter_dim * moe.n_routed_experts


def embedding(config: ModelConfig) -> int:
  """The token embedding, and as much again for an untied head."""
  return config.vocab_size * config.dim


def main_model(config: ModelConfig, active: bool = False) -> int:
  """Everything but MTP, with embedding and head.

  A token looks one row of the embedding up, so that the count which sets the
  FLOPs is `main_model(config, active=True) - embedding(config)` if untied.
  """
  total = embedding(config) * (1 if config.tie_embeddings else 2) + config.dim
  total += config.n_first_dense * layer(config, is_moe=False)
  return total + config.n_moe_layers * layer(config, True, active)


def mtp(config: ModelConfig, active: bool = False) -> int:
  """All MTP modules, without the embedding and head that they share."""
  is_moe = config.moe.n_routed_experts > 0
  module = layer(config, is_moe, active) + 2 * config.dim**2 + 3 * config.dim
  return config.n_mtp_layers * module
