"""Expert parallelism against one device: outputs and every gradient."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MoEConfig, ParallelConfig
from deepseek_jax.ops import experts, formats, fp8_recipe, routing
from deepseek_jax.parallel import expert, hlo, rules
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.parallel.expert import Exchange
from tests import jaxprs, tolerances

_T, _D, _F, _E, _K = 48, 8, 5, 16, 4
_NODES = 4  # Groups of experts, of which a token's lie in two.


def make_mesh(**sizes):
  """A mesh of all axes, on as many devices as they need."""
  config = ParallelConfig(**sizes)
  return mesh_lib.build(config, jax.devices()[: config.n_devices])


@functools.cache
def _problem(crowded=False):
  """Arguments of `expert_ffn`, and a cotangent."""
  rng = np.random.default_rng(0)
  shapes = ((_T, _D), (_E, _D, _F), (_E, _F, _D), (_E, _D, _F))
  x, w1, w2, w3 = (rng.normal(size=s).astype(np.float32) for s in shapes)
  config = MoEConfig(
    n_routed_experts=_E,
    n_activated_experts=_K,
    n_expert_groups=_NODES,
    n_limited_groups=2,
  )
  logits = jnp.asarray(rng.normal(size=(_T, _E)).astype(np.float32))
  route = routing.route(logits, jnp.zeros(_E), config)
  ids = np.asarray(route.expert_ids_TK)
  if crowded:  # All tokens choose the same experts.
    ids = np.broadcast_to(np.array([5, 4, 6, 7], np.int32), ids.shape)
  dy = rng.normal(size=(_T, _D)).astype(np.float32)
  return (x, w1, w2, w3, np.asarray(route.weights_TK)), ids, dy


def _run(ffn, args, ids, dy):
  """The output and the gradients of x, w1, w2, w3 and the gate weights."""

  def loss(args):
    x, w1, w2, w3, weights = args
    y = ffn(x, w1, w2, w3, ids, weights)
    return (y * dy).sum(), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
  return y, gradients


@functools.cache
def _single(crowded=False):
  return jax.device_get(_run(experts.expert_ffn, *_problem(crowded)))


def _parallel(mesh, exchange=Exchange(), crowded=False, ffn=experts.expert_ffn):
  run = functools.partial(expert.routed_ffn, ffn=ffn, exchange=exchange)
  with jax.set_mesh(mesh):
    return jax.device_get(_run(run, *_problem(crowded)))


class RaggedTest(parameterized.TestCase):
  def test_rows_go_where_they_should_and_others_stay(self):
    """Against a loop over senders and receivers; unequal sizes, some zero."""
    rng = np.random.default_rng(1)
    W, room, pair = 4, 20, 5
    sizes = rng.integers(pair + 1, size=(W, W))
    sizes[1], sizes[:, 2] = 0, 0
    operand = rng.normal(size=(W, W * pair, 3)).astype(np.float32)
    output = rng.normal(size=(W, room, 3)).astype(np.float32)
    starts = np.cumsum(sizes, 1) - sizes
    places = np.broadcast_to(np.arange(W)[:, None] * pair, (W, W))
    expected = output.copy()
    for s, d in np.ndindex(W, W):
      n, i, o = sizes[s, d], starts[s, d], places[s, d]
      expected[d, o : o + n] = operand[s, i : i + n]

    @functools.partial(
      jax.shard_map, in_specs=P('expert'), out_specs=P('expert')
    )
    def run(*args):
      args = [v[0] for v in args]
      return expert.ragged_a2a(*args, ('expert',), pair)[None]

    ints = (starts, sizes, places, sizes.T)
    with jax.set_mesh(make_mesh(expert=W)):
      got = jax.jit(run)(operand, output, *(v.astype(np.int32) for v in ints))
    np.testing.assert_array_equal(got, expected)


class RoutedFfnTest(parameterized.TestCase):
  @parameterized.product(
    sizes=(
      {'expert': 8},
      {'node': 2, 'expert': 4},
      {'node': 4, 'expert': 2},
      {'node': 4},
      {'data': 2, 'fsdp': 2, 'expert': 2},
      {'data': 8},
    ),
    two_hop=(True, False),
  )
  def test_equals_one_device(self, sizes, two_hop):
    if not two_hop and 'node' not in sizes:
      return
    exchange = Exchange(max_nodes=2 * (sizes.get('node') == 4), two_hop=two_hop)
    got = _parallel(make_mesh(**sizes), exchange)
    tolerances.assert_close(got, _single(), tolerances.COMPONENT_PARITY)

  @parameterized.parameters(
    ({'expert': 8}, 3),  # 12 rows a pair, 4 at a time.
    ({'node': 2, 'expert': 4}, 4),  # 24 rows a pair, 6 at a time.
  )
  def test_no_row_is_lost_when_a_buffer_overflows(self, sizes, rounds):
    """All tokens go to the experts of two ranks, in further rounds."""
    mesh, exchange = make_mesh(**sizes), Exchange(buffer=1)
    ids = _problem(crowded=True)[1]

    def count(ids):
      return expert.route(ids, _E, exchange)[-1].rounds[None]

    batch = P(rules.EXPERTS)
    with jax.set_mesh(mesh):
      run = jax.jit(jax.shard_map(count, in_specs=batch, out_specs=batch))
      counted = run(ids)
    self.assertEqual(max(counted), rounds)
    got = _parallel(mesh, exchange, crowded=True)
    tolerances.assert_close(got, _single(True), tolerances.COMPONENT_PARITY)

  def test_further_rounds_hold_float32_weights_narrow(self):
    """As a step has them, without rounding them or their gradients."""
    (x, *weights, gates), ids, dy = jax.tree.map(
      jnp.asarray, _problem(crowded=True)
    )
    x, weights, dy = jax.tree.map(
      lambda a: jnp.asarray(a, jnp.bfloat16), (x, weights, dy)
    )
    weights = [w.astype(jnp.float32) for w in weights]

    def ffn(x, w1, w2, w3, ids, gates):
      self.assertEqual(w1.dtype, jnp.float32)
      x = x.astype(jnp.float32)
      return experts.expert_ffn(x, w1, w2, w3, ids, gates).astype(jnp.bfloat16)

    def gradients(ffn, *weights):
      def loss(*weights):
        return (ffn(x, *weights, ids, gates) * dy).sum(dtype=jnp.float32)

      return jax.grad(loss, (0, 1, 2))(*weights)

    run = functools.partial(
      expert.routed_ffn, ffn=ffn, exchange=Exchange(buffer=1)
    )
    with jax.set_mesh(make_mesh(expert=8)):
      got = jax.jit(functools.partial(gradients, run))(*weights)
      traced = jax.make_jaxpr(functools.partial(gradients, run))(*weights)
    expected = jax.jit(functools.partial(gradients, ffn))(*weights)
    tolerances.assert_close(
      *jax.device_get((got, expected)), tolerances.COMPONENT_PARITY
    )
    own = {(w.shape[0] // 8, *w.shape[1:]) for w in weights}
    held = collections.Counter()
    for eqn, _ in jaxprs.equations(traced.jaxpr):
      if eqn.primitive.name == 'while':
        first = eqn.params['cond_nconsts']
        for v in eqn.invars[first : first + eqn.params['body_nconsts']]:
          held[v.aval.dtype.name] += v.aval.shape in own
    self.assertEqual(held['bfloat16'], 3 * 3)  # Forwards, and both gradients.

  def test_a_balanced_load_needs_one_round(self):
    """The loop is there, and adds nothing."""
    got = _parallel(make_mesh(expert=4, data=2), Exchange(2.5))
    tolerances.assert_close(got, _single(), tolerances.COMPONENT_PARITY)

  @parameterized.parameters(
    {'expert': 8}, {'node': 2, 'expert': 4}, {'node': 4, 'expert': 2}
  )
  def test_fp8_dispatch_rounds_tokens_and_gradients_once(self, **sizes):
    """Each row is rounded before it leaves, to its format, and never again."""
    recipe = fp8_recipe.Recipe(gradient_fmt=formats.E5M2)
    kept, gradient = recipe.dispatch, recipe.dispatch_gradient

    def rounded(x, kept):
      return kept.quantize(jnp.asarray(x)).dequantize()

    (x, *others), ids, dy = _problem()
    args = (rounded(x, kept), *others)
    expected = _run(experts.expert_ffn, args, ids, rounded(dy, gradient))
    exchange = Exchange(kept=kept, kept_gradient=gradient)
    small = 2.0**-37  # As gradients of a mean over V3's batch are.
    ffn = functools.partial(
      expert.routed_ffn, ffn=experts.expert_ffn, exchange=exchange
    )
    with jax.set_mesh(make_mesh(**sizes)):
      y, grads = jax.device_get(_run(ffn, *_problem()[:2], dy * small))
    got = y, jax.tree.map(lambda g: g / small, grads)
    tolerances.assert_close(got, expected, tolerances.COMPONENT_PARITY)

  def test_rows_that_a_policy_keeps_are_not_sent_again(self):
    """Recomputation dispatches nothing: the same exchanges as without it."""
    args, ids, dy = _problem()
    keep = jax.checkpoint_policies.save_only_these_names(
      'routing', 'dispatched', 'ffn_up'
    )

    def exchanges(wrap):
      def loss(x, w1, w2, w3, weights):
        run = wrap(lambda *a: expert.routed_ffn(*a[:4], ids, a[4]))
        return (run(x, w1, w2, w3, weights) * dy).sum()

      gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))
      text = gradients.lower(*args).compile().as_text()
      found = hlo.collectives(hlo.parse(text), {'expert': 4})
      return sum(c.kind == 'all-to-all' and 'f32' in c.dtypes for c in found)

    with jax.set_mesh(make_mesh(expert=4)):
      again = exchanges(lambda f: jax.checkpoint(f, policy=keep))
      self.assertEqual(again, exchanges(lambda f: f))

  def test_a_manual_region_needs_no_other(self):
    """As in a pipeline's stage: manual over `stage`, and over all axes."""
    mesh = make_mesh(stage=2, node=2, expert=2)
    args, ids, dy = _problem()
    batch = P(rules.BATCH)
    owned = P(rules.EXPERTS)
    for axes in (('stage',), mesh_lib.AXES):
      specs = [batch, owned, owned, owned, batch, batch]
      if axes == ('stage',):
        specs = [P()] * 6

      def stage(*args, axes=axes, specs=specs):
        return jax.shard_map(
          expert.routed_ffn,
          in_specs=tuple(specs),
          out_specs=specs[0],
          axis_names=set(axes),
          check_vma=False,
        )(*args)

      with jax.set_mesh(mesh):
        got = jax.device_get(_run(stage, args, ids, dy))
      tolerances.assert_close(got, _single(), tolerances.COMPONENT_PARITY)

  def test_tokens_need_not_divide(self):
    """A decoded token on eight devices."""
    args, ids, _ = _problem()
    x, *weights, gates = args
    for T in (1, 11):
      with jax.set_mesh(make_mesh(node=2, expert=4)):
        got = jax.jit(expert.routed_ffn)(x[:T], *weights, ids[:T], gates[:T])
      tolerances.assert_close(
        got, _single()[0][:T], tolerances.COMPONENT_PARITY
      )
