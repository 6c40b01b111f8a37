"""`config.json` of DeepSeek-V3, R1, V2 and V2-Lite as `ModelConfig`, and back.

Keys that say nothing about the architecture are kept: `from_model(model, like)`
gives `like` itself wherever the two mean the same.  The official inference
repository's `ModelArgs` files are read and written too.
"""

import json
import pathlib
from typing import Any

from deepseek_jax import config as config_lib
from deepseek_jax.config import ModelConfig

# Hugging Face's name -> ours, of what is equal on both sides.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'dim',
  'intermediate_size': 'inter_dim',
  'num_hidden_layers': 'n_layers',
  'first_k_dense_replace': 'n_dense_layers',
  'num_attention_heads': 'n_heads',
  'rms_norm_eps': 'norm_eps',
  'initializer_range': 'init_std',
  'tie_word_embeddings': 'tie_embeddings',
  'num_nextn_predict_layers': 'n_mtp_layers',
  'q_lora_rank': 'mla.q_lora_rank',
  'kv_lora_rank': 'mla.kv_lora_rank',
  'qk_nope_head_dim': 'mla.qk_nope_head_dim',
  'qk_rope_head_dim': 'mla.qk_rope_head_dim',
  'v_head_dim': 'mla.v_head_dim',
  'n_routed_experts': 'moe.n_routed_experts',
  'n_shared_experts': 'moe.n_shared_experts',
  'num_experts_per_tok': 'moe.n_activated_experts',
  'moe_intermediate_size': 'moe.moe_inter_dim',
  'n_group': 'moe.n_expert_groups',
  'topk_group': 'moe.n_limited_groups',
  'norm_topk_prob': 'moe.norm_topk',
  'routed_scaling_factor': 'moe.route_scale',
}
_DEFAULTS = {
  'num_nextn_predict_layers': 0,
  'tie_word_embeddings': False,
  'initializer_range': 0.02,
  'norm_topk_prob': None,  # By model type, below.
}
_ROPE = {
  'factor': 'rope.factor',
  'original_max_position_embeddings': 'rope.original_seq_len',
  'beta_fast': 'rope.beta_fast',
  'beta_slow': 'rope.beta_slow',
  'mscale': 'rope.mscale',
}
# What only one value of has a counterpart here.
_FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'moe_layer_freq': 1}
_FIXED_YARN = {'truncate': True, 'partial_rotary_factor': 1}
_V3, _V2 = 'deepseek_v3', 'deepseek_v2'
_CLASSES = {_V3: 'DeepseekV3ForCausalLM', _V2: 'DeepseekV2ForCausalLM'}
_OF_FP8 = 'fp8_quantization_config'  # What is to be said of the weights in FP8.
_FP8 = {
  'activation_scheme': 'dynamic',
  'fmt': 'e4m3',
  'quant_method': 'fp8',
  'weight_block_size': [128, 128],
}


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    ValueError: if there is no such file, or it holds something else.
  """
  path = pathlib.Path(path)
  try:
    tree = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(f'{path}: no such file') from None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(tree, dict):
    raise ValueError(f'{path}: must be a JSON object')
  return tree


def to_model(hf: dict[str, Any]) -> ModelConfig:
  """The architecture of a `config.json`.

  `balance` and `aux_loss`, which it does not tell, are the paper's.

  Raises:
    ValueError: naming the key, if it is missing or has no counterpart here.
  """
  kind = hf.get('model_type')
  _require(
    kind in _CLASSES, 'model_type', kind, f'use one of {", ".join(_CLASSES)}'
  )
  is_v3 = kind == _V3
  _check_fixed(hf, is_v3)
  leaves = {}
  for name, ours in _FIELDS.items():
    if name not in hf and name not in _DEFAULTS:
      raise ValueError(f'config.json has no {name!r}')
    leaves[ours] = hf.get(name, _DEFAULTS.get(name))
  if leaves['moe.norm_topk'] is None:
    leaves['moe.norm_topk'] = is_v3
  for ours in ('mla.q_lora_rank', 'moe.n_shared_experts'):
    leaves[ours] = leaves[ours] or 0
  if hf.get('topk_method') == 'greedy':  # V2-Lite: groups are not looked at.
    leaves['moe.n_expert_groups'] = leaves['moe.n_limited_groups'] = 1
  leaves |= _rope_leaves(hf)
  if not is_v3:
    leaves |= {
      'moe.score_func': 'softmax',
      'moe.group_score': 'max',
      'moe.balance': 'aux_loss',
      'moe.aux_loss': 'expert',
    }
  tree = {}
  for name, value in leaves.items():
    section, _, leaf = name.rpartition('.')
    (tree.setdefault(section, {}) if section else tree)[leaf] = value
  return config_lib.from_dict(ModelConfig, tree, 'model.')


def from_model(
  c: ModelConfig, like: dict[str, Any] | None = None
) -> dict[str, Any]:
  """The `config.json` of an architecture.

  Args:
    c: the architecture.
    like: where the model came from; what means the same in both, and every key
      that is unknown here, is taken from it.

  Raises:
    ValueError: naming the field, if `DeepseekV3ForCausalLM` and
      `DeepseekV2ForCausalLM` cannot compute it.
  """
  _check_representable(c)
  kind = _V2 if c.moe.score_func == 'softmax' else _V3
  like = like if like and like.get('model_type') == kind else {}
  flat = config_lib.leaves(c)
  if like and _same(like, flat):
    return dict(like)
  fields = {name: flat[ours] for name, ours in _FIELDS.items()}
  fields['first_k_dense_replace'] = c.n_first_dense
  fields['q_lora_rank'] = c.mla.q_lora_rank or None
  context = int(c.rope.factor * c.rope.original_seq_len)
  grouped = c.moe.n_expert_groups > 1
  softmax = 'group_limited_greedy' if grouped else 'greedy'
  fields |= _FIXED | {
    'architectures': [_CLASSES[kind]],
    'model_type': kind,
    'num_key_value_heads': c.n_heads,
    'scoring_func': c.moe.score_func,
    'topk_method': softmax if kind == _V2 else 'noaux_tc',
    'max_position_embeddings': context,
    'rope_theta': c.rope.theta,
    'rope_scaling': _rope_scaling(flat) if c.rope.factor > 1 else None,
  }
  kept = {k: v for k, v in like.items() if k != 'rope_parameters'}
  return kept | {k: v for k, v in fields.items() if kept.get(k, ()) != v}


def describe(hf: dict[str, Any], dtype: str, has_fp8: bool) -> dict[str, Any]:
  """`config.json` of tensors of a dtype (of numpy's name), or FP8 and it.

  A release's `quantization_config` goes with the codes, but is kept, for the
  way back, under a key that nobody else reads.
  """
  key = 'dtype' if 'dtype' in hf else 'torch_dtype'
  hf = hf | {key: dtype}
  kept = hf.pop(_OF_FP8, _FP8)
  if has_fp8:
    return hf | {'quantization_config': hf.get('quantization_config') or kept}
  kept = hf.pop('quantization_config', None) or kept
  return hf | ({_OF_FP8: kept} if kept != _FP8 else {})


def check_fp8(hf: dict[str, Any], has_fp8: bool) -> None:
  """Refuses a `quantization_config` that does not describe the tensors.

  Raises:
    ValueError: naming the key.
  """
  found = hf.get('quantization_config')
  for key in ('quantization_config', _OF_FP8):
    value = hf.get(key, {})
    _require(isinstance(value, dict | None), key, value, 'must be an object')
  if not has_fp8:
    _require(
      found is None,
      'quantization_config',
      found,
      'but no tensor is FP8; remove the key',
    )
    return
  _require(
    found is not None,
    'quantization_config',
    found,
    'but there are FP8 tensors; add the key of the released config.json',
  )
  for key in ('quant_method', 'fmt', 'weight_block_size'):
    _require(
      found.get(key, _FP8[key]) == _FP8[key],
      f'quantization_config.{key}',
      found.get(key),
      f'must be {_FP8[key]}',
    )


def is_power_of_two(hf: dict[str, Any]) -> bool:
  """Whether FP8 scales are powers of two, as from DeepSeek-V3.1 on."""
  quantization = hf.get('quantization_config') or hf.get(_OF_FP8, {})
  return quantization.get('scale_fmt') == 'ue8m0'


def with_powers_of_two(hf: dict[str, Any]) -> dict[str, Any]:
  """`config.json` of FP8 weights for which `is_power_of_two` holds."""
  return hf | {'quantization_config': _FP8 | {'scale_fmt': 'ue8m0'}}


def _require(ok: bool, key: str, value: Any, fix: str) -> None:
  if not ok:
    raise ValueError(f'config.json: {key}={value!r}: {fix}')


def _require_number(key, value):
  ok = isinstance(value, (int, float)) and not isinstance(value, bool)
  _require(ok, key, value, 'must be there, and a number')


def _check_fixed(hf, is_v3):
  fixed = _FIXED | {'scoring_func': 'sigmoid' if is_v3 else 'softmax'}
  if is_v3:  # V2 code knows no other order of the rotated pairs.
    fixed['rope_interleave'] = True
  for key, value in fixed.items():
    _require(hf.get(key, value) == value, key, hf.get(key), f'must be {value}')
  methods = ('noaux_tc',) if is_v3 else ('greedy', 'group_limited_greedy')
  method = hf.get('topk_method', methods[0])
  _require(
    method in methods, 'topk_method', method, f'use {" or ".join(methods)}'
  )
  _require(
    is_v3 or not hf.get('norm_topk_prob'),
    'norm_topk_prob',
    True,
    'V2 models do not renormalise; set it to false',
  )


def _rope_leaves(hf):
  """`rope_scaling` and `rope_theta`, or transformers 5's `rope_parameters`."""
  key = 'rope_scaling' if hf.get('rope_scaling') else 'rope_parameters'
  rope = hf.get(key) or {}
  _require(isinstance(rope, dict), key, rope, 'must be an object or null')
  theta = rope.get('rope_theta', hf.get('rope_theta', 10000.0))
  _require_number('rope_theta', theta)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  _require(
    kind in ('default', 'yarn'), 'rope_scaling.type', kind, 'must be yarn'
  )
  leaves = {'rope.theta': float(theta)}
  if kind == 'yarn':
    return leaves | _yarn_leaves(hf, rope)
  context = hf.get('max_position_embeddings')
  return leaves | ({'rope.original_seq_len': context} if context else {})


def _yarn_leaves(hf, rope):
  """YaRN as `transformers` reads it, its defaults and what wins among them."""
  length = 'original_max_position_embeddings'
  found = {length: hf.get('max_position_embeddings')}
  found |= {'beta_fast': 32, 'beta_slow': 1}
  found |= {name: rope[name] for name in _ROPE if rope.get(name)}
  found[length] = hf.get(length, found[length])
  found['mscale'] = rope.get('mscale_all_dim') or 0
  for name in _ROPE:
    _require_number(f'rope_scaling.{name}', found.get(name))
  for name, value in _FIXED_YARN.items():
    key = f'rope_scaling.{name}'
    got = rope.get(name, value)
    _require(got == value, key, got, f'must be {value}')
  _check_unscaled(rope, found['factor'])
  leaves = {ours: float(found[name]) for name, ours in _ROPE.items()}
  return leaves | {'rope.original_seq_len': int(found[length])}


def _check_unscaled(rope, factor):
  """Refuses a factor on `cos` and `sin`: here only the softmax has one.

  `attention_factor` is that factor; left out, it follows from the other two.
  """
  scale = rope.get('attention_factor')
  if scale is not None:
    fix = 'must be 1 or left out: cos and sin are not scaled here'
    _require(scale == 1, 'rope_scaling.attention_factor', scale, fix)
    return
  mscale, all_dim = rope.get('mscale'), rope.get('mscale_all_dim')
  _require(
    factor <= 1 or (mscale == all_dim and bool(mscale)),
    'rope_scaling.mscale_all_dim',
    all_dim,
    f'must be there and equal mscale={mscale}, which is not 0: cos and sin are '
    'not scaled here',
  )


def _rope_scaling(flat):
  rope = {name: flat[ours] for name, ours in _ROPE.items()}
  rope |= {'mscale_all_dim': rope['mscale'], 'type': 'yarn'}
  # Without it, `transformers` takes two zeros for two missing keys.
  return rope if rope['mscale'] else rope | {'attention_factor': 1.0}


def _same(like, flat):
  """Whether `like` is this architecture, training settings aside."""
  theirs = config_lib.leaves(to_model(like))
  names = [*_FIELDS.values(), *_ROPE.values(), 'rope.theta']
  return all(theirs[name] == flat[name] for name in names)


def _check_representable(c: ModelConfig) -> None:
  moe, is_softmax = c.moe, c.moe.score_func == 'softmax'
  group_score = 'max' if is_softmax else 'top2_sum'
  why = 'has no form in the released layout'
  for field, value, ok in (
    ('attention', c.attention, c.attention == 'mla'),
    ('moe.n_routed_experts', 0, moe.n_routed_experts > 0),
    ('moe.n_shared_experts', 0, moe.n_shared_experts > 0),
    ('moe.capacity_factor', moe.capacity_factor, not moe.capacity_factor),
    ('moe.norm_topk', moe.norm_topk, not (is_softmax and moe.norm_topk)),
    (
      'moe.group_score',
      moe.group_score,
      moe.n_expert_groups == 1 or moe.group_score == group_score,
    ),
  ):
    if not ok:
      raise ValueError(
        f'model.{field}={value!r} {why} (score_func={moe.score_func}): only '
        'models that DeepSeek-V3 or V2 code can run are converted'
      )
