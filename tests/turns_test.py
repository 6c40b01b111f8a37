"""Programs that take turns: where stretches begin, and who waits for whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import split_backward, turns
from tests import tolerances


class _Equation(NamedTuple):
  outputs: tuple[str, ...]
  reads: tuple[str, ...]
  in_exchange: bool = False
  sends: bool = False


def _place(*equations):
  """The stretch of each result; 'w' and what is made of it is a parameter."""
  moving = {v for e in equations for v in (*e.reads, *e.outputs)}
  found = turns.place(equations, moving - {'w', 'cast'})
  return {e.outputs[0]: found[i] for i, e in enumerate(equations)}


class PlaceTest(parameterized.TestCase):
  def test_a_layer(self):
    places = _place(
      _Equation(('cast',), ('w',)),
      _Equation(('attention',), ('x',)),
      _Equation(('shared',), ('attention',)),
      _Equation(('sorted',), ('attention',), True),
      _Equation(('sent',), ('sorted',), True, True),
      _Equation(('sorted_again',), ('sent',), True),
      _Equation(('sent_again',), ('sorted_again',), True, True),
      _Equation(('experts',), ('sent_again', 'cast')),
      _Equation(('back',), ('experts',), True, True),
      _Equation(('sum',), ('back',), True),
      _Equation(('y',), ('sum', 'shared')),
    )
    self.assertEqual(
      places,
      {
        'attention': 0,
        'sorted': 0,
        'sent': 1,
        'sorted_again': 1,
        'sent_again': 1,
        'cast': 2,
        'experts': 2,
        'back': 3,
        'sum': 4,
        'shared': 4,
        'y': 4,
      },
    )

  def test_an_exchange_does_not_wait_for_its_reader(self):
    places = _place(
      _Equation(('early',), ('x',), True, True),
      _Equation(('sent',), ('x',), True, True),
      _Equation(('there',), ('sent',)),
      _Equation(('back',), ('there',), True, True),
      _Equation(('y',), ('back', 'early')),
    )
    self.assertEqual((places['early'], places['y']), (1, 4))


def _layer(params, state, x, aux):
  """Two exchanges with oneself, and a product that needs neither."""

  @jax.named_scope(turns.SCOPE)
  def exchange(h):
    return jax.lax.all_to_all(h, 'alone', 0, 0, tiled=True)

  h = exchange(jnp.tanh(x @ params['up']))
  h = exchange(jnp.tanh(h @ params['middle']))
  return (h + x @ params['beside']) * aux, {'sum': h.sum()}


def _inputs():
  keys = iter(jax.random.split(jax.random.key(0), 4))
  names = ('up', 'middle', 'beside')
  params = {name: jax.random.normal(next(keys), (4, 4)) for name in names}
  return params, jax.random.normal(next(keys), (3, 4)), jnp.float32(0.5)


def _alone(function):
  """`function` on the only device of a mesh."""
  grid = jax.make_mesh((1,), ('alone',), devices=jax.devices()[:1])
  return jax.shard_map(
    function, mesh=grid, in_specs=P(), out_specs=P(), check_vma=False
  )


def _primitives(function):
  """Names of primitives on the device, nested calls aside."""
  (call,) = jax.make_jaxpr(_alone(function))(*_inputs()).eqns
  names = [e.primitive.name for e in call.params['jaxpr'].eqns]
  return [n for n in names if n in (_DOT, _BARRIER)]


_DOT, _BARRIER = 'dot_general', 'optimization_barrier'


def _split(params, x, aux):
  split = split_backward.split(_layer, params, {}, x, aux)
  return split, (params, {}, split.prepare(params, {}))


class TurnsTest(parameterized.TestCase):
  def test_results_are_those_without_turns(self):
    def run(*inputs):
      split, variables = _split(*inputs)
      _, x, aux = inputs
      y, stats, residuals = split.forward(*variables, x, aux)
      dx, cut = split.input_grad(*variables, aux, residuals, y)
      dparams = split.weight_grad(*variables, aux, residuals, cut)
      both = split.backward(*variables, aux, residuals, y)
      order = turns.Order()
      backward, forward = turns.alternate(
        split.backward.in_turns(order, *variables, aux, residuals, y),
        split.forward.in_turns(order, *variables, x, aux),
      )
      expected = (dx, dparams), (dx, dparams), (y, stats, residuals)
      return (both, backward, forward), expected

    got, expected = _alone(run)(*_inputs())
    tolerances.assert_close(got, expected, tolerances.FLOAT32_MATH)

  def test_stretches_alternate(self):
    """Two forwards: each has three stretches, and five barriers part them."""

    def run(*inputs):
      split, variables = _split(*inputs)
      order = turns.Order()
      return turns.alternate(
        *(
          split.forward.in_turns(order, *variables, *inputs[1:])
          for _ in range(2)
        )
      )

    self.assertEqual(_primitives(run), [_DOT] + 5 * [_BARRIER, _DOT])

  def test_one_alone_has_no_barrier(self):
    def run(*inputs):
      split, variables = _split(*inputs)
      program = split.forward.in_turns(None, *variables, *inputs[1:])
      return turns.alternate(program)

    self.assertEqual(_primitives(run), 3 * [_DOT])


if __name__ == '__main__':
  absltest.main()
