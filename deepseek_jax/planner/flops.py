"""FLOPs that training a token takes (FACTS 1.9): arithmetic only."""

from deepseek_jax.config import ModelConfig
from deepseek_jax.planner import parameters


def train_per_token(config: ModelConfig, seq_len: int) -> float:
  """Forward and backward of one token, in FLOPs; recomputation not counted.

  6 for each weight of a matmul that the token meets (every weight but the
  embedding, which is looked up), and three times the forward pass of causal
  attention, of which a token sees half its row on average.  V3 without MTP at
  4,096 tokens: 250.5 GFLOP, as published.
  """
  active = parameters.main_model(config, active=True)
  active += parameters.mtp(config, active=True)
  head = parameters.embedding(config)
  if not config.tie_embeddings:
    active -= head
  active += config.n_mtp_layers * head  # Each MTP depth uses the head again.
  return 6 * active + attention_per_token(config, seq_len)


def attention_per_token(config: ModelConfig, seq_len: int) -> float:
  """The part of queries with keys, and of weights with values."""
  mla, dims = config.mla, 2 * config.gqa.head_dim
  if config.attention == 'mla':
    dims = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
  layers = config.n_layers + config.n_mtp_layers
  return 3 * layers * config.n_heads * dims * seq_len


def linears_per_token(config: ModelConfig) -> dict[str, float]:
  """The parts of `train_per_token` that FP8 is for (V3 section 3.3.1).

  By module, as `PrecisionConfig.of` names them.  The rest is always in BF16:
  the products of attention itself, output heads, gates, norms and `eh_proj`.
  """
  moe, n_mtp = config.moe, config.n_mtp_layers
  n_moe, n_dense = config.n_moe_layers, config.n_first_dense
  if moe.n_routed_experts:
    n_moe += n_mtp
  else:
    n_dense += n_mtp
  expert = 3 * config.dim * moe.moe_inter_dim
  dense = n_dense * 3 * config.dim * config.inter_dim
  weights = {
    'attention': (config.n_layers + n_mtp) * parameters.attention(config),
    'dense': dense + n_moe * moe.n_shared_experts * expert,
    'experts': n_moe * moe.n_activated_experts * expert,
  }
  return {module: 6 * n for module, n in weights.items()}
