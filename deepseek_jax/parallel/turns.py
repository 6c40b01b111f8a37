"""Programs that take turns: one computes while another's rows travel.

DualPipe pairs the forward pass of a micro-batch with the backward pass of
another so that each all-to-all has computation beside it (V3 section 3.2.1);
two halves of a micro-batch do the same for each other (section 3.4.1).  That
they are independent is not enough: XLA fuses what they do alike, and then each
waits for both.  So the order is made explicit.  Exchanges cut a program into
stretches of computation; a stretch begins when the one before it, of any
program, has ended, but for an exchange only the program whose rows it brings
waits.
"""

import collections
from collections.abc import Callable, Generator, Sequence
from typing import Any

from jax import lax

# The scope of everything that belongs to the sending of rows.
SCOPE = 'exchange_of_rows'
# The collectives in it.
SENDS = ('all_to_all', 'ragged_all_to_all')

Turn = Generator[None, None, Any]  # Stops after each stretch; returns results.


class _Line:
  """Things done one after another, and what the last has left behind."""

  def __init__(self):
    self._left = []

  def follow(self, equations: Sequence[Any], env, moving, later, evaluate):
    """Evaluates equations after the last ones have ended.

    That holds for those that read a `moving` variable.  Ended is what makes a
    variable that is read `later`.
    """
    made = dict.fromkeys(v for e in equations for v in e.outputs)
    reads = dict.fromkeys(v for e in equations for v in e.reads)
    own = [v for v in reads if v in moving and v not in made]
    if own and self._left:
      values = [env[v] for v in own], self._left
      env.update(zip(own, lax.optimization_barrier(values)[0]))
    evaluate(equations, env)
    if left := [env[v] for v in made if v in moving and v in later]:
      self._left = left


class Order:
  """Common to programs that take turns: the last stretch, the last hop."""

  def __init__(self):
    self.computation, self.hops = _Line(), _Line()


def alternate(*programs: Turn) -> list[Any]:
  """Runs the programs a stretch each in turn; their results."""
  results, waiting = {}, dict(enumerate(programs))
  while waiting:
    for i, program in list(waiting.items()):
      try:
        next(program)
      except StopIteration as stop:
        results[i] = stop.value
        del waiting[i]
  return [results[i] for i in range(len(programs))]


def place(equations: Sequence[Any], moving: set[Any]) -> list[int]:
  """The stretch of each equation.

  Even numbers are computation; 2k + 1 is the exchange that follows stretch 2k,
  its hops and what is done between them.  An exchange goes as early as it can,
  so that it has time, and computation as late as its result allows, so that
  little waits: a shared expert, which is added to what comes back, beside the
  experts' exchange of another program, and what is rematerialised next to where
  it is used.

  Args:
    equations: in an order in which they could run, with `reads`, `outputs`,
      `in_exchange` and, of the collectives in one, `sends`.
    moving: all variables that depend on more than parameters.
  """
  sent: set[Any] = set()
  for e in reversed(equations):
    if e.sends or (e.in_exchange and not sent.isdisjoint(e.outputs)):
      sent.update(e.reads)
  earliest: dict[Any, int] = {}
  for e in equations:
    at = max((earliest.get(v, 0) for v in e.reads), default=0)
    if e.sends:
      at += at % 2 == 0
    elif not e.in_exchange or sent.isdisjoint(e.outputs):
      at += at % 2
    earliest.update((v, at) for v in e.outputs)
  readers = collections.defaultdict(list)
  places = [0] * len(equations)
  for index in reversed(range(len(equations))):
    e = equations[index]
    at, later = earliest[e.outputs[0]], [readers[v] for v in e.outputs]
    later = [n for numbers in later for n in numbers]
    is_fixed = moving.isdisjoint(e.outputs)
    if later and (is_fixed or at % 2 == 0):
      until = min(later)
      at = max(at, until if is_fixed else until - until % 2)
    places[index] = at
    for v in e.reads:
      readers[v].append(at)
  return places


def run(
  rounds: Sequence[Sequence[tuple[Sequence[Any], Sequence[Any]]]],
  env: dict[Any, Any],
  outputs: Sequence[Any],
  moving: set[Any],
  evaluate: Callable[[Sequence[Any], dict[Any, Any]], None],
  order: Order,
) -> Turn:
  """Evaluates rounds of stretches into `env`, with a stop after each round.

  Args:
    rounds: of stretches, each (computation, the exchange that follows).
    env: values of variables; when all is over, of `outputs` too.
    outputs: variables.
    moving: see `place`.
    evaluate: puts the results of equations into `env`.
    order: common to all that take turns.
  """
  later = [set(outputs)]
  for computation, exchange in reversed([s for r in rounds for s in r]):
    for equations in (exchange, computation):
      later.append(later[-1] | {v for e in equations for v in e.reads})
  later.reverse()
  after = iter(later[1:])
  for stretches in rounds:
    for computation, exchange in stretches:
      left = next(after)
      order.computation.follow(computation, env, moving, left, evaluate)
      left = next(after) | left
      for sends, between in _hops(exchange):
        evaluate(sends, env)
        order.hops.follow(between, env, moving, left, evaluate)
    yield


def _hops(exchange):
  """For each hop its collectives, and what is done before the next."""
  hops, number = [], {}
  for e in exchange:
    at = max((number.get(v, 0) for v in e.reads), default=0) + e.sends
    number.update((v, at) for v in e.outputs)
    hops += [([], []) for _ in range(len(hops), at + 1)]
    hops[at][not e.sends].append(e)
  return hops
