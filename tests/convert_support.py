"""Synthetic released checkpoints for the tests of conversion."""

import dataclasses
import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import safetensors
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.convert import hf_config, names

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn

_CODES = {
  'float32': 'F32',
  'bfloat16': 'BF16',
  'float8_e4m3fn': 'F8_E4M3',
  'int64': 'I64',
}

# Kinds of models: changes of presets.tiny.
_V2 = {
  'moe.score_func': 'softmax',
  'moe.group_score': 'max',
  'moe.norm_topk': False,
  'moe.balance': 'aux_loss',
  'moe.aux_loss': 'expert',
  'moe.n_shared_experts': 2,
  'moe.route_scale': 16.0,
  'n_mtp_layers': 0,
}
_YARN = {'rope.factor': 40.0, 'rope.original_seq_len': 16}
KINDS = {
  'v3': _YARN,
  'v3_two_depths': {'n_mtp_layers': 2},
  'v2': _V2 | _YARN | {'rope.mscale': 0.707},
  'v2_lite': _V2
  | {
    'mla.q_lora_rank': 0,
    'moe.n_expert_groups': 1,
    'moe.n_limited_groups': 1,
    'moe.route_scale': 1.0,
  },
}
# Widths of whole and of ragged FP8 blocks, which four ranks can share.
WIDE = {
  'dim': 192,
  'inter_dim': 512,
  'n_heads': 4,
  'mla.q_lora_rank': 64,
  'mla.kv_lora_rank': 48,
  'mla.qk_nope_head_dim': 128,
  'mla.qk_rope_head_dim': 128,
  'mla.v_head_dim': 128,
  'moe.moe_inter_dim': 512,
}


def model(kind, **changes):
  """The architecture of a kind."""
  base = dataclasses.replace(presets.tiny().model, init_std=0.02)
  return config_lib.replace(base, KINDS[kind] | changes)


def random_tensors(config, fp8=False, seed=0):
  """Released name -> array: BF16 or FP8 with scales, biases in float32."""
  rng = np.random.default_rng(seed)
  arrays = {}
  for tensor in names.tensors(config):
    if tensor.copy_of:
      arrays[tensor.name] = arrays[tensor.copy_of]
      continue
    x = 0.1 * rng.standard_normal(tensor.shape, np.float32)
    if len(tensor.shape) == 1:
      x += 1
    if tensor.leaf[0] == 'router_state':
      arrays[tensor.name] = x
    elif fp8 and tensor.is_linear:
      arrays[tensor.name] = (100 * x).astype(FP8)
      scales = rng.uniform(1e-4, 1e-3, tensor.scale.shape)
      arrays[tensor.scale.name] = scales.astype(np.float32)
    else:
      arrays[tensor.name] = x.astype(BF16)
  return arrays


def write(directory, config, arrays, n_files=3, **keys):
  """A directory as on the Hub: files, index, config and a tokenizer."""
  directory.mkdir(parents=True)
  ordered = sorted(arrays)
  groups = [ordered[i::n_files] for i in range(n_files)]
  located = {}
  for i, group in enumerate(groups):
    name = f'model-{i + 1:05d}-of-{n_files:05d}.safetensors'
    write_file(directory / name, {k: arrays[k] for k in group})
    located |= dict.fromkeys(group, name)
  index = {'metadata': {}, 'weight_map': located}
  path = directory / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  has_fp8 = any(x.dtype == FP8 for x in arrays.values())
  hf = hf_config.from_model(config) | keys
  hf = hf_config.describe(hf, 'bfloat16', has_fp8)
  (directory / 'config.json').write_text(json.dumps(hf))
  (directory / 'tokenizer_config.json').write_text('{"chat_template": "x"}')
  return directory


def write_file(path, arrays):
  """A safetensors file in any order, as the format's description says."""
  header, at = {'__metadata__': {'format': 'pt'}}, 0
  for name, x in arrays.items():
    header[name] = {
      'dtype': _CODES[x.dtype.name],
      'shape': x.shape,
      'data_offsets': [at, at + x.nbytes],
    }
    at += x.nbytes
  text = json.dumps(header).encode()
  data = b''.join(x.tobytes() for x in arrays.values())
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def read(directory):
  """Every tensor of a directory, read by the reference implementation."""
  dtypes = {code: np.dtype(name) for name, code in _CODES.items()}
  arrays = {}
  for path in sorted(directory.glob('*.safetensors')):
    for name, tensor in safetensors.deserialize(path.read_bytes()):
      assert name not in arrays, name
      x = np.frombuffer(tensor['data'], dtypes[tensor['dtype']])
      arrays[name] = x.reshape(tensor['shape'])
  return arrays


def assert_same(actual, expected):
  """The same names with the same dtypes, shapes and bytes."""
  assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
  for name, x in expected.items():
    y = actual[name]
    assert (y.dtype, y.shape) == (x.dtype, x.shape), (name, y.dtype, y.shape)
    assert y.tobytes() == x.tobytes(), name


class FolderTestCase(parameterized.TestCase):
  """A test with an empty folder of its own."""

  def setUp(self):
    super().setUp()
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    self.folder = pathlib.Path(temporary.name)
