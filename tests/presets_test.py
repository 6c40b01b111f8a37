"""Every preset builds, has the published size, and bad ones are refused."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.models import deepseek
from deepseek_jax.planner import parameters


def _abstract(config):
  """Shapes of all variables, without a single array."""
  init = deepseek.Transformer(config).init
  tokens = jnp.zeros((1, 1), jnp.int32)
  return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), tokens))


def _size(tree):
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _model(name):
  return presets.PRESETS[name]().model


class CountTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_arithmetic_is_the_models_own_shapes(self, name):
    config = _model(name)
    variables = _abstract(config)
    if config.moe.balance != 'aux_free':
      variables.pop('router_state')  # Zeros that nothing reads.
    mtp = sum(_size(tree.pop('mtp', {})) for tree in variables.values())
    self.assertEqual(parameters.mtp(config), mtp)
    self.assertEqual(parameters.main_model(config), _size(variables))
    idle = _size(
      {
        w: variables['params']['moe_layers']['ffn'][w]
        for w in ('w1', 'w2', 'w3')
      }
    )
    moe = config.moe
    idle = idle * (moe.n_routed_experts - moe.n_activated_experts)
    self.assertEqual(
      parameters.main_model(config, active=True),
      _size(variables) - idle // moe.n_routed_experts,
    )

  @parameterized.parameters(
    ({'attention': 'mha', 'moe.n_routed_experts': 0},),
    ({'attention': 'gqa', 'gqa.n_kv_heads': 2, 'n_dense_layers': 3},),
    ({'attention': 'mqa', 'tie_embeddings': True, 'n_mtp_layers': 3},),
    ({'mla.q_lora_rank': 0, 'moe.n_shared_experts': 0, 'n_dense_layers': 0},),
  )
  def test_arithmetic_of_ablations(self, changes):
    config = config_lib.replace(presets.tiny().model, changes)
    self.assertEqual(
      parameters.main_model(config) + parameters.mtp(config),
      _size(_abstract(config)),
    )

  @parameterized.parameters(
    ('deepseek_v3', 671_026_419_200, 37_552_297_472, 36_625_618_432),
    ('deepseek_v2', 235_741_434_880, 21_375_800_320, 20_851_512_320),
    ('deepseek_v2_lite', 15_706_484_224, 2_661_150_208, 2_451_435_008),
  )
  def test_released_models(self, name, total, active, computed):
    """FACTS 1.8; the first is proven by the released weights' byte counts."""
    config = _model(name)
    self.assertEqual(parameters.main_model(config), total)
    self.assertEqual(parameters.main_model(config, active=True), active)
    lookup = parameters.embedding(config)
    self.assertEqual(active - lookup, computed)

  def test_v3_in_detail(self):
    config = _model('deepseek_v3')
    self.assertEqual(parameters.attention(config), 187_107_328)
    self.assertEqual(parameters.layer(config, True), 11_507_286_272)
    self.assertEqual(parameters.layer(config, True, active=True), 585_318_656)
    self.assertEqual(parameters.layer(config, False), 583_483_392)
    self.assertEqual(parameters.mtp(config), 11_610_068_224)
    # The checkpoint: embedding and head again for MTP, and FP8 block scales.
    stored = parameters.main_model(config) + parameters.mtp(config)
    stored += 2 * parameters.embedding(config)
    self.assertEqual(stored + 41_540_496, 684_531_386_000)

  @parameterized.parameters(('loss_free_1b', 1e9), ('loss_free_3b', 3e9))
  def test_loss_free_models_have_about_the_stated_size(self, name, stated):
    ratio = parameters.main_model(_model(name)) / stated
    self.assertBetween(ratio, 0.8, 1.1)  # The FFN's width is not published.


class PresetTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_survives_json(self, name):
    config = presets.PRESETS[name]()
    tree = json.loads(json.dumps(config_lib.to_dict(config)))
    self.assertEqual(config_lib.from_dict(config_lib.Config, tree), config)
    self.assertEqual(config_lib.diff(config, config), {})

  def test_v3_is_the_default_model(self):
    self.assertEqual(presets.deepseek_v3().model, config_lib.ModelConfig())

  @parameterized.parameters(*presets.PRESETS)
  def test_v3_alone_is_in_fp8_and_has_the_papers_map(self, name):
    """FACTS 3.1, whose formats and tiles are the defaults of `FP8Config`."""
    precision = presets.PRESETS[name]().precision
    enabled = name == 'deepseek_v3'
    self.assertEqual(precision.fp8, config_lib.FP8Config(enabled=enabled))
    if enabled:
      other = dataclasses.replace(precision, fp8=config_lib.FP8Config())
      self.assertEqual(other, config_lib.PrecisionConfig())
      self.assertEqual(precision.mu_dtype, 'bfloat16')
      self.assertEqual(precision.nu_dtype, 'bfloat16')

  def test_quickstart_has_every_part_of_v3(self):
    for name in ('quickstart', 'tiny'):
      config = _model(name)
      self.assertEqual(config.attention, 'mla')
      moe = config.moe
      parts = (
        config.mla.q_lora_rank, config.n_mtp_layers, config.n_first_dense,
        config.n_moe_layers, moe.n_shared_experts, moe.norm_topk,
        moe.n_expert_groups - moe.n_limited_groups,
      )  # fmt: skip
      self.assertTrue(all(parts), name)
      self.assertEqual(
        (moe.score_func, moe.balance, moe.aux_loss, moe.group_score),
        ('sigmoid', 'aux_free', 'sequence', 'top2_sum'),
      )

  def test_published_token_counts(self):
    """Steps times tokens a step, the batch ramp left out."""
    for name, tokens in (
      ('loss_free_1b', 100e9),
      ('loss_free_3b', 200e9),
      ('deepseek_v2_lite', 5.7e12),
    ):
      config = presets.PRESETS[name]()
      a_step = config.data.batch_size * config.data.seq_len
      # The loss-free paper rounds: its 1B saw 40,000 steps, "100B" tokens.
      self.assertBetween(config.train.steps * a_step / tokens, 0.94, 1.01)

  @parameterized.parameters(
    ('deepseek_v2', 2.4e-4, 'v2', '0.003', 9216, 2304, 225 / 8100),
    ('deepseek_v2_lite', 4.2e-4, 'v2_lite', '0.001', 4608, 0, None),
  )
  def test_published_settings_of_v2(
    self, name, lr, schedule, alpha, batch, start, ramp
  ):
    """V2 section 3.1 and appendix B: what is trained, beside the shapes."""
    config = presets.PRESETS[name]()
    optim, data = config.optim, config.data
    self.assertEqual((optim.lr, optim.schedule), (lr, schedule))
    self.assertEqual((optim.warmup_steps, optim.alpha), (2000, alpha))
    self.assertEqual((data.batch_size, data.batch_size_start), (batch, start))
    if ramp:
      self.assertEqual(data.batch_ramp_fraction, ramp)
    self.assertEqual((optim.gamma, optim.mtp_weight), ('0', '0'))
    self.assertEqual((data.seq_len, config.model.n_mtp_layers), (4096, 0))


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('model.moe.n_expert_groups', 3, 'use one of'),
    ('model.moe.n_limited_groups', 5, 'use 1 to'),
    ('model.moe.n_limited_groups', 0, 'use 1 to'),
    ('model.moe.n_activated_experts', 5, 'activate fewer'),
    ('model.moe.n_activated_experts', 0, 'at least 1'),
    ('model.moe.n_expert_groups', 8, 'fewer groups'),
    ('model.moe.capacity_factor', -1.0, 'at least 0'),
    ('model.moe.score_func', 'tanh', 'sigmoid'),
    ('model.moe.balance', 'aux', 'aux_free'),
    ('model.moe.aux_loss', 'batch', 'micro_batch_size'),
    ('model.mla.qk_rope_head_dim', 5, 'even'),
    ('model.mla.kv_lora_rank', 0, 'at least 1'),
    ('model.mla.q_lora_rank', -1, 'at least 0'),
    ('model.gqa.head_dim', 7, 'even'),
    ('model.rope.theta', 1.0, 'more than 1'),
    ('model.rope.theta', float('inf'), 'float32 has no such'),
    ('model.rope.mscale', float('nan'), 'float32 has no such'),
    ('model.moe.route_scale', float('nan'), 'above 0'),
    ('model.moe.route_scale', -1.0, 'above 0'),
    ('model.rope.factor', 0.5, 'at least 1'),
    ('model.rope.factor', float('nan'), 'at least 1'),
    ('model.rope.beta_fast', 0.5, 'beta_slow'),
    ('model.rope.beta_fast', float('inf'), 'float32 has no such'),
    ('model.n_dense_layers', 9, '0 to n_layers'),
    ('model.n_mtp_layers', 32, 'data.seq_len'),
    ('model.norm_eps', 0.0, '(0, 1)'),
    ('model.init_std', float('inf'), '(0, 1)'),
    ('model.attention', 'flash', 'mla'),
    ('model.vocab_size', 0, 'at least 1'),
    ('precision.compute_dtype', 'fp8', 'bfloat16'),
    ('precision.mu_dtype', 'float16', 'bfloat16'),
    ('precision.nu_dtype', 'float16', 'bfloat16'),
    ('data.val_fraction', 1.0, '(0, 1)'),
    ('data.fim_rate', 1.5, '[0, 1]'),
    ('data.seq_len', 1, 'at least 2'),
    ('data.batch_size_start', 16, 'batch_size=8'),
    ('data.source', '', 'name a source'),
    ('optim.b2', 1.0, '[0, 1)'),
    ('optim.clip_norm', 0.0, 'above 0'),
    ('optim.lr', -1.0, 'at least 0'),
    ('optim.gamma', '0.1@0.5', 'fractions increasing'),
    ('optim.lr', 1e39, 'float32 has no such'),
    ('optim.eps', 1e-46, 'float32 has no such'),
    ('optim.alpha', '1e+40', 'float32 has no such'),
    ('optim.alpha', 'x', 'fractions increasing'),
    ('optim.mtp_weight', '1,2@0.9,3@0.8', 'fractions increasing'),
    ('optim.schedule', 'linear', 'cosine'),
    ('train.steps', 0, 'at least 1'),
    ('train.micro_batch_size', 3, 'must divide'),
    ('train.remat', 'half', 'selective'),
    ('train.nonfinite', 'ignore', 'stop'),
    ('train.seed', 'one', 'type int'),
    ('train.seed', 2**32, '4294967295'),
    ('model.tie_embeddings', 1, 'type bool'),
  )
  def test_names_the_field_the_value_and_the_fix(self, field, value, fix):
    base = presets.tiny()
    if value == 'batch':  # Defined over the whole batch: no accumulation.
      base = config_lib.replace(base, {'train.micro_batch_size': 2})
    with self.assertRaises(ValueError) as caught:
      config_lib.replace(base, {field: value})
    message = str(caught.exception)
    self.assertIn(field.rpartition('.')[2], message)
    self.assertIn(str(value), message)
    self.assertIn(fix, message)

  def test_heads_that_the_groups_do_not_divide(self):
    changes = {'model.attention': 'gqa', 'model.gqa.n_kv_heads': 3}
    with self.assertRaisesRegex(ValueError, 'n_kv_heads=3.*n_heads=2'):
      config_lib.replace(presets.tiny(), changes)

  def test_unknown_fields(self):
    for field in ('model.moe.experts', 'lr', 'a.b.c', 'optim.lr.x'):
      with self.assertRaisesRegex(ValueError, field.split('.')[0]):
        config_lib.replace(presets.tiny(), {field: 1})

  def test_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      presets.tiny().model.dim = 3


if __name__ == '__main__':
  absltest.main()
