"""Delayed FP8 scaling against float64 products; its histories over steps."""

import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.convert import names
from deepseek_jax.ops import fp8_delayed, fp8_experts, fp8_recipe, swiglu
from deepseek_jax.ops.fp8_delayed import Delayed
from deepseek_jax.training import checkpoint, delayed, optimizer, step
from tests import tolerances
from tests.drawn import draw
from tests.invariance_test import HYPER, make_batch

_TENSOR = {
  f'precision.fp8.{x}_tile': 'tensor'
  for x in ('activation', 'weight', 'gradient')
}
_FP8 = {'precision.fp8.enabled': True, **_TENSOR}
_RECIPE = fp8_recipe.of(
  config_lib.FP8Config(
    activation_tile='tensor', weight_tile='tensor', gradient_tile='tensor'
  )
)


def _config(**changes):
  """Two MoE layers with a shared expert; a history of two steps."""
  changes = {name.replace('__', '.'): v for name, v in changes.items()}
  base = {
    'model.n_layers': 2,
    'model.n_dense_layers': 0,
    'model.n_mtp_layers': 0,
    'precision.fp8.amax_history': 2,
  }
  return config_lib.replace(presets.tiny(), {**_FP8, **base, **changes})


def _rounded(x, amax):
  """E4M3 under one scale, in float64: what is above amax is clipped."""
  scale = np.float32(max(amax, 1e-4)) / np.float32(448)
  value = np.clip(np.float32(x) / scale, -448, 448).astype(np.float64)
  exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**-6)))
  unit = 2.0 ** (exponent - 3)
  return np.round(value / unit) * unit * np.float64(scale)


def _draw(*shapes):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(s).astype(np.float32) for s in shapes]


class LinearTest(parameterized.TestCase):
  @parameterized.parameters(((2.0, 0.5, 8.0),), ((0.0, 0.0, 0.0),))
  def test_equals_float64_products(self, amax):
    """Some values lie above 2 and are clipped; at 0 the tensors' own count."""
    x, w, dy = _draw((40, 130), (130, 70), (40, 70))
    own = [np.abs(v).max() for v in (x, w, dy)]

    @jax.jit
    def run(x, w, amax, dy):
      def linear(x, weight):
        return fp8_delayed.linear(x, weight, _RECIPE)

      y, vjp = jax.vjp(linear, x, Delayed(w, amax))
      return y, *vjp(dy)

    y, dx, dweight = run(x, w, jnp.asarray(amax), dy)
    scaled = [a or b for a, b in zip(amax, own)]
    x, w, dy = (_rounded(v, a) for v, a in zip((x, w, dy), scaled))
    expected = x @ w, dy @ w.T, x.T @ dy
    tolerances.assert_close(
      (y, dx, dweight.w), expected, tolerances.FLOAT32_MATH
    )
    np.testing.assert_array_equal(dweight.amax, np.float32(own))

  def test_gradients_of_a_mean_over_a_large_batch(self):
    """V3's has 62.9M tokens: the same gradients, 2^-37 as large."""
    x, w, dy = map(jnp.asarray, _draw((40, 130), (130, 70), (40, 70)))
    results = []
    for factor in (1, 2.0**-37):
      amax = jnp.array([2.0, 0.5, 3.0 * factor])
      _, vjp = jax.vjp(
        lambda x, w: fp8_delayed.linear(x, Delayed(w, amax), _RECIPE),  # noqa: B023
        x,
        w,
      )
      results.append([g / factor for g in vjp(dy * factor)])
    chex.assert_trees_all_equal(*results)

  def test_what_is_kept_already_takes_the_same_scale(self):
    x, w, dy = _draw((40, 130), (130, 70), (40, 70))
    kept = fp8_recipe.Kept(scale='ceil').quantize(jnp.asarray(x))

    def linear(weight):
      return fp8_delayed.linear(jnp.asarray(x), weight, _RECIPE, kept)

    amax = jnp.asarray([2.0, 0.5, 0.0])
    _, vjp = jax.vjp(linear, Delayed(jnp.asarray(w), amax))
    expected = _rounded(kept.dequantize(), 2).T @ _rounded(dy, abs(dy).max())
    [dweight] = vjp(jnp.asarray(dy))
    tolerances.assert_close(dweight.w, expected, tolerances.FLOAT32_MATH)

  def test_takes_swiglu_rounded_once(self):
    gate, up = (jnp.asarray(x, jnp.bfloat16) for x in _draw((8, 128), (8, 128)))
    exact = [np.asarray(x, np.float32) for x in (gate, up)]
    expected = exact[0] / (1 + np.exp(-exact[0])) * exact[1]

    def hidden(gate):
      return swiglu.fp8_swiglu(gate, up, _RECIPE).x_TD

    for x in (hidden(gate), jax.vjp(hidden, gate)[0]):
      np.testing.assert_array_equal(x, jnp.asarray(expected, jnp.bfloat16))

  def test_a_nan_is_seen_and_spreads(self):
    x, w = _draw((4, 130), (130, 70))
    x[1, 3] = np.nan
    weight = Delayed(jnp.asarray(w), jnp.ones(3))
    y = fp8_delayed.linear(jnp.asarray(x), weight, _RECIPE)
    spoilt = np.isnan(y).any(1)
    np.testing.assert_array_equal(spoilt, [False, True, False, False])
    self.assertTrue(np.isnan(fp8_delayed.seen(jnp.asarray(x))))


