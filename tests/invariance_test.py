"""What must not change loss, gradients or bias, and what may not leak."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.layers import moe, stack
from deepseek_jax.models import deepseek
from deepseek_jax.training import optimizer, schedules, step
from deepseek_jax.training.state import TrainState
from tests import jaxprs, tolerances
from tests.drawn import draw

_LENGTH = 17
HYPER = schedules.Hyper(lr=1e-3, gamma=0.01, alpha=0.1, mtp_weight=0.3)


def make_config(**changes):
  """Three MoE layers, MTP, documents; `changes` are leaves, '__' for dots."""
  changes = {name.replace('__', '.'): v for name, v in changes.items()}
  base = {
    'model.n_layers': 4,
    'data.mask_documents': True,
    'optim.z_loss': 0.01,
  }
  return config_lib.replace(presets.tiny(), {**base, **changes})


# Plain descent, that keeps the gradients where an optimizer keeps its moments.
_KEEP = optax.GradientTransformationExtraArgs(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, _, params, *, lr: (
    jax.tree.map(lambda g: -lr * g, grads),
    grads,
  ),
)


@functools.cache
def step_of(config):
  """(the compiled step, where its arrays lie)."""
  model = step.build_model(config)
  layout = step.make_layout(model, config)
  return step.make_train_step(model, config, _KEEP, layout=layout), layout


@functools.cache
def _variables(model_config):
  return draw(model_config, (-1.0, 0.3))


def arguments(config, batch):
  """The first state, and a batch [B, T + 1] as the step takes it."""
  _, layout = step_of(config)
  params, state = jax.tree.map(jnp.array, _variables(config.model))
  state = TrainState(jnp.int32(0), params, state, _KEEP.init(params))
  size = config.train.micro_batch_size or batch['tokens'].shape[0]
  cut = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), batch)
  if layout:
    state = jax.device_put(state, layout.state(state))
    cut = layout.put_batch(cut)
  return state, cut


def _run(config, batch, hyper=HYPER):
  """(losses and counts, gradients, biases) of one step on [B, T + 1]."""
  new, metrics = step_of(config)[0](*arguments(config, batch), hyper)
  names = [n for n in metrics if n.endswith('loss')]
  report = {n: metrics[n] for n in [*names, 'counts', 'dropped', 'grad_norm']}
  return report, new.opt_state, new.router_state


def make_batch():
  """Rows of several documents, with very different amounts of padding.

  The last column is padding: in a longer row a token there, here only a target,
  would be an input as well, and rightly counted.
  """
  rng = np.random.default_rng(0)
  tokens = rng.integers(512, size=(4, _LENGTH + 1)).astype(np.int32)
  ends = ((5, 11, 17), (17,), (3, 4, 9), (2,))
  segments = np.zeros_like(tokens)
  for row, bounds in zip(segments, ends):
    for i, (a, b) in enumerate(zip((0, *bounds), bounds)):
      row[a:b] = i + 1
  return {'tokens': tokens, 'segments': segments}


def _assert_same(actual, expected, rung=tolerances.COMPONENT_PARITY):
  for a, e, name in zip(actual, expected, ('losses', 'gradients', 'biases')):
    tolerances.assert_close(a, e, rung, name)


@functools.cache
def _baseline():
  return _run(make_config(), make_batch())


class StepTest(parameterized.TestCase):
  def test_the_baseline_has_something_to_lose(self):
    report, grads, biases = _baseline()
    for name in ('loss', 'mtp_1_loss', 'balance_loss'):
      self.assertGreater(report[name], 0.1, name)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      self.assertGreater(jnp.abs(grad).max(), 0, path)
    before = _variables(make_config().model)[1]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), biases, before)
    tolerances.assert_close(
      moved, jax.tree.map(lambda _: 0.01, moved), tolerances.DEEP_MODEL
    )

  def test_accumulation(self):
    config = make_config(train__micro_batch_size=1)
    _assert_same(_run(config, make_batch()), _baseline())

  def test_order_of_the_batch(self):
    batch = jax.tree.map(lambda x: x[[2, 0, 3, 1]], make_batch())
    _assert_same(_run(make_config(), batch), _baseline())

  @parameterized.parameters(
    ('none', False),
    ('full', True),
    ('alternate', True),
    ('selective', True),
  )
  def test_recomputation_and_scan(self, remat, scan):
    """Three MoE layers: `alternate` has a pair and one left over."""
    config = make_config(train__remat=remat, train__scan_layers=scan)
    _assert_same(_run(config, make_batch()), _baseline())

  def test_what_recomputation_keeps(self):
    """Of eight layers; and their weights, but only once."""

    def kept(remat):
      config = make_config(
        train__remat=remat,
        model__n_layers=8,
        model__n_dense_layers=0,
        model__n_mtp_layers=0,
      )
      model = step.build_model(config)
      tokens = make_batch()['tokens']
      variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

      def backward(variables):
        def apply(params):
          v = {**variables, 'params': params}
          return model.apply(v, tokens, method='logits')

        return jax.vjp(apply, variables['params'])[1]

      residuals = jax.tree.leaves(jax.eval_shape(backward, variables))
      return sum(r.size for r in residuals)

    none, full, selective = map(kept, ('none', 'full', 'selective'))
    self.assertLess(full, selective)
    self.assertLess(selective, none)
    mean = (none + full) / 2  # But for some scalars.
    self.assertAlmostEqual(kept('alternate'), mean, delta=8)

  @parameterized.parameters('none', 'selective')
  def test_mtp_computes_no_more_again_than_its_block(self, policy):
    """It has three products more: `eh_proj`'s, and its two gradients."""
    model = step.build_model(make_config())
    layers, stacks = model._layers(), nn.meta.unbox(step.declare(model))
    shape = make_batch()['tokens'].shape
    x_BTD = jax.ShapeDtypeStruct((*shape, model.config.dim), jnp.float32)
    rest = jnp.zeros(shape, jnp.int32), None, jnp.ones(shape)

    def products(name, streams):
      apply = stack.rematerialised(layers[name][0].apply, policy)
      variables = {
        collection: jax.tree.map(
          lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree[name]
        )
        for collection, tree in stacks.items()
      }

      def loss(params, state, *xs):
        both = {'params': params, 'router_state': state}
        return (apply(both, *xs, *rest)[0] ** 2).sum()

      traced = jax.make_jaxpr(jax.grad(loss, (0, 2)))(
        variables['params'], variables['router_state'], *streams * [x_BTD]
      )
      names = [e.primitive.name for e, _ in jaxprs.equations(traced.jaxpr)]
      return names.count('dot_general')

    self.assertEqual(products('mtp', 2), products('moe_layers', 1) + 3)

  def test_padding(self):
    """Longer rows, a row of nothing, other ids in the padding."""
    batch = make_batch()
    rng = np.random.default_rng(9)
    noise = rng.integers(512, size=(5, _LENGTH + 8)).astype(np.int32)
    segments = np.zeros_like(noise)
    segments[:4, : _LENGTH + 1] = batch['segments']
    noise[:4, : _LENGTH + 1] = np.where(
      batch['segments'] > 0, batch['tokens'], noise[:4, : _LENGTH + 1]
    )
    longer = {'tokens': noise, 'segments': segments}
    _assert_same(_run(make_config(), longer), _baseline())

  def test_packed_documents_are_separate_documents(self):
    """All but the balance loss, which is a mean over rows by definition."""
    hyper = HYPER._replace(alpha=0.0)
    packed, separate = make_batch(), {'tokens': [], 'segments': []}
    for tokens, segments in zip(packed['tokens'], packed['segments']):
      for document in range(1, segments.max() + 1):
        own = segments == document
        for name, x in (('tokens', tokens[own]), ('segments', own[own])):
          separate[name].append(np.pad(x, (0, _LENGTH + 1 - own.sum())))
    separate = {n: np.array(x, np.int32) for n, x in separate.items()}
    a, e = (_run(make_config(), batch, hyper) for batch in (separate, packed))
    for report in (a[0], e[0]):
      report.pop('balance_loss')
    _assert_same(a, e)

  def test_v2_with_capacity(self):
    """Dropping is per row: neither cut, nor order, nor padding changes it."""
    changes = {
      'model__moe__capacity_factor': 1.0,
      'model__moe__score_func': 'softmax',
      'model__moe__group_score': 'max',
      'model__moe__norm_topk': False,
      'model__moe__balance': 'aux_loss',
      'model__moe__aux_loss': 'expert',
    }
    expected = _run(make_config(**changes), make_batch())
    self.assertGreater(expected[0]['dropped'], 0)
    biases = _variables(make_config(**changes).model)[1]
    jax.tree.map(np.testing.assert_array_equal, expected[2], biases)
    longer = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 3))), make_batch())
    shuffled = jax.tree.map(lambda x: x[[3, 1, 0, 2]], longer)
    config = make_config(train__micro_batch_size=2, **changes)
    _assert_same(_run(config, shuffled), expected)

  def test_the_bias_is_float32_and_moves_by_gamma_in_a_bfloat16_run(self):
    config = make_config(precision__compute_dtype='bfloat16')
    model = step.build_model(config)
    tx = optimizer.adamw(config.optim, config.precision)
    state = step.abstract_state(model, tx)
    batch = jax.tree.map(lambda x: x[None], make_batch())
    new, metrics = jax.eval_shape(
      step.make_train_step(model, config, tx), state, batch, HYPER
    )
    for leaf in jax.tree.leaves((new.router_state, metrics['counts'])):
      self.assertEqual(leaf.dtype, jnp.float32)
    # Steps that bfloat16 could not make from here.
    before = {'moe_layers': {'bias': jnp.full((1, 4), 0.5, jnp.float32)}}
    stats = moe.MoEStats(jnp.array([[0.0, 4, 2, 2]]), None, None)
    after = step.update_router_state(
      before, {'moe_layers': stats}, HYPER._replace(gamma=1e-4), config
    )
    step_E = np.float32(1e-4) * np.float32([[1, -1, 0, 0]])
    np.testing.assert_array_equal(
      after['moe_layers']['bias'], np.float32(0.5) + step_E
    )

  @parameterized.parameters('aux_loss', 'none')
  def test_without_its_balancing_the_bias_stays(self, balance):
    config = make_config(model__moe__balance=balance)
    before = {'moe_layers': {'bias': jnp.ones((1, 4))}}
    after = step.update_router_state(before, {}, HYPER, config)
    self.assertIs(after, before)

  def test_float16_is_refused(self):
    config = make_config(precision__compute_dtype='float16')
    with self.assertRaisesRegex(ValueError, 'float16.*train in bfloat16'):
      step_of(config)


