"""Hugging Face checkpoints there and back, byte for byte, in memory and not."""

import contextlib
import json

import jax
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import convert, presets
from deepseek_jax.convert import hf_config, run
from deepseek_jax.ops import quantize
from deepseek_jax.training import checkpoint, step
from tests import convert_support as support

_UNKNOWN = {
  'ep_size': 1,
  'auto_map': {'AutoConfig': 'x.Y'},
  'rope_theta': 10000,
}


class RoundTripTest(support.FolderTestCase):
  def _source(self, kind, fp8=False, change=None, **changes):
    model = support.model(kind, **changes)
    arrays = support.random_tensors(model, fp8)
    if change:
      change(arrays)
    src = support.write(self.folder / 'src', model, arrays, **_UNKNOWN)
    return src, model, arrays

  @parameterized.parameters(
    ('v3', False), ('v3', True), ('v3_two_depths', False), ('v2', False),
    ('v2_lite', False), ('v2_lite', True),
  )  # fmt: skip
  def test_byte_identical_through_files(self, kind, fp8):
    src, model, arrays = self._source(kind, fp8)
    run.convert(src, self.folder / 'jax', 'jax')
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)
    config, variables, _ = checkpoint.load_for_inference(self.folder / 'jax')
    self.assertEqual(config.model, model)
    # Exactly what a freshly made model has, and codes with their scales.
    fresh = step.build_model(config)
    like = step.abstract_state(fresh, _NoOptimizer)
    self.assertEqual(
      jax.tree.map(
        lambda x: x.shape,
        variables['params'],
        is_leaf=lambda x: isinstance(x, quantize.Quantized),
      ),
      jax.tree.map(lambda x: x.shape, like.params),
    )
    self.assertEqual(
      jax.tree.map(lambda x: x.shape, variables['router_state']),
      jax.tree.map(lambda x: x.shape, like.router_state),
    )
    self.assertEqual(quantize.is_quantized(variables), fp8)
    self.assertEqual(variables.keys(), {'params', 'router_state'})
    self._check_companions(src, self.folder / 'back')

  def _check_companions(self, src, back):
    old, new = (
      json.loads((d / 'config.json').read_text()) for d in (src, back)
    )
    self.assertEqual(new, old)
    self.assertEqual(list(new), list(old))
    name = 'tokenizer_config.json'
    self.assertEqual((back / name).read_text(), (src / name).read_text())

  @parameterized.parameters(('v3', False), ('v3', True), ('v2_lite', False))
  def test_byte_identical_in_memory(self, kind, fp8):
    src, model, arrays = self._source(kind, fp8)
    config, variables = convert.load_hf(src)
    self.assertEqual(config.model, model)
    convert.save_hf(self.folder / 'back', config, variables, like=src)
    support.assert_same(support.read(self.folder / 'back'), arrays)
    self._check_companions(src, self.folder / 'back')
    run.convert(src, self.folder / 'jax', 'jax')
    _, streamed, _ = checkpoint.load_for_inference(self.folder / 'jax')
    jax.tree.map(
      lambda a, b: self.assertEqual(
        np.asarray(a).tobytes(), np.asarray(b).tobytes()
      ),
      streamed,
      quantize.join_scales(variables),
    )

  def test_biases_in_bfloat16_are_float32_in_memory_alone(self):
    def change(arrays):
      for name in arrays:
        if name.endswith('e_score_correction_bias'):
          arrays[name] = arrays[name].astype(support.BF16)

    src, _, arrays = self._source('v3', change=change)
    config, variables = convert.load_hf(src)
    for bias in jax.tree.leaves(variables['router_state']):
      self.assertEqual(bias.dtype, np.float32)
    convert.save_hf(self.folder / 'saved', config, variables)
    saved = support.read(self.folder / 'saved')
    for name, x in saved.items():
      np.testing.assert_array_equal(x, arrays[name].astype(x.dtype), name)
    run.convert(src, self.folder / 'jax', 'jax')
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)

  def test_other_copies_in_the_mtp_layer_survive(self):
    name = 'model.layers.3.shared_head.head.weight'

    def change(arrays):
      arrays[name] = arrays[name] + np.float32(1).astype(support.BF16)

    src, _, arrays = self._source('v3', change=change)
    run.convert(src, self.folder / 'jax', 'jax')
    extra = support.read(self.folder / 'jax')
    self.assertEqual(list(extra), [name])
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)
    config, variables = convert.load_hf(src)
    convert.save_hf(self.folder / 'saved', config, variables)
    support.assert_same(support.read(self.folder / 'saved'), arrays)

  def test_unknown_tensors_are_refused_or_carried_along(self):
    def change(arrays):
      arrays['value_head.weight'] = np.arange(6, dtype=np.int64).reshape(2, 3)

    src, _, arrays = self._source('v3', change=change)
    with self.assertRaisesRegex(ValueError, 'extra.*value_head.weight'):
      run.convert(src, self.folder / 'jax', 'jax')
    self.assertEqual(list(self.folder.iterdir()), [src])
    run.convert(src, self.folder / 'jax', 'jax', keep_extra=True)
    run.convert(
      self.folder / 'jax', self.folder / 'back', 'hf', keep_extra=True
    )
    support.assert_same(support.read(self.folder / 'back'), arrays)
    before = 'jax'
    for folder in 'saved', 'again':
      with self.assertLogs('absl') as logs:
        config, variables = convert.load_hf(self.folder / before)
      self.assertIn('model: value_head.weight', logs.output[0])
      convert.save_hf(self.folder / folder, config, variables)
      support.assert_same(support.read(self.folder / folder), arrays)
      before = folder
    run.convert(src, self.folder / 'official', 'official', keep_extra=True)
    for folder, name in ('jax', 'extra'), ('official', 'rest'):
      (self.folder / folder / f'{name}.safetensors').unlink()
      with self.assertRaisesRegex(ValueError, f'{name}.safetensors is missing'):
        run.plan(self.folder / folder, 'hf', keep_extra=True)

  def test_a_checkpoint_without_its_mtp_layer(self):
    def change(arrays):
      for name in [n for n in arrays if n.startswith('model.layers.3.')]:
        del arrays[name]

    src, _, arrays = self._source('v3', change=change)
    run.convert(src, self.folder / 'jax', 'jax')
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)
    hf = hf_config.read(self.folder / 'back' / 'config.json')
    self.assertEqual(hf['num_nextn_predict_layers'], 0)

  def test_tied_embeddings_have_no_head(self):
    src, _, arrays = self._source('v3', tie_embeddings=True)
    self.assertNotIn('lm_head.weight', arrays)
    run.convert(src, self.folder / 'jax', 'jax')
    (self.folder / 'back').mkdir()
    with contextlib.chdir(self.folder / 'back'):
      run.convert(self.folder / 'jax', '.', 'hf')
    support.assert_same(support.read(self.folder / 'back'), arrays)


