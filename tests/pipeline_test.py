"""The executor on a model of plain functions: exact for every schedule."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax import config as config_lib
from deepseek_jax.parallel import (
  hlo,
  mesh,
  pipeline,
  placement,
  schedules,
  simulate,
  split_backward,
  ticks,
)
from tests import jaxprs, tolerances

_D, _V, _ROWS, _T = 16, 11, 2, 4
_SCALE = np.float32(0.01)


def _embed(embedding, micro):
  return embedding[micro['tokens'][:, :-1]]


def _thin(params, state, x, aux):
  """A layer without a loss, statistics or state."""
  y = x + jnp.tanh(x @ params['w']) * params['scale']
  return (y, jnp.zeros((), jnp.float32)), None


def _wide(params, state, x, aux):
  micro, scale = aux
  h = jax.nn.silu(x @ params['w1'] + state['bias'])
  stats = {
    'on': (h > 0).sum(dtype=jnp.float32),
    'tokens': micro['tokens'].sum(dtype=jnp.float32),
  }
  return (x + h @ params['w2'], scale * jnp.sum(h**2)), stats


def _head(params, state, x, micro, scale):
  z = x @ params['head'].T + 0.1 * x @ params['embed'].T + state['offset']
  targets = micro['tokens'][:, 1:, None]
  nll = -jnp.take_along_axis(jax.nn.log_softmax(z), targets, -1).sum()
  return scale * nll, {'nll': nll}


_PROGRAM = pipeline.Program(_embed, {'thin': _thin, 'wide': _wide}, _head)


def _problem(n_thin, n_wide, microbatches, rows, length=_T, width=2 * _D):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return 0.3 * rng.normal(size=shape).astype(np.float32)

  params = {
    'thin': {'w': normal(n_thin, _D, _D), 'scale': normal(n_thin, _D)},
    'wide': {
      'w1': normal(n_wide, _D, width),
      'w2': normal(n_wide, width, _D),
    },
    'embed': normal(_V, _D),
    'head': normal(_V, _D),
  }
  state = {'wide': {'bias': normal(n_wide, width)}, 'offset': normal(_V)}
  tokens = rng.integers(_V, size=(microbatches, rows, length + 1))
  return params, state, {'tokens': tokens.astype(np.int32)}


def _plain(params, state, batch, scale):
  """The same on one device: (gradients, statistics of 'wide', report)."""

  def objective(params, micro):
    x, total, stats = _embed(params['embed'], micro), 0.0, []
    for kind, layer in _PROGRAM.layers.items():
      for i in range(jax.tree.leaves(params[kind])[0].shape[0]):
        own = jax.tree.map(lambda a: a[i], (params[kind], state.get(kind)))  # noqa: B023
        (x, loss), s = layer(*own, x, (micro, scale))
        total += loss
        stats += [s] if s else []
    loss, report = _head(params, state, x, micro, scale)
    stats = jax.tree.map(lambda *s: jnp.stack(s), *stats)
    return total + loss, (stats, report)

  def body(sums, micro):
    grads, aux = jax.grad(objective, has_aux=True)(params, micro)
    return jax.tree.map(jnp.add, sums, (grads, *aux)), None

  first = jax.tree.map(lambda a: a[0], batch)
  shapes = jax.eval_shape(
    lambda p: jax.grad(objective, has_aux=True)(p, first), params
  )
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1])
  )
  return jax.lax.scan(body, zeros, batch)[0]


def _stored(grid, is_stack, array):
  return placement.divide(P(), array.shape, grid.shape, is_stack)


@dataclasses.dataclass(frozen=True)
class _Case:
  schedule: str
  ranks: int
  microbatches: int
  n_thin: int = 1
  n_wide: int = 3
  sizes: tuple[int, ...] | None = None
  data: int = 1
  length: int = _T
  width: int = 2 * _D

  def make(self):
    """(function of the pipeline, its arguments)."""
    schedule = schedules.make(self.schedule, self.ranks, self.microbatches)
    layers = [('thin', i) for i in range(self.n_thin)]
    layers += [('wide', i) for i in range(self.n_wide)]
    asked = self.sizes or ()
    sizes = config_lib.stage_sizes(len(layers), schedule.stages, asked)
    layout = placement.Layout(schedule, placement.cut(layers, sizes))
    config = config_lib.ParallelConfig(stage=self.ranks, data=self.data)
    devices = jax.devices()[: config.n_devices]
    grid = mesh.build(config, devices)
    problem = _problem(
      self.n_thin,
      self.n_wide,
      self.microbatches,
      _ROWS * self.data,
      self.length,
      self.width,
    )
    stored = {
      key: jax.tree.map(
        functools.partial(_stored, grid, key in _PROGRAM.layers), value
      )
      for key, value in problem[0].items()
    }
    specs = pipeline.Specs(
      stored=stored,
      used=jax.tree.map(lambda _: P(), problem[0]),
      dtypes=jax.tree.map(lambda a: a.dtype, problem[0]),
      batch=P(None, 'data'),
      batch_axes=('data',),
    )
    table = ticks.build(schedule)
    run = pipeline.gradients(_PROGRAM, table, layout, grid, specs)
    return run, (*problem, _SCALE)


class GradientsTest(parameterized.TestCase):
  @parameterized.parameters(
    _Case('gpipe', 2, 3),
    _Case('1f1b', 4, 6, data=2),
    _Case('interleaved', 2, 4, n_thin=2),
    _Case('zb_h1', 4, 6, n_thin=3, sizes=(2, 1, 2, 1)),
    _Case('dualpipe', 4, 8, data=2),
    _Case('dualpipe_v', 2, 5, n_wide=4, sizes=(2, 1, 1, 1)),
    _Case('dualpipe_v', 1, 2, n_wide=1),
  )
  def test_equal_one_device(self, case):
    run, args = case.make()
    grads, stats, report = jax.jit(run)(*args)
    expected = jax.jit(_plain)(*args)
    tolerances.assert_close(
      (grads, stats['wide'], report), expected, tolerances.COMPONENT_PARITY
    )

  def test_messages_wrap_only_where_a_chunk_follows(self):
    for name, links in ('1f1b', [(0, 1), (1, 2)]), (
      'interleaved', [(2, 0), (0, 1), (1, 2)]
    ):  # fmt: skip
      table = ticks.build(schedules.make(name, 3, 6))
      self.assertEqual(table.links('y_up'), links)
      back = [(b, a) for a, b in links]
      self.assertCountEqual(table.links('g_down'), back)

  def test_parameters_are_stored_in_parts(self):
    """Each rank has a part of every matrix, and gives back that of its sum."""
    run, args = _Case('1f1b', 4, 4).make()
    grads, *_ = jax.eval_shape(run, *args)
    self.assertEqual(
      jax.tree.map(jnp.shape, grads), jax.tree.map(jnp.shape, args[0])
    )
    text = jax.jit(run).lower(*args).as_text()
    self.assertEqual(text.count('stablehlo.all_to_all'), 2 * 3)

  @parameterized.parameters('zb_h1', 'dualpipe')
  def test_what_lies_in_branches_that_other_ranks_skip(self, schedule):
    """All work on the vocabulary's tables; no message, which would hang."""
    run, args = _Case(schedule, 4, 8).make()
    jaxpr = jax.make_jaxpr(run)(*args).jaxpr
    for name, count in ('dot_general', 3), ('gather', 0), ('scatter-add', 0):
      is_work = functools.partial(_is_on_a_table, name)
      inside, outside = _places(jaxpr, is_work)
      self.assertGreater(inside, count, name)
      self.assertEqual(outside, 0, name)
    inside, outside = _places(jaxpr, lambda e: e.primitive.name == 'ppermute')
    self.assertEqual(inside, 0)
    self.assertGreater(outside, 1)


