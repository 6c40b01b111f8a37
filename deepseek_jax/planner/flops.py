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


def bfloat16_per_token(config: ModelConfig, seq_len: int) -> float:
  """The part of `train_per_token` that V3 leaves in BF16 (section 3.3.1).

  The products of attention itself, output heads, gates and `eh_proj`.
  """
  moe, heads = config.moe, 1 + config.n_mtp_layers
  gates = config.n_moe_layers + (
    config.n_mtp_layers if moe.n_routed_experts else 0
  )
  weights = heads * parameters.embedding(config)
  weights += gates * moe.n_routed_experts * config.dim
  weights += config.n_mtp_layers * 2 * config.dim**2
  return 6 * weights + attention_per_token(config, seq_len)