class _NoOptimizer:
  """Nothing but an empty state."""

  init = staticmethod(lambda params: ())


class RefusalTest(support.FolderTestCase):
  @parameterized.parameters(
    ({'attention': 'mha'}, 'attention'),
    ({'attention': 'gqa', 'gqa.n_kv_heads': 1}, 'attention'),
    ({'moe.n_routed_experts': 0, 'n_mtp_layers': 0}, 'n_routed_experts'),
    ({'moe.n_shared_experts': 0}, 'n_shared_experts'),
    ({'moe.capacity_factor': 1.5}, 'capacity_factor'),
    ({'moe.group_score': 'max'}, 'group_score'),
    ({'moe.score_func': 'softmax'}, 'norm_topk'),
  )
  def test_ablations_without_a_released_form(self, changes, field):
    model = support.model('v3', **changes)
    with self.assertRaisesRegex(ValueError, f'model.*{field}'):
      hf_config.from_model(model)

  def test_a_softmax_gate_with_a_bias(self):
    model = support.model('v2')
    src = self.folder / 'src'
    support.write(src, model, support.random_tensors(model))
    config, variables = convert.load_hf(src)
    bias = variables['router_state']['moe_layers']['ffn']['bias']
    variables['router_state']['moe_layers']['ffn']['bias'] = bias + 1
    with self.assertRaisesRegex(ValueError, 'ffn/bias is not zero'):
      convert.save_hf(src.parent / 'dst', config, variables)
    del variables['params']['norm']
    with self.assertRaisesRegex(ValueError, 'params/norm is missing'):
      convert.save_hf(src.parent / 'dst', config, variables)
    self.assertFalse((src.parent / 'dst').exists())