class ObjectiveTest(parameterized.TestCase):
  def test_gradient_in_the_papers_setting_equals_the_sum_written_out(self):
    """Two depths of MTP, no document mask: by hidden states and by the head."""
    config = make_config(
      data__mask_documents=False, model__n_mtp_layers=2, model__dim=6
    )
    model, batch = step.build_model(config), make_batch()
    B, T = batch['tokens'][:, 1:].shape
    rng = np.random.default_rng(1)
    hidden = [rng.normal(size=(B, T, 6)).astype(np.float32) for _ in range(3)]
    head = rng.normal(size=(512, 6)).astype(np.float32)
    hyper = schedules.Hyper(lr=0.0, gamma=0.0, alpha=0.7, mtp_weight=0.3)
    totals = step.batch_totals(batch, config)

    @jax.jit
    def gradients(hidden, head, balance):
      def loss(hidden, head, balance):
        stats = {'moe_layers': moe.MoEStats(None, balance, None)}
        output = deepseek.Output(hidden[0], tuple(hidden[1:]), stats)
        params = {'head': head, 'embed': head}
        return step.objective(
          model, config, params, output, batch, hyper, totals
        )[0]

      return jax.grad(loss, argnums=(0, 1, 2))(hidden, head, balance)

    expected = _written_out(hidden, head, batch, config.optim.z_loss, 0.3)
    actual = gradients(hidden, head, jnp.ones(3))
    tolerances.assert_close(actual[:2], expected, tolerances.COMPONENT_PARITY)
    tolerances.assert_close(
      actual[2], np.full(3, 0.7 / B), tolerances.FLOAT32_MATH
    )