def _is_on_a_table(name, eqn):
  """Whether it is `name`, of anything as wide as the vocabulary."""
  shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
  return eqn.primitive.name == name and any(_V in s for s in shapes)


def _places(jaxpr, is_counted):
  """How many such equations lie within a conditional, and without."""
  is_inside = [
    not {'cond', 'while'}.isdisjoint(around)
    for eqn, around in jaxprs.equations(jaxpr)
    if is_counted(eqn)
  ]
  return sum(is_inside), len(is_inside) - sum(is_inside)


def _bytes(shape):
  return shape.size * shape.dtype.itemsize


class MemoryTest(parameterized.TestCase):
  def _temporary(self, case):
    run, args = case.make()
    compiled = jax.jit(run).lower(*args).compile()
    schedule = schedules.make(case.schedule, case.ranks, case.microbatches)
    ranks = range(case.ranks)
    peak = max(simulate.peak_activations(schedule, r) for r in ranks)
    return compiled.memory_analysis().temp_size_in_bytes, peak

  def _split(self, kind, *sizes):
    params, state, batch = _problem(1, 1, 1, _ROWS, *sizes)
    one = jax.tree.map(lambda a: a[0], (params[kind], state.get(kind, {})))
    micro = {'tokens': batch['tokens'][0]}
    x = jax.eval_shape(_embed, params['embed'], micro)
    return split_backward.split(_PROGRAM.layers[kind], *one, x, (micro, _SCALE))

  def test_activations_are_the_simulators_peak(self):
    """GPipe holds all micro-batches, 1F1B as many as there are stages."""

    def of_few_and_many(name):
      return (
        self._temporary(_Case(name, 2, n, n_thin=2, n_wide=2, sizes=(2, 2)))
        for n in (8, 40)
      )

    few, many = of_few_and_many('gpipe')
    slot = (many[0] - few[0]) / (many[1] - few[1])
    # Each buffer as large as the stage with the most wants; gradient's inbox.
    sizes = (
      sorted((_bytes(s) for s in 2 * self._split(kind).residuals), reverse=True)
      for kind in ('thin', 'wide')
    )
    expected = sum(map(max, itertools.zip_longest(*sizes, fillvalue=0)))
    expected += 4 * _ROWS * _T * _D
    self.assertBetween(slot, expected, 1.05 * expected)
    few, many = of_few_and_many('1f1b')
    self.assertEqual(few[1], many[1])
    self.assertLess(many[0] - few[0], slot)

  @parameterized.parameters(
    ('gpipe', 10), ('1f1b', 10), ('interleaved', 8),
    ('zb_h1', 10), ('dualpipe', 10), ('dualpipe_v', 10),
  )  # fmt: skip
  def test_every_schedule_holds_its_peak(self, name, microbatches):
    """A layer made wider takes more memory once for each activation held.

    Besides these there are what a forward gives, what a backward reads, and
    what input gradients leave to weight gradients.
    """
    ranks, length, widths = 4, 64, (128, 1024)
    table = ticks.build(schedules.make(name, ranks, microbatches))
    more, held, left = [], [], []
    for width in widths:
      split = self._split('wide', length, width)
      held.append(sum(map(_bytes, split.residuals)))
      left.append(sum(map(_bytes, split.cut)))
      case = _Case(
        name,
        ranks,
        microbatches,
        n_thin=0,
        n_wide=table.schedule.stages,
        length=length,
        width=width,
      )
      temporary, peak = self._temporary(case)
      more.append(temporary)
    grown, one, cut = (b - a for a, b in (more, held, left))
    measured = (grown - table.cut_slots * cut) / one
    self.assertBetween(measured, peak + 2, peak + 3.5)


