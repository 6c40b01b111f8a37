"""A backward pass cut in two: gradient of the input, gradient of the weights.

Zero-bubble schedules and DualPipe send the gradient of the input on at once and
compute that of the weights later (V3 section 3.2.1).  Here any function is cut
so, from its jaxpr: what the input's gradient needs is the first part, what is
left for the weights the second, and values that cross are kept.  Nothing is
computed twice that the function itself does not rematerialise.

What depends on parameters alone, such as their copies in the compute dtype or
their FP8 form, becomes a program of its own, to be run once for all
micro-batches.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from deepseek_jax.parallel import sharding, turns

# Calls that are replaced by their body, so that their equations can be sorted.
_INLINED = (
  'jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call',
  'custom_vjp_call', 'checkpoint', 'remat', 'remat2',
)  # fmt: skip
_BODIES = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
# Operations that only look at their operand in another way.
_VIEWS = ('broadcast_in_dim', 'reshape', 'squeeze', 'transpose')
# Cheap enough to be done again where that leaves fewer bytes to keep.
_REPEATED = (*_VIEWS, 'convert_element_type')
# What a gradient of weights consists of, whose time is to come later.
_PRODUCTS = (
  'dot_general', 'ragged_dot', 'ragged_dot_general', 'while', 'scan', 'cond',
  'scatter-add',
)  # fmt: skip
# How kernels appear; their work is not to be seen.
_KERNELS = ('custom_vmap_call', 'pallas_call')


class _Var:
  """A variable of the flattened program."""

  __slots__ = ('aval',)

  def __init__(self, aval):
    self.aval = aval


@dataclasses.dataclass(frozen=True)
class _Equation:
  inputs: tuple[Any, ...]  # _Var or Literal
  outputs: tuple[_Var, ...]
  eqn: Any
  scope: str  # Its names in a profile, of all calls around it.

  @property
  def reads(self) -> list[_Var]:
    return [v for v in self.inputs if isinstance(v, _Var)]

  @property
  def in_exchange(self) -> bool:
    return turns.SCOPE in self.scope

  @property
  def sends(self) -> bool:
    return self.in_exchange and self.eqn.primitive.name in turns.SENDS


class _Flat:
  """Collects equations of jaxprs, calls inlined, on common variables."""

  def __init__(self):
    self.equations: list[_Equation] = []
    self.constants: dict[_Var, Any] = {}

  def add(self, jaxpr, constants, arguments, around='') -> list[Any]:
    """Appends a jaxpr applied to `arguments`; its outputs."""
    env = dict(zip(jaxpr.invars, arguments))
    for var, value in zip(jaxpr.constvars, constants):
      env[var] = _Var(var.aval)
      self.constants[env[var]] = value

    def read(atom):
      return atom if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
      inputs = [read(atom) for atom in eqn.invars]
      body = _body(eqn)
      scope = f'{around}/{eqn.source_info.name_stack}'.strip('/')
      if body is not None:
        outputs = self.add(*body, inputs, scope)
      else:
        outputs = [_Var(var.aval) for var in eqn.outvars]
        self.equations.append(
          _Equation(tuple(inputs), tuple(outputs), eqn, scope)
        )
      env.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _body(eqn):
  """(jaxpr, constants) of a call that is to be inlined, else None."""
  if eqn.primitive.name not in _INLINED:
    return None
  for name in _BODIES:
    if name in eqn.params:
      body = eqn.params[name]
      return (
        (body.jaxpr, body.consts) if hasattr(body, 'consts') else (body, ())
      )
  return None


def _reached(equations, sources: Iterable[_Var]) -> set[_Var]:
  """All variables that depend on one of `sources`, these included."""
  reached = set(sources)
  for e in equations:
    if any(v in reached for v in e.reads):
      reached.update(e.outputs)
  return reached


def _needed(equations, wanted: Iterable[Any], given: set[_Var]):
  """The equations that compute `wanted` from `given` and the inputs."""
  live = {v for v in wanted if isinstance(v, _Var)} - given
  kept = []
  for e in reversed(equations):
    if any(v in live for v in e.outputs):
      kept.append(e)
      live.update(v for v in e.reads if v not in given)
  return kept[::-1]


def _merge_static(equations, static: set[_Var]) -> list[_Equation]:
  """Lets equal functions of `static` alone be computed once.

  Both passes cast the same weights, and a rematerialised layer once more.  What
  is made wider and narrow again is what it was.
  """
  static, known, same, result = set(static), {}, {}, []
  narrow = {}
  for e in equations:
    inputs = tuple(
      same.get(v, v) if isinstance(v, _Var) else v for v in e.inputs
    )
    e = dataclasses.replace(e, inputs=inputs)
    result.append(e)
    if static.issuperset(e.reads):
      static.update(e.outputs)
      atoms = tuple(v if isinstance(v, _Var) else str(v) for v in inputs)
      types = tuple(str(v.aval) for v in e.outputs)
      key = e.eqn.primitive, atoms, types, str(e.eqn.params)
      same.update(zip(e.outputs, known.setdefault(key, e.outputs)))
      if e.eqn.primitive.name == 'convert_element_type' and e.reads:
        [x], [y] = e.reads, e.outputs
        floats = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (x, y))
        if floats and _bytes(y) > _bytes(x):
          narrow[y] = x
        elif x in narrow and narrow[x].aval.dtype == y.aval.dtype:
          same[y] = narrow[x]
  return result


def _unique(variables: Iterable[Any]) -> list[_Var]:
  return list(dict.fromkeys(v for v in variables if isinstance(v, _Var)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
  """Equations between named inputs and outputs."""

  parts: list[list[_Equation]]
  constants: dict[_Var, Any]
  outputs: list[Any]
  moving: set[_Var]

  def __call__(self, env: dict[_Var, Any]) -> list[Any]:
    env = {**self.constants, **env}
    for equations in self.parts:
      _evaluate(equations, env)
    return [_read(env, atom) for atom in self.outputs]

  def in_turns(self, order: turns.Order, env: dict[_Var, Any]) -> turns.Turn:
    """The same, with stops; see `turns.py`."""
    env = {**self.constants, **env}
    equations = [e for part in self.parts for e in part]
    places = dict(zip(map(id, equations), turns.place(equations, self.moving)))
    rounds = []
    for at in range(0, 1 + max(places.values(), default=0), 2):
      rounds.append([])
      for part in self.parts:
        here, after = (
          [e for e in part if places[id(e)] == place] for place in (at, at + 1)
        )
        rounds[-1].append((here, after))
    outputs = _unique(self.outputs)
    yield from turns.run(rounds, env, outputs, self.moving, _evaluate, order)
    return [_read(env, atom) for atom in self.outputs]


def _read(env: dict[_Var, Any], atom: Any) -> Any:
  return atom.val if isinstance(atom, Literal) else env[atom]


def _evaluate(equations: Iterable[_Equation], env: dict[_Var, Any]) -> None:
  """Puts the results of equations into `env`."""
  for e in equations:
    primitive = e.eqn.primitive
    params = primitive.get_bind_params(e.eqn.params)
    with e.eqn.ctx.manager, jax.named_scope(e.scope):
      inputs = [_read(env, atom) for atom in e.inputs]
      values = primitive.bind(*inputs, **params)
    many = primitive.multiple_results
    env.update(zip(e.outputs, values if many else [values]))


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
  """A program as a function of trees."""

  _program: _Program
  _bind: Callable[..., dict[_Var, Any]]
  _give: Callable[[list[Any]], Any]

  def __call__(self, *arguments: Any) -> Any:
    """Runs it."""
    return self._give(self._program(self._bind(*arguments)))

  def in_turns(self, order: turns.Order | None, *arguments: Any) -> turns.Turn:
    """Runs it with stops at its exchanges; without an order, with none."""
    if order is None:
      return self(*arguments)
    env = self._bind(*arguments)
    return self._give((yield from self._program.in_turns(order, env)))


@dataclasses.dataclass(frozen=True)
class Split:
  """Programs that together are `jax.vjp` of one function.

  `prepared`, `residuals` and `cut` are lists of arrays.

  Attributes:
    prepare: (params, state) -> prepared.
    forward: (params, state, prepared, x, aux) -> (y, stats, residuals).
    input_grad: (params, state, prepared, aux, residuals, dy) -> (dx, cut).
    weight_grad: (params, state, prepared, aux, residuals, cut) -> dparams.
    backward: (params, state, prepared, aux, residuals, dy) -> (dx, dparams):
      both at once; in turns, weights after inputs within each stretch.
    residuals: their shapes, of one call.
    cut: likewise.
    stats: likewise.
  """

  prepare: Function
  forward: Function
  input_grad: Function
  weight_grad: Function
  backward: Function
  residuals: list[jax.ShapeDtypeStruct]
  cut: list[jax.ShapeDtypeStruct]
  stats: Any


def split(
  function: Callable[..., tuple[Any, Any]],
  params: Any,
  state: Any,
  x: Any,
  aux: Any,
) -> Split:
  """Cuts the backward pass of `function(params, state, x, aux)`.

  Loops stay whole: one that computes gradients of inputs and weights together
  goes to the first part, so layers should not be scanned over in `function`.

  Args:
    function: gives (y, stats); there is no gradient of `stats`.
    params: differentiated; arrays or their shapes, as the other arguments.
      In float32, whatever their dtype: so `function` gets them, and so its
      gradients are.
    state: belongs to `params`, but is not differentiated.
    x: differentiated.
    aux: not differentiated, and at hand in both passes: never a residual.
  """
  treedefs = []

  def forward(params, state, x, aux):
    def run(slots, x):
      return function(sharding.widen(params, slots), state, x, aux)

    y, vjp, stats = jax.vjp(run, sharding.slots(params), x, has_aux=True)
    leaves, treedef = jax.tree.flatten(vjp)
    treedefs.append(treedef)
    return y, stats, leaves

  def backward(leaves, dy):
    return jax.tree.unflatten(treedefs[-1], leaves)(dy)

  first, shapes = jax.make_jaxpr(forward, return_shape=True)(
    params, state, x, aux
  )
  second, grads = jax.make_jaxpr(backward, return_shape=True)(
    shapes[2], shapes[0]
  )
  return _Splitter(first, second, (params, state, x, aux), shapes, grads).make()


class _Splitter:
  """Sorts the equations of a forward and a backward jaxpr into programs."""

  def __init__(self, first, second, arguments, shapes, grads):
    self._shapes, self._grads = shapes, grads
    flat = _Flat()
    inputs = [_Var(aval) for aval in first.in_avals]
    sizes = [len(jax.tree.leaves(a)) for a in arguments]
    ends = list(itertools.accumulate(sizes))
    self._params, self._state, self._x, self._aux = (
      inputs[end - size : end] for size, end in zip(sizes, ends)
    )
    outs = flat.add(first.jaxpr, first.consts, inputs)
    n_y, n_stats = (len(jax.tree.leaves(s)) for s in shapes[:2])
    self._y = outs[: n_y + n_stats]
    n_forward = len(flat.equations)
    self._dy = [_Var(aval) for aval in second.in_avals[-n_y:]]
    leaves = outs[n_y + n_stats :]
    outs = flat.add(second.jaxpr, second.consts, leaves + self._dy)
    n_params = len(self._params)
    self._dparams, self._dx = outs[:n_params], outs[n_params:]
    self._constants = flat.constants
    self._equations = _merge_static(
      flat.equations, {*self._params, *self._state, *flat.constants}
    )
    self._forward_equations = self._equations[:n_forward]

  def make(self) -> Split:
    """The programs."""
    equations = self._equations
    moving = _reached(equations, [*self._x, *self._dy])
    prepared = self._hoisted()
    self._prepared = prepared
    # Whatever moves in the forward pass and is read in the backward pass.
    in_forward = {v for e in self._forward_equations for v in e.outputs}
    kept = (in_forward & moving) | set(self._x)
    given = kept | set(prepared)
    # The gradient of a vector, a sum over tokens, is smaller than what it is
    # made of: it does not wait.
    vectors = [d for d in self._dparams if d.aval.ndim < 2]
    first = _needed(equations, self._dx + vectors, given)
    done = {v for e in first for v in e.outputs if v in moving}
    cut = self._cut(given, done, moving)
    backward = _needed(equations, self._dx + cut, given)
    rest = _needed(equations, self._dparams, given | set(cut))
    reads = [v for e in backward + rest for v in e.reads]
    residuals = _unique(
      v for v in [*reads, *self._dx, *self._dparams] if v in kept
    )
    forward = _needed(equations, self._y + residuals, set(prepared))
    return Split(
      prepare=self._prepare(_needed(equations, prepared, set())),
      forward=self._forward(forward, residuals),
      input_grad=self._input_grad(backward, residuals, cut),
      weight_grad=self._weight_grad(rest, residuals, cut),
      backward=self._backward(
        first, _needed(equations, self._dparams, given | done), residuals
      ),
      residuals=[_shape(v) for v in residuals],
      cut=[_shape(v) for v in cut],
      stats=self._shapes[1],
    )

  def _hoisted(self) -> list[_Var]:
    """What is kept of parameters alone: the fewest bytes to go on from.

    That is a cast or quantised matrix, but not its form in wider tiles, nor a
    scale that is broadcast to all tokens: such is made again.
    """
    inputs = {*self._params, *self._state}
    origin = {v: frozenset([v]) for v in inputs}
    origin |= {v: frozenset() for v in self._constants}
    for e in self._equations:
      if all(v in origin for v in e.reads):
        sources, saved = _sources(e, origin)
        is_kept = saved > 0 or saved == 0 and _is_computed(e)
        for v in e.outputs:
          origin[v] = frozenset([v]) if sources and is_kept else sources
    static = set(origin)
    used = _unique(
      v
      for e in self._equations
      if not static.issuperset(e.outputs)
      for v in e.reads
    )
    kept = _unique(o for v in used if v in static for o in origin[v])
    return sorted((v for v in kept if v not in inputs), key=list(origin).index)

  def _cut(self, given, done, moving) -> list[_Var]:
    """What the first part leaves to the second: as few bytes as can be.

    Codes and scales, for instance, in place of what is quantised for a weight's
    gradient alone.  Only what makes fewer bytes is done ahead of its time, and
    no product.

    Args:
      given: at hand in both parts.
      done: what the first part computes in any case.
      moving: everything that depends on the micro-batch.
    """
    origin = {v: frozenset([v]) for v in self._dy}
    ahead, products = {}, set()
    for e in self._equations:
      if given.issuperset(e.outputs) or moving.isdisjoint(e.outputs):
        continue
      sources, saved = _sources(e, origin)
      if done.issuperset(e.outputs):
        is_kept = saved > 0 or e.eqn.primitive.name not in _REPEATED
      elif _is_product(e) or not products.isdisjoint(e.reads):
        products.update(e.outputs)
        is_kept = False
      else:
        is_kept = saved > 0
      for v in e.outputs:
        origin[v] = frozenset([v]) if is_kept else sources
        if is_kept and v not in done:
          ahead[v] = sources
    cut = set().union(*(origin.get(v, ()) for v in self._dparams))
    for v, sources in ahead.items():
      if sources <= cut:  # They are kept anyway: this can wait.
        cut.discard(v)
    return sorted(cut, key=list(origin).index)

  def _function(self, parts, outputs, bind, give):
    fixed = {*self._params, *self._state, *self._prepared, *self._constants}
    for e in self._equations:
      if fixed.issuperset(e.reads):
        fixed.update(e.outputs)
    reads = (v for part in parts for e in part for v in (*e.reads, *e.outputs))
    moving = {v for v in reads if v not in fixed}
    program = _Program(parts, self._constants, outputs, moving)
    return Function(program, bind, give)

  def _bind(self, params, state, prepared=(), aux=None):
    env = _bindings(self._params, params) | _bindings(self._state, state)
    env |= zip(self._prepared, prepared) if prepared else {}
    return env | (_bindings(self._aux, aux) if aux is not None else {})

  def _prepare(self, equations):
    return self._function([equations], self._prepared, self._bind, list)

  def _forward(self, equations, residuals):
    n_y, n_stats = (len(jax.tree.leaves(s)) for s in self._shapes[:2])
    trees = [jax.tree.structure(s) for s in self._shapes[:2]]

    def bind(params, state, prepared, x, aux):
      env = self._bind(params, state, prepared, aux)
      return env | _bindings(self._x, x)

    def give(out):
      y = jax.tree.unflatten(trees[0], out[:n_y])
      stats = jax.tree.unflatten(trees[1], out[n_y : n_y + n_stats])
      return y, stats, out[n_y + n_stats :]

    return self._function([equations], self._y + residuals, bind, give)

  def _bind_backward(self, residuals):
    def bind(params, state, prepared, aux, residual_values, dy):
      env = self._bind(params, state, prepared, aux)
      env |= dict(zip(residuals, residual_values))
      return env | _bindings(self._dy, dy)

    return bind

  def _input_grad(self, equations, residuals, cut):
    tree, n_dx = jax.tree.structure(self._grads[1]), len(self._dx)

    def give(out):
      return jax.tree.unflatten(tree, out[:n_dx]), out[n_dx:]

    bind = self._bind_backward(residuals)
    return self._function([equations], self._dx + cut, bind, give)

  def _weight_grad(self, equations, residuals, cut):
    tree = jax.tree.structure(self._grads[0])

    def bind(params, state, prepared, aux, residual_values, cut_values):
      env = self._bind(params, state, prepared, aux)
      env |= dict(zip(residuals, residual_values))
      return env | dict(zip(cut, cut_values))

    return self._function([equations], self._dparams, bind, tree.unflatten)

  def _backward(self, inputs, weights, residuals):
    trees = [jax.tree.structure(g) for g in self._grads]
    n_dx = len(self._dx)

    def give(out):
      return trees[1].unflatten(out[:n_dx]), trees[0].unflatten(out[n_dx:])

    # What depends on neither x nor dy is in both.
    known = set(map(id, inputs))
    parts = [inputs, [e for e in weights if id(e) not in known]]
    bind = self._bind_backward(residuals)
    return self._function(parts, self._dx + self._dparams, bind, give)


def _bindings(variables, tree):
  leaves = jax.tree.leaves(tree)
  assert len(leaves) == len(variables), (len(leaves), len(variables))
  return dict(zip(variables, leaves))


def _sources(equation, origin):
  """What an equation's outputs are made of, and its bytes less theirs."""
  sources = frozenset().union(*(origin.get(v, ()) for v in equation.reads))
  saved = sum(map(_bytes, sources)) - sum(map(_bytes, equation.outputs))
  return sources, saved


def _is_product(equation):
  """Whether it is work that is to wait: no elementwise step to codes."""
  is_narrow = any(v.aval.dtype.itemsize == 1 for v in equation.outputs)
  name = equation.eqn.primitive.name
  return name in _PRODUCTS or name in _KERNELS and not is_narrow


def _is_computed(equation):
  """Whether numbers come out: no view, and no mask on the way from codes."""
  is_float = all(
    jnp.issubdtype(v.aval.dtype, jnp.floating) for v in equation.outputs
  )
  return is_float and equation.eqn.primitive.name not in _VIEWS


def _bytes(var):
  return var.aval.size * var.aval.dtype.itemsize


def _shape(var):
  return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
