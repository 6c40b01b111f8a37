"""Expert parallelism: rows travel to their experts and back (V3 section 3.2.2).

What a token's experts are decides where it goes; nothing is dropped.  `route`
plans the journey once, of one hop or of two: over `node` first, where a token
crosses once to each node that owns one of its experts, to the rank of the same
index, and from there over `expert` inside the node, a row per expert.
`combine` goes the same way back and sums at both ends of each hop, so that a
node's partial sum crosses as one row.  The backward pass of either is the other
on the same plan.

Everything but `routed_ffn` runs inside a manual region (`shard_map`), where
arrays are what one device holds.  Beside the package's letters, W are the ranks
of a hop; C, the rows that a rank sends another in one round.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MoEConfig, ParallelConfig, PrecisionConfig
from deepseek_jax.ops import experts, fp8_recipe
from deepseek_jax.ops.fp8_delayed import Delayed
from deepseek_jax.ops.fp8_recipe import Kept
from deepseek_jax.ops.quantize import Quantized
from deepseek_jax.parallel import rules, sharding, turns

# As `experts.expert_ffn`.
Ffn = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How tokens are exchanged.

  Attributes:
    buffer: room for received rows, as a multiple of their mean number; rows
      beyond it go in further rounds.  0: room for the worst case, one round.
    kept: how tokens are quantised when they are dispatched.  None, and when
      combining: in the dtype they have.
    kept_gradient: likewise, the gradients that go to the experts.
    max_nodes: that a token's experts lie on; 0: as many as it has experts.
    two_hop: over `node`, then over `expert`, where there are several nodes.
  """

  buffer: float = 0.0
  kept: Kept | None = None
  kept_gradient: Kept | None = None
  max_nodes: int = 0
  two_hop: bool = True

  @classmethod
  def of(
    cls, moe: MoEConfig, precision: PrecisionConfig, parallel: ParallelConfig
  ) -> 'Exchange':
    """That of a model's layers, on the ambient mesh."""
    nodes, groups = _axis_size('node'), moe.n_expert_groups
    max_nodes = 0
    if groups % nodes == 0 or nodes % groups == 0:
      # A node owns whole groups, or a group's experts lie on several.
      max_nodes = moe.n_limited_groups * max(1, nodes // groups)
    kept = kept_gradient = None
    if precision.fp8.enabled:
      recipe = fp8_recipe.of(precision.fp8)
      kept, kept_gradient = recipe.dispatch, recipe.dispatch_gradient
    return cls(parallel.expert_buffer, kept, kept_gradient, max_nodes)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('permutation', 'counts_WWe'),
  meta_fields=('axes', 'pair_rows'),
)
@dataclasses.dataclass(frozen=True)
class Hop:
  """Who sends which rows where, over one or more mesh axes.

  Attributes:
    permutation: of this rank's rows and choices [T, K], sorted by target.
    counts_WWe: int32, rows from each rank to each rank's targets.
    axes: names.
    pair_rows: C, static.  A receiver has C places for each sender.
  """

  permutation: experts.Permutation
  counts_WWe: jax.Array
  axes: tuple[str, ...]
  pair_rows: int

  @property
  def ranks(self) -> int:
    """W."""
    return self.counts_WWe.shape[0]

  @property
  def send_rows(self) -> int:
    """Static size of the sorted rows of one round: no more can be sent."""
    items = self.permutation.row_to_flat_R.size
    return min(self.ranks * self.pair_rows, items)

  @property
  def crossing_rows(self) -> jax.Array:
    """int32, that this rank sends to others, in all rounds."""
    rank = lax.axis_index(self.axes)
    rows = self.counts_WWe[rank].sum(-1)
    return rows.sum() - rows[rank]

  @property
  def rounds(self) -> jax.Array:
    """int32, after which this group of ranks has sent all."""
    return -(-self.counts_WWe.sum(-1).max() // self.pair_rows)


Route = tuple[Hop, ...]


def ragged_a2a(
  operand_RD: jax.Array,
  output_RD: jax.Array,
  input_offsets_W: jax.Array,
  send_sizes_W: jax.Array,
  output_offsets_W: jax.Array,
  recv_sizes_W: jax.Array,
  axes: tuple[str, ...],
  pair_rows: int,
) -> jax.Array:
  """`lax.ragged_all_to_all`, or the same of `all_to_all` on a CPU.

  Args:
    operand_RD: rows to send.
    output_RD: what stays where nothing is received.
    input_offsets_W: of the rows for each rank.
    send_sizes_W: how many.
    output_offsets_W: where they go in that rank's output.
    recv_sizes_W: how many come from each rank.
    axes: over which.
    pair_rows: at least every size; only the emulation pads to it.
  """
  sizes = (input_offsets_W, send_sizes_W, output_offsets_W, recv_sizes_W)
  if sharding.on_cpu():
    return _emulated_a2a(operand_RD, output_RD, *sizes, axes, pair_rows)
  return lax.ragged_all_to_all(operand_RD, output_RD, *sizes, axis_name=axes)


def _emulated_a2a(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes,
  axes, pair_rows,
):  # fmt: skip
  """XLA's CPU backend has no ragged exchange: pads each pair's rows."""
  within = jnp.arange(pair_rows)

  def places(offsets, sizes, outside):
    place = offsets[:, None] + within
    return jnp.where(within < sizes[:, None], place, outside)

  index = places(input_offsets, send_sizes, operand.shape[0])
  sent = jnp.take(operand, index, axis=0, mode='fill', fill_value=0)
  received = lax.all_to_all(sent, axes, 0, 0, tiled=True)
  offsets = lax.all_to_all(output_offsets, axes, 0, 0, tiled=True)
  index = places(offsets, recv_sizes, output.shape[0])
  return output.at[index].set(received, mode='drop')


def plan(
  targets_TK: jax.Array,
  per_rank: int,
  axes: tuple[str, ...],
  pair_rows: int,
) -> Hop:
  """Sorts by target and tells all ranks how many rows go where.

  Args:
    targets_TK: int32, rank * per_rank + target within; W * per_rank: nowhere.
    per_rank: targets of a rank.
    axes: over which.
    pair_rows: C.
  """
  W = lax.axis_size(axes)
  permutation = experts.sort_by_expert(targets_TK, W * per_rank)
  counts = lax.all_gather(permutation.group_sizes_E, axes)
  counts = checkpoint_name(counts.reshape(W, W, per_rank), 'routing')
  return Hop(permutation, counts, axes, pair_rows)


def route(
  expert_ids_TK: jax.Array, n_experts: int, exchange: Exchange
) -> Route:
  """Plans the hops of this rank's tokens.

  The worst case of a hop is the static size of its buffers.  Over `node` every
  rank may send all its T rows here: W * T.  In the last hop each of the T'
  rows that a rank then holds may go to all experts of one rank: W * T' *
  min(K, e) rows, unless `exchange.buffer` says less.

  Args:
    expert_ids_TK: int32; `n_experts` is no expert.
    n_experts: E, of all ranks.
    exchange: options.
  """
  *outer, last = _axes_of_hops(exchange)
  (T, K), ids, hops = expert_ids_TK.shape, expert_ids_TK, []
  for axes in outer:
    W = lax.axis_size(axes)
    own = n_experts // W
    copies = min(W, K, exchange.max_nodes or K)
    targets = _distinct(ids // own, W, copies)
    hop = plan(targets, 1, axes, pair_rows=ids.shape[0])
    ids = push(ids, hop, 0) - lax.axis_index(axes) * own
    elsewhere = (ids < 0) | (ids >= own) | (received_ids(hop, 0) > 0)
    ids, n_experts = jnp.where(elsewhere, own, ids), own
    hops.append(hop)
  W = lax.axis_size(last)
  worst = ids.shape[0] * min(K, n_experts // W)
  room = worst
  if exchange.buffer:
    # At least for one token's choices.
    room = min(worst, max(math.ceil(exchange.buffer * T * K / W), K))
  hops.append(plan(ids, n_experts // W, last, pair_rows=room))
  return tuple(hops)


def _axes_of_hops(exchange: Exchange) -> tuple[tuple[str, ...], ...]:
  if exchange.two_hop and _axis_size('node') > 1:
    return ('node',), ('expert',)
  return (rules.EXPERTS,)


def _axis_size(axis: str) -> int:
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _distinct(nodes_TK: jax.Array, n_nodes: int, copies: int) -> jax.Array:
  """The first `copies` different nodes of each row; n_nodes fills it up."""
  nodes = jnp.arange(n_nodes, dtype=nodes_TK.dtype)
  is_chosen = (nodes_TK[..., None] == nodes).any(-2)
  return jnp.sort(jnp.where(is_chosen, nodes, n_nodes), axis=-1)[:, :copies]


def _traffic(hop: Hop, index: Any) -> tuple[jax.Array, jax.Array]:
  """Rows [W, W] of a round, and where they start among the sender's."""
  totals = hop.counts_WWe.sum(-1)
  sizes = jnp.clip(totals - index * hop.pair_rows, 0, hop.pair_rows)
  return sizes, jnp.cumsum(sizes, 1) - sizes


def _starts(hop: Hop) -> jax.Array:
  """Where this rank's sorted rows for each rank start, and where all end."""
  totals = hop.counts_WWe[lax.axis_index(hop.axes)].sum(-1)
  return jnp.pad(jnp.cumsum(totals), (1, 0))


def _sent_items(hop: Hop, index: Any) -> jax.Array:
  """The flat (row, choice) of each row of a round, arbitrary at its end."""
  _, offsets = _traffic(hop, index)
  offsets = offsets[lax.axis_index(hop.axes)]
  place = jnp.arange(hop.send_rows)
  target = (place[:, None] >= offsets[1:]).sum(-1)
  within = place - offsets[target] + index * hop.pair_rows
  order = hop.permutation.row_to_flat_R
  return order.at[_starts(hop)[target] + within].get(mode='clip')


def _places(hop: Hop, index: Any) -> jax.Array:
  """Where each (row, choice) lies in a round; `send_rows` if it is not sent."""
  _, offsets = _traffic(hop, index)
  starts, row = _starts(hop), hop.permutation.flat_to_row_TK
  target = (row[..., None] >= starts[1:]).sum(-1)
  inside = jnp.minimum(target, hop.ranks - 1)
  within = row - starts[inside] - index * hop.pair_rows
  is_sent = (target < hop.ranks) & (within >= 0) & (within < hop.pair_rows)
  place = offsets[lax.axis_index(hop.axes)][inside] + within
  return jnp.where(is_sent, place, hop.send_rows)


def received_ids(hop: Hop, index: Any) -> jax.Array:
  """The target, of this rank's, of each received row: int32 [R, 1].

  `per_rank`, which is none of them, where no row came.
  """
  counts_We = hop.counts_WWe[:, lax.axis_index(hop.axes)]
  row = index * hop.pair_rows + jnp.arange(hop.pair_rows)
  ends = jnp.cumsum(counts_We, -1)[:, None]
  return (row[:, None] >= ends).sum(-1, dtype=jnp.int32).reshape(-1, 1)


def _send(x: jax.Array, items_R: jax.Array, hop: Hop, index: Any) -> jax.Array:
  """Rows `items_R` of `x` to their targets: [W * C, ...], zeros if empty."""
  rank, W, C = lax.axis_index(hop.axes), hop.ranks, hop.pair_rows
  sizes, offsets = _traffic(hop, index)
  return ragged_a2a(
    x[items_R],
    jnp.zeros((W * C, *x.shape[1:]), x.dtype),
    offsets[rank],
    sizes[rank],
    jnp.full((W,), rank * C, jnp.int32),
    sizes[:, rank],
    hop.axes,
    C,
  )


def push(x: Any, hop: Hop, index: Any) -> Any:
  """Rows [T, ...] to all their targets: [W * C, ...], of a tree of arrays."""
  K = hop.permutation.flat_to_row_TK.shape[1]
  items = _sent_items(hop, index)
  return jax.tree.map(lambda v: _send(v, items // K, hop, index), x)


def push_choices(x_TK: jax.Array, hop: Hop, index: Any) -> jax.Array:
  """One number of each row and choice to its target: [W * C, 1]."""
  return _send(x_TK.reshape(-1, 1), _sent_items(hop, index), hop, index)


def pull_choices(rows_RD: jax.Array, hop: Hop, index: Any) -> list[jax.Array]:
  """What comes back for each of the K choices: [T, D] each; 0 if not sent."""
  rank, W, C = lax.axis_index(hop.axes), hop.ranks, hop.pair_rows
  sizes, offsets = _traffic(hop, index)
  back = ragged_a2a(
    rows_RD,
    jnp.zeros((hop.send_rows, *rows_RD.shape[1:]), rows_RD.dtype),
    jnp.arange(W, dtype=jnp.int32) * C,
    sizes[:, rank],
    offsets[:, rank],
    sizes[rank],
    hop.axes,
    C,
  )
  places = _places(hop, index)
  return [
    jnp.take(back, places[:, k], axis=0, mode='fill', fill_value=0)
    for k in range(places.shape[1])
  ]


def pull(rows_RD: jax.Array, hop: Hop, index: Any) -> jax.Array:
  """The transpose of `push`: sums what comes back in float32, [T, D]."""
  choices = pull_choices(rows_RD, hop, index)
  total = sum(c.astype(jnp.float32) for c in choices)
  return total.astype(rows_RD.dtype)


def _out(x_TD: jax.Array, hops: Route, index: Any, kept: Any) -> jax.Array:
  """Rows to their experts, quantised once for all hops."""
  x = x_TD
  if kept:
    x = kept.message(x)
  with jax.named_scope(turns.SCOPE):
    for hop in hops[:-1]:
      x = push(x, hop, 0)
    x = push(x, hops[-1], index)
  x = jax.tree.map(lambda v: checkpoint_name(v, 'dispatched'), x)
  return x.dequantize(x_TD.dtype) if kept else x


@jax.named_scope(turns.SCOPE)
def _back(rows_RD: jax.Array, hops: Route, index: Any) -> jax.Array:
  x = pull(rows_RD, hops[-1], index)
  for hop in reversed(hops[:-1]):
    x = pull(x, hop, 0)
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def dispatch(
  x_TD: jax.Array,
  weights_TK: jax.Array,
  hops: Route,
  index: Any,
  kept: Kept | None,
) -> tuple[jax.Array, jax.Array]:
  """Tokens and gate weights to the experts: ([R, D], float32 [R, 1]).

  Rows where nothing came are zero.

  Args:
    x_TD: tokens of this rank.
    weights_TK: float32 gate weights.
    hops: of `route`.
    index: int32, the round of the last hop.
    kept: see `Exchange`.
  """
  return _dispatch(x_TD, weights_TK, hops, index, kept)


def _dispatch(x_TD, weights_TK, hops, index, kept):
  gates = weights_TK
  with jax.named_scope(turns.SCOPE):
    for hop in hops[:-1]:
      gates = push(gates, hop, 0)
    gates = push_choices(gates, hops[-1], index)
  gates = checkpoint_name(gates, 'dispatched')
  return _out(x_TD, hops, index, kept), gates


def _dispatch_fwd(x_TD, weights_TK, hops, index, kept):
  # Not `dispatch`: recomputation policies see no names within a custom_vjp.
  return _dispatch(x_TD, weights_TK, hops, index, kept), (hops, index)


def _dispatch_bwd(kept, residuals, cotangents):
  hops, index = residuals
  dx_RD, dgates_R1 = cotangents
  with jax.named_scope(turns.SCOPE):
    columns = pull_choices(dgates_R1, hops[-1], index)
    dweights_TK = jnp.concatenate(columns, -1)
    for hop in reversed(hops[:-1]):
      dweights_TK = pull(dweights_TK, hop, 0)
  return _back(dx_RD, hops, index), dweights_TK, None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(
  rows_RD: jax.Array, hops: Route, index: Any, kept: Kept | None
) -> jax.Array:
  """Sums each token's rows on the way back: [T, D]; the others as `dispatch`.

  `kept` is for the backward pass, which dispatches the gradient.
  """
  return _back(rows_RD, hops, index)


def _combine_fwd(rows_RD, hops, index, kept):
  return _back(rows_RD, hops, index), (hops, index)


def _combine_bwd(kept, residuals, dy_TD):
  hops, index = residuals
  return _out(dy_TD, hops, index, kept), None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def _one_round(weights, x_TD, gates_TK, hops, index, ffn, exchange):
  """Dispatch, experts, combine; `weights` are w1, w2 and w3."""
  rows, gates = dispatch(x_TD, gates_TK, hops, index, exchange.kept)
  y = ffn(rows, *weights, received_ids(hops[-1], index), gates)
  return combine(y, hops, index, exchange.kept_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _further_rounds(weights, x_TD, gates_TK, hops, ffn, exchange, dtype):
  """The sum of all rounds but the first.

  How many there are is decided at run time, the same on all ranks of the hops;
  as a rule none.  The backward pass dispatches and computes them again.

  Float32 weights, whose `dtype` that is, are those of the compute dtype made
  wide (`sharding.collect`).  The loops hold them narrow: what a loop holds is
  there even if it does nothing.
  """
  weights = _cast(weights, x_TD.dtype)

  def body(index, y):
    wide = _cast(weights, dtype)
    return y + _one_round(wide, x_TD, gates_TK, hops, index, ffn, exchange)

  return lax.fori_loop(1, _agreed_rounds(hops), body, jnp.zeros_like(x_TD))


def _cast(weights, dtype):
  """Codes are left as they are."""

  def one(w):
    if isinstance(w, Quantized):
      return w
    if isinstance(w, Delayed):
      return dataclasses.replace(w, w=w.w.astype(dtype))
    return w.astype(dtype)

  return tuple(map(one, weights))


def _agreed_rounds(hops):
  every = sum((hop.axes for hop in hops), ())
  return lax.pmax(hops[-1].rounds, every)


def _further_rounds_fwd(weights, x_TD, gates_TK, hops, ffn, exchange, dtype):
  y = _further_rounds(weights, x_TD, gates_TK, hops, ffn, exchange, dtype)
  return y, (_cast(weights, x_TD.dtype), x_TD, gates_TK, hops)


def _further_rounds_bwd(ffn, exchange, dtype, residuals, dy_TD):
  weights, x_TD, gates_TK, hops = residuals

  def gradients(run, primals):
    def body(index, total):
      _, vjp = jax.vjp(functools.partial(run, index), *primals())
      return jax.tree.map(jnp.add, total, vjp(dy_TD))

    shapes = jax.eval_shape(primals)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.fori_loop(1, _agreed_rounds(hops), body, zeros)

  def run(index, weights, x_TD, gates_TK):
    return _one_round(weights, x_TD, gates_TK, hops, index, ffn, exchange)

  def wide():
    return _cast(weights, dtype)

  # Two loops: a pipeline computes the gradients of weights later, and those
  # that came with others' it would keep, large as they are, in between.
  (dweights,) = gradients(
    lambda i, w: run(i, w, x_TD, gates_TK), lambda: (wide(),)
  )
  inputs = gradients(
    lambda i, *xs: run(i, wide(), *xs), lambda: (x_TD, gates_TK)
  )
  return dweights, *inputs, None


_further_rounds.defvjp(_further_rounds_fwd, _further_rounds_bwd)


def expert_parallel_ffn(
  x_TD: jax.Array,
  w1_eDF: jax.Array,
  w2_eFD: jax.Array,
  w3_eDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  ffn: Ffn = experts.expert_ffn,
  exchange: Exchange = Exchange(),
) -> jax.Array:
  """`ffn` with experts spread over the `node` and `expert` axes: [T, D].

  To be called in a region that is manual over these axes.  Rank r of them holds
  experts r * e to (r + 1) * e.  `ffn` sees received rows as tokens of one
  expert each, with ids of this rank; id e, which is no expert, marks an empty
  row.

  Args:
    x_TD: this rank's tokens.
    w1_eDF: this rank's experts.
    w2_eFD: likewise.
    w3_eDF: likewise.
    expert_ids_TK: int32, of all experts; E is none.
    weights_TK: float32 gate weights.
    ffn: with the signature of `experts.expert_ffn`.
    exchange: options.
  """
  weights = (w1_eDF, w2_eFD, w3_eDF)
  W = math.prod(_axis_size(a) for a in rules.EXPERTS)
  if W == 1:
    return ffn(x_TD, *weights, expert_ids_TK, weights_TK)
  own = w1_eDF.shape[0]
  hops = route(expert_ids_TK, W * own, exchange)
  y = _one_round(weights, x_TD, weights_TK, hops, 0, ffn, exchange)
  most = hops[-1].permutation.flat_to_row_TK.shape[0] * min(
    expert_ids_TK.shape[1], own
  )
  if hops[-1].pair_rows < most:
    dtype = jax.tree.leaves(w1_eDF)[0].dtype  # Of codes: not used.
    y += _further_rounds(weights, x_TD, weights_TK, hops, ffn, exchange, dtype)
  return y


def routed_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array,
  w2_EFD: jax.Array,
  w3_EDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  ffn: Ffn = experts.expert_ffn,
  exchange: Exchange = Exchange(),
) -> jax.Array:
  """`ffn` on the ambient mesh: [T, D], tokens split over its batch axes.

  Without a mesh, `ffn` itself.  Within a region that is manual already (a
  pipeline's stage) over some axes, arrays are local in those.

  Args:
    x_TD: as the others, see `expert_parallel_ffn`.
    w1_EDF: split over `node` and `expert`, as the other two.
    w2_EFD: down projections.
    w3_EDF: up projections.
    expert_ids_TK: int32.
    weights_TK: float32.
    ffn: with the signature of `experts.expert_ffn`.
    exchange: options.
  """
  run = functools.partial(expert_parallel_ffn, ffn=ffn, exchange=exchange)
  manual = jax.sharding.get_abstract_mesh().manual_axes
  auto = tuple(
    a
    for a in rules.BATCH
    if a not in manual and (_axis_size(a) > 1 or a in rules.EXPERTS)
  )
  shards = math.prod(map(_axis_size, auto))
  if shards == 1:
    return run(x_TD, w1_EDF, w2_EFD, w3_EDF, expert_ids_TK, weights_TK)
  already = math.prod(_axis_size(a) for a in rules.EXPERTS if a in manual)
  T, E = x_TD.shape[0], w1_EDF.shape[0] * already
  missing = -T % shards
  rows = [
    jnp.pad(v, ((0, missing), (0, 0)), constant_values=fill)
    for v, fill in ((x_TD, 0), (expert_ids_TK, E), (weights_TK, 0))
  ]
  over_rows = P(auto)
  over_experts = P(tuple(a for a in auto if a in rules.EXPERTS))
  y = jax.shard_map(
    run,
    in_specs=(over_rows, *[over_experts] * 3, over_rows, over_rows),
    out_specs=over_rows,
    axis_names=set(auto),
    check_vma=False,
  )(rows[0], w1_EDF, w2_EFD, w3_EDF, *rows[1:])
  return y[:T]
