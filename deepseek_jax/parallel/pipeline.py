"""Runs a pipeline schedule in one compiled program (V3 section 3.2.1).

The program is a loop over ticks (`ticks.py`).  At each, a rank takes one of a
few branches: a forward, the gradient of an input or of weights through one of
its stages, or a pair of a forward and a backward.  Residuals wait in a buffer
of as many slots as the schedule needs.  All messages travel outside the
branches, for a permutation waits for ranks that may have taken another branch.

The model comes as functions of one layer, of the embedding and of the head.  A
branch is made of layers, so that the first and the last stage are like the
others: the embedding runs before the branches, on the rank that has it, and the
head behind them, forwards and backwards at once, for cross-entropy makes its
gradient in its forward pass.

Everything but `gradients` runs in a manual region over all axes of the mesh.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.parallel import (
  hlo,
  placement,
  sharding,
  split_backward,
  ticks,
  turns,
)
from deepseek_jax.parallel.placement import AXIS, Layout, Signature
from deepseek_jax.parallel.ticks import Cell, Table


@dataclasses.dataclass(frozen=True)
class Program:
  """A model in pieces; `micro` is a micro-batch, `scalars` any values.

  Attributes:
    embed: (embedding, micro) -> x.
    layers: kind -> (params, state, x, (micro, scalars)) -> ((x, loss), stats);
      `loss` is added to the objective, `stats` are summed over micro-batches.
    head: (params, state, x, micro, scalars) -> (loss, report), where `params`
      and `state` are those of no kind of layer; reports are summed.
  """

  embed: Callable[..., jax.Array]
  layers: Mapping[str, Callable[..., Any]]
  head: Callable[..., tuple[jax.Array, Any]]


class _Union:
  """Buffers that hold the arrays of any signature, each as one row of numbers.

  The largest array of a dtype shares its buffer with the largest of the other
  signatures, the next with the next.
  """

  def __init__(self, shapes: Mapping[Signature, Sequence[Any]]):
    self._arrays = shapes
    self._keys = {sig: _by_size(arrays) for sig, arrays in shapes.items()}
    self._sizes: dict[tuple, int] = {}
    for signature, arrays in shapes.items():
      for key, s in zip(self._keys[signature], arrays):
        self._sizes[key] = max(s.size, self._sizes.get(key, 0))
    self.shapes = [
      jax.ShapeDtypeStruct((size,), dtype)
      for (dtype, _), size in self._sizes.items()
    ]

  def pack(self, signature: Signature, leaves: Sequence[jax.Array]) -> list:
    """One value per buffer, zeros where the signature has none."""
    values = dict(zip(self._keys[signature], leaves))

    def one(key, size):
      if key not in values:
        return jnp.zeros(size, key[0])
      flat = values[key].reshape(-1)
      return jnp.pad(flat, (0, size - flat.size))

    return [one(*item) for item in self._sizes.items()]

  def unpack(self, signature: Signature, buffers: Sequence[jax.Array]) -> list:
    """The inverse of `pack`."""
    values = dict(zip(self._sizes, buffers))
    return [
      values[key][: s.size].reshape(s.shape)
      for key, s in zip(self._keys[signature], self._arrays[signature])
    ]


def _by_size(arrays: Sequence[Any]) -> list[tuple[Any, int]]:
  """Of each array: its dtype, and how many of that dtype are larger."""
  order = sorted(range(len(arrays)), key=lambda i: -arrays[i].size)
  seen, keys = collections.Counter(), {}
  for i in order:
    dtype = arrays[i].dtype
    keys[i] = dtype, seen[dtype]
    seen[dtype] += 1
  return [keys[i] for i in range(len(arrays))]


# What a branch does: the signatures of its forward, of its gradient of an
# input and of its gradient of weights, None for what it leaves out.
_Action = tuple[Signature | None, Signature | None, Signature | None]


def _action(layout: Layout, rank: int, cell: Cell) -> _Action:
  tasks = (cell.forward, cell.backward, cell.weight)
  return tuple(t and layout.signatures[rank, t.chunk] for t in tasks)


def _columns(table: Table, layout: Layout, actions: Sequence[_Action]):
  """The table as int32 arrays [ticks, ranks]."""
  schedule = table.schedule

  def row(rank: int, cell: Cell) -> dict[str, int]:
    forward, backward = cell.forward, cell.backward or cell.weight

    def micro(task):
      return ticks.microbatch(schedule, rank, task) if task else 0

    def stage(task):
      return ticks.stage_of(schedule, rank, task.chunk) if task else -1

    return {
      'action': actions.index(_action(layout, rank, cell)),
      'f_micro': micro(forward),
      'f_chunk': forward.chunk if forward else 0,
      'b_micro': micro(backward),
      'b_chunk': backward.chunk if backward else 0,
      'embeds': stage(forward) == 0,
      'has_loss': stage(forward) == schedule.stages - 1,
      'has_grads': cell.weight is not None,
      'ends': stage(cell.backward) == 0,
      'x': cell.x_slot,
      'g': cell.g_slot,
      'load': cell.load_slot,
      'save': cell.save_slot,
      'cut_save': cell.cut_slot if cell.backward else -1,
      'cut_load': cell.cut_slot if not cell.backward else -1,
      'y_local': cell.y_local,
      'g_local': cell.g_local,
      **{c: cell.arrivals.get(c, -1) for c in table.channels},
    }

  rows = [[row(r, cell) for r, cell in enumerate(t)] for t in table.cells]
  return {
    name: np.array([[cell[name] for cell in t] for t in rows], np.int32)
    for name in rows[0][0]
  }


def _read(buffers: Any, slot: jax.Array) -> Any:
  """The arrays in a slot; of slot -1 the first, which nobody uses."""
  return jax.tree.map(
    lambda b: lax.dynamic_index_in_dim(b, jnp.maximum(slot, 0), 0, False),
    buffers,
  )


def _write(buffers: Any, slot: jax.Array, values: Any) -> Any:
  """Puts arrays into a slot; into slot -1 nothing."""

  def put(buffer, value):
    at = jnp.maximum(slot, 0)
    old = lax.dynamic_index_in_dim(buffer, at, 0, False)
    value = jnp.where(slot >= 0, value.astype(buffer.dtype), old)
    return lax.dynamic_update_index_in_dim(buffer, value, at, 0)

  return jax.tree.map(put, buffers, values)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _empty(shapes: Any, size: int, dtype: Any = None) -> Any:
  """Empty buffers."""
  return jax.tree.map(
    lambda s: jnp.zeros((size, *s.shape), dtype or s.dtype), shapes
  )


class _Rank:
  """One rank's side of a schedule."""

  def __init__(self, program, table, layout, params, state, batch, scalars):
    """Arguments as for `run`."""
    kinds = layout.kinds
    self._program, self._table, self._layout = program, table, layout
    self._params = {k: params[k] for k in kinds}
    self._state = {k: state.get(k, {}) for k in kinds}
    self._outer = {k: v for k, v in params.items() if k not in kinds}
    self._outer_state = {k: v for k, v in state.items() if k not in kinds}
    self._batch, self._scalars = batch, scalars
    micro = self._micro(0)
    self._x = jax.eval_shape(program.embed, self._outer['embed'], micro)
    self._splits = {k: self._split(k, micro) for k in kinds}
    self._prepared = {k: self._prepare(k) for k in kinds}
    self._residuals = self._union('residuals')
    self._cut = self._union('cut')
    self._slots = {k: jnp.asarray(v)[_rank()] for k, v in layout.slots.items()}

  def _micro(self, index):
    return jax.tree.map(
      lambda a: lax.dynamic_index_in_dim(a, index, 0, False), self._batch
    )

  def _split(self, kind, micro):
    one = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype),
      (self._params[kind], self._state[kind]),
    )
    function, aux = self._program.layers[kind], (micro, self._scalars)
    return split_backward.split(function, *one, self._x, aux)

  def _prepare(self, kind):
    """Layer by layer, as one device does: of several XLA divides otherwise.

    A scale of FP8 weights is then a rounding off, and some codes are others.
    """
    trees = self._params[kind], self._state[kind]
    layers = [
      self._splits[kind].prepare(*jax.tree.map(lambda a: a[i], trees))  # noqa: B023
      for i in range(self._layout.sources[kind].shape[1])
    ]
    return jax.tree.map(lambda *values: jnp.stack(values), *layers)

  def _union(self, field):
    return _Union(
      {
        sig: [s for kind in sig for s in getattr(self._splits[kind], field)]
        for sig in sorted(set(self._layout.signatures.values()))
      }
    )

  def run(self):
    """See `run`."""
    table, layout = self._table, self._layout
    cells = [(r, c) for row in table.cells for r, c in enumerate(row)]
    actions = sorted({_action(layout, r, c) for r, c in cells}, key=str)
    columns = {
      name: jnp.asarray(column)[:, _rank()]
      for name, column in _columns(table, layout, actions).items()
    }
    branches = [functools.partial(self._branch, action) for action in actions]
    tick = functools.partial(self._tick, branches)
    carry, _ = lax.scan(tick, self._start(), columns)
    grads = {**carry['dlayers'], **carry['douter']}
    return grads, carry['stats'], carry['report']

  def _start(self):
    table = self._table
    report, *_ = jax.eval_shape(self._head_grad, self._micro(0), self._x)
    return {
      'residuals': _empty(self._residuals.shapes, table.residual_slots),
      'cut': _empty(self._cut.shapes, table.cut_slots),
      'x': _empty(self._x, max(1, table.x_slots)),
      'g': _empty(self._x, max(1, table.g_slots)),
      'dlayers': sharding.slots(self._params),
      'douter': sharding.slots(self._outer),
      'stats': {
        k: _empty(self._splits[k].stats, self._layout.sources[k].shape[1])
        for k in self._layout.kinds
      },
      'report': _zeros(report),
    }

  def _tick(self, branches, carry, at):
    """One pass of the loop: a branch, what belongs to its ends, messages."""
    f_micro, b_micro = self._micro(at['f_micro']), self._micro(at['b_micro'])
    x = lax.cond(
      at['embeds'],
      lambda: self._program.embed(self._outer['embed'], f_micro),
      lambda: _read(carry['x'], at['x']),
    )
    g = _read(carry['g'], at['g'])
    rings = carry['residuals'], carry['cut']
    out = lax.switch(at['action'], branches, at, f_micro, b_micro, x, g, *rings)
    douter, report, dy = self._head(at, f_micro, out['y'], carry)
    return {
      'residuals': _write(rings[0], at['save'], out['residuals']),
      'cut': _write(rings[1], at['cut_save'], out['cut']),
      **self._exchange(carry, at, out, dy),
      'dlayers': _if(
        at['has_grads'],
        lambda total: self._add(total, out['dparams'], at['b_chunk']),
        carry['dlayers'],
      ),
      'douter': self._embed_grad(at, b_micro, out['dx'], douter),
      'stats': self._add(carry['stats'], out['stats'], at['f_chunk']),
      'report': report,
    }, None

  def _exchange(self, carry, at, out, dy):
    """Sends to both neighbours, and puts what arrives into the inboxes."""
    x, g = carry['x'], carry['g']
    for channel in self._table.channels:
      is_y = channel.startswith('y')
      value = out['y'] if is_y else out['dx']
      value = lax.ppermute(value, AXIS, self._table.links(channel))
      if is_y:
        x = _write(x, at[channel], value)
      else:
        g = _write(g, at[channel], value)
    dx = jnp.where(at['has_loss'], dy, out['dx'])
    return {
      'x': _write(x, at['y_local'], out['y']),
      'g': _write(g, at['g_local'], dx),
    }

  # The branches.

  def _branch(self, action, at, f_micro, b_micro, x, g, residuals, cut):
    """The tasks of an action; what they do not give is zero."""
    forward, backward, weight = action
    if forward is not None and backward is not None:
      return self._pair(action, at, f_micro, b_micro, x, g, residuals)
    out = self._nothing()
    if forward is not None:
      out |= _alone(self._forward(forward, at['f_chunk'], x, f_micro))
    if backward is None and weight is None:
      return out
    chunk = at['b_chunk']
    saved = _read(residuals, at['load'])
    if backward is not None:
      args = backward, chunk, g, saved, b_micro
      out |= _alone(self._input_grad(*args))
    else:
      cuts = _read(cut, at['cut_load'])
      out['dparams'] = self._weight_grad(weight, chunk, saved, cuts, b_micro)
    return out

  def _pair(self, action, at, f_micro, b_micro, x, g, residuals):
    """A forward and a backward that hide each other's exchanges.

    Layer by layer: the gradients of a layer's half, of its input and then of
    its weights, and the other micro-batch's forward half (V3 figure 4).
    """
    forward, backward, weight = action
    order, saved = turns.Order(), _read(residuals, at['load'])
    grads = self._input_grad if weight is None else self._gradients
    values = turns.alternate(
      grads(backward, at['b_chunk'], g, saved, b_micro, order),
      self._forward(forward, at['f_chunk'], x, f_micro, order),
    )
    return self._nothing() | values[0] | values[1]

  def _nothing(self):
    layers = {k: self._layout.slots[k].shape[2] for k in self._layout.kinds}
    return {
      'y': _zeros(self._x),
      'dx': _zeros(self._x),
      'residuals': _zeros(self._residuals.shapes),
      'cut': _zeros(self._cut.shapes),
      'dparams': {
        k: _empty(jax.tree.map(lambda a: a[0], self._params[k]), n, jnp.float32)
        for k, n in layers.items()
      },
      'stats': {k: _empty(self._splits[k].stats, n) for k, n in layers.items()},
    }

  def _layers(self, signature: Signature, chunk):
    """For each layer of a stage: kind, number among its kind, variables."""
    seen = collections.Counter()
    for kind in signature:
      i = seen[kind]
      seen[kind] += 1
      is_static = self._table.schedule.chunks == 1
      slot = i if is_static else self._slots[kind][chunk, i]
      trees = self._params[kind], self._state[kind], self._prepared[kind]
      yield (
        kind,
        i,
        (
          jax.tree.map(lambda a: a[i], trees)  # noqa: B023
          if is_static
          else _read(trees, slot)
        ),
      )

  # These stop at exchanges if they are given an order; see `turns.py`.

  def _forward(self, signature, chunk, x, micro, order=None):
    leaves, stats = [], self._nothing()['stats']
    for kind, i, variables in self._layers(signature, chunk):
      (x, _), s, residuals = yield from self._splits[kind].forward.in_turns(
        order, *variables, x, (micro, self._scalars)
      )
      leaves += residuals
      stats[kind] = jax.tree.map(lambda a, v: a.at[i].set(v), stats[kind], s)  # noqa: B023
    saved = self._residuals.pack(signature, leaves)
    return {'y': x, 'residuals': saved, 'stats': stats}

  def _input_grad(self, signature, chunk, g, saved, micro, order=None):
    cuts = []
    for kind, _, arguments in self._backwards(signature, chunk, saved, micro):
      g, values = yield from self._splits[kind].input_grad.in_turns(
        order, *arguments, (g, jnp.ones((), jnp.float32))
      )
      cuts.append(values)
    leaves = [v for values in cuts[::-1] for v in values]
    return {'dx': g, 'cut': self._cut.pack(signature, leaves)}

  def _gradients(self, signature, chunk, g, saved, micro, order):
    grads = self._nothing()['dparams']
    for kind, i, arguments in self._backwards(signature, chunk, saved, micro):
      g, grad = yield from self._splits[kind].backward.in_turns(
        order, *arguments, (g, jnp.ones((), jnp.float32))
      )
      grads[kind] = jax.tree.map(lambda a, v: a.at[i].set(v), grads[kind], grad)  # noqa: B023
    return {'dx': g, 'dparams': grads}

  def _backwards(self, signature, chunk, saved, micro):
    """From the last layer: kind, number, arguments but for the gradient."""
    saved = self._by_layer(signature, 'residuals', saved)
    layers = list(self._layers(signature, chunk))
    for (kind, i, variables), residuals in zip(layers[::-1], saved[::-1]):
      yield kind, i, (*variables, (micro, self._scalars), residuals)

  def _weight_grad(self, signature, chunk, saved, cuts, micro):
    saved = self._by_layer(signature, 'residuals', saved)
    cuts = self._by_layer(signature, 'cut', cuts)
    grads = self._nothing()['dparams']
    layers = self._layers(signature, chunk)
    for (kind, i, variables), residuals, values in zip(layers, saved, cuts):
      split = self._splits[kind]
      grad = split.weight_grad(
        *variables, (micro, self._scalars), residuals, values
      )
      grads[kind] = jax.tree.map(lambda a, v: a.at[i].set(v), grads[kind], grad)  # noqa: B023
    return grads

  def _by_layer(self, signature, field, buffers):
    """A stage's arrays as one list for each layer."""
    union = self._residuals if field == 'residuals' else self._cut
    leaves = iter(union.unpack(signature, buffers))
    counts = [len(getattr(self._splits[kind], field)) for kind in signature]
    return [[next(leaves) for _ in range(n)] for n in counts]

  def _add(self, totals, values, chunk):
    """Adds a stage's values, by kind [layers, ...], to those of the rank."""

    def add(total, value, slots):
      for i in range(value.shape[0]):
        at = jnp.maximum(slots[i], 0)  # Without a layer the value is zero.
        old = lax.dynamic_index_in_dim(total, at, 0, False)
        total = lax.dynamic_update_index_in_dim(total, old + value[i], at, 0)
      return total

    return {
      kind: jax.tree.map(
        functools.partial(add, slots=self._slots[kind][chunk]),
        totals[kind],
        values[kind],
      )
      for kind in totals
    }

  # The two ends of the model.

  def _head_grad(self, micro, y):
    """(report, gradients of the outer parameters, of y)."""

    def loss(slots, y):
      outer = sharding.widen(self._outer, slots)
      return self._program.head(
        outer, self._outer_state, y, micro, self._scalars
      )

    slots = sharding.slots(self._outer)
    grads, report = jax.grad(loss, (0, 1), has_aux=True)(slots, y)
    return report, *grads

  def _head(self, at, micro, y, carry):
    """(gradients of the outer parameters, report, both summed; dy)."""

    def run(carry):
      report, grads, dy = self._head_grad(micro, y)
      douter, total = jax.tree.map(jnp.add, carry[:2], (grads, report))
      return douter, total, dy

    first = carry['douter'], carry['report'], jnp.zeros_like(y)
    return _if(at['has_loss'], run, first)

  def _embed_grad(self, at, micro, dx, douter):
    def add(total):
      table = self._outer['embed']

      def embed(slot):
        return self._program.embed(sharding.widen(table, slot), micro)

      _, vjp = jax.vjp(embed, sharding.slots(table))
      return total + vjp(dx)[0]

    return {**douter, 'embed': _if(at['ends'], add, douter['embed'])}