def _sent(params, state, x, aux):
  """A layer whose rows travel to another device and back."""

  def exchange(x):
    return lax.all_to_all(x, 'expert', 0, 0, tiled=True)

  h = jnp.tanh(exchange(x @ params['w1']))
  return (x + exchange(h @ params['w2']), jnp.zeros((), jnp.float32)), None


class OverlapTest(parameterized.TestCase):
  def test_a_pairs_exchanges_have_other_computation_beside_them(self):
    """In the compiled program, of the other micro-batch (V3 figure 4)."""
    schedule = schedules.make('dualpipe', 4, 8)
    stages = placement.cut([('wide', i) for i in range(4)], (1, 1, 1, 1))
    config = config_lib.ParallelConfig(stage=4, expert=2)
    grid = mesh.build(config, jax.devices())
    params, state, batch = _problem(1, 4, 8, 2 * _ROWS)
    params = {k: v for k, v in params.items() if k != 'thin'}
    specs = pipeline.Specs(
      stored=jax.tree.map(lambda _: P(), params),
      used=jax.tree.map(lambda _: P(), params),
      dtypes=jax.tree.map(lambda a: a.dtype, params),
      batch=P(None, 'expert'),
      batch_axes=('expert',),
    )
    run = pipeline.gradients(
      pipeline.Program(_embed, {'wide': _sent}, _head),
      ticks.build(schedule),
      placement.Layout(schedule, stages),
      grid,
      specs,
    )
    compiled = jax.jit(run).lower(params, state, batch, _SCALE).compile()
    program = hlo.parse(compiled.as_text())
    exchanges = {
      name: [i for i in body.values() if i.opcode == 'all-to-all']
      for name, body in program.computations.items()
    }
    # A branch's: there and back, of a forward, a backward, or of both.
    counts = sorted(len(found) for found in exchanges.values() if found)
    self.assertEqual(counts, [2, 2, 4])
    for name, found in exchanges.items():
      body = program.computations[name]
      for instruction in found if len(found) == 4 else []:
        beside = hlo.beside(body, instruction.name)
        dots = [i for i in beside if program.has(i, ('dot',))]
        # Its own two layers' worth at least: forward 2, backward 4 products.
        self.assertGreaterEqual(len(dots), 2, instruction.name)


