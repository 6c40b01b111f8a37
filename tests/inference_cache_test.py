"""Cached forward passes against the training forward, in every form."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.inference import prefill, weights
from deepseek_jax.ops import cached_attention
from deepseek_jax.planner import cache as planner
from deepseek_jax.training import step as step_lib
from tests import tolerances

_LENGTHS = (9, 1, 14)  # Prompts; 20 tokens are then known of each text.
_TOTAL, _CAPACITY, _CHUNK = 20, 32, 5

_SMALL = {
  'model.n_layers': 2,
  'model.vocab_size': 64,
  'model.init_std': 0.2,
}
# Beyond the original context, where YaRN and its scale show.
_YARN = {'model.rope.factor': 4.0, 'model.rope.original_seq_len': 8}
_VARIANTS = {
  'mla_yarn_two_mtp': _YARN | {'model.n_mtp_layers': 2},
  'mla_without_q_lora': {'model.mla.q_lora_rank': 0, 'model.n_mtp_layers': 0},
  'gqa': {
    'model.attention': 'gqa',
    'model.n_heads': 4,
    'model.gqa.n_kv_heads': 2,
    'model.gqa.head_dim': 8,
    'model.n_mtp_layers': 1,
    'model.moe.n_routed_experts': 0,
  },
}


@functools.cache
def _case(name):
  """(model, unstacked weights, texts, the training forward's `Output`)."""
  config = config_lib.replace(presets.tiny(), _SMALL | _VARIANTS[name])
  model = step_lib.build_model(config)
  variables = step_lib.init_variables(model, 0)
  texts = np.random.default_rng(0).integers(0, 64, (3, _TOTAL), np.int32)
  expected = jax.jit(model.apply)(variables, texts)
  return model, weights.unstack(model, variables), texts, expected


def _prefilled(name, window=1):
  model, variables, texts, _ = _case(name)
  M = model.config.n_mtp_layers
  empty = cache_lib.init(model.config, 3, _CAPACITY, jnp.float32, M)
  prompts = [row[:n].tolist() for row, n in zip(texts, _LENGTHS)]
  return prefill.prefill(model, variables, empty, prompts, window, _CHUNK)


def _extend(name, cache, T):
  """`T` more tokens of every text: (hidden of each depth, cache)."""
  model, variables, texts, _ = _case(name)
  texts = jnp.pad(texts, ((0, 0), (0, T + len(cache.mtp))))
  at = cache.lengths_B[:, None] + jnp.arange(T)
  rows = jnp.arange(3)[:, None]
  mask = jnp.ones((3, T), jnp.float32)
  hidden, layers, load = model.apply(
    variables, texts[rows, at], at, mask, cache.layers, method='extend'
  )
  hiddens, mtp = [hidden], []
  for k, own in enumerate(cache.mtp, 1):
    ahead, own, _ = model.apply(
      variables,
      k,
      hiddens[-1],
      texts[rows, at + k],
      at,
      mask,
      own,
      method='extend_ahead',
    )
    hiddens.append(ahead)
    mtp.append(own)
  cache = cache_lib.Cache(layers, tuple(mtp), cache.lengths_B + T)
  return hiddens, cache, load


class CachedForwardTest(parameterized.TestCase):
  @parameterized.parameters(*_VARIANTS)
  def test_prefill_in_chunks_is_the_training_forward(self, name):
    expected = _case(name)[3].hidden_BTD
    last = _prefilled(name, window=max(_LENGTHS)).last_BWD
    for row, want, n in zip(last, expected, _LENGTHS):
      tolerances.assert_close(row[-n:], want[:n], tolerances.DEEP_MODEL)

  @parameterized.product(name=list(_VARIANTS), T=[1, 3])
  def test_decoding_is_the_training_forward_at_every_depth(self, name, T):
    expected = _case(name)[3]
    cache, n_mtp = _prefilled(name).cache, len(expected.mtp_hidden)
    extend = jax.jit(functools.partial(_extend, name, T=T))
    want = [expected.hidden_BTD, *expected.mtp_hidden]
    # A prompt's last MTP entries need tokens that were not known: those here
    # are wrong up to the last `n_mtp` positions of the prompt.
    cache = cache._replace(lengths_B=cache.lengths_B - n_mtp)
    for _ in range(6 // T):
      at = np.asarray(cache.lengths_B)[:, None] + np.arange(T)
      hiddens, cache, _ = extend(cache)
      known = (at >= 0) & (at < _TOTAL - n_mtp)
      for got, full in zip(hiddens, want):
        picked = full[np.arange(3)[:, None], np.clip(at, 0, _TOTAL - 1)]
        tolerances.assert_close(
          got[known], picked[known], tolerances.DEEP_MODEL
        )

  def test_in_bfloat16_all_forms_are_near_one_another(self):
    model, variables, texts, expected = _case('mla_yarn_two_mtp')
    half = model.clone(
      precision=config_lib.PrecisionConfig(compute_dtype='bfloat16')
    )
    empty = cache_lib.init(model.config, 3, _CAPACITY, jnp.bfloat16)
    prompts = [row[:n].tolist() for row, n in zip(texts, _LENGTHS)]
    done = prefill.prefill(
      half, variables, empty, prompts, max(_LENGTHS), _CHUNK
    )
    for row, want, n in zip(done.last_BWD, expected.hidden_BTD, _LENGTHS):
      tolerances.assert_close(row[-n:], want[:n], tolerances.BFLOAT16)
    at = done.cache.lengths_B[:, None]
    hidden, _, _ = jax.jit(functools.partial(half.apply, method='extend'))(
      variables,
      texts[np.arange(3)[:, None], at],
      at,
      jnp.ones((3, 1)),
      done.cache.layers,
    )
    want = expected.hidden_BTD[np.arange(3)[:, None], np.asarray(at)]
    tolerances.assert_close(hidden, want, tolerances.BFLOAT16)

  def test_stacked_parameters_serve_as_well(self):
    name = 'mla_yarn_two_mtp'
    model, variables, _, _ = _case(name)
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    stacked = {
      c: {k: stack(*v) if isinstance(v, list) else v for k, v in tree.items()}
      for c, tree in variables.items()
    }
    for layers in stacked['params'].values():
      if isinstance(layers, dict):
        attn = layers.get('block', layers)['attn']
        del attn['w_uk'], attn['w_uv']
    args = (
      jnp.ones((1, 1), jnp.int32),
      jnp.zeros((1, 1), jnp.int32),
      jnp.ones((1, 1)),
      cache_lib.init(model.config, 1, 4, jnp.float32).layers,
    )
    extend = jax.jit(lambda v: model.apply(v, *args, method='extend')[0])
    results = [extend(v) for v in (variables, stacked)]
    tolerances.assert_close(*results, tolerances.COMPONENT_PARITY)
    again = weights.unstack(model, stacked)
    jax.tree.map(np.testing.assert_array_equal, again, variables)

  def test_load_counts_what_the_mask_lets_through(self):
    name = 'mla_yarn_two_mtp'
    done = _prefilled(name)
    K = _case(name)[0].config.moe.n_activated_experts
    # A layer and two modules.
    np.testing.assert_array_equal(done.load_LE.sum(1), 3 * [sum(_LENGTHS) * K])
    _, _, load = jax.jit(lambda c: _extend(name, c, 1))(done.cache)
    np.testing.assert_array_equal(load.sum(1), [3 * K])


class SizeTest(parameterized.TestCase):
  def test_v3_keeps_70_272_bytes_per_token(self):
    config = presets.deepseek_v3().model
    cache = jax.eval_shape(lambda: cache_lib.init(config, 4, 128))
    self.assertEqual(cache_lib.bytes_per_token(cache), 70_272)

  @parameterized.product(
    preset=sorted(presets.PRESETS), attention=['mla', 'gqa', 'mqa', 'mha']
  )
  def test_as_planned(self, preset, attention):
    model = presets.PRESETS[preset]().model
    if attention == 'gqa' and model.n_heads % model.gqa.n_kv_heads:
      attention = 'mqa'
    model = config_lib.replace(model, {'attention': attention})
    cache = jax.eval_shape(lambda: cache_lib.init(model, 2, 64))
    self.assertEqual(
      cache_lib.bytes_per_token(cache), planner.bytes_per_token(model)
    )
    self.assertEqual(cache.capacity, 64)


class WriteTest(parameterized.TestCase):
  def test_positions_outside_are_dropped(self):
    empty = jnp.zeros((2, 4, 1))
    at = jnp.array([[-1, 0, 3], [2, 4, 9]])
    filled = cached_attention.write_rows(empty, jnp.ones((2, 3, 1)), at)
    np.testing.assert_array_equal(filled[..., 0], [[1, 0, 0, 1], [0, 0, 1, 0]])

  @parameterized.parameters(-1, 0, 3, 4)
  def test_a_single_row(self, at):
    filled = cached_attention.write_rows(
      jnp.zeros((1, 4, 2)), jnp.ones((1, 1, 2)), jnp.array([[at]])
    )
    want = (np.arange(4) == at)[None, :, None] * np.ones(2)
    np.testing.assert_array_equal(filled, want)

  def test_a_single_row_copies_no_cache(self):
    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, new):
      def body(i, carry):
        cache, total = carry
        at = jnp.broadcast_to(i, (1, 1))
        cache = cached_attention.write_rows(cache, new, at)
        q = jnp.ones((1, 1, 2, 16)) * total
        out = cached_attention.attend_latents(q, cache, 8, at, 1.0)
        return cache, total + out.sum()

      return jax.lax.fori_loop(0, 3, body, (cache, jnp.float32(1)))

    cache = jax.ShapeDtypeStruct((1, 24, 16), jnp.float32)
    new = jax.ShapeDtypeStruct((1, 1, 16), jnp.float32)
    text = run.lower(cache, new).compile().as_text()
    self.assertIn('f32[1,24,16]', text)
    self.assertNotRegex(text, r'f32\[1,24,16\]\S* copy\(')

  def test_what_lies_beyond_is_not_read(self):
    rng = np.random.default_rng(0)
    q, k, v = (
      rng.standard_normal(s).astype(np.float32)
      for s in ((2, 1, 4, 3), (2, 6, 2, 3), (2, 6, 2, 5))
    )
    at = np.array([[2], [4]], np.int32)
    out = cached_attention.attend_rows(q, k, v, at, 0.5)
    for b, last in enumerate((2, 4)):
      for head in range(4):
        scores = 0.5 * k[b, : last + 1, head // 2] @ q[b, 0, head]
        probs = np.exp(scores - scores.max())
        want = probs / probs.sum() @ v[b, : last + 1, head // 2]
        tolerances.assert_close(
          out[b, 0, head], want, tolerances.COMPONENT_PARITY
        )


def test_a_gate_and_its_bias_stay_float32_in_a_bfloat16_model():
  config = config_lib.replace(
    presets.tiny(), {**_SMALL, 'precision.compute_dtype': 'bfloat16'}
  )
  model = step_lib.build_model(config)
  like = nn.meta.unbox(step_lib.declare(model))
  unstacked = jax.eval_shape(lambda v: weights.unstack(model, v), like)
  dtypes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(unstacked):
    dtypes.setdefault(path[-1].key, set()).add(leaf.dtype.name)
  assert dtypes['gate'] == dtypes['bias'] == {'float32'}
  assert dtypes['w1'] == dtypes['wkv_a'] == {'bfloat16'}


@pytest.mark.parametrize('name', _VARIANTS)
def test_a_cache_in_bfloat16_keeps_its_dtype(name):
  model, variables, _, _ = _case(name)
  model = model.clone(
    precision=config_lib.PrecisionConfig(compute_dtype='bfloat16')
  )
  empty = cache_lib.init(model.config, 1, 16)
  shapes = jax.eval_shape(
    lambda: prefill.prefill(model, variables, empty, [[1, 2]])
  )
  for layer in jax.tree.leaves(shapes.cache.layers):
    assert layer.dtype == jnp.bfloat16
  assert shapes.last_BWD.dtype == jnp.bfloat16


if __name__ == '__main__':
  absltest.main()
