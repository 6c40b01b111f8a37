"""The official repository's shards, there and back, for several rank counts."""

import json
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.convert import hf_config, official, run
from tests import convert_support as support

# Last part of Hugging Face's name -> (official, split axis): what the official
# converter does, as far as these models need it.
_NAMES = {
  'embed_tokens': ('embed', 0), 'lm_head': ('head', 0), 'norm': ('norm', None),
  'input_layernorm': ('attn_norm', None),
  'post_attention_layernorm': ('ffn_norm', None),
  'q_proj': ('wq', 0), 'q_a_proj': ('wq_a', None), 'q_b_proj': ('wq_b', 0),
  'q_a_layernorm': ('q_norm', None),
  'kv_a_proj_with_mqa': ('wkv_a', None), 'kv_a_layernorm': ('kv_norm', None),
  'kv_b_proj': ('wkv_b', 0), 'o_proj': ('wo', 1), 'gate': ('gate', None),
  'gate_proj': ('w1', 0), 'down_proj': ('w2', 1), 'up_proj': ('w3', 0),
}  # fmt: skip
_ENDINGS = {
  'weight': 'weight',
  'weight_scale_inv': 'scale',
  'e_score_correction_bias': 'bias',
}


def _expected(arrays, n_layers, n_experts, n):
  """Rank -> its tensors."""
  ranks = [{} for _ in range(n)]
  for name, x in arrays.items():
    parts = name.removeprefix('model.').split('.')
    if parts[0] == 'layers' and int(parts[1]) >= n_layers:
      continue
    new, axis = _NAMES[parts[-2]]
    rename = {'self_attn': 'attn', 'mlp': 'ffn'}
    parts = [rename.get(p, p) for p in parts[:-2]] + [new, _ENDINGS[parts[-1]]]
    expert = (
      int(parts[parts.index('experts') + 1]) if 'experts' in parts else None
    )
    for rank, held in enumerate(ranks):
      if expert is not None:
        if expert // (n_experts // n) == rank:
          held['.'.join(parts)] = x
      else:
        held['.'.join(parts)] = (
          x if axis is None else np.split(x, n, axis)[rank]
        )
  return ranks