def _written_out(hidden, head, batch, z_loss, mtp_weight):
  """The gradients, token by token in float64, of equations 24 and 25."""
  tokens, segments = batch['tokens'], batch['segments']
  head = head.astype(np.float64)
  n = np.sum((segments[:, :-1] > 0) & (segments[:, 1:] > 0))
  by_head, by_hidden = np.zeros_like(head), []
  for k, states in enumerate(hidden):
    weight = (mtp_weight / (len(hidden) - 1) if k else 1) / n
    gradient = np.zeros(states.shape)
    for b, i in np.ndindex(*states.shape[:2]):
      j = i + 1 + k
      if j >= tokens.shape[1] or not segments[b, i] or not segments[b, j]:
        continue
      if k and segments[b, i] != segments[b, j]:
        continue  # MTP stays within the document, the main head does not.
      h = states[b, i].astype(np.float64)
      z = head @ h
      lse = np.log(np.exp(z).sum())
      by_logits = np.exp(z - lse) * (1 + 2 * z_loss * lse)
      by_logits[tokens[b, j]] -= 1
      gradient[b, i] = weight * head.T @ by_logits
      by_head += weight * np.outer(by_logits, h)
    by_hidden.append(gradient)
  return by_hidden, by_head


class WeightsTest(parameterized.TestCase):
  @parameterized.product(k=(0, 1, 2, 3, 15), crosses=(True, False))
  def test_targets_end_with_the_document(self, k, crosses):
    segments = make_batch()['segments'][:, :-1]
    actual = step.target_weights(jnp.asarray(segments), k, crosses)
    expected = np.zeros((4, _LENGTH - 1))
    for b in range(4):
      for i in range(_LENGTH - 1):
        j = i + 1 + k
        if j < _LENGTH and segments[b, i] and segments[b, j]:
          same = segments[b, i] == segments[b, j]
          expected[b, i] = crosses or same
    np.testing.assert_array_equal(actual, expected)