def _if(flag: jax.Array, update: Callable[[Any], Any], value: Any) -> Any:
  """`update(value)` if `flag`, in place: a conditional would copy `value`."""
  with jax.named_scope(hlo.AT_MOST_ONCE):
    return lax.fori_loop(0, flag, lambda _, v: update(v), value)


def _alone(program: turns.Turn) -> Any:
  return turns.alternate(program)[0]


def _rank():
  return lax.axis_index(AXIS)


def run(
  program: Program,
  table: Table,
  layout: Layout,
  params: Any,
  state: Any,
  batch: Any,
  scalars: Any,
) -> tuple[Any, Any, Any]:
  """One rank's part of the gradients, summed over its micro-batches.

  Args:
    program: the model.
    table: of the schedule.
    layout: of the layers.
    params: this rank's: kind -> stacked layers [slots, ...], and whatever
      `Program.head` takes, 'embed' among it.
    state: likewise.
    batch: arrays [M, ...].
    scalars: see `Program`.

  Returns:
    (float32 gradients like `params`; kind -> statistics [slots, ...]; report).
  """
  return _Rank(program, table, layout, params, state, batch, scalars).run()


@dataclasses.dataclass(frozen=True)
class Specs:
  """Divisions of everything that goes into a pipelined step.

  Attributes:
    stored: of each parameter, as the optimizer has it; see `placement.divide`.
    used: of each parameter, as a layer computes with it, without stages.
    dtypes: in which a layer computes with each parameter.
    batch: of each array of the batch [M, ...].
    batch_axes: all over which sequences are divided.
  """

  stored: Any
  used: Any
  dtypes: Any
  batch: Any
  batch_axes: tuple[str, ...]


