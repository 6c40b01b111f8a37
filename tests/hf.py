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

import re

import jax
import numpy as np
import torch
import transformers
from transformers import modeling_layers

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import hf_config as released
from deepseek_jax.convert import names

_EXPERT = re.compile(r'(.*\.experts)\.\d+\.(\w+)_proj\.weight')


def to_names(config: ModelConfig, *trees) -> dict[str, np.ndarray]:
  """Our collections, or gradients of them, as arrays by their names."""
  leaves, parts = {}, {}
  for tree in trees:
    leaves |= _flat(tree)
  for tensor in names.tensors(config):
    if tensor.leaf[1:] in leaves and not tensor.copy_of:
      array = tensor.from_jax(leaves[tensor.leaf[1:]][tensor.index])
      parts.setdefault(_place(config, tensor), []).append(array)
  arrays = {}
  for (name, _), found in parts.items():
    # In the order of the table: w1 (gate) before w3 (up).
    x = np.stack(found) if '.experts.' in name else found[0]
    arrays[name] = np.concatenate([arrays[name], x], 1) if name in arrays else x
  return arrays


def to_tree(config: ModelConfig, arrays: dict, like):
  """Their arrays, or gradients, in the structure of `like`, ours."""
  leaves = {path: np.empty_like(x) for path, x in _flat(like).items()}
  for tensor in names.tensors(config):
    if tensor.leaf[1:] not in leaves:
      continue
    name, projection = _place(config, tensor)
    x = arrays[name]
    if projection:
      half = x.shape[1] // 2
      x = {'gate': x[:, :half], 'up': x[:, half:]}.get(projection, x)
      x = x[tensor.index[1]]
    leaves[tensor.leaf[1:]][tensor.index] = tensor.to_jax(x)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[tuple(part.key for part in path)], like
  )


def _flat(tree, path=()):
  if not isinstance(tree, dict):
    return {path: np.asarray(tree)}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, (*path, key))
  return flat


def _place(config: ModelConfig, tensor: names.Tensor) -> tuple[str, str]:
  """(their name in memory, projection of a fused one).

  Experts are one array there, w1 and w3 of them too; MTP is a model of its own.
  """
  name, projection = tensor.name, ''
  match = _EXPERT.fullmatch(name)
  if match:
    projection = match[2]
    kind = 'down_proj' if projection == 'down' else 'gate_up_proj'
    name = f'{match[1]}.{kind}'
  if tensor.leaf[1] != 'mtp':
    return name, projection
  [k] = tensor.index[:1]
  inner = name.removeprefix(f'model.layers.{config.n_layers + k}.')
  inner = inner.replace('shared_head.norm', 'post_norm')
  block = 'mtp_block.' if tensor.leaf[2] == 'block' else ''
  return f'layers.{k}.{block}{inner}', projection


def build(config: ModelConfig, *trees):
  """Their causal LM, float32 on CPU, with the weights of our `trees`.

  V2's class if the scores are softmax, else V3's.
  """
  torch.set_num_threads(1)  # Threads of tiny products wait for each other.
  is_v2 = config.moe.score_func == 'softmax'
  cls = (
    transformers.DeepseekV2Config if is_v2 else transformers.DeepseekV3Config
  )
  fields = released.from_model(config)
  if not is_v2:
    fields['num_mtp_layers'] = config.n_mtp_layers
  hf_config = cls(**fields)
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