_ROWS, _D, _F = (5, 0, 130), 130, 70
_AMAXES = np.float32([[2, 0.2, 0.05], [0.1, 0.2, 1.5], [2, 0.2, 0.08]])


@functools.cache
def _experts():
  """(arguments, results, what is expected of them) of experts in FP8."""
  rng = np.random.default_rng(1)
  ids = rng.permutation(np.repeat(np.arange(3), _ROWS))[:, None].astype('i4')
  T, E = len(ids), 3
  x, dy, *ws = _draw((T, _D), (T, _D), (E, _D, _F), (E, _F, _D), (E, _D, _F))
  ws, gates = [0.1 * w for w in ws], rng.uniform(0.1, 1, (T, 1)).astype('f4')

  @jax.jit
  def run(x, ws, amaxes, gates, dy):
    def ffn(x, ws):
      return fp8_experts.expert_ffn(x, *ws, ids, gates, _RECIPE)

    y, vjp = jax.vjp(ffn, x, tuple(map(Delayed, ws, amaxes)))
    return y, *vjp(dy)

  actual = run(x, ws, jnp.asarray(_AMAXES), gates, dy)
  send = _RECIPE.dispatch.quantize
  x, dy = (np.float64(send(jnp.asarray(v)).dequantize()) for v in (x, dy))
  (ax, a1, agate), (ah, a2, ady), (_, a3, aup) = _AMAXES
  u1, u2, u3 = (_rounded(w, a) for w, a in zip(ws, (a1, a2, a3)))
  experts = ids[:, 0]

  def each(v, w):
    return np.einsum('TD,TDF->TF', v, w[experts])

  def outer(a, b):
    return np.stack([a[experts == e].T @ b[experts == e] for e in range(E)])

  rows, drows = _rounded(x, ax), _rounded(dy, ady)
  gate, up = each(rows, u1), each(rows, u3)
  silu = gate / (1 + np.exp(-gate))
  hidden = silu * up * gates
  y = each(_rounded(hidden, ah), u2)
  dhidden = each(drows, u2.swapaxes(1, 2)) * gates
  keep = _RECIPE.swiglu.quantize
  kept = [np.float64(keep(jnp.float32(v)).dequantize()) for v in (gate, up)]
  sigmoid = 1 / (1 + np.exp(-kept[0]))
  dgate = dhidden * kept[1] * sigmoid * (1 + kept[0] * (1 - sigmoid))
  dup = dhidden * kept[0] * sigmoid
  codes = _rounded(dgate, agate), _rounded(dup, aup)
  turned = [u.swapaxes(1, 2) for u in (u1, u3)]
  dx = each(codes[0], turned[0]) + each(codes[1], turned[1])
  again = _rounded(kept[0] * sigmoid * kept[1] * gates, ah)
  dws = outer(rows, codes[0]), outer(again, drows), outer(rows, codes[1])
  tops = [abs(v).max() for v in (x, hidden, dgate, dy, dup, *ws)]
  return actual, (y, dx, dws), tops


class ExpertsTest(parameterized.TestCase):
  def test_equal_float64_products(self):
    (y, dx, weights), (y_exact, dx_exact, dws), _ = _experts()
    for a, e in zip(
      (y, dx, *(w.w for w in weights)), (y_exact, dx_exact, *dws)
    ):
      tolerances.assert_close(a, e, tolerances.FP8_REORDERED)
      error = np.abs(a - e)  # No code but a few beyond a tie.
      limit = tolerances.COMPONENT_PARITY * np.abs(e).max()
      self.assertLess(np.mean(error > limit), 0.05)

  def test_see_what_all_rows_had(self):
    (_, _, weights), _, (x, hidden, dgate, dy, dup, *ws) = _experts()
    expected = (x, ws[0], dgate), (hidden, ws[1], dy), (x, ws[2], dup)
    seen = [w.amax for w in weights]
    tolerances.assert_close(seen, list(expected), tolerances.DEEP_MODEL)


@functools.cache
def _step(config):
  model = step.build_model(config)
  tx = optimizer.adamw(config.optim, config.precision)
  params, router_state = jax.tree.map(jnp.array, draw(config.model, (-1, 0.3)))
  state = step.init_state(model, tx, 0)
  state = state.replace(params=params, router_state=router_state)
  return step.make_train_step(model, config, tx), state