class ConfigTest(parameterized.TestCase):
  def test_published_values(self):
    """FACTS 1.1 and the files on the Hub."""
    yarn = {
      'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'mscale': 1.0,
      'mscale_all_dim': 1.0, 'original_max_position_embeddings': 4096,
      'type': 'yarn',
    }  # fmt: skip
    v3 = {
      'architectures': ['DeepseekV3ForCausalLM'], 'aux_loss_alpha': 0.001,
      'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': 7168,
      'initializer_range': 0.006, 'intermediate_size': 18432,
      'kv_lora_rank': 512, 'max_position_embeddings': 163840,
      'model_type': 'deepseek_v3', 'moe_intermediate_size': 2048,
      'moe_layer_freq': 1, 'n_group': 8, 'n_routed_experts': 256,
      'n_shared_experts': 1, 'norm_topk_prob': True,
      'num_attention_heads': 128, 'num_experts_per_tok': 8,
      'num_hidden_layers': 61, 'num_nextn_predict_layers': 1,
      'q_lora_rank': 1536, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64,
      'rms_norm_eps': 1e-06, 'rope_scaling': yarn, 'rope_theta': 10000,
      'routed_scaling_factor': 2.5, 'scoring_func': 'sigmoid',
      'tie_word_embeddings': False, 'topk_group': 4, 'topk_method': 'noaux_tc',
      'v_head_dim': 128, 'vocab_size': 129280,
    }  # fmt: skip
    v2 = v3 | {
      'architectures': ['DeepseekV2ForCausalLM'],
      'model_type': 'deepseek_v2', 'first_k_dense_replace': 1,
      'hidden_size': 5120, 'intermediate_size': 12288,
      'moe_intermediate_size': 1536, 'n_routed_experts': 160,
      'n_shared_experts': 2, 'norm_topk_prob': False, 'num_experts_per_tok': 6,
      'num_hidden_layers': 60, 'routed_scaling_factor': 16.0,
      'scoring_func': 'softmax', 'topk_group': 3,
      'topk_method': 'group_limited_greedy', 'vocab_size': 102400,
    }  # fmt: skip
    del v2['num_nextn_predict_layers']
    lite = v2 | {
      'hidden_size': 2048, 'intermediate_size': 10944,
      'moe_intermediate_size': 1408, 'n_group': 1, 'n_routed_experts': 64,
      'num_attention_heads': 16, 'num_hidden_layers': 27, 'q_lora_rank': None,
      'routed_scaling_factor': 1.0, 'topk_group': 1, 'topk_method': 'greedy',
      'rope_scaling': yarn | {'mscale': 0.707, 'mscale_all_dim': 0.707},
    }  # fmt: skip
    for hf, preset in ((v3, 'deepseek_v3'), (v2, 'deepseek_v2'),
                       (lite, 'deepseek_v2_lite')):  # fmt: skip
      model = presets.PRESETS[preset]().model
      mscale = hf['rope_scaling']['mscale']
      rope = {'rope.factor': 40.0, 'rope.mscale': mscale}
      model = support.config_lib.replace(model, rope)
      self.assertEqual(hf_config.to_model(hf), model, preset)
      self.assertEqual(hf_config.from_model(model, hf), hf)
      again = hf_config.from_model(model)
      self.assertEqual(hf_config.to_model(again), model, preset)
      self.assertContainsSubset(again.keys() & hf.keys(), hf.keys())
      # A change is written, and only that.
      changed = support.config_lib.replace(model, {'moe.route_scale': 3.0})
      expected = hf | {'routed_scaling_factor': 3.0}
      got = hf_config.from_model(changed, hf)
      self.assertEqual({k: got[k] for k in hf}, expected)

  def test_transformers_5_spelling(self):
    model = support.model('v3')
    hf = hf_config.from_model(model)
    rope = hf.pop('rope_scaling')
    rope['rope_type'] = rope.pop('type')
    hf['rope_parameters'] = rope | {'rope_theta': hf.pop('rope_theta')}
    for key in ('topk_method', 'scoring_func', 'moe_layer_freq'):
      del hf[key]
    self.assertEqual(hf_config.to_model(hf), model)

  @parameterized.parameters(
    ({'model_type': 'llama'}, 'model_type'),
    ({'hidden_act': 'gelu'}, 'hidden_act'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'topk_method': 'greedy'}, 'topk_method'),
    ({'hidden_size': 0}, 'model.dim'),
    ({'hidden_size': '64'}, 'model.dim'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2}}, 'rope_scaling.type'),
    ({'rope_scaling': 'x'}, "rope_scaling='x': must be an object"),
    ({'rope_scaling': None, 'rope_parameters': [1]}, 'rope_parameters=.1'),
    ({'rope_interleave': False}, 'rope_interleave=False'),
    ({'rope_scaling.mscale_all_dim': 0.5}, 'mscale_all_dim=0.5'),
    ({'rope_scaling.mscale_all_dim': None}, 'mscale_all_dim=None'),
    ({'rope_scaling.mscale': None}, 'must be there and equal mscale=None'),
    ({'rope_scaling.mscale': 0.0, 'rope_scaling.mscale_all_dim': 0.0},
     'mscale_all_dim=0.0'),
    ({'rope_scaling.attention_factor': 1.3}, 'attention_factor=1.3'),
    ({'rope_scaling.factor': None}, 'rope_scaling.factor=None'),
    ({'rope_scaling.factor': '40'}, "rope_scaling.factor='40'"),
    ({'rope_scaling.truncate': False}, 'truncate=False'),
    ({'rope_scaling.partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling.original_max_position_embeddings': None,
      'max_position_embeddings': None},
     'original_max_position_embeddings=None'),
    ({'rope_theta': None}, 'rope_theta=None'),
  )  # fmt: skip
  def test_bad_values_are_named(self, changes, field):
    hf = hf_config.from_model(support.model('v3'))
    for name, value in changes.items():
      *section, key = name.split('.')
      node = hf[section[0]] if section else hf
      node[key] = value
    with self.assertRaisesRegex(ValueError, field):
      hf_config.to_model(hf)

  def test_a_missing_key_is_named(self):
    hf = hf_config.from_model(support.model('v3'))
    del hf['kv_lora_rank']
    with self.assertRaisesRegex(ValueError, 'kv_lora_rank'):
      hf_config.to_model(hf)


if __name__ == '__main__':
  absltest.main()