def gradients(
  program: Program,
  table: Table,
  layout: Layout,
  mesh: Mesh,
  specs: Specs,
) -> Callable[..., tuple[Any, Any, Any]]:
  """A function of whole arrays, (params, state, batch, scalars).

  The state and the scalars are whole everywhere.  It returns the gradients, in
  the canonical layout and divided as `specs.stored`; the statistics of each
  kind of layer, [L, ...]; and the report.  The last two are summed over all
  micro-batches and shards and whole everywhere.
  """

  trees, whole = (specs.stored, specs.used), PartitionSpec()

  def local(params, state, batch, scalars):
    params = jax.tree.map(lambda x, d: x.astype(d), params, specs.dtypes)
    own = placement.map_by_kind(placement.collect, layout, params, *trees)
    own_state = placement.map_by_kind(
      functools.partial(placement.collect, stored=whole, used=whole),
      layout,
      state,
    )
    grads, stats, report = run(
      program, table, layout, own, own_state, batch, scalars
    )
    give_back = functools.partial(
      placement.give_back, batch_axes=specs.batch_axes
    )
    grads = placement.map_by_kind(give_back, layout, grads, *trees)
    stats = placement.map_by_kind(
      functools.partial(give_back, stored=whole, used=whole), layout, stats
    )
    axes = (AXIS, *specs.batch_axes)
    return grads, stats, jax.tree.map(lambda a: lax.psum(a, axes), report)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs.stored, whole, specs.batch, whole),
    out_specs=(specs.stored, whole, whole),
    check_vma=False,
  )