def _one(config, state):
  """(the next state, metrics), on the host; `state` is kept."""
  size = config.train.micro_batch_size or 4
  batch = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), make_batch())
  new, metrics = _step(config)[0](jax.device_put(state), batch, HYPER)
  assert metrics['finite']
  return jax.device_get((new, metrics))


@functools.cache
def _run(config, steps):
  """The states before and after each step."""
  states = [jax.device_get(_step(config)[1])]
  for _ in range(steps):
    states.append(_one(config, states[-1])[0])
  return states


def _weights(amax, params):
  """(history, weight) of every FP8 weight."""
  if isinstance(amax, dict):
    return [pair for k in amax for pair in _weights(amax[k], params[k])]
  return [(amax, params)]


class ConfigTest(parameterized.TestCase):
  def test_exactly_the_linear_weights_have_one(self):
    """As many as the released checkpoint has in FP8, MTP's too."""
    fp8 = _config(precision__fp8__amax_history=3).precision.fp8

    def paths(config):
      params = draw(config, None)[0]
      self.assertEqual(delayed.histories(params, config_lib.FP8Config()), {})
      found = jax.tree_util.tree_leaves_with_path(
        delayed.histories(params, fp8)
      )
      return {tuple(key.key for key in path) for path, _ in found}

    base = presets.tiny().model
    for changes in ({}, {'mla.q_lora_rank': 0}):
      config = config_lib.replace(base, changes)
      linear = {t.leaf[1:] for t in names.tensors(config) if t.is_linear}
      self.assertEqual(paths(config), linear)
    config = config_lib.replace(base, {'attention': 'mha'})
    own = {p[-1] for p in paths(config) if 'attn' in p}
    self.assertEqual(own, {'wq', 'wk', 'wv', 'wo'})

  @parameterized.parameters(
    ({'precision.fp8.amax_history': -1}, 'use 0, or'),
    ({'precision.fp8.weight_tile': '128x128'}, 'all three tiles tensor'),
    ({'parallel.stage': 3}, r'one device \(now 3\)'),
    ({'parallel.data': 2}, r'one device \(now 2\)'),
    ({'parallel.interleave': True}, 'no parallel.interleave'),
  )
  def test_refused(self, updates, message):
    with self.assertRaisesRegex(ValueError, f'amax_history.*{message}'):
      config_lib.replace(_config(), updates)


@pytest.mark.slow
class HistoryTest(parameterized.TestCase):
  def test_moves_once_per_step_newest_first(self):
    states = _run(_config(), 3)
    histories = [_weights(s.amax, s.params) for s in states]
    for i, (amax, _) in enumerate(histories[0]):
      self.assertFalse(amax.any())
      for before, after in zip(histories, histories[1:]):
        old, new = before[i][0], after[i][0]
        self.assertEqual(new.shape[1:], (2, 3))
        self.assertGreater(new[:, 0].min(), 0)
        np.testing.assert_array_equal(new[:, 1], old[:, 0])
        weight = before[i][1]
        top = np.abs(weight).reshape(len(weight), -1).max(1)
        np.testing.assert_array_equal(new[:, 0, 1], top)

  def test_a_step_depends_on_its_history(self):
    """Halved, the largest numbers are clipped."""
    _, start = _run(_config(), 1)
    halved = start.replace(amax=jax.tree.map(lambda x: x / 2, start.amax))
    losses = [_one(_config(), s)[1]['loss'] for s in (start, halved)]
    self.assertGreater(abs(losses[0] - losses[1]), 1e-4)

  def test_accumulation_and_recomputation(self):
    """Under a history, neither gradients nor what is seen depends on them.

    Second moments are compared, the squares of gradients, in bfloat16.
    """
    _, start = _run(_config(), 1)
    expected, _ = _one(_config(), start)
    other = _config(train__micro_batch_size=2, train__remat='full')
    actual, _ = _one(other, start)
    tolerances.assert_close(
      actual.amax, expected.amax, tolerances.FP8_REORDERED
    )
    moments = actual.opt_state.nu, expected.opt_state.nu
    moments = jax.tree.map(np.float32, moments)
    tolerances.assert_close(*moments, tolerances.BFLOAT16)

  def test_is_in_the_checkpoint(self):
    config = _config()
    _, state = _run(config, 1)
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    with checkpoint.Checkpointer(workdir, config) as saver:
      saver.save(state, {})
    with checkpoint.Checkpointer(workdir, config) as saver:
      restored, _, _ = saver.restore(state)
    chex.assert_trees_all_equal(restored.amax, state.amax)
    other = _config(precision__fp8__amax_history=3)
    with (
      checkpoint.Checkpointer(workdir, other) as saver,
      self.assertRaisesRegex(ValueError, 'amax_history: 2 -> 3'),
    ):
      saver.restore(state)