class PlacementTest(parameterized.TestCase):
  def test_layers_that_do_not_divide_evenly(self):
    layers = [('dense', 0), *(('moe', i) for i in range(4))]
    stages = placement.cut(layers, (2, 0, 1, 2))
    self.assertEqual(stages[0], [('dense', 0), ('moe', 0)])
    self.assertEqual([len(stage) for stage in stages], [2, 0, 1, 2])

  def test_dualpipe_holds_both_directions_stages(self):
    schedule = schedules.make('dualpipe', 4, 8)
    stages = placement.cut([('moe', i) for i in range(4)], (1, 1, 1, 1))
    layout = placement.Layout(schedule, stages)
    sources = layout.sources['moe'].tolist()
    self.assertEqual(sources, [[0, 3], [1, 2], [2, 1], [3, 0]])

  @parameterized.parameters(
    ((6, 8, 16), True, P(None, None, 'stage')),
    ((6, 8, 5), True, P(None, 'stage', None)),
    ((8, 16), True, P()),
    ((8, 6), False, P('stage', None)),
  )
  def test_division_at_rest(self, shape, is_stack, expected):
    sizes = {'stage': 4, 'data': 1}
    self.assertEqual(placement.divide(P(), shape, sizes, is_stack), expected)

  def test_a_matrix_that_no_rank_can_have_a_part_of(self):
    sizes = {'stage': 4, 'fsdp': 2}
    with self.assertRaisesRegex(ValueError, r'none of \[2, 5\] is a multiple'):
      placement.divide(P(None, 'fsdp'), (8, 4, 5), sizes, True)

  def test_a_dimension_may_be_divided_already(self):
    sizes = {'stage': 2, 'expert': 4}
    spec = placement.divide(P(None, 'expert'), (3, 8, 6, 6), sizes, True)
    self.assertEqual(spec, P(None, 'expert', 'stage', None))


if __name__ == '__main__':
  absltest.main()
