"""Models of `transformers` with our weights: an implementation not ours.

Builds DeepseekV3ForCausalLM, DeepseekV2ForCausalLM and transformers' MTP
modules from a `ModelConfig`, and copies arrays between their names and our
stacked tree, both ways.  Test support; `torch` lives here and in tests only.

Where transformers 5.23 differs from DeepSeek's released code, and from us:
- V2's router ignores `norm_topk_prob`; the released V2 models have it off.
- V2 masks closed groups with 0 rather than -inf; softmax scores are above 0, so
  the choice is the same.
- V3's latent norms always use eps 1e-6; all released models do.
- MTP hands the next depth its *normed* output, also beyond depth 1.
"""

import jax
import numpy as np
import torch
import transformers
from transformers import modeling_layers

from deepseek_jax.config import ModelConfig

# Our name -> theirs, within one layer.  A matrix is stored [in, out] here and
# [out, in] there, with heads split out here.
_ATTN = {
  ('attn_norm',): 'input_layernorm.weight',
  ('ffn_norm',): 'post_attention_layernorm.weight',
  ('attn', 'wkv_a'): 'self_attn.kv_a_proj_with_mqa.weight',
  ('attn', 'kv_norm'): 'self_attn.kv_a_layernorm.weight',
  ('attn', 'wkv_b'): 'self_attn.kv_b_proj.weight',
  ('attn', 'wo'): 'self_attn.o_proj.weight',
}
_FULL_RANK = {('attn', 'wq'): 'self_attn.q_proj.weight'}
_LOW_RANK = {
  ('attn', 'wq_a'): 'self_attn.q_a_proj.weight',
  ('attn', 'q_norm'): 'self_attn.q_a_layernorm.weight',
  ('attn', 'wq_b'): 'self_attn.q_b_proj.weight',
}
_MLP = {'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}
_DENSE = {('ffn', w): f'mlp.{n}.weight' for w, n in _MLP.items()}
_SHARED = {
  ('ffn', 'shared', w): f'mlp.shared_experts.{n}.weight'
  for w, n in _MLP.items()
}
_MOE = {
  ('ffn', 'gate'): 'mlp.gate.weight',
  ('ffn', 'w1'): 'mlp.experts.gate_up_proj',  # First half of the rows.
  ('ffn', 'w3'): 'mlp.experts.gate_up_proj',  # Second half.
  ('ffn', 'w2'): 'mlp.experts.down_proj',
}
_BIAS = {('ffn', 'bias'): 'mlp.gate.e_score_correction_bias'}
_MTP = {
  ('enorm',): 'enorm.weight',
  ('hnorm',): 'hnorm.weight',
  ('norm',): 'post_norm.weight',
  ('eh_proj',): 'eh_proj.weight',
}


def table(config: ModelConfig) -> dict[tuple, str]:
  """(stack, layer, path...) -> their name, for parameters and biases."""
  attn = _ATTN | (_LOW_RANK if config.mla.q_lora_rank else _FULL_RANK)
  moe = attn | _MOE | (_SHARED if config.moe.n_shared_experts else {})
  if config.moe.score_func == 'sigmoid':
    moe = moe | _BIAS
  dense = config.n_first_dense
  names = {
    ('embed',): 'model.embed_tokens.weight',
    ('norm',): 'model.norm.weight',
  }
  if not config.tie_embeddings:
    names['head',] = 'lm_head.weight'
  for i in range(config.n_layers):
    stack, layer, rows = (
      ('dense_layers', i, attn | _DENSE)
      if i < dense
      else ('moe_layers', i - dense, moe)
    )
    for path, name in rows.items():
      names[stack, layer, *path] = f'model.layers.{i}.{name}'
  for k in range(config.n_mtp_layers):
    for path, name in _MTP.items():
      names['mtp', k, *path] = f'layers.{k}.{name}'
    for path, name in moe.items():
      names['mtp', k, 'block', *path] = f'layers.{k}.mtp_block.{name}'
  return names


def to_names(config: ModelConfig, *trees) -> dict[str, np.ndarray]:
  """Our collections, or gradients of them, as arrays by their names."""
  out = {}
  for key, name in table(config).items():
    x = _find(trees, key)
    if x is None:
      continue
    if '.experts.' in name:
      x = np.swapaxes(x, -1, -2)
    elif x.ndim > 1 and key[-1] not in ('embed', 'head'):
      # wo is [N, U, D]: its output is last; elsewhere the input comes first.
      x = (
        x.reshape(-1, x.shape[-1])
        if key[-1] == 'wo'
        else x.reshape(x.shape[0], -1)
      )
      x = x.T
    out[name] = np.concatenate([out[name], x], 1) if name in out else x
  return out


def _find(trees, key):
  stack, *path = key
  index = path.pop(0) if path else None
  for tree in trees:
    node = tree.get(stack)
    for part in path:
      node = node.get(part) if isinstance(node, dict) else None
    if node is not None:
      return np.asarray(node if index is None else node[index])
  return None


def to_tree(config: ModelConfig, arrays: dict, like):
  """Their arrays, or gradients, in the structure of `like`, ours."""

  def leaf(path, x):
    stack, *inner = (part.key for part in path)
    if not inner:
      return _ours(arrays[names[stack,]], stack, x.shape)
    return np.stack(
      [
        _ours(arrays[names[stack, i, *inner]], inner[-1], shape)
        for i, shape in enumerate([x.shape[1:]] * x.shape[0])
      ]
    )

  names = table(config)
  return jax.tree_util.tree_map_with_path(leaf, like)


def _ours(x, name, shape):
  if x.ndim == 3:  # Experts.
    half = x.shape[1] // 2
    x = {'w1': x[:, :half], 'w3': x[:, half:]}.get(name, x)
    return np.swapaxes(x, 1, 2)
  return (
    x.reshape(shape)
    if name in ('embed', 'head') or x.ndim == 1
    else (x.T.reshape(shape))
  )


def build(config: ModelConfig, *trees):
  """Their causal LM, float32 on CPU, with the weights of our `trees`.

  V2's class if the scores are softmax, else V3's.
  """
  torch.set_num_threads(1)  # Threads of tiny products wait for each other.
  is_v2 = config.moe.score_func == 'softmax'
  cls = (
    transformers.DeepseekV2Config if is_v2 else transformers.DeepseekV3Config
  )
  hf_config = cls(**_shape(config), **_moe(config, is_v2))
  hf_config._attn_implementation = 'eager'
  hf_config._experts_implementation = 'eager'
  model_cls = (
    transformers.DeepseekV2ForCausalLM
    if is_v2
    else transformers.DeepseekV3ForCausalLM
  )
  model = model_cls(hf_config).float()
  _load(model, config, trees, lambda name: not name.startswith('layers.'))
  return model


def build_mtp(config: ModelConfig, model, *trees):
  """Their MTP modules on top of `model`, with the weights of our `trees`."""
  mtp = modeling_layers.MtpModel(model, config.n_mtp_layers).float()
  mtp.config._experts_implementation = 'eager'
  _load(mtp, config, trees, lambda name: name.startswith('layers.'))
  return mtp


def _load(model, config, trees, chosen):
  arrays = {
    name: torch.tensor(np.array(x))
    for name, x in to_names(config, *trees).items()
    if chosen(name)
  }
  missing, unexpected = model.load_state_dict(arrays, strict=False)
  shared = ('lm_head', 'embed_tokens', 'shared_head', 'rotary')
  assert not unexpected, unexpected
  assert all(name.startswith(shared) for name in missing), missing


def _shape(c: ModelConfig) -> dict:
  rope = {'rope_type': 'default', 'rope_theta': c.rope.theta}
  if c.rope.factor > 1:
    rope |= {
      'rope_type': 'yarn',
      'factor': c.rope.factor,
      'original_max_position_embeddings': c.rope.original_seq_len,
      'beta_fast': c.rope.beta_fast,
      'beta_slow': c.rope.beta_slow,
      'mscale': c.rope.mscale,
      'mscale_all_dim': c.rope.mscale,
    }
  return {
    'vocab_size': c.vocab_size,
    'hidden_size': c.dim,
    'intermediate_size': c.inter_dim,
    'num_hidden_layers': c.n_layers,
    'first_k_dense_replace': c.n_first_dense,
    'num_attention_heads': c.n_heads,
    'num_key_value_heads': c.n_heads,
    'q_lora_rank': c.mla.q_lora_rank or None,
    'kv_lora_rank': c.mla.kv_lora_rank,
    'qk_nope_head_dim': c.mla.qk_nope_head_dim,
    'qk_rope_head_dim': c.mla.qk_rope_head_dim,
    'v_head_dim': c.mla.v_head_dim,
    'rms_norm_eps': c.norm_eps,
    'tie_word_embeddings': c.tie_embeddings,
    'max_position_embeddings': int(c.rope.original_seq_len * c.rope.factor),
    'rope_parameters': rope,
  }


def _moe(c: ModelConfig, is_v2: bool) -> dict:
  moe = c.moe
  limited = moe.n_limited_groups < moe.n_expert_groups
  fields = {
    'n_routed_experts': moe.n_routed_experts,
    'n_shared_experts': moe.n_shared_experts,
    'num_experts_per_tok': moe.n_activated_experts,
    'moe_intermediate_size': moe.moe_inter_dim,
    'n_group': moe.n_expert_groups,
    'topk_group': moe.n_limited_groups,
    'norm_topk_prob': moe.norm_topk,
    'routed_scaling_factor': moe.route_scale,
  }
  if is_v2:
    return fields | {
      'topk_method': 'group_limited_greedy' if limited else 'greedy'
    }
  return fields | {'num_mtp_layers': c.n_mtp_layers}
