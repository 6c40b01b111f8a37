"""How much a decoder keeps per token of context: arithmetic only."""

from deepseek_jax.config import ModelConfig


def elements_per_token(config: ModelConfig) -> int:
  """Numbers kept per token by all layers of the main model (V2 table 1).

  MLA keeps one latent and one rotated key, `C + P`, whatever the number of
  heads; MHA, GQA and MQA keep a key and a value for each key-value head.
  """
  mla, gqa = config.mla, config.gqa
  if config.attention == 'mla':
    per_layer = mla.kv_lora_rank + mla.qk_rope_head_dim
  else:
    per_layer = 2 * config.n_kv_heads * gqa.head_dim
  return config.n_layers * per_layer


def bytes_per_token(config: ModelConfig) -> int:
  """The same in bytes, at the two bytes a number of BF16."""
  return 2 * elements_per_token(config)