class OfficialTest(support.FolderTestCase):
  @parameterized.product(n=(1, 2, 4), kind=('v3', 'v2_lite'), fp8=(False, True))
  def test_there_and_back(self, n, kind, fp8):
    model = support.model(kind, **support.WIDE)
    if kind == 'v2_lite':
      model = support.config_lib.replace(model, {'mla.q_lora_rank': 0})
    arrays = support.random_tensors(model, fp8)
    src = support.write(self.folder / 'src', model, arrays, ep_size=1)
    shards = self.folder / 'official'
    run.convert(src, shards, 'official', mp=n)
    expected = _expected(arrays, model.n_layers, model.moe.n_routed_experts, n)
    for rank, tensors in enumerate(expected):
      folder = self.folder / f'rank{rank}'
      folder.mkdir()
      (folder / 'm.safetensors').symlink_to(
        shards / f'model{rank}-mp{n}.safetensors'
      )
      support.assert_same(support.read(folder), tensors)
    args = json.loads((shards / official.ARGS).read_text())
    self.assertEqual(args['dim'], model.dim)
    self.assertEqual(args['dtype'], 'fp8' if fp8 else 'bf16')
    run.convert(shards, self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)
    hf = hf_config.read(self.folder / 'back' / 'config.json')
    self.assertEqual(hf, hf_config.read(src / 'config.json'))

  def test_by_way_of_jax_with_model_args_alone(self):
    model = support.model('v3', **support.WIDE, n_mtp_layers=0)
    arrays = support.random_tensors(model, fp8=True)
    src = support.write(self.folder / 'src', model, arrays)
    run.convert(src, self.folder / 'jax', 'jax')
    run.convert(self.folder / 'jax', self.folder / 'official', 'official', mp=2)
    (self.folder / 'official' / 'config.json').unlink()
    run.convert(self.folder / 'official', self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)

  @parameterized.parameters(
    ({'moe.norm_topk': False}, 'norm_topk=False'),
    ({'norm_eps': 1e-5}, 'norm_eps=1e-05'),
    ({'tie_embeddings': True}, 'tie_embeddings=True'),
  )
  def test_what_model_args_cannot_say_is_refused(self, changes, message):
    model = support.model('v3', **changes)
    src = self.folder / 'src'
    support.write(src, model, support.random_tensors(model))
    with self.assertRaisesRegex(ValueError, f'model.*{message}.*--to=hf'):
      run.plan(src, 'official')
    run.plan(src, 'hf')

  @parameterized.parameters(
    ('sigmoid', 64, True),
    ('sigmoid', 7168, False),
    ('softmax', 64, False),
  )
  def test_a_width_by_which_its_gate_is_another_is_told(self, func, dim, told):
    model = support.config_lib.replace(
      support.model('v2_lite'), {'moe.score_func': func, 'dim': dim}
    )
    with mock.patch.object(official.logging, 'warning') as warning:
      official.warn_of_gate(model)
    self.assertEqual(warning.called, told)

  def test_powers_of_two_survive_model_args_alone(self):
    """config_v3.1.json's scale_fmt, there and back."""
    model = support.model('v3', n_mtp_layers=0)
    arrays = support.random_tensors(model, fp8=True)
    src = support.write(self.folder / 'src', model, arrays)
    path = src / 'config.json'
    hf = hf_config.with_powers_of_two(json.loads(path.read_text()))
    path.write_text(json.dumps(hf))
    shards = self.folder / 'official'
    run.convert(src, shards, 'official')
    (shards / 'config.json').unlink()
    args = hf_config.read(shards / official.ARGS)
    self.assertEqual(args['scale_fmt'], 'ue8m0')
    run.convert(shards, self.folder / 'jax', 'jax')
    config = hf_config.read(self.folder / 'jax' / 'config.json')
    self.assertEqual(config['precision']['fp8']['scale'], 'ceil')
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    back = hf_config.read(self.folder / 'back' / 'config.json')
    self.assertTrue(hf_config.is_power_of_two(back))
    run.convert(src, self.folder / 'bf16', 'official', 'bf16')
    bf16 = hf_config.read(self.folder / 'bf16' / official.ARGS)
    self.assertNotIn('scale_fmt', bf16)
    (shards / official.ARGS).write_text(json.dumps(args | {'scale_fmt': 'x'}))
    with self.assertRaisesRegex(ValueError, "scale_fmt='x'"):
      run.plan(shards, 'hf')

  def test_model_args_as_published(self):
    """inference/configs/config_671B.json and config_16B.json."""
    big = {
      'vocab_size': 129280, 'dim': 7168, 'inter_dim': 18432,
      'moe_inter_dim': 2048, 'n_layers': 61, 'n_dense_layers': 3,
      'n_heads': 128, 'n_routed_experts': 256, 'n_shared_experts': 1,
      'n_activated_experts': 8, 'n_expert_groups': 8, 'n_limited_groups': 4,
      'route_scale': 2.5, 'score_func': 'sigmoid', 'q_lora_rank': 1536,
      'kv_lora_rank': 512, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64,
      'v_head_dim': 128, 'dtype': 'fp8',
    }  # fmt: skip
    changes = {'rope.factor': 40.0, 'n_mtp_layers': 0}
    model = support.config_lib.replace(
      support.config_lib.ModelConfig(), changes
    )
    self.assertEqual(official.from_args(big), model)
    self.assertContainsSubset(
      big.items(), official.to_args(model, True).items()
    )
    del big['dim']
    with self.assertRaisesRegex(ValueError, "no 'dim'"):
      official.from_args(big)

  @parameterized.parameters(
    (3, False, {}, 'n_routed_experts=8'),
    (2, False, {'n_heads': 3, 'mla.qk_nope_head_dim': 7,
                'mla.qk_rope_head_dim': 4}, 'axis 0 of .*q_b_proj'),
    (2, True, {}, 'cuts blocks'),
  )  # fmt: skip
  def test_ranks_that_cannot_share(self, n, fp8, changes, message):
    model = support.model('v3', **changes)
    arrays = support.random_tensors(model, fp8)
    src = support.write(self.folder / 'src', model, arrays)
    with self.assertRaisesRegex(ValueError, message):
      run.convert(src, self.folder / 'dst', 'official', mp=n)
    self.assertEqual(list(self.folder.iterdir()), [src])

  def test_damaged_sets_are_refused(self):
    model = support.model('v3')
    src = support.write(
      self.folder / 'src', model, support.random_tensors(model)
    )
    shards = self.folder / 'official'
    run.convert(src, shards, 'official', mp=2)
    first = shards / 'model0-mp2.safetensors'
    other = shards / 'model0-mp4.safetensors'
    first.rename(other)
    with self.assertRaisesRegex(ValueError, 'both mp2 and'):
      run.plan(shards, 'hf')
    other.unlink()
    with self.assertRaisesRegex(
      ValueError, 'model0-mp2.safetensors is missing'
    ):
      run.plan(shards, 'hf')
    (shards / 'model1-mp2.safetensors').rename(first)
    run.convert(src, self.folder / 'again', 'official', mp=2)
    (self.folder / 'again' / first.name).rename(
      shards / 'model1-mp2.safetensors'
    )
    with self.assertRaisesRegex(ValueError, 'experts.* is missing in rank'):
      run.plan(shards, 'hf')


if __name__ == '__main__':
  absltest.main()