class LeakTest(parameterized.TestCase):
  def test_no_head_sees_the_future(self):
    """Head k at position i has read tokens up to i + k."""
    config = make_config(model__n_mtp_layers=2).model
    params, state = _variables(config)
    variables = {'params': params, 'router_state': state}
    apply = jax.jit(deepseek.Transformer(config).apply)
    tokens = make_batch()['tokens'][:1]
    for t in (0, 9, _LENGTH):
      changed = tokens.copy()
      changed[0, t] = (changed[0, t] + 1) % config.vocab_size
      outputs = [apply(variables, x) for x in (tokens, changed)]
      heads = [(o.hidden_BTD, *o.mtp_hidden) for o in outputs]
      for k, (a, b) in enumerate(zip(*heads)):
        first = max(t - k, 0)
        tolerances.assert_close(
          a[:, :first], b[:, :first], tolerances.FLOAT32_MATH, f'head {k}'
        )
        # And does see the token itself.
        difference = np.abs(a[0, first] - b[0, first]).max()
        self.assertGreater(difference, 1e-2, f'head {k} at {t}')

  def test_documents_do_not_see_each_other(self):
    config = make_config().model
    params, state = _variables(config)
    batch = make_batch()
    tokens, segments = (x[:1] for x in (batch['tokens'], batch['segments']))
    other = np.where(segments == 2, tokens, (tokens + 7) % config.vocab_size)
    for masked in (True, False):
      model = deepseek.Transformer(config, mask_documents=masked)
      apply = jax.jit(model.apply)
      heads = []
      for x in (tokens, other):
        o = apply({'params': params, 'router_state': state}, x, segments)
        heads.append((o.hidden_BTD, *o.mtp_hidden))
      for k, (a, b) in enumerate(zip(*heads)):
        own = slice(5, 11 - k)  # Document 2, as far as head k predicts in it.
        if masked:
          tolerances.assert_close(
            a[0, own], b[0, own], tolerances.COMPONENT_PARITY, f'head {k}'
          )
        else:  # The paper's setting: a packed row is one context.
          self.assertGreater(np.abs(a[0, own] - b[0, own]).max(), 1e-2)


class SeedTest(parameterized.TestCase):
  def test_a_seed_reproduces_a_run_bitwise(self):
    config = dataclasses.replace(
      make_config(), precision=config_lib.PrecisionConfig('float32')
    )
    model = step.build_model(config)
    tx = optimizer.adamw(config.optim, config.precision)
    train_step = step.make_train_step(model, config, tx)
    batch = jax.tree.map(lambda x: x[None], make_batch())

    def run(seed):
      state = step.init_state(model, tx, seed)
      reports = []
      for _ in range(3):
        state, metrics = train_step(state, batch, HYPER)
        reports.append(jax.device_get(metrics))
      return jax.device_get(state), reports

    first, second, other = run(0), run(0), run(1)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    self.assertNotEqual(first[1][0]['loss'], other[1][0]['loss'])
    self.assertLess(first[1][-1]['loss'], first[1][0]['loss'])


if __name__ == '__main__':
  absltest.main()
