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
  mla, dims = config.mla, 2 * config.gqa.head_dim
  if config.attention == 'mla':
    dims = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
  layers = config.n_layers + config.n_mtp_layers
  return 6 * active + 3 * layers * config.n_heads * dims * seq_len
