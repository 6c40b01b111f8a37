"""The Transformer, MTP and every attention against float64 equations."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.layers import gqa, mla, moe
from deepseek_jax.models import deepseek
from deepseek_jax.training import step
from tests import reference, tolerances
from tests.drawn import draw

_YARN = {'rope.factor': 40.0, 'rope.original_seq_len': 8}
# Two documents and padding; one document that fills the row.
_SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13], np.int32)


def _float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _layer(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def _exact_forward(config, params, state, tokens, segments, masked):
  """One row, all heads: main hidden, MTP hiddens, counts and losses."""
  mask = (segments > 0).astype(np.float64)
  attended = segments if masked else None
  embeddings = params['embed'][tokens]
  x, counts, losses = embeddings, {'moe_layers': [], 'mtp': []}, []
  for i in range(config.n_first_dense):
    p = _layer(params['dense_layers'], i)
    x, _, _ = reference.block(p, None, x, config, mask, attended)
  for i in range(config.n_moe_layers):
    p, s = _layer((params['moe_layers'], state['moe_layers']), i)
    x, count, loss = reference.block(
      p, s['ffn']['bias'], x, config, mask, attended
    )
    counts['moe_layers'].append(count)
    losses.append(loss)
  hidden = reference.rms_norm(x, params['norm'], config.norm_eps)
  heads = [hidden]
  for k in range(1, config.n_mtp_layers + 1):
    p, s = _layer((params['mtp'], state['mtp']), k - 1)
    ahead = np.zeros_like(embeddings)
    ahead[:-k] = embeddings[k:]
    mask = np.zeros(len(tokens))
    for i in range(len(tokens) - k):
      mask[i] = segments[i] > 0 and segments[i] == segments[i + k]
    bias = s['block']['ffn']['bias']
    hidden, count, loss = reference.mtp_module(
      p, bias, hidden, ahead, config, mask, attended
    )
    heads.append(hidden)
    counts['mtp'].append(count)
    losses.append(loss)
  return heads, counts, losses


class TransformerTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('mtp1', {}, True),
    ('mtp2_unmasked', {'n_mtp_layers': 2, **_YARN}, False),
    (
      'mtp2_v2_style',
      {
        'n_mtp_layers': 2,
        'mla.q_lora_rank': 0,
        'moe.score_func': 'softmax',
        'moe.group_score': 'max',
        'moe.norm_topk': False,
        'moe.aux_loss': 'expert',
        'moe.n_shared_experts': 0,
        'n_dense_layers': 0,
      },
      True,
    ),
    (
      'bfloat16',
      {'n_mtp_layers': 0},
      True,
      'bfloat16',
      tolerances.BFLOAT16,
    ),
  )
  def test_every_head_count_and_loss(
    self,
    changes,
    masked,
    dtype='float32',
    rung=tolerances.COMPONENT_PARITY,
  ):
    config = config_lib.replace(presets.tiny().model, changes)
    params, state = draw(config, (-1.0, 0.3))
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=_SEGMENTS.shape)
    precision = config_lib.PrecisionConfig(dtype)
    model = deepseek.Transformer(config, precision, mask_documents=masked)
    output = jax.jit(model.apply)(
      {'params': params, 'router_state': state}, tokens, _SEGMENTS
    )
    exact = [
      _exact_forward(
        config, _float64(params), _float64(state), tokens[b], segments, masked
      )
      for b, segments in enumerate(_SEGMENTS)
    ]
    actual = [output.hidden_BTD, *output.mtp_hidden]
    self.assertLen(actual, 1 + config.n_mtp_layers)
    for k, head in enumerate(actual):
      for b in range(2):
        # Beyond T - k there is no token to embed, and no target.
        end = _SEGMENTS.shape[1] - k
        tolerances.assert_close(
          head[b, :end],
          exact[b][0][k][:end],
          rung,
          f'depth {k}',
        )
    for name, stats in output.stats.items():
      counts = np.sum([e[1][name] for e in exact], 0)
      np.testing.assert_array_equal(stats.counts_E, counts, name)
      np.testing.assert_array_equal(stats.dropped, 0, name)
    balance = sum(s.balance_loss.sum() for s in output.stats.values())
    tolerances.assert_close(balance, sum(sum(e[2]) for e in exact), rung)

  @parameterized.parameters(1, 2, 3)
  def test_mtp_mask_ends_with_the_document(self, k):
    actual = deepseek.mtp_mask(jnp.asarray(_SEGMENTS), k)
    expected = np.zeros(_SEGMENTS.shape)
    expected[0, : 5 - k] = expected[0, 5 : 11 - k] = expected[1, : 13 - k] = 1
    np.testing.assert_array_equal(actual, expected)

  def test_logits_are_hidden_times_head(self):
    for tied in (False, True):
      config = dataclasses.replace(presets.tiny().model, tie_embeddings=tied)
      params, state = draw(config, None)
      self.assertEqual('head' in params, not tied)
      model = deepseek.Transformer(config)
      variables = {'params': params, 'router_state': state}
      tokens = np.arange(6).reshape(1, 6)

      def both(variables, tokens, model=model):
        logits = model.apply(variables, tokens, method='logits')
        return logits, model.apply(variables, tokens).hidden_BTD

      logits, hidden = jax.jit(both)(variables, tokens)
      chex.assert_shape(logits, (1, 6, config.vocab_size))
      tolerances.assert_close(
        logits,
        np.float64(hidden) @ params['embed' if tied else 'head'].T,
        tolerances.FLOAT32_MATH,
      )

  def test_what_is_computed_with_it_is_not_declared(self):
    changes = {
      'precision.fp8.enabled': True,
      'precision.compute_dtype': 'bfloat16',
      'parallel.expert': 2,
      'train.remat': 'full',
    }
    model = step.build_model(config_lib.replace(presets.tiny(), changes))

    def init(rng):
      return model.init(rng, method=lambda module: module.embed)

    own = jax.eval_shape(init, jax.random.key(0))
    self.assertEqual(step.declare(model), own)

  def test_initial_values(self):
    """N(0, init_std) matrices, unit norms, zero biases; layers differ."""
    config = presets.tiny().model
    model = step.build_model(presets.tiny())
    boxed = step.declare(model)['params']['moe_layers']['ffn']['w1']
    self.assertEqual(boxed.names, ('layers', 'experts', 'dim', 'mlp'))
    variables = step.init_variables(model, seed=0)

    def check(path, x):
      name = path[-1].key
      self.assertEqual(x.dtype, jnp.float32, path)
      if name == 'bias' or name.endswith('norm'):
        np.testing.assert_array_equal(x, float(name != 'bias'), str(path))
        return
      # Ten standard errors of the mean and of the standard deviation.
      tolerance = 10 * config.init_std / np.sqrt(x.size)
      self.assertLess(abs(x.mean()), tolerance, path)
      self.assertLess(abs(x.std() - config.init_std), tolerance, path)

    jax.tree_util.tree_map_with_path(check, variables)
    w1 = variables['params']['moe_layers']['ffn']['w1']
    self.assertGreater(jnp.abs(w1[0] - w1[1]).max(), config.init_std)


class MoELayerTest(parameterized.TestCase):
  @parameterized.parameters(
    {'capacity_factor': 0.75, 'aux_loss': 'gshard', 'balance': 'aux_loss'},
    {'balance': 'none'},
  )
  def test_equations(self, **changes):
    base = presets.tiny().model
    config = dataclasses.replace(
      base, moe=dataclasses.replace(base.moe, **changes)
    )
    params, state = draw(config, (-1.0, 0.3))
    p, s = _layer((params['moe_layers'], state['moe_layers']), 0)
    p, bias = p['ffn'], s['ffn']['bias']
    mask = (_SEGMENTS > 0).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((*mask.shape, config.dim))
    layer = moe.MoE(config, config_lib.PrecisionConfig('float32'))
    y, stats = jax.jit(layer.apply)(
      {'params': p, 'router_state': s['ffn']}, jnp.float32(x), mask
    )
    counts, dropped, loss = 0, 0, 0.0
    for b in range(2):
      row, count, (chosen_of, scores_of) = reference.moe_ffn(
        _float64(p), np.float64(bias), x[b], config, mask[b]
      )
      real = mask[b] > 0
      tolerances.assert_close(y[b, real], row[real], tolerances.FLOAT32_MATH)
      counts += count
      dropped += len(reference.over_capacity(chosen_of, mask[b], config.moe))
      if config.moe.balance != 'none':
        loss += reference.balance_loss(
          chosen_of, scores_of, mask[b], config.moe
        )
    np.testing.assert_array_equal(stats.counts_E, counts)
    self.assertEqual(stats.dropped, dropped)
    self.assertEqual(dropped > 0, config.moe.capacity_factor > 0)
    tolerances.assert_close(stats.balance_loss, loss, tolerances.FLOAT32_MATH)


class GateTest(parameterized.TestCase):
  def test_a_bfloat16_layer_picks_the_experts_of_a_float32_gate(self):
    """Two logits are one number in bfloat16."""
    base = presets.tiny().model
    config = dataclasses.replace(
      base,
      dim=4,
      moe=dataclasses.replace(
        base.moe,
        n_routed_experts=4,
        n_activated_experts=1,
        n_expert_groups=1,
        n_limited_groups=1,
        n_shared_experts=0,
        moe_inter_dim=4,
      ),
    )
    layer = moe.MoE(config, config_lib.PrecisionConfig('bfloat16'))
    x_BTD = jnp.zeros((1, 3, 4), jnp.bfloat16).at[..., 0].set(1)
    mask_BT = jnp.ones((1, 3))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, mask_BT)
    variables = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), nn.meta.unbox(variables)
    )
    logits = jnp.array([0.5, 0.5001, 0.4, 0.3])
    gate = variables['params']['gate'].at[0].set(logits)
    variables['params']['gate'] = gate
    _, stats = jax.jit(layer.apply)(variables, x_BTD, mask_BT)
    np.testing.assert_array_equal(stats.counts_E, [0, 3, 0, 0])


class AttentionLayerTest(parameterized.TestCase):
  @parameterized.parameters('mla', 'mha', 'gqa', 'mqa')
  def test_equations(self, kind):
    gqa_config = config_lib.GQAConfig(n_kv_heads=2, head_dim=6)
    base = dataclasses.replace(
      presets.tiny().model, attention=kind, n_heads=4, gqa=gqa_config
    )
    config = config_lib.replace(base, _YARN)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 13, config.dim)).astype(np.float32)
    positions = np.broadcast_to(np.arange(13), (2, 13))
    module = (mla.MLA if kind == 'mla' else gqa.GQA)(config)
    args = jnp.asarray(x), positions, jnp.asarray(_SEGMENTS)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    params = jax.tree.map(
      lambda s: rng.normal(0.5, 0.3, s.shape).astype(np.float32),
      nn.meta.unbox(shapes)['params'],
    )
    if kind != 'mla':
      heads = {'mha': 4, 'gqa': 2, 'mqa': 1}[kind]
      self.assertEqual(params['wk'].shape, (config.dim, heads, 6))
    actual = jax.jit(module.apply)({'params': params}, *args)
    exact = reference.mla if kind == 'mla' else reference.grouped_query
    for b in range(2):
      expected = exact(_float64(params), np.float64(x[b]), config, _SEGMENTS[b])
      tolerances.assert_close(actual[b], expected, tolerances.COMPONENT_PARITY)
